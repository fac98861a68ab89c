"""The file system below one URL: what lies there, and its bytes."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from fsspec.implementations.local import LocalFileSystem

from latteflow.storage.drivers import open_fs, passing, said, sort, told
from latteflow.storage.errors import DataError, StorageError
from latteflow.storage.fingerprint import sha256
from latteflow.storage.retry import retried

T = TypeVar("T")
_PATIENCE = 60.0
"""Seconds to go on trying a remote source for."""
_LOCAL_BUFFER, _REMOTE_BUFFER = 16 << 10, 4 << 20
_ODD = 0x9E3779B97F4A7C15


class File(NamedTuple):
    """A regular file: its name below the root as the file system has it, a number that changes with it, its size."""

    name: str
    stamp: int
    size: int


class Root:
    """A folder, a file, or a pattern with ``*``, local or in any fsspec file system.

    Raises:
        StorageError: the URL cannot be opened.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, path = open_fs(url, "source")
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self._path = path.rstrip("/")
        with self._explained():
            exists = self._fs.exists(self._path)
            self.is_file = exists and self._fs.isfile(self._path)
        self._is_folder = exists and not self.is_file
        if self._is_folder:
            self._base = self._path
        else:
            self._base = self._path.partition("*")[0].rpartition("/")[0]

    def find(self) -> Iterator[File]:
        """Every regular file that is not hidden, in no particular order.

        Raises:
            DataError: there is nothing under that URL.
            StorageError: it cannot be listed.
        """
        with self._explained():
            if self.is_local and self._is_folder:
                yield from _walk(self._base, "")
                return
            if self._is_folder:
                found = self._fs.find(self._path, detail=True)
            elif self.is_file:
                found = {self._path: self._fs.info(self._path)}
            else:
                found = self._fs.glob(self._path, detail=True) if "*" in self._path else {}
        if not found and not self._is_folder:
            raise DataError(f"source {self.url!r} does not exist")
        for location, info in found.items():
            name = location[len(self._base) :].lstrip("/")
            if is_hidden(name):
                continue
            if self.is_local and Path(location).is_file():
                yield _local(name, Path(location).stat())
            elif not self.is_local and info.get("type") == "file":
                yield File(name, _stamp(info), int(info.get("size") or 0))

    def open(self, name: str) -> BinaryIO:
        """The file, for reading at any place.

        Raises:
            StorageError: also later, when it is read: the source cannot be reached.
        """
        if self.is_local:
            return Path(f"{self._base}/{name}").open("rb", buffering=_LOCAL_BUFFER)
        size = self._remote(lambda: self._fs.size(f"{self._base}/{name}"))
        return io.BufferedReader(_Ranges(lambda start, end: self.read_range(name, start, end), size), _REMOTE_BUFFER)

    def read(self, name: str, size: int, most: int) -> bytes:
        """The whole file, which had ``size`` bytes; at most one byte more than ``most``, should it have grown.

        Raises:
            OSError: there is no such file, or it may not be read.
            StorageError: the source cannot be reached at all.
        """
        if not self.is_local:
            return bytes(self._remote(lambda: self._fs.cat_file(f"{self._base}/{name}")))
        # What was a file when it was listed may be a pipe by now: never wait for one.
        handle = os.open(f"{self._base}/{name}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            data = os.read(handle, size + 1)
            while 0 < len(data) != size and len(data) <= most:
                more = os.read(handle, min(most + 1 - len(data), 1 << 20))
                if not more:
                    break
                data += more
            return data
        finally:
            os.close(handle)

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """The bytes in ``[start, end)``, fewer at the end of the file."""
        if not self.is_local:
            return bytes(self._remote(lambda: self._fs.cat_file(f"{self._base}/{name}", start=start, end=end)))
        with Path(f"{self._base}/{name}").open("rb", buffering=0) as file:
            file.seek(start)
            return file.read(end - start)

    def _remote(self, call: Callable[[], T]) -> T:
        # A source that is out of reach is not a source full of bad images: it stops the run.
        try:
            return retried(call, _PATIENCE, f"reading {self.url}")
        except Exception as error:
            if sort(error) is None:
                raise
            if passing(error):
                raise StorageError(f"source {self.url!r} cannot be reached: {told(error)}") from error
            raise error if isinstance(error, OSError) else OSError(said(error)) from error

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if sort(error) is None:
                raise
            raise StorageError(
                f"source {self.url!r} cannot be listed: {said(error) if self.is_local else told(error)}"
            ) from error


class _Ranges(io.RawIOBase):
    """A remote file as one to seek in; fsspec's own gives up at the first failed request."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size, self._at = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        data = self._read(self._at, end) if self._at < end else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def is_hidden(name: str) -> bool:
    """``._photo.jpg`` and ``.thumbnails/`` are what desktops leave behind, not pictures of the domain."""
    return any(part.startswith(".") for part in name.split("/"))


def _walk(base: str, below: str) -> Iterator[File]:
    # Links to files are followed, links to folders are not: those could lead anywhere, and round in circles.
    folders = []
    with os.scandir(f"{base}/{below}") as found:
        for each in found:
            if each.name.startswith("."):
                continue
            if each.is_dir(follow_symlinks=False):
                folders.append(f"{below}{each.name}/")
            elif each.is_file():
                yield _local(below + each.name, each.stat())
    for folder in folders:
        yield from _walk(base, folder)


def _local(name: str, info: os.stat_result) -> File:
    # Size and time in 63 bits: a file that changed keeps its number by an accident of one in 2**63.
    return File(name, (info.st_size * _ODD + info.st_mtime_ns) % 2**63, info.st_size)


def _stamp(info: Mapping[str, Any]) -> int:
    tag = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("mtime") or info.get("created")
    return int(sha256(f"{info.get('size')}:{tag}".encode())[:15], 16)
