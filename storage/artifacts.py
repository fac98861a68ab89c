"""Artifacts: what a stage made, trusted only through its manifest.

Under ``STORE/<domain>/<stage>/``::

    data/<name>.<digest>.<ext>      the bytes, named by content
    parts/<part fingerprint>.json   one finished unit of work: its files with size and sha256
    <fingerprint>/manifest.json     the artifact: all its parts; written last

A part has a fingerprint of its own, over only what that part was made from. So a run that died takes up its finished
parts, and a run over a folder that grew takes up the parts of the old shards: resume and increment are one mechanism.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from storage.errors import Damaged, NotFound, StorageError
from storage.fingerprint import canonical_json, fingerprint, sha256, sha256_file
from storage.objects import ObjectStore

FORMAT = 1
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
        self.parts = tuple(_part(record) for record in manifest["parts"])
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

    def fetch(self, name: str, folder: Path) -> Path:
        """The file as a local path, checked; ``folder`` receives a copy if the store is remote.

        Raises:
            NotFound: the artifact has no such file.
            Damaged: its bytes are not those of the manifest.
        """
        part, file = self._find(name)
        path = self._store.objects.fetch(f"{self._base}/data/{file.object}", folder)
        if path.stat().st_size != file.bytes or sha256_file(path) != file.sha256:
            raise self._store.set_aside(self._base, part, file, path.read_bytes())
        return path

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
        key = f"{self._base}/parts/{self._part_fingerprint(name, inputs)}.json"
        try:
            part = _part(json.loads(self._store.objects.read(key)))
        except NotFound:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{self._store.objects.address(key)} is not a part record ({error}); delete it"
            ) from error
        if any(self._sizes.get(f"{self._base}/data/{file.object}") != file.bytes for file in part.files):
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
        part = Part(name, self._part_fingerprint(name, inputs), stored, dict(counts or {}))
        key = f"{self._base}/parts/{part.fingerprint}.json"
        if not self._store.objects.put_if_absent(key, canonical_json(asdict(part))):
            # Another worker finished the same part first: its files count, so that all readers see one set.
            part = _part(json.loads(self._store.objects.read(key)))
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
        if not self._store.objects.put_if_absent(key, canonical_json(manifest)):
            manifest = json.loads(self._store.objects.read(key))
        return Artifact(self._store, manifest)

    def _part_fingerprint(self, name: str, inputs: Mapping[str, Any]) -> str:
        return fingerprint(self._stage, self._version, {"part": name, **inputs})

    def _store_file(self, name: str, data: bytes | Path, rows: int) -> File:
        digest = sha256(data) if isinstance(data, bytes) else sha256_file(data)
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        stem, dot, extension = name.partition(".")
        file = File(name, f"{stem}.{digest[:16]}{dot}{extension}", digest, size, rows)
        key = f"{self._base}/data/{file.object}"
        if self._sizes.get(key, size) != size:
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

    def load(self, domain: str, stage: str, digest: str) -> Artifact | None:
        """The artifact with this fingerprint; None if its manifest or one of its files (by size) is missing."""
        key = f"{domain}/{stage}/{digest}/manifest.json"
        try:
            manifest = json.loads(self.objects.read(key))
            if manifest["format"] > FORMAT:
                raise StorageError(f"{self.objects.address(key)} was written by a newer latteflow: upgrade to read it")
            artifact = Artifact(self, manifest)
        except NotFound:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{self.objects.address(key)} is not a manifest ({error}); delete it") from error
        sizes = self.objects.sizes(f"{domain}/{stage}/data")
        if all(sizes.get(f"{domain}/{stage}/data/{file.object}") == file.bytes for _, file in artifact.files.values()):
            return artifact
        log.warning("%s: a file is missing or cut short; the stage runs again", self.objects.address(key))
        self.objects.delete(key)
        return None

    def open(self, ref: ArtifactRef) -> Artifact:
        """The artifact behind a reference.

        Raises:
            NotFound: it is gone; run the pipeline again.
        """
        artifact = self.load(ref.domain, ref.stage, ref.fingerprint)
        if artifact is None:
            raise NotFound(f"artifact {ref.domain}/{ref.stage}/{ref.fingerprint[:12]} is gone; run the pipeline again")
        return artifact

    def all(self, domain: str, stage: str) -> list[Artifact]:
        """Every complete artifact of a stage, sorted by fingerprint."""
        names = self.objects.names(f"{domain}/{stage}")
        found = (self.load(domain, stage, name) for name in names if len(name) == 64)
        return [artifact for artifact in found if artifact is not None]

    def writer(self, domain: str, stage: str, version: int, inputs: Mapping[str, Any]) -> ArtifactWriter:
        return ArtifactWriter(self, domain, stage, version, inputs)

    def read_checked(self, base: str, part: Part, file: File) -> bytes:
        """The bytes of a stored file if they are those of its record.

        Raises:
            Damaged: they are not; they were set aside.
        """
        data = self.objects.read(f"{base}/data/{file.object}")
        if len(data) != file.bytes or sha256(data) != file.sha256:
            raise self.set_aside(base, part, file, data)
        return data

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


def content_digest(parts: tuple[Part, ...]) -> str:
    """sha256 over names and digests of all files, in order of name."""
    files = sorted((file.name, file.sha256) for part in parts for file in part.files)
    return sha256(canonical_json(files))


def _part(record: Mapping[str, Any]) -> Part:
    files = tuple(File(**file) for file in record["files"])
    return Part(record["name"], record["fingerprint"], files, record["counts"])
