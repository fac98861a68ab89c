"""Shards: reproducible webdataset tars with an index, appended to as a source grows.

A member pair is ``<key>.<ext>`` (the original bytes) and ``<key>.json`` (key, path, sha256, width, height); never a
label. Keys are sorted, times and owners are zero, so the same images give the same bytes on any day and machine.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from json.encoder import encode_basestring as quoted
from pathlib import Path
from typing import Any, Literal, NamedTuple

import polars as pl

from latteflow.storage import tars
from latteflow.storage.artifacts import Artifact, ArtifactStore, ArtifactWriter
from latteflow.storage.fingerprint import sha256
from latteflow.storage.images import ImageInfo, ImageLimits, ImageRejected, decoder_version
from latteflow.storage.inspectors import Inspectors
from latteflow.storage.listing import CHUNK, REMOTE_THREADS, UNREADABLE, Listing, ahead, chunks, digest_of, key_of
from latteflow.storage.sources import Entry, Source
from latteflow.storage.tables import parquet, read_parquet

log = logging.getLogger("latteflow.storage")

INDEX_SCHEMA = {
    "key": pl.String,
    "shard": pl.String,
    "offset": pl.Int64,
    "bytes": pl.Int64,
    "sha256": pl.String,
    "width": pl.Int32,
    "height": pl.Int32,
    "path": pl.String,
}
QUARANTINE_SCHEMA = {
    "key": pl.String,
    "path": pl.String,
    "sha256": pl.String,
    "reason": pl.String,
    "detail": pl.String,
    "bytes": pl.Binary,
}
_GREYS_SCHEMA = {"key": pl.String, "white": pl.Int32}
_REMOVED_SCHEMA = {"key": pl.String, "path": pl.String}
_DUPLICATE_SCHEMA = {"key": pl.String, "duplicate_of": pl.String, "dropped": pl.Boolean}
_IDENTITY = ["key", "path", "sha256"]
_TABLES = """
    CREATE TABLE packed (number INTEGER PRIMARY KEY, key TEXT UNIQUE, path TEXT, sha256 TEXT);
    CREATE TABLE refused (number INTEGER PRIMARY KEY, key TEXT UNIQUE, path TEXT, sha256 TEXT);
"""
_NEW = "FROM image WHERE key NOT IN (SELECT key FROM packed UNION ALL SELECT key FROM refused)"

SHARD_BYTES = 256 << 20
"""A shard is closed before it grows beyond this, however few images it holds: it is made in memory."""

_GREYS, _GREYS_FILE = ".greys.parquet", "greys.json"
_INDEX = ".index.parquet"
_RECORDED = (_INDEX, ".quarantine.parquet")
"""Tables that say which images a shard was made of."""
_TABLES_AT_ONCE = 100
_FULL = 2**16 - 1

_PROCESSORS = os.cpu_count() or 1


@dataclass(frozen=True)
class Packing:
    """How images are packed, and which are refused."""

    images_per_shard: int
    limits: ImageLimits
    drop_duplicates: bool = False
    """Of images with the same bytes, only the first goes on to later stages."""
    grey_range: Literal["auto", "full"] | tuple[float, float] = "auto"
    """Which values of greys of 16 bits are black and white: by the file, 0 and 65,535, or these."""


def write_shards(
    writer: ArtifactWriter,
    source: Source,
    images: Listing,
    previous: Artifact | None,
    packing: Packing,
    *,
    again: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """Pack the images that no earlier shard holds; leave old shards alone; record what is gone.

    Args:
        writer: of the shard artifact.
        images: everything the source holds now, see :meth:`storage.listing.StatCache.digested`.
        previous: the domain's newest shard artifact, whose shards are taken over.
        again: look again at what earlier runs put into quarantine, because the limits or the decoders changed.
        on_progress: called with the images that are read, and all that are to be.

    Returns:
        Counts of the whole artifact: images, quarantined, duplicates, removed, shards.
    """
    threads = _PROCESSORS + 1 if source.is_local else REMOTE_THREADS
    with _Shards(writer, images, previous, packing, threads) as shards:
        shards.pack(source, on_progress)
        if again:
            shards.retry()
    return shards.finish()


def retry_quarantined(writer: ArtifactWriter, previous: Artifact, packing: Packing) -> dict[str, int]:
    """Look again at what is in the quarantine of ``previous``, by the bytes kept there; the source is not needed.

    Returns:
        Counts of the whole artifact, as :func:`write_shards`.
    """
    gone = read_parquet(previous.read("removed.parquet"))
    with Listing() as images:
        for suffix in (".index.parquet", ".quarantine.parquet"):
            for _, rows in _tables(previous, suffix, ["path", "sha256", "key"]):
                still = rows.join(gone, on="key", how="anti").rows()
                images.fill("image", ((path, 0, 0, "", -1, digest, key) for path, digest, key in still))
        with _Shards(writer, images, previous, packing, threads=1) as shards:
            shards.retry()
        return shards.finish()


class _Shard(NamedTuple):
    number: int
    inputs: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"shard-{self.number:05d}"


class _Loaded(NamedTuple):
    key: str
    """Of what was read, should the file have changed since it was listed; as is the digest."""
    path: str
    sha256: str
    data: bytes
    found: ImageInfo | ImageRejected


class _Shards:
    """The shards of one artifact in the making.

    Images are read and hashed in threads and inspected in processes, while a last thread packs and stores the shard
    before. At most two shards are in memory; what was packed and refused is in the listing's database.
    """

    def __init__(
        self, writer: ArtifactWriter, images: Listing, previous: Artifact | None, packing: Packing, threads: int
    ) -> None:
        self._writer, self._images, self._previous = writer, images, previous
        self._packing, self._threads = packing, threads
        self._made_with = {"limits": asdict(packing.limits), "decoder": decoder_version()}
        self._number = 0
        self._bright: list[int] = []
        """The brightest value of each new image whose greys have 16 bits and no depth of their own."""
        self._storing: tuple[int, Future[dict[str, pl.DataFrame]]] | None = None
        images.database.executescript(_TABLES)
        if previous is not None:
            for part in previous.parts:
                if part.name.startswith("shard-"):
                    writer.adopt(part)
                    self._number += 1
            for suffix in (".index.parquet", ".quarantine.parquet"):
                for name, table in _tables(previous, suffix, _IDENTITY):
                    self._record(int(name[6:].partition(".")[0]), {name: table})

    def __enter__(self) -> _Shards:
        with ExitStack() as stack:
            self._inspect = stack.enter_context(Inspectors(self._packing.limits, _PROCESSORS))
            self._pool = stack.enter_context(ThreadPoolExecutor(self._threads))
            self._storer = stack.enter_context(ThreadPoolExecutor(1))
            stack.callback(self._pool.shutdown, cancel_futures=True)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        with self._stack:
            if kind is None:
                self._stored()

    def pack(self, source: Source, on_progress: Callable[[int, int], None]) -> None:
        """Put the images that were neither packed nor refused before into new shards.

        Image files are taken in the order of their keys, which is as good as shuffled: what lies in one folder is often
        alike. Containers are read in their own order.
        """
        new = self._images.one(f"SELECT count(*) {_NEW}")
        self._inspect.start(-(-new // CHUNK))
        done: list[_Loaded] = []
        read = 0
        on_progress(read, new)
        for shard, loaded in ahead(self._pool, lambda work: work(), self._work(source), self._threads + 2):
            done += loaded
            read += len(loaded)
            on_progress(read, new)
            if shard is not None:
                self._store(*shard, done)
                done = []

    def _work(self, source: Source) -> Iterator[Callable[[], tuple[_Shard | None, list[_Loaded]]]]:
        """Chunks of images to load; the last of a shard says which shard it was. Goes on to the next shard at once."""
        for rows in self._groups():
            shard = self._next({"images": digest_of(row[:3] for row in rows)})
            part = self._writer.find(shard.name, shard.inputs)
            if part is not None:
                files = [file.name for file in part.files if file.name.endswith(_RECORDED)]
                tables = {name: read_parquet(self._writer.read(part, name)) for name in files}
                self._record(shard.number, tables)
                continue
            some = list(chunks(Entry(path, 0, *rest) for _, path, _, *rest in rows))
            for number, chunk in enumerate(some, 1):
                yield partial(self._load, source, chunk, shard if number == len(some) else None)

    def retry(self) -> None:
        """Inspect what earlier runs refused once more; pack what passes, and what is refused for another reason."""
        self._stored()
        changed: list[_Loaded] = []
        size = looked_at = taken = 0
        for key, path, digest, reason, data in self._quarantined():
            found = self._inspect([data])[0]
            looked_at += 1
            taken += isinstance(found, ImageInfo)
            if isinstance(found, ImageRejected) and found.reason == reason:
                continue
            if len(changed) == self._packing.images_per_shard or (changed and size + len(data) > SHARD_BYTES):
                self._store_again(changed)
                changed, size = [], 0
            changed.append(_Loaded(key, path, digest, data, found))
            size += len(data)
        if changed:
            self._store_again(changed)
        if looked_at:
            log.info("quarantine: %d of %d images can be used now", taken, looked_at)

    def finish(self) -> dict[str, int]:
        """Record what is gone and what is there twice; returns the artifact's counts."""
        database, one, drop = self._images.database, self._images.one, self._packing.drop_duplicates
        greys = self._packing.grey_range
        self._warn_of_dark_greys()
        database.execute("CREATE INDEX image_key ON image (key)")
        database.execute("DELETE FROM refused WHERE key IN (SELECT key FROM packed)")
        live = "FROM packed WHERE key IN (SELECT key FROM image)"
        gone = database.execute(
            "SELECT key, path FROM (SELECT * FROM packed UNION ALL SELECT * FROM refused) "
            "WHERE key NOT IN (SELECT key FROM image) ORDER BY key"
        ).fetchall()
        twice = database.execute(
            f"""
            WITH live AS (SELECT number, key, sha256 {live}),
                 first AS (SELECT sha256, min(number) AS number {live} GROUP BY sha256 HAVING count(*) > 1)
            SELECT live.key, packed.key, ?
            FROM live JOIN first USING (sha256) JOIN packed ON packed.number = first.number
            WHERE live.number > first.number ORDER BY live.number
            """,
            (drop,),
        ).fetchall()
        self._writer.put(
            "state",
            {
                "live": digest_of(database.execute(f"SELECT key {live} ORDER BY number")),
                "gone": digest_of((key,) for key, _ in gone),
                "drop_duplicates": drop,
                **({} if greys == "auto" else {"grey_range": greys}),
            },
            {
                # Another range makes other pictures of the same shards, and so another artifact.
                **({} if greys == "auto" else {_GREYS_FILE: json.dumps(greys).encode()}),
                "removed.parquet": parquet(pl.DataFrame(gone, _REMOVED_SCHEMA, orient="row")),
                "duplicates.parquet": parquet(pl.DataFrame(twice, _DUPLICATE_SCHEMA, orient="row")),
            },
        )
        return {
            "images": one(f"SELECT count(*) {live}") - (len(twice) if drop else 0),
            "quarantined": one("SELECT count(*) FROM refused WHERE key IN (SELECT key FROM image)"),
            "duplicates": len(twice),
            "removed": len(gone),
            "shards": self._number,
        }

    def _groups(self) -> Iterator[list[tuple[Any, ...]]]:
        """Rows of (key, path, sha256, size, container, place), for a shard each."""
        found = self._images.database.execute(
            f"SELECT key, path, sha256, size, container, place {_NEW} "
            "ORDER BY container, CASE container WHEN '' THEN key ELSE path END"
        )
        group: list[tuple[Any, ...]] = []
        total = 0
        for row in found:
            size = max(row[3], 0)
            if group and (len(group) == self._packing.images_per_shard or total + size > SHARD_BYTES):
                yield group
                group, total = [], 0
            group.append(row)
            total += size
        if group:
            yield group

    def _load(self, source: Source, chunk: list[Entry], shard: _Shard | None) -> tuple[_Shard | None, list[_Loaded]]:
        read = source.read_all(chunk, self._packing.limits)
        found = iter(self._inspect([data for data in read if not isinstance(data, ImageRejected)]))
        loaded = []
        for entry, data in zip(chunk, read, strict=True):
            if isinstance(data, ImageRejected):
                loaded.append(_Loaded(key_of(entry.path, UNREADABLE), entry.path, UNREADABLE, b"", data))
            else:
                digest = sha256(data)
                loaded.append(_Loaded(key_of(entry.path, digest), entry.path, digest, data, next(found)))
        return shard, loaded

    def _quarantined(self) -> Iterator[tuple[str, str, str, str, bytes]]:
        """Key, path, digest, reason and bytes of refused images that are wanted and whose bytes are kept."""
        if self._previous is None:
            return
        wanted = """
            SELECT EXISTS (SELECT 1 FROM image WHERE path = ? AND key = ?)
               AND NOT EXISTS (SELECT 1 FROM packed WHERE key = ?)
        """
        for _, rows in _tables(self._previous, ".quarantine.parquet", [*QUARANTINE_SCHEMA]):
            for key, path, digest, reason, _, data in rows.iter_rows():
                if data and self._images.one(wanted, path, key, key):
                    yield key, path, digest, reason, data

    def _next(self, inputs: Mapping[str, Any]) -> _Shard:
        self._number += 1
        return _Shard(self._number - 1, {**inputs, **self._made_with})

    def _store_again(self, changed: list[_Loaded]) -> None:
        images = digest_of((each.key, each.path, each.sha256) for each in changed)
        self._store(*self._next({"quarantined": images}), changed)

    def _store(self, number: int, inputs: Mapping[str, Any], loaded: list[_Loaded]) -> None:
        self._stored()
        self._storing = number, self._storer.submit(self._put, _Shard(number, inputs), loaded)

    def _stored(self) -> None:
        if self._storing is not None:
            number, future = self._storing
            self._storing = None
            self._record(number, future.result())

    def _put(self, shard: _Shard, loaded: list[_Loaded]) -> dict[str, pl.DataFrame]:
        tar, index, quarantine = _packed(shard.name, loaded)
        tables = {f"{shard.name}.index.parquet": index}
        if quarantine.height:
            tables[f"{shard.name}.quarantine.parquet"] = quarantine
        greys = [(each.key, each.found) for each in sorted(loaded) if isinstance(each.found, ImageInfo)]
        self._bright += [found.brightest for _, found in greys if found.brightest and found.white is None]
        if whites := [(key, found.white) for key, found in greys if found.white is not None]:
            tables[f"{shard.name}{_GREYS}"] = pl.DataFrame(whites, schema=_GREYS_SCHEMA, orient="row")
        files: dict[str, bytes | Path] = {name: parquet(table) for name, table in tables.items()}
        self._writer.put(shard.name, shard.inputs, {f"{shard.name}.tar": tar, **files}, rows=index.height)
        return {name: table.select(_IDENTITY) for name, table in tables.items() if name.endswith(_RECORDED)}

    def _warn_of_dark_greys(self) -> None:
        brightest = max(self._bright, default=_FULL)
        if self._packing.grey_range == "auto" and brightest <= _FULL // 16:
            bits = brightest.bit_length()
            log.warning(
                "the greys of %d images have 16 bits and go up to %d of %d, which is nearly black to a model (white, "
                "where 0 is white); if they are of %d bits, say `shard: {grey_range: [0, %d]}`, and `full` if they are "
                "meant to be dark",
                len(self._bright), brightest, _FULL, bits, (1 << bits) - 1,
            )  # fmt: skip

    def _record(self, shard: int, tables: Mapping[str, pl.DataFrame]) -> None:
        """Keep in mind what a shard holds and refuses; numbers are in the order of shards and rows."""
        for name, table in tables.items():
            rows = table.select(_IDENTITY).iter_rows()
            kind = "refused" if name.endswith(".quarantine.parquet") else "packed"
            self._images.fill(kind, ((shard << 24 | number, *row) for number, row in enumerate(rows)))


def _packed(name: str, loaded: Iterable[_Loaded]) -> tuple[bytes, pl.DataFrame, pl.DataFrame]:
    """A shard's tar, index and quarantine."""
    pieces: list[bytes] = []
    rows, bad = [], []
    end = 0
    for key, path, digest, data, found in sorted(loaded):
        if isinstance(found, ImageRejected):
            bad.append((key, path, digest, found.reason.value, found.detail, data))
            continue
        width, height = found.width, found.height
        rows.append((key, name, end + tars.BLOCK, len(data), digest, width, height, path))
        # Canonical JSON, written out: an encoder takes ten times as long.
        about = f'{{"height":{height},"key":"{key}","path":{quoted(path)},"sha256":"{digest}","width":{width}}}'
        for extension, content in ((found.extension, data), ("json", about.encode())):
            pieces += tars.member(f"{key}.{extension}", content)
            end += tars.BLOCK + len(content) + -len(content) % tars.BLOCK
    pieces.append(tars.end(end))
    return (
        b"".join(pieces),
        pl.DataFrame(rows, schema=INDEX_SCHEMA, orient="row"),
        pl.DataFrame(bad, schema=QUARANTINE_SCHEMA, orient="row"),
    )


@dataclass(frozen=True)
class Record:
    """One image of a shard: its key, content digest, path in the source, and original bytes."""

    key: str
    sha256: str
    path: str
    data: bytes
    greys: tuple[float, float] | None = None
    """Values of greys of more than 8 bits that are black and white; None: by their type."""


class Greys:
    """How the greys of a shard artifact's images are read."""

    def __init__(self, shards: Artifact, keys: pl.Series | None = None) -> None:
        """Of a shard artifact's images, or of those with some keys."""
        self._shards, self._keys = shards, keys
        self._asked = json.loads(shards.read(_GREYS_FILE)) if _GREYS_FILE in shards.files else "auto"

    @property
    def any(self) -> bool:
        """Whether there are greys of more than 8 bits, or a range for all."""
        return self._asked != "auto" or bool(self._shards.names(_GREYS))

    @functools.cached_property
    def _whites(self) -> dict[str, int]:
        if self._asked != "auto":
            return {}
        wanted = None if self._keys is None else self._keys.to_frame("key")
        return dict(_table(self._shards, _GREYS, _GREYS_SCHEMA, keys=wanted).iter_rows())

    def range(self, key: str) -> tuple[float, float] | None:
        """Of an image, see :class:`Record`."""
        if isinstance(self._asked, list):
            return self._asked[0], self._asked[1]
        white = self._whites.get(key)
        return None if white is None else (0, white)

    def content(self, key: str, checksum: str) -> str:
        """The digest of an image as it is seen: the same bytes in another range are another picture."""
        found = self.range(key)
        return checksum if found is None else sha256(f"{checksum} {found[0]:g} {found[1]:g}".encode())

    def digest(self, shard: str) -> str | None:
        """Of all that this says of a shard; None where it says nothing."""
        if self._asked != "auto":
            return self._shards.files[_GREYS_FILE][1].sha256
        found = self._shards.files.get(f"{shard}{_GREYS}")
        return None if found is None else found[1].sha256


def read_index(
    shards: Artifact, *, removed: bool = False, only: Collection[str] | None = None, keys: pl.Series | None = None
) -> pl.DataFrame:
    """One row per live image, ordered by shard and key; without dropped duplicates.

    Args:
        removed: every image that was ever packed instead.
        only: names of the shards that are read.
        keys: of the images that are wanted; the others are never in memory all at once.
    """
    wanted = None if keys is None else keys.to_frame("key")
    index = _table(shards, _INDEX, INDEX_SCHEMA, only=only, keys=wanted)
    if removed:
        return index
    dropped = read_parquet(shards.read("duplicates.parquet")).filter("dropped").select("key")
    gone = pl.concat([read_parquet(shards.read("removed.parquet")).select("key"), dropped])
    return index.join(gone, on="key", how="anti", maintain_order="left")


def packed_images(shards: Artifact) -> dict[str, int]:
    """Shard name -> how many images were ever packed into it, in the order of the shards; told by the manifest."""
    named = ((name.removesuffix(_INDEX), name) for name in shards.names(_INDEX))
    return {shard: shards.files[name][1].rows for shard, name in named}


def read_quarantine(shards: Artifact) -> pl.DataFrame:
    """One row per image that is refused and still in the source: key, path, sha256, reason, detail, bytes."""
    gone = read_parquet(shards.read("removed.parquet"))
    packed = _table(shards, _INDEX, {"key": pl.String})
    return (
        _table(shards, ".quarantine.parquet", QUARANTINE_SCHEMA)
        .unique("key", keep="last", maintain_order=True)
        .join(pl.concat([gone.select("key"), packed]), on="key", how="anti", maintain_order="left")
    )


def read_records(shards: Artifact, index: pl.DataFrame) -> Iterator[Record]:
    """The images of some index rows, in the rows' order; each shard is fetched once if rows are in shard order."""
    held, tar = "", b""
    greys = Greys(shards)
    for key, shard, offset, size, checksum, path in index.select(
        "key", "shard", "offset", "bytes", "sha256", "path"
    ).iter_rows():
        if shard != held:
            held, tar = shard, shards.read(f"{shard}.tar")
        yield Record(key, checksum, path, tar[offset : offset + size], greys.range(key))


def read_image(shards: Artifact, shard: str, offset: int, size: int, checksum: str) -> bytes:
    """One image, read by itself.

    Raises:
        Damaged: its shard is not what it was; it was set aside.
    """
    data = shards.read_range(f"{shard}.tar", offset, offset + size)
    if sha256(data) != checksum:
        tar = shards.read(f"{shard}.tar")  # raises, unless only our reading of the stretch went wrong
        data = tar[offset : offset + size]
    return data


def overlap(train: Artifact, test: Artifact) -> pl.DataFrame:
    """Images of the test split whose very bytes are also in the training split.

    Returns:
        key, path, train_key, train_path: one row for each such test image, with the first such training image.
    """
    first = read_index(train).select("sha256", train_key="key", train_path="path").unique("sha256", maintain_order=True)
    both = read_index(test).join(first, on="sha256", how="inner", maintain_order="left")
    return both.select("key", "path", "train_key", "train_path")


def newest(store: ArtifactStore, domain: str, split: str) -> Artifact | None:
    """The shard artifact to append to: the one of this split that holds most shards."""
    found = [artifact for artifact in store.all(domain, "shard") if artifact.inputs["split"] == split]
    return max(found, key=lambda artifact: (len(artifact.parts), artifact.fingerprint), default=None)


def _table(
    shards: Artifact,
    suffix: str,
    schema: Mapping[str, Any],
    *,
    only: Collection[str] | None = None,
    keys: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Some columns of all tables of a kind, or of some shards; of all rows, or of those with some keys."""
    found = [pl.DataFrame(schema=schema)]
    for some in _together(shards, suffix, list(schema), only, _TABLES_AT_ONCE if keys is not None else None):
        found.append(some if keys is None else some.join(keys, on="key", how="semi", maintain_order="left"))
    return pl.concat(found)


def index_tables(shards: Artifact, columns: list[str]) -> Iterator[pl.DataFrame]:
    """Some columns of all images that were ever packed, in the order of the shards, some shards at a time."""
    return _together(shards, _INDEX, columns, None, _TABLES_AT_ONCE)


def _together(
    shards: Artifact, suffix: str, columns: list[str], only: Collection[str] | None, at_once: int | None
) -> Iterator[pl.DataFrame]:
    """Some columns of tables of a kind, so many tables together; None: all."""
    names = [name for name in shards.names(suffix) if only is None or name.removesuffix(suffix) in only]
    # Many at once: of a small table, polars takes ten times as long to begin as to read.
    step = at_once or max(len(names), 1)
    for start in range(0, len(names), step):
        yield pl.read_parquet([shards.read(name) for name in names[start : start + step]], columns=columns)


def _tables(shards: Artifact, suffix: str, columns: list[str]) -> Iterator[tuple[str, pl.DataFrame]]:
    """Name and some columns of each table of a kind, in the order of the shards."""
    return ((name, pl.read_parquet(io.BytesIO(shards.read(name)), columns=columns)) for name in shards.names(suffix))
