"""Objects under keys in any fsspec file system, created atomically and at most once.

Everything above this module rests on one operation, :meth:`ObjectStore.put_if_absent`: after it returns, the key
holds one writer's complete bytes, whoever else tried at the same time and whoever was killed half-way. A folder does it
with hard links, a bucket with a conditional request (``If-None-Match: *``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from latteflow.storage.drivers import Kind, answer, open_fs, passing, said, sort, told
from latteflow.storage.errors import NotFound, StorageError
from latteflow.storage.fingerprint import sha256, sha256_file
from latteflow.storage.retry import retried

T = TypeVar("T")

# File systems whose fsspec driver passes mode="create" on to the server as a precondition.
_CONDITIONAL = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
_S3 = ("s3://", "s3a://")
_TEMPORARY = ".tmp-"
_LEFTOVER_SECONDS = 86_400
_MARKER = ".latteflow"
_WRITE = "latteflow-write"
# An S3 server takes one request of this size whole or not at all. Larger objects are uploaded in parts, and not every
# server checks the precondition of those under a lock; they are all named by content, so that this does no harm.
_ONE_REQUEST = 256 << 20
_CHUNK = 64 << 20
_CHUNKS_AT_ONCE = 4
_READS = 5
_WRITERS = 4
_ADVICE = (
    "so two workers could overwrite each other; use another server, or set `single_writer: true` if only one "
    "process writes"
)
_memory_lock = threading.Lock()


@dataclass(frozen=True)
class Stored:
    """Size of an object in bytes, and when it was written, in seconds since 1970 by the store's clock."""

    bytes: int
    modified: float


class ObjectStore:
    """Keys are relative paths with ``/``; values are bytes.

    Args:
        url: any fsspec URL or a local folder, for example ``runs/store`` or ``s3://bucket/latteflow``.
        single_writer: accept a file system without atomic create. Only for one process at a time.
        patience: seconds for which a remote store may fail (no connection, 500, 503, cut answers) before the
            operation gives up; every operation has this budget for itself.
        options: passed to the fsspec file system (endpoint, credentials, ...).

    Raises:
        StorageError: the URL's file system is unknown, or has no atomic create and ``single_writer`` is off.
    """

    def __init__(self, url: str, *, single_writer: bool = False, patience: float = 60.0, **options: Any) -> None:
        self._s3 = url.startswith(_S3)
        if self._s3:
            # We try again ourselves, within our patience and with a word in the log. One stream for each object saves
            # the driver a request to learn the size before each read.
            options["config_kwargs"] = {"retries": {"total_max_attempts": 1}, **(options.get("config_kwargs") or {})}
            options = {"max_concurrency": 1, **options}
        self._fs, root = open_fs(url, "store", **options)
        self.url = url.rstrip("/")
        self._root = root.rstrip("/")
        self._patience = patience
        self._single_writer = single_writer
        protocol = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        self._local = isinstance(self._fs, LocalFileSystem)
        self._memory = isinstance(self._fs, MemoryFileSystem)
        self._proved = self._local or self._memory or single_writer
        self._swept: set[Path] = set()
        if not (self._proved or protocol & _CONDITIONAL):
            raise StorageError(
                f"store {url!r}: {sorted(protocol)[0]} has no atomic create, so two workers could overwrite each "
                "other; use a local folder, s3, gs or abfs, or set `single_writer: true` if only one process writes"
            )

    def path(self, key: str) -> str:
        """Where the object lives, as a path of the underlying file system (a local path for a folder)."""
        return f"{self._root}/{key}"

    def address(self, key: str) -> str:
        """The object's full URL, which plain fsspec, polars or webdataset open."""
        return self._fs.unstrip_protocol(self.path(key)) if not self._local else self.path(key)

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def size(self, key: str) -> int | None:
        """Size of the object in bytes, as the store says now; None if there is none."""
        try:
            info = self._do("look for", key, lambda: self._fs.info(self.path(key)))
        except NotFound:
            return None
        return None if info["type"] == "directory" else int(info["size"] or 0)

    def read(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        """The object's bytes, or those in ``[start, end)``.

        Raises:
            NotFound: no such object.
        """
        if self._local and start is None and end is None:  # fsspec takes five times as long for a small one
            return self._do("read", key, Path(self.path(key)).read_bytes)
        return bytes(self._do("read", key, lambda: self._fs.cat_file(self.path(key), start=start, end=end)))

    def fetch(self, key: str, folder: Path) -> Path:
        """A local file with the object's bytes: the object itself in a local store, else a copy in ``folder``."""
        if self._local:
            if not Path(self.path(key)).exists():
                raise NotFound(f"{self.address(key)} does not exist")
            return Path(self.path(key))
        target = folder / key.replace("/", "_")
        self._do("fetch", key, lambda: self._fs.get_file(self.path(key), str(target)))
        return target

    def read_sure(self, key: str, good: Callable[[bytes], bool]) -> tuple[bytes, bool]:
        """The object's bytes, and whether they are good; they are read again while that may be the connection's fault.

        Raises:
            NotFound: no such object.
            StorageError: every read gave something else, so that nobody knows what the store holds.
        """
        return self._sure(key, lambda: self.read(key), good, lambda data: (len(data), sha256(data)))

    def fetch_sure(self, key: str, folder: Path, good: Callable[[Path], bool]) -> tuple[Path, bool]:
        """As :meth:`read_sure`, as a local file (see :meth:`fetch`)."""
        return self._sure(
            key, lambda: self.fetch(key, folder), good, lambda path: (path.stat().st_size, sha256_file(path))
        )

    def listing(self, prefix: str) -> dict[str, Stored]:
        """Every object below ``prefix`` by its key, in one listing, with the unfinished writes of a local folder."""
        if self._local:
            return self._do(
                "list", prefix, lambda: dict(_files(Path(self.path(prefix)), f"{prefix}/" if prefix else ""))
            )
        try:
            found = self._do("list", prefix, lambda: self._fs.find(self.path(prefix), detail=True))
        except NotFound:
            return {}
        skip = len(self._root) + 1
        return {
            self._strip(path)[skip:]: Stored(int(info["size"] or 0), _modified(info)) for path, info in found.items()
        }

    def sizes(self, prefix: str) -> dict[str, int]:
        """Key and size in bytes of every object below ``prefix``, in one listing. Unfinished writes are left out."""
        found = self.listing(prefix)
        return {key: stored.bytes for key, stored in found.items() if _visible(key.rsplit("/", 1)[-1])}

    def names(self, prefix: str) -> list[str]:
        """Sorted names directly below ``prefix`` (folders and objects), in one listing."""
        try:
            found = self._do("list", prefix, lambda: self._fs.ls(self.path(prefix), detail=False))
        except NotFound:
            return []
        return sorted(name for name in {path.rstrip("/").rsplit("/", 1)[-1] for path in found} if _visible(name))

    def put_if_absent(self, key: str, data: bytes | Path) -> bool:
        """Create the object from bytes or a local file, unless the key exists.

        Returns:
            True if this call created it, False if the key was already there (its bytes are untouched).
        """
        if self._local:
            return self._do("write", key, lambda: self._link(Path(self.path(key)), data))
        if not self._proved:
            self._prove()
        name = uuid.uuid4().hex

        def create() -> bool:
            try:
                self._create(key, data, name)
            except FileExistsError:
                return self._is_ours(key, data, name)
            return True

        return self._do("write", key, create)

    def put(self, key: str, data: bytes) -> None:
        """Create or replace an object; in a folder or bucket, readers see the old bytes or the new ones.

        Of two writers the last one wins, unnoticed: for statistics, caches and copies, and for records made anew.
        """

        def replace() -> None:
            if self._local:
                target = Path(self.path(key))
                with self._temporary(target, data) as temporary:
                    os.replace(temporary, target)
            else:
                self._fs.pipe_file(self.path(key), data)

        self._do("write", key, replace)

    def prove(self) -> None:
        """Show that of several writers of one key one creates it and the others hear of it; the object goes again.

        Of a store with a single writer only that it can be written, read and deleted.

        Raises:
            StorageError: it cannot be used, or two writers could overwrite each other.
        """
        key = f"{_MARKER}-{uuid.uuid4().hex}"
        words = [f"writer {number}".encode() for number in range(1 if self._single_writer else _WRITERS)]
        try:
            with ThreadPoolExecutor(len(words)) as pool:
                created = [*pool.map(lambda word: self.put_if_absent(key, word), words)]
            created.append(self.put_if_absent(key, b"too late"))
            kept = self.read(key)
        finally:
            with contextlib.suppress(StorageError):  # what was wrong before is worth more
                self.delete(key)
        if created.count(True) != 1 or kept != words[created.index(True)]:
            raise StorageError(
                f"store {self.url!r} let {created.count(True)} of {len(created)} writers create one object, {_ADVICE}"
            )

    def delete(self, key: str) -> None:
        """Remove the object; a missing one is fine."""
        with contextlib.suppress(NotFound):
            self._do("delete", key, lambda: self._fs.rm_file(self.path(key)))

    # A local folder.

    def _link(self, target: Path, data: bytes | Path) -> bool:
        # A hard link either makes the complete file appear under its name or fails because the name exists.
        if target.exists():
            return False
        with self._temporary(target, data) as temporary:
            try:
                os.link(temporary, target)
            except FileExistsError:
                # NFS repeats a request whose answer was lost: the second link, then, is the file's own.
                return temporary.stat().st_nlink > 1
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                    raise
                if not self._single_writer:
                    raise StorageError(
                        f"{target.parent} has no hard links ({error.strerror}), so two workers could overwrite each "
                        "other; put the store on another file system, or set `single_writer: true` if only one "
                        "process writes"
                    ) from error
                os.replace(temporary, target)
            _sync_folder(target.parent)
            return True

    @contextlib.contextmanager
    def _temporary(self, target: Path, data: bytes | Path) -> Iterator[Path]:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            with temporary.open("xb") as out:
                if isinstance(data, Path):
                    with data.open("rb") as source:
                        shutil.copyfileobj(source, out, 1 << 20)
                else:
                    out.write(data)
                out.flush()
                os.fsync(out.fileno())
            if target.parent not in self._swept:
                self._swept.add(target.parent)
                _sweep(target.parent, temporary)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    # Memory and buckets.

    def _create(self, key: str, data: bytes | Path, name: str) -> None:
        """One attempt to create the object; raises FileExistsError if it is there. ``name`` is of this very write."""
        if self._memory:
            with _memory_lock:
                self._create_checked(key, data)
        elif self._single_writer:
            self._create_checked(key, data)
        else:
            self._create_conditional(key, data, name)

    def _create_checked(self, key: str, data: bytes | Path) -> None:
        if self._fs.exists(self.path(key)):
            raise FileExistsError(key)
        self._fs.pipe_file(self.path(key), _bytes(data))

    def _create_conditional(self, key: str, data: bytes | Path, name: str) -> None:
        how: dict[str, Any] = {"mode": "create"}
        if self._s3:
            size = data.stat().st_size if isinstance(data, Path) else len(data)
            how["chunksize"] = max(size, 1) if size < _ONE_REQUEST else _CHUNK
            how["max_concurrency"] = _CHUNKS_AT_ONCE
            how["Metadata"] = {_WRITE: name}
        try:
            if self._s3 and isinstance(data, Path):
                self._fs.put_file(str(data), self.path(key), **how)
            else:
                self._fs.pipe_file(self.path(key), _bytes(data), **how)
        except Exception as error:
            status, code = answer(error)
            # The upload may be gone because it was completed, without our hearing of it.
            if status == 412 or (code == "NoSuchUpload" and self._fs.exists(self.path(key))):
                raise FileExistsError(key) from error
            if code == "NoSuchUpload":
                raise TimeoutError(f"the upload of {key} expired") from error
            if not (self._s3 or sort(error) is None or passing(error)) and self._fs.exists(self.path(key)):
                raise FileExistsError(key) from error  # other drivers have other words for a failed precondition
            raise

    def _is_ours(self, key: str, data: bytes | Path, name: str) -> bool:
        """Whether the object that is there was made by this very write.

        A connection can break between the deed and the answer; then we, the driver or the HTTP library below it (which
        repeats a PUT unasked) try again and find our own object.
        """
        if self._memory:
            return False
        if self._s3:
            return bool(self._fs.metadata(self.path(key)).get(_WRITE) == name)
        return bool(self._fs.cat_file(self.path(key)) == _bytes(data))  # the best that is known of other stores

    def _prove(self) -> None:
        """Find out, before the first write, whether the server keeps its word about preconditions.

        Raises:
            StorageError: it does not know them, or overwrites in spite of them.
        """

        def create() -> bool:
            try:
                self._create_conditional(_MARKER, b"objects here are created conditionally\n", uuid.uuid4().hex)
            except FileExistsError:
                return False
            except Exception as error:
                if answer(error)[0] == 501:
                    raise StorageError(
                        f"store {self.url!r} has no conditional create ({said(error)}), {_ADVICE}"
                    ) from error
                raise
            return True

        if self._do("write", _MARKER, create) and self._do("write", _MARKER, create):
            raise StorageError(f"store {self.url!r} ignores the precondition of a conditional create, {_ADVICE}")
        self._proved = True

    def _sure(
        self, key: str, load: Callable[[], T], good: Callable[[T], bool], measure: Callable[[T], tuple[int, str]]
    ) -> tuple[T, bool]:
        # An answer may be cut or mangled on its way: bad bytes are believed only when two reads agree, with each other
        # and with the size that the store tells.
        before = (0, "")
        for _ in range(_READS):
            loaded = load()
            if good(loaded):
                return loaded, True
            found = measure(loaded)
            if found == before and found[0] == self.size(key):
                return loaded, False
            before = found
        raise StorageError(
            f"{self.address(key)}: read {_READS} times and never as it was written (at last {before[0]} bytes, of "
            f"{self.size(key)} in the store); it was left alone: check the connection to the store"
        )

    def _strip(self, path: str) -> str:
        return str(self._fs._strip_protocol(path))

    def _do(self, action: str, key: str, call: Callable[[], T]) -> T:
        """Call, trying again where the store is remote, and explain what cannot be done."""
        remote = not (self._local or self._memory)
        try:
            return retried(call, self._patience, f"{action} {self.address(key)}") if remote else call()
        except Exception as error:
            kind = sort(error)
            if kind is None:
                raise
            if kind is not Kind.MISSING:
                raise StorageError(f"cannot {action} {self.address(key)}: {self._advice(kind, error)}") from error
            if action == "write" and remote:
                raise StorageError(f"cannot write {self.address(key)}: {said(error)}; create it first") from error
            raise NotFound(f"{self.address(key)} does not exist") from error

    def _advice(self, kind: Kind, error: Exception) -> str:
        advice = {
            errno.ENOSPC: "the disk is full: free some space and run again; finished parts are kept",
            errno.EDQUOT: "the disk quota is used up: free some space and run again; finished parts are kept",
            errno.EACCES: "permission denied: check the owner of the folder",
            errno.EROFS: "the file system is read-only: choose another `store` in the domain file",
            errno.EEXIST: "a file is where a folder should be: choose another `store` in the domain file",
            errno.ENOTDIR: "a file is where a folder should be: choose another `store` in the domain file",
        }.get(getattr(error, "errno", None) or 0)
        if advice or self._local or self._memory:
            return advice or said(error)
        if kind in (Kind.BUSY, Kind.NETWORK):
            return (
                f"{told(error)}; tried for {self._patience:.0f} s: check the server and the network, and run again; "
                "finished parts are kept"
            )
        return told(error)


def _files(folder: Path, prefix: str) -> Iterator[tuple[str, Stored]]:
    """Every file below a folder, its path below it behind the prefix. fsspec takes ten times as long."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.is_dir():
            yield from _files(Path(entry.path), f"{prefix}{entry.name}/")
        else:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                found = entry.stat()
                yield f"{prefix}{entry.name}", Stored(found.st_size, found.st_mtime)


def is_unfinished(key: str) -> bool:
    """Whether an object is what a writer of ours has not finished."""
    return re.fullmatch(rf"{re.escape(_TEMPORARY)}[0-9a-f]{{32}}", key.rsplit("/", 1)[-1]) is not None


def _visible(name: str) -> bool:
    return not name.startswith((_TEMPORARY, _MARKER))


def _modified(info: Mapping[str, Any]) -> float:
    """Each file system of fsspec has its own name for the time of the last write."""
    for name in ("mtime", "LastModified", "last_modified", "updated", "created"):
        found = info.get(name)
        if isinstance(found, datetime):
            return found.timestamp()
        if isinstance(found, int | float):
            return float(found)
        if isinstance(found, str):
            return datetime.fromisoformat(found).timestamp()
    return time.time()  # unknown: never old enough to be deleted


def _bytes(data: bytes | Path) -> bytes:
    return data.read_bytes() if isinstance(data, Path) else data


def _sweep(folder: Path, fresh: Path) -> None:
    """Remove what killed writers left behind: unfinished files a day away from one that was just written.

    Both times are by the file system's clock, so a machine whose own clock is wrong does no harm to the others.
    """
    now = fresh.stat().st_mtime
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            if is_unfinished(entry.name) and abs(now - entry.stat().st_mtime) > _LEFTOVER_SECONDS:
                Path(entry.path).unlink()


def _sync_folder(folder: Path) -> None:
    # Some shared file systems refuse to fsync a folder; the object itself is already on disk.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
