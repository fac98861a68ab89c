"""The caption store: every text a model was paid for, once, keyed by what was asked about which content.

One place for all domains of a store, ``captions/<describer>/<digest>.v<schema>.parquet``, append-only. A caption's key
is a digest over the content of its images and everything that shaped the answer, so an image that moves to another
shard or turns up in a second domain is never described twice, and two describers never mix.

A key may lie in several parts: two workers described the same image at once, a text was asked for anew, or a compaction
was killed before it removed the old parts. Readers see one row, chosen by the rows alone, whatever part they lie in.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl

from latteflow.storage.errors import NotFound, StorageError
from latteflow.storage.fingerprint import canonical_json, sha256
from latteflow.storage.objects import ObjectStore
from latteflow.storage.tables import parquet, read_parquet

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
_SMALL = 32 << 20
"""Parts below this many bytes are compacted, into parts of about this size, so that memory is bounded."""
_ATTEMPTS = 10
log = logging.getLogger("latteflow.storage")


def describer_id(identity: Mapping[str, Any]) -> str:
    """Digest of who writes: kind of text, model, revision, sampling."""
    return sha256(canonical_json(dict(identity)))


def caption_key(describer: str, members: Sequence[str], prompt: str = "") -> str:
    """Key of one text: describer, content digests of the images in order, and what was asked about them."""
    return sha256(canonical_json([describer, list(members), prompt]))


class CaptionStore:
    """Texts of all domains of one object store. An instance remembers which part holds which keys: keep it."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects
        self._places: dict[str, tuple[set[str], pl.DataFrame]] = {}

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
        rows = self._find(describer, keys)
        return set(rows.filter(pl.lit(failed) | pl.col("finish_reason").ne_missing(ERROR))["caption_key"])

    def has_texts(self, describer: str) -> bool:
        """Whether this describer ever gave a text."""
        for name in self._names(describer):
            with contextlib.suppress(NotFound):
                if self._read(describer, name)["finish_reason"].ne_missing(ERROR).any():
                    return True
        return False

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
        self._put(describer, rows.with_columns(generation=pl.lit(generation, pl.Int32)))

    def scan(self, describer: str) -> pl.LazyFrame:
        """All visible rows of a describer, lazily where the store is a local folder."""
        names = self._names(describer)
        if not names:
            return pl.LazyFrame(schema=CAPTION_SCHEMA)
        parts = [self._objects.address(f"captions/{describer}/{name}") for name in names]
        sources = parts if "://" not in parts[0] else [self._objects.read(f"captions/{describer}/{n}") for n in names]
        rows = pl.scan_parquet(sources, schema=STORED_SCHEMA, missing_columns="insert", glob=False)
        return visible(rows).select(*CAPTION_SCHEMA)

    def sample(self, describer: str, parts: int = 8) -> pl.DataFrame:
        """Rows of some parts, at most so many: what texts of the describer look like. Columns as ``CAPTION_SCHEMA``."""
        frames = []
        for name in self._names(describer)[:parts]:
            with contextlib.suppress(NotFound):
                frames.append(self._read(describer, name).select(*CAPTION_SCHEMA))
        return pl.concat([pl.DataFrame(schema=CAPTION_SCHEMA), *frames])

    def describers(self) -> list[str]:
        """Everyone who ever wrote, as :func:`describer_id`."""
        return [name for name in self._objects.names("captions") if len(name) == 64]

    def compact(self, describer: str) -> int:
        """Merge small parts; returns by how many parts the store became smaller.

        The merged part is there, and read back, before the first old one goes. So readers at any moment, and readers
        after a kill at any moment, find every row; those that are there twice they see once.
        """
        fewer = 0
        batch: dict[str, pl.DataFrame] = {}
        size = 0
        sizes = self._objects.sizes(f"captions/{describer}")
        for name in self._names(describer):
            part_size = sizes.get(f"captions/{describer}/{name}", _SMALL)
            if part_size >= _SMALL:
                continue
            try:
                batch[name] = self._read(describer, name)
            except NotFound:
                continue  # another compaction took it
            size += part_size
            if size >= _SMALL:
                fewer += self._merge(describer, batch)
                batch, size = {}, 0
        return fewer + self._merge(describer, batch)

    def verify(self, describer: str) -> list[str]:
        """Read every part against its digest; returns what was wrong, one line for each part that was set aside."""
        return [line for name in self._names(describer) if (line := self._check(describer, name)) is not None]

    def _find(self, describer: str, keys: Iterable[str]) -> pl.DataFrame:
        """Every stored row among the keys, superseded ones too."""
        wanted = pl.Series("caption_key", list(keys), dtype=pl.String).unique()
        for _ in range(_ATTEMPTS):
            try:
                frames = [
                    self._read(describer, name).filter(pl.col("caption_key").is_in(wanted.implode()))
                    for name in self._holding(describer, wanted)
                ]
                return pl.concat(frames) if frames else pl.DataFrame(schema=STORED_SCHEMA)
            except NotFound:
                continue  # a compaction took a part between our listing and our reading; its rows have moved
        raise StorageError(
            f"{self._objects.address(f'captions/{describer}')} changes faster than it can be read; let compaction end"
        )

    def _holding(self, describer: str, wanted: pl.Series) -> list[str]:
        """The parts with at least one of the keys (a hash collision may add one without)."""
        names = set(self._names(describer))
        seen, places = self._places.get(describer, (set(), pl.DataFrame(schema={"hash": pl.UInt64, "part": pl.String})))
        if seen - names:
            places = places.filter(pl.col("part").is_in(list(names)))
        read = [
            self._read(describer, name).select(hash=pl.col("caption_key").hash(), part=pl.lit(name))
            for name in sorted(names - seen)
        ]
        places = pl.concat([places, *read])
        self._places[describer] = (names, places)
        return sorted(places.filter(pl.col("hash").is_in(wanted.hash().implode()))["part"].unique())

    def _names(self, describer: str) -> list[str]:
        names = []
        for name in self._objects.names(f"captions/{describer}"):
            match = _PART.fullmatch(name)
            if match is None:
                continue
            if int(match["version"] or 1) > SCHEMA_VERSION:
                raise StorageError(
                    f"{self._objects.address(f'captions/{describer}/{name}')} has caption schema {match['version']}, "
                    f"this latteflow reads 1 to {SCHEMA_VERSION}: upgrade to read it"
                )
            names.append(name)
        return names

    def _read(self, describer: str, name: str) -> pl.DataFrame:
        """The rows of a part, columns as ``STORED_SCHEMA``; a damaged part is set aside and has none.

        Raises:
            NotFound: it is gone.
        """
        data, good = self._objects.read_sure(f"captions/{describer}/{name}", lambda data: _is_named(data, name))
        if not good:
            self._set_aside(describer, name, data)
            return pl.DataFrame(schema=STORED_SCHEMA)
        frame = read_parquet(data)
        missing = [pl.lit(None, kind).alias(column) for column, kind in STORED_SCHEMA.items() if column not in frame]
        return frame.with_columns(*missing).select(*STORED_SCHEMA)

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

    def _put(self, describer: str, rows: pl.DataFrame) -> str:
        data = parquet(rows.select(*STORED_SCHEMA).sort("caption_key"))
        name = f"{sha256(data)[:32]}.v{SCHEMA_VERSION}.parquet"
        key = f"captions/{describer}/{name}"
        # A file system that lost its tail may have left this name with fewer bytes.
        if not self._objects.put_if_absent(key, data) and self._check(describer, name) is not None:
            self._objects.put_if_absent(key, data)
        return name

    def _merge(self, describer: str, parts: Mapping[str, pl.DataFrame]) -> int:
        if len(parts) < 2:
            return 0
        rows = visible(pl.concat(parts.values()).lazy()).collect()
        whole = self._put(describer, rows)
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


def _is_named(data: bytes, name: str) -> bool:
    """Whether a part's bytes are those its name was given for."""
    return sha256(data)[:32] == name[:32]
