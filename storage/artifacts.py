"""Artifacts: what a stage made, trusted only through its manifest.

Under ``STORE/<domain>/<stage>/``::

    data/<name>.<digest>.<ext>      the bytes, named by content
    parts/<part fingerprint>.json   one finished unit of work: its files with size and sha256
    <fingerprint>/manifest.json     the artifact: all its parts; written last

A part has a fingerprint of its own, over only what that part was made from. So a run that died takes up its finished
parts, and a run over a folder that grew takes up the parts of the old shards: resume and increment are one mechanism.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from latteflow.storage.errors import Damaged, NotFound, StorageError
from latteflow.storage.fingerprint import canonical_json, fingerprint, sha256, sha256_file
from latteflow.storage.objects import ObjectStore

FORMAT = 1
_SEAL = "sha256"
log = logging.getLogger("latteflow.storage")


@dataclass(frozen=True)
class File:
    """One stored file of an artifact."""

    name: str
    """Name inside the artifact, for example ``shard-00000.tar``."""
    object: str
    """Name below ``data/``: the same with a part of the digest."""
    sha256: str
    bytes: int
    rows: int
    """Rows, images or records in the file; 0 where that means nothing."""


@dataclass(frozen=True)
class Part:
    """A finished unit of work: its fingerprint, its files, and counts such as ``{"images": 512}``."""

    name: str
    fingerprint: str
    files: tuple[File, ...]
    counts: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Part:
        """The part that a record stands for.

        Raises:
            KeyError, TypeError: it is no record of a part.
        """
        files = tuple(File(**file) for file in record["files"])
        return cls(record["name"], record["fingerprint"], files, record["counts"])


@dataclass(frozen=True)
class ArtifactRef:
    """Small reference that stages pass to each other.

    Attributes:
        digest: sha256 over the artifact's file names and digests; equal content has an equal digest, so a stage
            that ran again without changing anything leaves everything after it cached.
    """

    domain: str
    stage: str
    fingerprint: str
    digest: str


class Artifact:
    """A complete artifact. Every read is checked against the manifest's digest."""

    def __init__(self, store: ArtifactStore, manifest: Mapping[str, Any]) -> None:
        self._store = store
        self.manifest = manifest
        self.domain: str = manifest["domain"]
        self.stage: str = manifest["stage"]
        self.fingerprint: str = manifest["fingerprint"]
        self.inputs: Mapping[str, Any] = manifest["inputs"]
        self.counts: Mapping[str, int] = manifest["counts"]
        self.parts = tuple(Part.of(record) for record in manifest["parts"])
        self.files = {file.name: (part, file) for part in self.parts for file in part.files}
        self.ref = ArtifactRef(self.domain, self.stage, self.fingerprint, content_digest(self.parts))
        self._base = f"{self.domain}/{self.stage}"

    def read(self, name: str) -> bytes:
        """The whole file.

        Raises:
            NotFound: the artifact has no such file.
            Damaged: its bytes are not those of the manifest.
        """
        return self._store.read_checked(self._base, *self._find(name))

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """The bytes ``[start, end)`` of a file, unchecked: for callers who know the digest of that stretch."""
        return self._store.objects.read(f"{self._base}/data/{self._find(name)[1].object}", start, end)

    def fetch(self, name: str, folder: Path) -> Path:
        """The file as a local path, checked; ``folder`` receives a copy if the store is remote.

        Raises:
            NotFound: the artifact has no such file.
            Damaged: its bytes are not those of the manifest.
        """
        return self._store.fetch_checked(self._base, *self._find(name), folder)

    def address(self, name: str) -> str:
        """Full URL of the file, for other readers (webdataset, DuckDB, polars)."""
        return self._store.objects.address(f"{self._base}/data/{self._find(name)[1].object}")

    def names(self, suffix: str) -> list[str]:
        """Sorted names of the files that end so."""
        return sorted(name for name in self.files if name.endswith(suffix))

    def _find(self, name: str) -> tuple[Part, File]:
        if name not in self.files:
            raise NotFound(f"{self._base}/{self.fingerprint[:12]} has no file {name!r}")
        return self.files[name]


class ArtifactWriter:
    """Collects the parts of one artifact; nothing is visible as an artifact before :meth:`finish`."""

    def __init__(self, store: ArtifactStore, domain: str, stage: str, version: int, inputs: Mapping[str, Any]) -> None:
        self._store, self._domain, self._stage, self._version, self._inputs = store, domain, stage, version, inputs
        self._base = f"{domain}/{stage}"
        self._parts: dict[str, Part] = {}
        self._sizes = store.objects.sizes(f"{self._base}/data")
        self.reused = 0
        """Parts taken from earlier work."""

    def find(self, name: str, inputs: Mapping[str, Any]) -> Part | None:
        """The part made earlier from the same inputs, if all its files are there at their size."""
        key = f"{self._base}/parts/{self.part_fingerprint(name, inputs)}.json"
        part = self._read_part(key)
        if part is None:
            return None
        if not self._store.complete(self._base, part.files, self._sizes):
            log.warning("%s part %s: a file is missing or cut short; making the part again", self._stage, name)
            self._store.objects.delete(key)
            return None
        self.reused += 1
        self._parts[name] = part
        return part

    def adopt(self, part: Part) -> None:
        """Take over a part of another artifact of the same stage, as it is."""
        self.reused += 1
        self._parts[part.name] = part

    def read(self, part: Part, name: str) -> bytes:
        """A file of a part that was found.

        Raises:
            Damaged: its bytes are not those of the record; the part will be made again.
        """
        file = next(file for file in part.files if file.name == name)
        return self._store.read_checked(self._base, part, file)

    def part_fingerprint(self, name: str, inputs: Mapping[str, Any]) -> str:
        """Digest over what a part is made from, which names its record."""
        return fingerprint(self._stage, self._version, {"part": name, **inputs})

    def put(
        self,
        name: str,
        inputs: Mapping[str, Any],
        files: Mapping[str, bytes | Path],
        *,
        rows: int = 0,
        counts: Mapping[str, int] | None = None,
    ) -> Part:
        """Store a part: its files first, then the record that makes them count.

        Args:
            name: name of the part, unique in the artifact.
            inputs: what this part was made from (the stage and its version are added).
            files: file name to bytes or local path.
            rows: rows, images or records in each file.
            counts: numbers to be summed into the artifact's counts.
        """
        stored = tuple(self._store_file(file, data, rows) for file, data in files.items())
        part = Part(name, self.part_fingerprint(name, inputs), stored, dict(counts or {}))
        key = f"{self._base}/parts/{part.fingerprint}.json"
        # If another worker finished the same part first, its files count, so that all readers see one set.
        part = Part.of(self._store.commit(key, asdict(part)))
        self._parts[name] = part
        return part

    def finish(self, counts: Mapping[str, int] | None = None, versions: Mapping[str, str] | None = None) -> Artifact:
        """Write the manifest, the artifact's commit point, and return the artifact as readers see it.

        Args:
            counts: numbers beside those of the parts, which are summed by name.
            versions: libraries the result was made with, by name.
        """
        parts = [self._parts[name] for name in sorted(self._parts)]
        total: dict[str, int] = {}
        for each in [*(part.counts for part in parts), counts or {}]:
            for name, number in each.items():
                total[name] = total.get(name, 0) + int(number)
        manifest = {
            "format": FORMAT,
            "domain": self._domain,
            "stage": self._stage,
            "version": self._version,
            "inputs": dict(self._inputs),
            "fingerprint": fingerprint(self._stage, self._version, self._inputs),
            "parts": [asdict(part) for part in parts],
            "counts": total,
            "versions": dict(versions or {}),
        }
        key = f"{self._base}/{manifest['fingerprint']}/manifest.json"
        return Artifact(self._store, self._commit(key, manifest))

    def _commit(self, key: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
        return self._store.commit(key, manifest)

    def _read_part(self, key: str) -> Part | None:
        try:
            return Part.of(self._store.read_record(key))
        except NotFound:
            return None
        except (KeyError, TypeError) as error:
            raise StorageError(
                f"{self._store.objects.address(key)} is not a part record ({error}); delete it"
            ) from error

    def _store_file(self, name: str, data: bytes | Path, rows: int) -> File:
        digest = sha256(data) if isinstance(data, bytes) else sha256_file(data)
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        stem, dot, extension = name.partition(".")
        file = File(name, f"{stem}.{digest[:16]}{dot}{extension}", digest, size, rows)
        key = f"{self._base}/data/{file.object}"
        if self._sizes.get(key, size) != size and self._store.objects.size(key) != size:
            self._store.objects.delete(key)  # cut short by a file system that lost its tail
        self._store.objects.put_if_absent(key, data)
        self._sizes[key] = size
        return file


class ArtifactStore:
    """All artifacts below one URL. See :class:`~storage.objects.ObjectStore` for the URL."""

    def __init__(self, objects: ObjectStore) -> None:
        self.objects = objects

    def find(self, domain: str, stage: str, version: int, inputs: Mapping[str, Any]) -> Artifact | None:
        """The artifact made from exactly these inputs, or None if there is none or a file of it is gone."""
        return self.load(domain, stage, fingerprint(stage, version, inputs))

    def load(self, domain: str, stage: str, digest: str, sizes: Mapping[str, int] | None = None) -> Artifact | None:
        """The artifact with this fingerprint; None if its manifest or one of its files (by size) is missing.

        Args:
            sizes: an earlier listing of the stage's data, see :meth:`complete`.
        """
        base = f"{domain}/{stage}"
        key = f"{base}/{digest}/manifest.json"
        artifact = self._read_manifest(key)
        if artifact is None:
            return None
        if sizes is None:
            sizes = self.objects.sizes(f"{base}/data")
        if self.complete(base, (file for _, file in artifact.files.values()), sizes):
            return artifact
        log.warning("%s: a file is missing or cut short; the stage runs again", self.objects.address(key))
        self.objects.delete(key)
        return None

    def _read_manifest(self, key: str) -> Artifact | None:
        try:
            return self.read_artifact(key)
        except NotFound:
            return None
        except (KeyError, TypeError) as error:
            raise StorageError(f"{self.objects.address(key)} is not a manifest ({error}); delete it") from error

    def read_artifact(self, key: str) -> Artifact:
        """The artifact of the manifest under a key, whether its files are there or not.

        Raises:
            NotFound: there is no such manifest.
            Damaged: it is not what was written; it was set aside.
            StorageError: it was written by a newer version.
            KeyError, TypeError: it is no manifest.
        """
        manifest = self.read_record(key)
        if manifest["format"] > FORMAT:
            raise StorageError(
                f"{self.objects.address(key)} has format {manifest['format']} of a newer latteflow, this one reads "
                f"{FORMAT}: upgrade to read it"
            )
        return Artifact(self, manifest)

    def open(self, ref: ArtifactRef, *, listed: bool = True) -> Artifact:
        """The artifact behind a reference.

        Args:
            listed: False: its files are not looked for; who reads some of very many finds out about those.

        Raises:
            NotFound: it is gone, or another run made it anew with other content.
        """
        if listed:
            artifact = self.load(ref.domain, ref.stage, ref.fingerprint)
        else:
            artifact = self._read_manifest(f"{ref.domain}/{ref.stage}/{ref.fingerprint}/manifest.json")
        name = f"artifact {ref.domain}/{ref.stage}/{ref.fingerprint[:12]}"
        if artifact is None:
            raise NotFound(f"{name} is gone; run the pipeline again")
        if artifact.ref != ref:
            raise NotFound(f"{name} was made anew meanwhile, with other content; run the pipeline again")
        return artifact

    def all(self, domain: str, stage: str) -> list[Artifact]:
        """Every complete artifact of a stage, sorted by fingerprint."""
        sizes = self.objects.sizes(f"{domain}/{stage}/data")
        names = self.objects.names(f"{domain}/{stage}")
        found = (self.load(domain, stage, name, sizes) for name in names if len(name) == 64)
        return [artifact for artifact in found if artifact is not None]

    def writer(self, domain: str, stage: str, version: int, inputs: Mapping[str, Any]) -> ArtifactWriter:
        return ArtifactWriter(self, domain, stage, version, inputs)

    def commit(self, key: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write a record, with a digest of itself, unless there is one; returns the one that counts."""
        plain = json.loads(canonical_json(record))
        while not self.objects.put_if_absent(key, _sealed(plain)):
            with contextlib.suppress(NotFound):  # set aside by another worker just now
                return self.read_record(key)
        return dict(plain)

    def replace(self, key: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """As :meth:`commit`, in the place of the record that is there."""
        plain = json.loads(canonical_json(record))
        self.objects.put(key, _sealed(plain))
        return dict(plain)

    def read_record(self, key: str) -> dict[str, Any]:
        """The record under a key, checked against the digest it carries.

        Raises:
            NotFound: there is no such record.
            Damaged: it is not what was written; it was set aside.
        """
        record: dict[str, Any] = {}

        def good(data: bytes) -> bool:
            with contextlib.suppress(ValueError):
                record.update(_unsealed(data))
            return bool(record)

        data, whole = self.objects.read_sure(key, good)
        if whole:
            return record
        base = key.rsplit("/", 2)[0]
        self.objects.put(f"{base}/damaged/{sha256(data)[:16]}.json", data)
        self.objects.delete(key)
        raise Damaged(
            f"{self.objects.address(key)} is no record, or not as it was written; moved to {base}/damaged/, and what "
            "it stood for will be looked for and made again"
        )

    def complete(self, base: str, files: Iterable[File], sizes: Mapping[str, int]) -> bool:
        """Whether all files are there at their size.

        Args:
            sizes: an earlier listing of the data; a file it lacks is looked for, as another worker may have just
                written it.
        """
        keys = {f"{base}/data/{file.object}": file.bytes for file in files}
        return all(sizes.get(key) == size or self.objects.size(key) == size for key, size in keys.items())

    def read_checked(self, base: str, part: Part, file: File) -> bytes:
        """The bytes of a stored file if they are those of its record.

        Raises:
            Damaged: they are not, and were set aside; or they are gone.
        """
        with _gone_is_damaged():
            data, good = self.objects.read_sure(
                f"{base}/data/{file.object}", lambda data: len(data) == file.bytes and sha256(data) == file.sha256
            )
        if not good:
            raise self.set_aside(base, part, file, data)
        return data

    def fetch_checked(self, base: str, part: Part, file: File, folder: Path) -> Path:
        """As :meth:`read_checked`, as a local file (see :meth:`ObjectStore.fetch`)."""
        with _gone_is_damaged():
            path, good = self.objects.fetch_sure(
                f"{base}/data/{file.object}",
                folder,
                lambda path: path.stat().st_size == file.bytes and sha256_file(path) == file.sha256,
            )
        if not good:
            raise self.set_aside(base, part, file, path.read_bytes())
        return path

    def set_aside(self, base: str, part: Part, file: File, data: bytes) -> Damaged:
        """Take damaged bytes out of the way, so that the part is made again; the returned error says so.

        Every manifest that names the file stops being trusted with its disappearance (see :meth:`load`).
        """
        self.objects.delete(f"{base}/parts/{part.fingerprint}.json")
        self.objects.put(f"{base}/damaged/{file.object}", data)
        self.objects.delete(f"{base}/data/{file.object}")
        return Damaged(
            f"{self.objects.address(f'{base}/data/{file.object}')}: expected {file.bytes} bytes with sha256 "
            f"{file.sha256[:12]}, found {len(data)} bytes with {sha256(data)[:12]}; moved to {base}/damaged/, "
            "and the part will be made again"
        )


def _sealed(record: Mapping[str, Any]) -> bytes:
    """A record as it is stored: with a digest of itself."""
    return canonical_json({**record, _SEAL: sha256(canonical_json(dict(record)))})


def _unsealed(data: bytes) -> dict[str, Any]:
    """A record without its digest; raises ValueError if that is not its digest."""
    record = json.loads(data)
    if not isinstance(record, dict):
        raise ValueError("not a record")
    digest = record.pop(_SEAL, None)
    # As a rule the bytes without the digest are those it is of; to write out a large record anew takes long.
    plain = data.replace(f',"{_SEAL}":"{digest}"'.encode(), b"", 1)
    if digest is not None and digest != sha256(plain) and digest != sha256(canonical_json(record)):
        raise ValueError("not a record")
    return record


@contextlib.contextmanager
def _gone_is_damaged() -> Iterator[None]:
    # For example set aside by another worker: the remedy is the same.
    try:
        yield
    except NotFound as error:
        raise Damaged(f"{error}, though a record names it; its part will be made again") from error


def content_digest(parts: tuple[Part, ...]) -> str:
    """sha256 over names and digests of all files, in order of name."""
    files = sorted((file.name, file.sha256) for part in parts for file in part.files)
    return sha256(canonical_json(files))
