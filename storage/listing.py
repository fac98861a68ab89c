"""What a source holds, in a database on the local disk: memory does not grow with the number of images."""

from __future__ import annotations

import hashlib
import io
import logging
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeVar

import polars as pl

from latteflow.storage.errors import StorageError
from latteflow.storage.fingerprint import sha256
from latteflow.storage.images import ImageLimits, ImageRejected
from latteflow.storage.objects import ObjectStore
from latteflow.storage.sources import Entry, Source

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")
U = TypeVar("U")
log = logging.getLogger("latteflow.storage")

UNREADABLE = sha256(b"")
"""Stands for the content of an image that could not be read."""

REMOTE_THREADS = 16
"""Reads at once from a source behind a network, against its latency."""

CHUNK, _CHUNK_BYTES = 256, 4 << 20
_ROWS = 8192
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
    """

    def __init__(self) -> None:
        self.database = sqlite3.connect("", isolation_level=None)
        self.database.executescript(_TABLES)
        self.database.create_function("key_of", 2, key_of, deterministic=True)

    def __enter__(self) -> Listing:
        return self

    def __exit__(self, *error: object) -> None:
        self.database.close()

    def __len__(self) -> int:
        return int(self.one("SELECT count(*) FROM image"))

    @property
    def digest(self) -> str:
        """Of all paths and contents."""
        return digest_of(self.database.execute("SELECT path, sha256 FROM image ORDER BY path"))

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

    def digested(self, source: Source, limits: ImageLimits) -> Listing:
        """What the source holds now, all of it with a digest; what is new or changed is read.

        What cannot be read, or is larger than the limit, has the digest :data:`UNREADABLE`.

        Raises:
            DataError: see :meth:`~storage.sources.Source.scan`.
        """
        listing = Listing()
        try:
            listing.fill("known", self._read())
            listing.scan(source)
            kept = time.monotonic()
            for some in _contents(source, limits, listing.new()):
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

    def _read(self) -> Iterator[tuple[Any, ...]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            if self._objects.exists(self._key):
                with pq.ParquetFile(io.BytesIO(self._objects.read(self._key))) as file:
                    for batch in file.iter_batches(_ROWS, use_threads=False):
                        yield from pl.DataFrame(batch).select(pl.col(n).cast(k) for n, k in _STAT_SCHEMA.items()).rows()
        except (pa.ArrowException, pl.exceptions.PolarsError, OSError, ValueError, StorageError) as error:
            log.warning("the stat cache is unreadable and starts afresh: %s", error)

    def _write(self, listing: Listing) -> None:
        """Replace the cache by this listing; what could not be read is tried again next time."""
        import pyarrow.parquet as pq

        out = io.BytesIO()
        query = "SELECT path, stamp, size, container, place, nullif(sha256, ?) FROM image ORDER BY path"
        rows = listing.database.execute(query, (UNREADABLE,))
        with pq.ParquetWriter(out, _table([]).schema, compression="zstd") as file:
            while some := rows.fetchmany(_ROWS):
                file.write_table(_table(some))
        self._objects.put(self._key, out.getvalue())


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


def _table(rows: list[tuple[Any, ...]]) -> pa.Table:
    # By way of polars: handed Python objects, Arrow would import pandas.
    return pl.DataFrame(rows, _STAT_SCHEMA, orient="row").to_arrow()


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
