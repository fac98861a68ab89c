"""What a source holds, in a database on the local disk: memory does not grow with the number of images."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import os
import shutil
import sqlite3
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import polars as pl

from latteflow.storage.errors import NotFound, StorageError
from latteflow.storage.fingerprint import sha256
from latteflow.storage.images import ImageLimits, ImageRejected
from latteflow.storage.objects import ObjectStore
from latteflow.storage.sources import Entry, Source
from latteflow.storage.tables import are_in

T = TypeVar("T")
U = TypeVar("U")
log = logging.getLogger("latteflow.storage")

UNREADABLE = sha256(b"")
"""Stands for the content of an image that could not be read."""

REMOTE_THREADS = 16
"""Reads at once from a source behind a network, against its latency."""

CHUNK, _CHUNK_BYTES = 256, 4 << 20
_ROWS = 8192
_BATCH = 16_384
_FEW = 50_000
"""New images that are listed in memory."""
_KEEP_EVERY = 30.0
"""Seconds after which the digests so far are kept."""
_STAT_SCHEMA = {
    "path": pl.String,
    "stamp": pl.Int64,
    "size": pl.Int64,
    "container": pl.String,
    "place": pl.Int64,
    "sha256": pl.String,
}
_TABLES = """
    PRAGMA journal_mode = OFF;
    PRAGMA synchronous = OFF;
    CREATE TABLE image (
        path TEXT PRIMARY KEY, stamp INTEGER, size INTEGER, container TEXT, place INTEGER, sha256 TEXT, key TEXT
    ) WITHOUT ROWID;
    CREATE TABLE known (
        path TEXT PRIMARY KEY, stamp INTEGER, size INTEGER, container TEXT, place INTEGER, sha256 TEXT
    ) WITHOUT ROWID;
"""


def key_of(path: str, digest: str) -> str:
    """The image's unique and stable name: 20 hexadecimal characters of a digest over its path and its content."""
    return hashlib.sha256(f"{path}\0{digest}".encode()).hexdigest()[:20]


def digest_of(rows: Iterable[tuple[str, ...]]) -> str:
    """sha256 over rows of strings that hold no control characters."""
    running = hashlib.sha256()
    for row in rows:
        running.update("\0".join((*row, "")).encode())
    return running.hexdigest()


class Listing:
    """The images of a source: an :class:`~storage.sources.Entry` each, with the digest of its content and its key.

    The tables live in :attr:`database`: ``image``, and ``known``, which is what the last run knew. They are a temporary
    file of SQLite's own, which vanishes with this object.

    Args:
        known: where the last run knew nearly all of it, what it knew and how that changed. The database is then made
            for who asks for it.
    """

    def __init__(self, known: Changed | None = None) -> None:
        self._known = known

    @functools.cached_property
    def database(self) -> sqlite3.Connection:
        database = sqlite3.connect("", isolation_level=None)
        database.executescript(_TABLES)
        database.create_function("key_of", 2, key_of, deterministic=True)
        self.__dict__["database"] = database
        if self._known is not None:
            self.fill("image", ((*row, key_of(row[0], row[-1])) for rows in self._known.rows() for row in rows.rows()))
        return database

    def __enter__(self) -> Listing:
        return self

    def __exit__(self, *error: object) -> None:
        if "database" in self.__dict__:
            self.database.close()
        if self._known is not None:
            self._known.close()

    def __len__(self) -> int:
        return sum(rows.height for rows in self.rows())

    @functools.cached_property
    def digest(self) -> str:
        """Of all paths and contents."""
        running = hashlib.sha256()
        for rows in self.rows():
            running.update(
                rows.select(_joined(pl.col("path"), pl.col("sha256"))).to_series().str.join("").item().encode()
            )
        return running.hexdigest()

    def rows(self) -> Iterator[pl.DataFrame]:
        """Path, stamp, size, container, place and sha256 of the images, by path, some thousands at a time."""
        if self._known is not None:
            yield from self._known.rows()
            return
        found = self.database.execute("SELECT path, stamp, size, container, place, sha256 FROM image ORDER BY path")
        while some := found.fetchmany(_ROWS):
            yield pl.DataFrame(some, _STAT_SCHEMA, orient="row")

    def one(self, query: str, *values: Any) -> Any:
        """The single value of a query."""
        return self.database.execute(query, values).fetchone()[0]

    def fill(self, table: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Add rows to a table; of rows with the same key the first counts."""
        rows = iter(rows)
        while some := list(islice(rows, _ROWS)):
            marks = ", ".join("?" * len(some[0]))
            with self.database:
                self.database.execute("BEGIN")
                self.database.executemany(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", some)

    def scan(self, source: Source) -> None:
        """List the source. What is as the last run knew it has its digest; containers that are so are not opened.

        Raises:
            DataError: see :meth:`~storage.sources.Source.scan`.
        """
        containers: list[Entry] = []

        def found() -> Iterator[Entry]:
            for entry in source.files():
                if entry.container:
                    containers.append(entry)
                else:
                    yield entry
            for each in containers:
                if not self._take_over(each):
                    yield from source.members(each)

        self.fill(
            "image", ((each.path, each.stamp, each.size, each.container, each.place, None, None) for each in found())
        )
        if self.one("SELECT EXISTS (SELECT 1 FROM known)"):
            self.database.execute(
                "UPDATE image SET sha256 = "
                "(SELECT sha256 FROM known WHERE known.path = image.path AND known.stamp = image.stamp)"
            )
            self.database.execute("UPDATE image SET key = key_of(path, sha256) WHERE sha256 IS NOT NULL")

    def new(self) -> Iterator[Entry]:
        """The images without a digest, by path. They may be given one meanwhile."""
        page = """
            SELECT path, stamp, size, container, place FROM image
            WHERE sha256 IS NULL AND path > ? ORDER BY path LIMIT ?
        """
        last = ""
        while rows := self.database.execute(page, (last, _ROWS)).fetchall():
            last = rows[-1][0]
            yield from (Entry(*row) for row in rows)

    def new_count(self) -> int:
        """How many :meth:`new` gives."""
        count: int = self.database.execute("SELECT count(*) FROM image WHERE sha256 IS NULL").fetchone()[0]
        return count

    def is_known(self) -> bool:
        """Whether the last run knew exactly this."""
        same = """
            SELECT count(*) FROM image JOIN known USING (path)
            WHERE image.stamp = known.stamp AND nullif(image.sha256, ?) IS known.sha256
        """
        counts = [self.one("SELECT count(*) FROM known"), self.one(same, UNREADABLE)]
        return counts == [len(self)] * 2

    def _take_over(self, container: Entry) -> bool:
        """Take the members of a container from what is known, if it is as it was then."""
        self.database.execute("CREATE INDEX IF NOT EXISTS known_container ON known (container)")
        found = self.database.execute(
            "SELECT stamp, min(place) FROM known WHERE container = ? GROUP BY stamp", (container.container,)
        ).fetchall()
        if len(found) != 1 or found[0][0] != container.stamp or found[0][1] < 0:  # a broken one is looked at again
            return False
        self.database.execute(
            "INSERT INTO image SELECT path, stamp, size, container, place, NULL, NULL FROM known WHERE container = ?",
            (container.container,),
        )
        return True


class StatCache:
    """The last listing of a source, so that what did not change is not read again. Losing it costs only time.

    Args:
        key: of the object that holds it.
    """

    def __init__(self, objects: ObjectStore, key: str) -> None:
        self._objects, self._key = objects, key

    def digested(
        self,
        source: Source,
        limits: ImageLimits,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Listing:
        """What the source holds now, all of it with a digest; what is new or changed is read.

        What cannot be read, or is larger than the limit, has the digest :data:`UNREADABLE`.

        Args:
            on_progress: called with the images that were read, and all that are to be.

        Raises:
            DataError: see :meth:`~storage.sources.Source.scan`.
        """
        changed = self._few_changes(source, limits)
        if changed is not None:
            listing = Listing(changed)
            if changed.any:
                self._write(listing)
            return listing
        listing = Listing()
        try:
            listing.fill("known", (row for rows in self._read() for row in rows.rows()))
            listing.scan(source)
            kept, read, new = time.monotonic(), 0, listing.new_count()
            on_progress(read, new)
            for some in _contents(source, limits, listing.new()):
                read += len(some)
                on_progress(read, new)
                with listing.database:
                    listing.database.execute("BEGIN")
                    listing.database.executemany(
                        "UPDATE image SET sha256 = ?1, size = ?2, key = key_of(path, ?1) WHERE path = ?3", some
                    )
                if time.monotonic() - kept > _KEEP_EVERY:  # a killed run does not read all of it again
                    self._write(listing)
                    kept = time.monotonic()
            if not listing.is_known():
                self._write(listing)
        except BaseException:
            listing.__exit__()
            raise
        return listing

    def _few_changes(self, source: Source, limits: ImageLimits) -> Changed | None:
        """How the source changed since the last listing; None if in many places, or if there is no sound listing."""
        changed = Changed(self._copy)
        try:
            found = changed.look(source)
            if found is not None:
                changed.add(
                    found,
                    {path: (digest, size) for some in _contents(source, limits, found) for digest, size, path in some},
                )
                return changed
        except BaseException:
            changed.close()
            raise
        changed.close()
        return None

    def _read(self) -> Iterator[pl.DataFrame]:
        with self._copy() as file:
            yield from _known_rows(file)

    def _copy(self) -> IO[bytes]:
        """A copy of the last listing on the local disk, that nobody replaces; empty if there is none."""
        file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
        try:
            with (
                tempfile.TemporaryDirectory() as folder,
                self._objects.fetch(self._key, Path(folder)).open("rb") as last,
            ):
                shutil.copyfileobj(last, file)
        except NotFound:
            pass
        except StorageError as error:
            log.warning("the stat cache is unreadable and starts afresh: %s", error)
        return file

    def _write(self, listing: Listing) -> None:
        """Replace the cache by this listing; what could not be read is tried again next time."""
        import pyarrow.parquet as pq

        out = io.BytesIO()
        readable = pl.when(pl.col("sha256") != UNREADABLE).then("sha256")
        with pq.ParquetWriter(out, pl.DataFrame(schema=_STAT_SCHEMA).to_arrow().schema, compression="zstd") as file:
            for rows in listing.rows():
                # By way of polars: handed Python objects, Arrow would import pandas.
                file.write_table(rows.with_columns(sha256=readable).to_arrow())
        self._objects.put(self._key, out.getvalue())


class Changed:
    """What a source holds, as the last listing plus what is new minus what is gone. In memory are the new ones alone,
    and eight bytes of each image file.

    Args:
        copy: opens the last listing.
    """

    def __init__(self, copy: Callable[[], IO[bytes]]) -> None:
        self._file = copy()
        self._containers: set[str] = set()
        """Those that are as they were."""
        self._files = np.zeros(0, np.uint64)
        """Image files that are as they were, by path and stamp; sorted."""
        self._new = pl.DataFrame(schema=_STAT_SCHEMA)
        self.any = False
        """Whether anything is new or gone."""

    def close(self) -> None:
        self._file.close()

    def look(self, source: Source) -> list[Entry] | None:
        """The new and changed images; None if they are many, or if the last listing is not sound.

        Raises:
            DataError: see :meth:`~storage.sources.Source.scan`.
        """
        known = self._look_back()
        if known is None:
            return None
        files, containers = known
        seen = np.zeros(len(files), bool)
        new: list[Entry] = []
        for some in _some(source.files()):
            loose = [entry for entry in some if not entry.container]
            hashes = _hashes(
                pl.DataFrame([entry[:2] for entry in loose], {"path": pl.String, "stamp": pl.Int64}, orient="row")
            )
            place = np.minimum(np.searchsorted(files, hashes), max(len(files) - 1, 0))
            same = files[place] == hashes if len(files) else np.zeros(len(hashes), bool)
            seen[place[same]] = True
            new += [entry for entry, is_same in zip(loose, same.tolist(), strict=True) if not is_same]
            for entry in some:
                if entry.container and containers.get(entry.path) == entry.stamp:
                    self._containers.add(entry.path)
                elif entry.container:
                    new += islice(source.members(entry), _FEW + 1)
            if len(new) > _FEW:
                return None
        self._files = files[seen]
        self.any = bool(new) or not seen.all() or self._containers != containers.keys()
        return new

    def add(self, new: Sequence[Entry], contents: Mapping[str, tuple[str, int]]) -> None:
        """Take in what is new.

        Args:
            contents: path -> digest and size.
        """
        rows = [
            (each.path, each.stamp, contents[each.path][1], each.container, each.place, contents[each.path][0])
            for each in new
        ]
        self._new = (
            pl.DataFrame(rows, _STAT_SCHEMA, orient="row")
            .unique("path", keep="first", maintain_order=True)
            .sort("path")
        )

    def rows(self) -> Iterator[pl.DataFrame]:
        """As :meth:`Listing.rows`."""
        done = 0
        for rows in _known_rows(self._file):
            if not rows.height:
                continue
            loose = pl.col("container") == ""
            same = pl.Series(are_in(_hashes(rows), self._files))
            kept = rows.filter((loose & same) | (~loose & pl.col("container").is_in(self._containers)))
            upto = int(self._new["path"].search_sorted(rows["path"][-1], side="right"))
            yield pl.concat([kept, self._new[done:upto]]).sort("path") if upto > done else kept
            done = upto
        if done < self._new.height:
            yield self._new[done:]

    def _look_back(self) -> tuple[np.ndarray, dict[str, int]] | None:
        """Image files, as sorted hashes of path and stamp, and containers with their stamp, of the last listing."""
        files, containers, broken, last = [], dict[str, int](), set[str](), ""
        for rows in _known_rows(self._file):
            if not rows.height:
                continue
            if rows["sha256"].null_count() or not rows["path"].is_sorted() or rows["path"][0] < last:
                return None
            last = rows["path"][-1]
            loose = pl.col("container") == ""
            files.append(_hashes(rows.filter(loose)))
            inside = (
                rows.filter(~loose)
                .group_by("container")
                .agg(pl.col("stamp").first(), different=pl.col("stamp").n_unique(), place=pl.col("place").min())
            )
            for container, stamp, different, place in inside.iter_rows():
                if different > 1 or place < 0 or containers.setdefault(container, stamp) != stamp:
                    broken.add(container)
        if not last:
            return None
        sound = {container: stamp for container, stamp in containers.items() if container not in broken}
        return np.sort(np.concatenate(files)), sound


def chunks(found: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Entries in pieces of work that are neither tiny nor large in memory."""
    chunk: list[Entry] = []
    size = 0
    for entry in found:
        chunk.append(entry)
        size += entry.size if entry.size >= 0 else _CHUNK_BYTES // 8
        if len(chunk) == CHUNK or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def ahead(pool: Executor, work: Callable[[T], U], items: Iterable[T], most: int) -> Iterator[U]:
    """``map`` in threads, in order, with at most so many items under way."""
    waiting: deque[Future[U]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def identities(rows: pl.DataFrame) -> np.ndarray:
    """A number for path and content of each row, ``(rows,)`` uint64, the same in all of a process."""
    return rows.select(_joined(pl.col("path"), pl.col("sha256")).hash()).to_series().to_numpy()


def _hashes(rows: pl.DataFrame) -> np.ndarray:
    """A number for path and stamp of each row, ``(rows,)`` uint64."""
    return rows.select(_joined(pl.col("path"), pl.col("stamp").cast(pl.String)).hash()).to_series().to_numpy()


def _joined(*columns: pl.Expr) -> pl.Expr:
    return pl.concat_str([each for column in columns for each in (column, pl.lit("\0"))])


def _some(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    entries = iter(entries)
    while some := list(islice(entries, _ROWS)):
        yield some


def _known_rows(file: IO[bytes]) -> Iterator[pl.DataFrame]:
    """The rows of a listing that was kept; none, with a word in the log, from where it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not file.seek(0, os.SEEK_END):
        return
    try:
        with pq.ParquetFile(pa.PythonFile(file, mode="r")) as table:
            for batch in table.iter_batches(_BATCH, use_threads=False):
                yield pl.DataFrame(batch).select(pl.col(name).cast(kind) for name, kind in _STAT_SCHEMA.items())
    except (pa.ArrowException, pl.exceptions.PolarsError, OSError, ValueError) as error:
        log.warning("the stat cache is unreadable and starts afresh: %s", error)


def _contents(source: Source, limits: ImageLimits, new: Iterable[Entry]) -> Iterator[list[tuple[str, int, str]]]:
    """Digest, size and path of each image, in order, some thousands at a time."""
    # Of a local disk one thread reads as fast as Python can take it, and several only wait for each other.
    threads = 1 if source.is_local else REMOTE_THREADS

    def work(chunk: list[Entry]) -> list[tuple[str, int, str]]:
        found = []
        for entry, data in zip(chunk, source.read_all(chunk, limits), strict=True):
            if isinstance(data, ImageRejected):
                log.warning("%s: %s", entry.path, data)
                found.append((UNREADABLE, entry.size, entry.path))
            else:
                found.append((sha256(data), len(data), entry.path))
        return found

    with ThreadPoolExecutor(threads) as pool:
        rows = chain.from_iterable(ahead(pool, work, chunks(new), 2 * threads))
        while some := list(islice(rows, _ROWS)):
            yield some
