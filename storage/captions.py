"""The caption store: every text a model was paid for, once, keyed by what was asked about which content.

One place for all domains of a store, ``captions/<describer>/<digest>.v<schema>.parquet``, append-only. A caption's key
is a digest over the content of its images and everything that shaped the answer, so an image that moves to another
shard or turns up in a second domain is never described twice, and two describers never mix.

A key may lie in several parts: two workers described the same image at once, a text was asked for anew, or a compaction
was killed before it removed the old parts. Readers see one row, chosen by the rows alone, whatever part they lie in.

Beside a part that was compacted lies a *directory*, ``<digest of the part>.<own digest>.keys``: eight bytes of each of
its keys. Who wants to know which texts are there reads those, a twenty-fifth of the store, and then only the parts that
hold what is wanted. As keys are digests, the texts of a range of shards lie anywhere among the keys; but they were
written together, and parts are merged by age, so that they lie in few parts. A part without a directory is read whole.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from latteflow.storage.errors import NotFound, StorageError
from latteflow.storage.fingerprint import canonical_json, sha256
from latteflow.storage.objects import ObjectStore
from latteflow.storage.tables import are_in, parquet, read_safetensors, safetensors

CAPTION_SCHEMA: dict[str, Any] = {
    "caption_key": pl.String,
    "kind": pl.String,
    "members": pl.List(pl.String),
    "text": pl.String,
    "flags": pl.List(pl.String),
    "finish_reason": pl.String,
    "prompt_tokens": pl.Int32,
    "output_tokens": pl.Int32,
    "model": pl.String,
    "revision": pl.String,
    "prompt_id": pl.String,
    "prompt": pl.String,
    "sampling": pl.String,
    "engine": pl.String,
    "detail": pl.String,
}
"""What readers get. ``members`` are the sha256 digests of the described images' bytes; ``prompt_id`` is the prompt pack
and its version, ``prompt`` what was asked; ``sampling`` is JSON; ``engine`` is what ran the model, with its version;
``detail`` says why there is no text where ``finish_reason`` is error."""

STORED_SCHEMA: dict[str, Any] = {**CAPTION_SCHEMA, "generation": pl.Int32}
"""What parts hold. ``generation`` counts how often a text was asked for anew; the highest is the visible one."""

SCHEMA_VERSION = 3
"""Version 1 has no ``generation``, version 2 nothing after ``prompt_id``. A column that a part lacks reads as null."""

ERROR = "error"
"""The ``finish_reason`` of a row that has no text, as its model could not answer."""

_PART = re.compile(r"(?P<digest>[0-9a-f]{32})(\.v(?P<version>\d+))?\.parquet")
_DIRECTORY = re.compile(r"(?P<part>[0-9a-f]{32})\.(?P<digest>[0-9a-f]{16})\.keys")
_SMALL = 32 << 20
"""Parts below this many bytes are compacted, into parts of about this size, so that memory is bounded."""
_MANY = 16
"""So many small parts are worth merging."""
_SAMPLED = 1024
"""Rows of a part that a sample takes."""
_ATTEMPTS = 10
log = logging.getLogger("latteflow.storage")


@dataclass(frozen=True)
class _Directory:
    """The first eight bytes of the keys of a part, as sorted numbers: of those with a text, and of those without."""

    texts: np.ndarray
    errors: np.ndarray

    @classmethod
    def of(cls, rows: pl.DataFrame) -> _Directory:
        """Of the columns caption_key and finish_reason."""
        failed = rows["finish_reason"].eq_missing(pl.Series([ERROR]))
        return cls(*(np.sort(_numbers(rows.filter(some)["caption_key"])) for some in (~failed, failed)))

    def holds(self, wanted: np.ndarray, *, failed: bool) -> np.ndarray:
        """Which of some numbers are here, ``(len(wanted),)`` bool.

        Args:
            failed: those without a text count as well.
        """
        found = are_in(wanted, self.texts)
        return found | are_in(wanted, self.errors) if failed else found


def describer_id(identity: Mapping[str, Any]) -> str:
    """Digest of who writes: kind of text, model, revision, sampling."""
    return sha256(canonical_json(dict(identity)))


def caption_key(describer: str, members: Sequence[str], prompt: str = "") -> str:
    """Key of one text: describer, content digests of the images in order, and what was asked about them."""
    return sha256(canonical_json([describer, list(members), prompt]))


class CaptionStore:
    """Texts of all domains of one object store.

    An instance remembers the directories of small parts, and which parts it added: keep it.
    """

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects
        self._read_once: dict[str, dict[str, _Directory]] = defaultdict(dict)
        self._added: dict[str, list[str]] = defaultdict(list)

    def get(self, describer: str, keys: Iterable[str]) -> pl.DataFrame:
        """The stored rows among these keys, each once, sorted by key. Columns as ``CAPTION_SCHEMA``.

        Raises:
            StorageError: a part was written by a newer version.
        """
        return visible(self._find(describer, keys).lazy()).select(*CAPTION_SCHEMA).collect()

    def known(self, describer: str, keys: Iterable[str], *, failed: bool = False) -> set[str]:
        """Those of the keys that need not be asked again: a text was written, however it ended, and no error.

        Args:
            failed: errors count as well.
        """
        wanted = pl.Series("caption_key", list(keys), dtype=pl.String)
        if not len(wanted):
            return set()
        numbers = _numbers(wanted)
        found = np.zeros(len(numbers), bool)
        for _, directory in self._directories(describer):
            found |= directory.holds(numbers, failed=failed)
        return set(wanted.filter(pl.Series(found)))

    def has_texts(self, describer: str) -> bool:
        """Whether this describer ever gave a text."""
        return any(len(directory.texts) for _, directory in self._directories(describer))

    def add(self, describer: str, rows: pl.DataFrame, *, anew: bool = False) -> None:
        """Append texts; adding the same rows again changes nothing.

        Args:
            rows: with the columns of ``CAPTION_SCHEMA``.
            anew: these rows take the place of earlier texts with the same keys.
        """
        if not rows.height:
            return
        generation = 0
        if anew:
            earlier = self._find(describer, rows["caption_key"])["generation"].max()
            generation = 0 if earlier is None else int(earlier) + 1  # type: ignore[arg-type]
        rows = rows.with_columns(generation=pl.lit(generation, pl.Int32))
        self._added[describer].append(self._put(describer, rows))

    def scan(self, describer: str) -> pl.LazyFrame:
        """All visible rows of a describer, lazily where the store is a local folder."""
        names = [*self._names(describer)]
        if not names:
            return pl.LazyFrame(schema=CAPTION_SCHEMA)
        parts = [self._objects.address(f"captions/{describer}/{name}") for name in names]
        sources = parts if "://" not in parts[0] else [self._objects.read(f"captions/{describer}/{n}") for n in names]
        rows = pl.scan_parquet(sources, schema=STORED_SCHEMA, missing_columns="insert", glob=False)
        return visible(rows).select(*CAPTION_SCHEMA)

    def sample(self, describer: str, parts: int = 8) -> pl.DataFrame:
        """The first rows of some parts, at most so many: what texts of the describer look like.

        Columns as ``CAPTION_SCHEMA``.
        """
        frames = []
        for name in [*self._names(describer)][:parts]:
            with contextlib.suppress(NotFound):
                frames.append(self._read(describer, name, rows=_SAMPLED).select(*CAPTION_SCHEMA))
        return pl.concat([pl.DataFrame(schema=CAPTION_SCHEMA), *frames])

    def describers(self) -> list[str]:
        """Everyone who ever wrote, as :func:`describer_id`."""
        return [name for name in self._objects.names("captions") if len(name) == 64]

    def compact(self, describer: str) -> int:
        """Merge small parts, and give a directory to parts without one; returns by how many parts the store became
        smaller.

        The merged part is there, and read back, before the first old one goes. So readers at any moment, and readers
        after a kill at any moment, find every row; those that are there twice they see once.
        """
        names = self._names(describer)
        fewer = self._merge_all(describer, names)
        for name, directory in names.items():
            if directory is None and self._size(describer, name) >= _SMALL:
                with contextlib.suppress(NotFound):
                    self._put_directory(describer, name, self._directory(describer, name, None))
        for orphan in self._orphans(describer):
            self._objects.delete(f"captions/{describer}/{orphan}")
        return fewer

    def settle(self, describer: str) -> None:
        """Merge what this instance added, if it is many parts: to be called when it has added its last.

        Of many workers each merges its own parts, so that they do not do each other's work.
        """
        added = list(dict.fromkeys(self._added.pop(describer, [])))
        if len(added) >= _MANY:
            self._merge_all(describer, added)

    def tidy(self, describer: str) -> None:
        """Compact what many readers are about to look into, where that is worth it."""
        without = [name for name, directory in self._names(describer).items() if directory is None]
        if len(without) >= _MANY or any(self._size(describer, name) >= _SMALL for name in without):
            self.compact(describer)

    def verify(self, describer: str) -> list[str]:
        """Read every part against its digest; returns what was wrong, one line for each part that was set aside.

        A directory that is not as it was goes without a word here: it is only a shorter way to its part.
        """
        names = self._names(describer)
        for own in filter(None, names.values()):
            self._read_directory(describer, own)
        return [line for name in names if (line := self._check(describer, name)) is not None]

    def _find(self, describer: str, keys: Iterable[str]) -> pl.DataFrame:
        """Every stored row among the keys, superseded ones too."""
        wanted = pl.Series("caption_key", list(keys), dtype=pl.String).unique()
        numbers = _numbers(wanted)
        for _ in range(_ATTEMPTS):
            holding = {
                name for name, directory in self._directories(describer) if directory.holds(numbers, failed=True).any()
            }
            try:
                frames = [
                    self._read(describer, name).filter(pl.col("caption_key").is_in(wanted.implode()))
                    for name in sorted(holding)
                ]
                return pl.concat(frames) if frames else pl.DataFrame(schema=STORED_SCHEMA)
            except NotFound:
                continue  # a compaction took a part between our listing and our reading; its rows have moved
        raise self._restless(describer)

    def _directories(self, describer: str) -> Iterator[tuple[str, _Directory]]:
        """Name and directory of each part, one at a time; some twice if a compaction is under way."""
        for _ in range(_ATTEMPTS):
            names = self._names(describer)
            remembered = self._read_once[describer]
            for gone in remembered.keys() - names.keys():
                del remembered[gone]
            try:
                for name, own in names.items():
                    yield name, self._directory(describer, name, own)
            except NotFound:
                continue
            return
        raise self._restless(describer)

    def _directory(self, describer: str, name: str, own: str | None) -> _Directory:
        """Of one part, by its directory if it has one that is sound.

        Raises:
            NotFound: the part is gone.
        """
        if name in self._read_once[describer]:
            return self._read_once[describer][name]
        if own is not None and (found := self._read_directory(describer, own)) is not None:
            return found
        found = _Directory.of(self._read(describer, name, columns=["caption_key", "finish_reason"]))
        self._read_once[describer][name] = found
        return found

    def _read_directory(self, describer: str, own: str) -> _Directory | None:
        match = _DIRECTORY.fullmatch(own)
        assert match is not None
        key, digest = f"captions/{describer}/{own}", match["digest"]
        try:
            data, good = self._objects.read_sure(key, lambda data: sha256(data)[:16] == digest)
        except NotFound:
            return None
        if not good:
            log.warning("%s is not as it was written; its part is read instead", self._objects.address(key))
            self._objects.delete(key)
            return None
        return _Directory(**read_safetensors(data))

    def _put_directory(self, describer: str, part: str, directory: _Directory) -> None:
        data = safetensors(texts=directory.texts, errors=directory.errors)
        self._objects.put_if_absent(f"captions/{describer}/{part[:32]}.{sha256(data)[:16]}.keys", data)

    def _orphans(self, describer: str) -> list[str]:
        """Directories whose part is gone; that of a part which is just being written loses no more than time."""
        names = self._objects.names(f"captions/{describer}")
        parts = {name[:32] for name in names if _PART.fullmatch(name)}
        return [name for name in names if (match := _DIRECTORY.fullmatch(name)) and match["part"] not in parts]

    def _size(self, describer: str, name: str) -> int:
        return self._objects.size(f"captions/{describer}/{name}") or 0

    def _restless(self, describer: str) -> StorageError:
        return StorageError(
            f"{self._objects.address(f'captions/{describer}')} changes faster than it can be read; let compaction end"
        )

    def _names(self, describer: str) -> dict[str, str | None]:
        """The parts, sorted by name, and the directory of each, where there is one."""
        every = self._objects.names(f"captions/{describer}")
        directories = {match["part"]: name for name in every if (match := _DIRECTORY.fullmatch(name))}
        names = {}
        for name in every:
            match = _PART.fullmatch(name)
            if match is None:
                continue
            if int(match["version"] or 1) > SCHEMA_VERSION:
                raise StorageError(
                    f"{self._objects.address(f'captions/{describer}/{name}')} has caption schema {match['version']}, "
                    f"this latteflow reads 1 to {SCHEMA_VERSION}: upgrade to read it"
                )
            names[name] = directories.get(match["digest"])
        return names

    def _read(
        self, describer: str, name: str, *, rows: int | None = None, columns: list[str] | None = None
    ) -> pl.DataFrame:
        """The rows of a part, columns as ``STORED_SCHEMA``; a damaged part is set aside and has none.

        Args:
            rows: no more than the first ones.
            columns: no more than these.

        Raises:
            NotFound: it is gone.
        """
        schema = {column: STORED_SCHEMA[column] for column in columns or STORED_SCHEMA}
        data, good = self._objects.read_sure(f"captions/{describer}/{name}", lambda data: _is_named(data, name))
        if not good:
            self._set_aside(describer, name, data)
            return pl.DataFrame(schema=schema)
        frame = pl.read_parquet(io.BytesIO(data), columns=columns, n_rows=rows)
        missing = [pl.lit(None, kind).alias(column) for column, kind in schema.items() if column not in frame]
        return frame.with_columns(*missing).select(*schema)

    def _check(self, describer: str, name: str) -> str | None:
        try:
            data, good = self._objects.read_sure(f"captions/{describer}/{name}", lambda data: _is_named(data, name))
        except NotFound:
            return None  # compacted meanwhile
        return None if good else self._set_aside(describer, name, data)

    def _set_aside(self, describer: str, name: str, data: bytes) -> str:
        aside = f"captions/damaged/{describer[:12]}-{name}"
        self._objects.put(aside, data)
        self._objects.delete(f"captions/{describer}/{name}")
        line = (
            f"{self._objects.address(f'captions/{describer}/{name}')}: its {len(data)} bytes have sha256 "
            f"{sha256(data)[:12]}, not {name[:12]}; moved to {aside}, and its texts are written again when needed"
        )
        log.warning("%s", line)
        return line

    def _put(self, describer: str, rows: pl.DataFrame, *, directory: bool = False) -> str:
        data = parquet(rows.select(*STORED_SCHEMA).sort("caption_key"))
        name = f"{sha256(data)[:32]}.v{SCHEMA_VERSION}.parquet"
        key = f"captions/{describer}/{name}"
        if directory:  # first, so that whoever sees the part sees it
            self._put_directory(describer, name, _Directory.of(rows))
        # A file system that lost its tail may have left this name with fewer bytes.
        if not self._objects.put_if_absent(key, data) and self._check(describer, name) is not None:
            self._objects.put_if_absent(key, data)
        return name

    def _merge_all(self, describer: str, names: Collection[str]) -> int:
        """Merge those of the parts that are small, those of one age with each other."""
        fewer = 0
        batch: dict[str, pl.DataFrame] = {}
        size = 0
        prefix = f"captions/{describer}/"
        stored = self._objects.listing(prefix[:-1])
        small = [name for name in names if prefix + name in stored and stored[prefix + name].bytes < _SMALL]
        for name in sorted(small, key=lambda name: (stored[prefix + name].modified, name)):
            try:
                batch[name] = self._read(describer, name)
            except NotFound:
                continue  # another compaction took it
            size += stored[prefix + name].bytes
            if size >= _SMALL:
                fewer += self._merge(describer, batch)
                batch, size = {}, 0
        return fewer + self._merge(describer, batch)

    def _merge(self, describer: str, parts: Mapping[str, pl.DataFrame]) -> int:
        if len(parts) < 2:
            return 0
        rows = visible(pl.concat(parts.values()).lazy()).collect()
        whole = self._put(describer, rows, directory=True)
        # Look before anything goes.
        if self._read(describer, whole).height != rows.height:
            return 0
        for name in parts.keys() - {whole}:
            self._objects.delete(f"captions/{describer}/{name}")
        return len(parts) - 1


def visible(rows: pl.LazyFrame) -> pl.LazyFrame:
    """One row for each key: the newest generation; among equals a text before an error; then, as two workers wrote it,
    the first in order of text.

    The choice depends on the rows alone, so that moving them to another part never changes it.
    """
    newest_first = -pl.col("generation").fill_null(0)
    failed = pl.col("finish_reason").eq_missing(ERROR)
    rest = [pl.col("finish_reason", "prompt_tokens", "output_tokens"), pl.col("flags").list.join(" ")]
    ordered = rows.sort("caption_key", newest_first, failed, "text", *rest)
    return ordered.unique("caption_key", keep="first", maintain_order=True)


def _numbers(keys: pl.Series) -> np.ndarray:
    """The first eight bytes of each key as a number, ``(len(keys),)`` uint64."""
    bytes_ = keys.str.head(16).str.decode("hex")
    return bytes_.bin.reinterpret(dtype=pl.UInt64, endianness="big").to_numpy()


def _is_named(data: bytes, name: str) -> bool:
    """Whether a part's bytes are those its name was given for."""
    return sha256(data)[:32] == name[:32]
