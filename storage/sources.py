"""Where images come from: folders and buckets, listed and digested without decoding anything."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import fsspec
import polars as pl

from storage.errors import DataError, StorageError
from storage.fingerprint import sha256
from storage.images import SUFFIXES
from storage.objects import ObjectStore
from storage.tables import parquet, read_parquet

log = logging.getLogger("latteflow.storage")
_STAT_SCHEMA = {"path": pl.String, "stamp": pl.String, "sha256": pl.String}


@dataclass(frozen=True)
class Entry:
    """One file of a source: its path below the source (POSIX, printable) and how to tell that it changed."""

    path: str
    stamp: str
    """Size and modification time, or the bucket's entity tag. Equal stamp: not read again."""
    location: str
    """Path in the source's file system."""


@dataclass(frozen=True)
class Image:
    """An entry whose content is known."""

    entry: Entry
    sha256: str

    @property
    def key(self) -> str:
        """Unique and stable name: 20 hexadecimal characters of a digest over path and content."""
        return sha256(f"{self.entry.path}\0{self.sha256}".encode())[:20]


class Source:
    """Images below one or more URLs (a local folder or any fsspec URL)."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = list(urls)
        self._systems: list[tuple[Any, str]] = []
        for url in self.urls:
            try:
                self._systems.append(fsspec.url_to_fs(url, use_listings_cache=False))
            except (ValueError, ImportError) as error:
                raise StorageError(f"source {url!r} cannot be opened: {error}") from error

    def scan(self) -> list[Entry]:
        """Every file that is named like an image, sorted by path.

        Raises:
            DataError: a source does not exist or holds no image.
        """
        entries: list[Entry] = []
        for index, (url, (fs, root)) in enumerate(zip(self.urls, self._systems, strict=True)):
            try:
                if not fs.exists(root):
                    raise DataError(f"source {url!r} does not exist")
                found = fs.find(root, detail=True)
            except OSError as error:
                raise StorageError(f"source {url!r} cannot be listed: {error}") from error
            prefix = f"{index}/" if len(self.urls) > 1 else ""
            images = [
                Entry(prefix + _printable(location[len(root) :].lstrip("/")), _stamp(info), location)
                for location, info in found.items()
                if PurePosixPath(location).suffix.lower() in SUFFIXES and not _hidden(location[len(root) :])
            ]
            if not images:
                raise DataError(
                    f"source {url!r} holds no image ({len(found)} other files); "
                    f"names must end in one of {', '.join(sorted(SUFFIXES))}"
                )
            entries += images
        return sorted(entries, key=lambda entry: entry.path)

    def read(self, entry: Entry) -> bytes:
        """The file's bytes.

        Raises:
            OSError: it vanished or may not be read.
        """
        fs = self._systems[int(entry.path.split("/", 1)[0]) if len(self.urls) > 1 else 0][0]
        return bytes(fs.cat_file(entry.location))

    def digest(self, entries: Iterable[Entry], cache: StatCache, threads: int = 8) -> list[Image]:
        """Content digests, in the order of the entries.

        Files whose stamp did not change are not read; unreadable ones get the digest of no bytes, and are quarantined
        when they are packed.
        """
        entries = list(entries)

        def one(entry: Entry) -> Image:
            known = cache.get(entry)
            if known is None:
                try:
                    known = sha256(self.read(entry))
                except OSError as error:
                    log.warning("%s cannot be read: %s", entry.path, error)
                    return Image(entry, sha256(b""))
            return Image(entry, known)

        with ThreadPoolExecutor(threads) as pool:
            images = list(pool.map(one, entries))
        cache.keep(images)
        return images


class StatCache:
    """Digests by path and stamp, so that an unchanged folder is not read again. Losing it costs only time."""

    def __init__(self, objects: ObjectStore, key: str) -> None:
        self._objects, self._key = objects, key
        self._known: dict[tuple[str, str], str] = {}
        try:
            if objects.exists(key):
                frame = read_parquet(objects.read(key))
                self._known = {(path, stamp): digest for path, stamp, digest in frame.select(*_STAT_SCHEMA).iter_rows()}
        except (pl.exceptions.PolarsError, StorageError) as error:
            log.warning("the stat cache is unreadable and starts afresh: %s", error)

    def get(self, entry: Entry) -> str | None:
        return self._known.get((entry.path, entry.stamp))

    def keep(self, images: Sequence[Image]) -> None:
        """Replace the cache by what is there now."""
        unreadable = sha256(b"")
        now = {(image.entry.path, image.entry.stamp): image.sha256 for image in images if image.sha256 != unreadable}
        if now == self._known:
            return
        rows = [(path, stamp, digest) for (path, stamp), digest in now.items()]
        self._objects.put(self._key, parquet(pl.DataFrame(rows, schema=_STAT_SCHEMA, orient="row")))
        self._known = now


def _stamp(info: dict[str, Any]) -> str:
    tag = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("mtime") or info.get("created")
    return f"{info.get('size')}:{tag}"


def _printable(path: str) -> str:
    """A file name that is not UTF-8 keeps its odd bytes as ``\\xNN``, so that Parquet and JSON can carry it."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _hidden(relative: str) -> bool:
    # "._photo.jpg" and ".thumbnails/" are what desktops leave behind, not pictures of the domain.
    return any(part.startswith(".") for part in relative.strip("/").split("/"))
