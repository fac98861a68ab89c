"""Objects under keys in any fsspec file system, created atomically and at most once.

Everything above this module rests on one operation, :meth:`ObjectStore.put_if_absent`: after it returns, the key
holds one writer's complete bytes, whoever else tried at the same time and whoever was killed half-way.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from storage.errors import NotFound, StorageError

# File systems whose fsspec driver passes mode="create" on to the server as a precondition.
_CONDITIONAL = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
_TEMPORARY = ".tmp-"
_memory_lock = threading.Lock()


class ObjectStore:
    """Keys are relative paths with ``/``; values are bytes that never change once written.

    Args:
        url: any fsspec URL or a local folder, for example ``runs/store`` or ``s3://bucket/latteflow``.
        single_writer: accept a file system without atomic create. Only for one process at a time.
        options: passed to the fsspec file system (endpoint, credentials, ...).

    Raises:
        StorageError: the URL's file system is unknown, or has no atomic create and ``single_writer`` is off.
    """

    def __init__(self, url: str, *, single_writer: bool = False, **options: object) -> None:
        try:
            self._fs, root = fsspec.url_to_fs(url, use_listings_cache=False, **options)
        except (ValueError, ImportError) as error:
            raise StorageError(f"store {url!r} cannot be opened: {error}") from error
        self.url = url.rstrip("/")
        self._root = root.rstrip("/")
        protocol = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        self._local = isinstance(self._fs, LocalFileSystem)
        self._memory = isinstance(self._fs, MemoryFileSystem)
        self._conditional = bool(protocol & _CONDITIONAL)
        if not (self._local or self._memory or self._conditional or single_writer):
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
        with self._explained("look for", key):
            return bool(self._fs.exists(self.path(key)))

    def read(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        """The object's bytes, or those in ``[start, end)``.

        Raises:
            NotFound: no such object.
        """
        with self._explained("read", key):
            return bytes(self._fs.cat_file(self.path(key), start=start, end=end))

    def fetch(self, key: str, folder: Path) -> Path:
        """A local file with the object's bytes: the object itself in a local store, else a copy in ``folder``."""
        if self._local:
            if not Path(self.path(key)).exists():
                raise NotFound(f"{self.address(key)} does not exist")
            return Path(self.path(key))
        target = folder / key.replace("/", "_")
        with self._explained("fetch", key):
            self._fs.get_file(self.path(key), str(target))
        return target

    def sizes(self, prefix: str) -> dict[str, int]:
        """Key and size in bytes of every object below ``prefix``, in one listing. Unfinished writes are left out."""
        with self._explained("list", prefix):
            try:
                found = self._fs.find(self.path(prefix), detail=True)
            except FileNotFoundError:
                return {}
        skip = len(self._root) + 1
        keys = {self._strip(path)[skip:]: int(info["size"] or 0) for path, info in found.items()}
        return {key: size for key, size in keys.items() if not key.rsplit("/", 1)[-1].startswith(_TEMPORARY)}

    def names(self, prefix: str) -> list[str]:
        """Sorted names directly below ``prefix`` (folders and objects), in one listing."""
        with self._explained("list", prefix):
            try:
                found = self._fs.ls(self.path(prefix), detail=False)
            except FileNotFoundError:
                return []
        names = {path.rstrip("/").rsplit("/", 1)[-1] for path in found}
        return sorted(name for name in names if not name.startswith(_TEMPORARY))

    def put_if_absent(self, key: str, data: bytes | Path) -> bool:
        """Create the object from bytes or a local file, unless the key exists.

        Returns:
            True if this call created it, False if the key was already there (its bytes are untouched).
        """
        with self._explained("write", key):
            if self._local:
                return self._link(Path(self.path(key)), data)
            body = data.read_bytes() if isinstance(data, Path) else data
            if self._memory:
                with _memory_lock:
                    return self._create_checked(key, body)
            if self._conditional:
                return self._create_conditional(key, body)
            return self._create_checked(key, body)

    def put(self, key: str, data: bytes) -> None:
        """Create or replace an object whose loss would cost nothing but time (statistics, a stat cache)."""
        with self._explained("write", key):
            if self._local:
                target = Path(self.path(key))
                with self._temporary(target, data) as temporary:
                    os.replace(temporary, target)
            else:
                self._fs.pipe_file(self.path(key), data)

    def delete(self, key: str) -> None:
        """Remove the object; a missing one is fine."""
        with self._explained("delete", key), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self.path(key))

    def _link(self, target: Path, data: bytes | Path) -> bool:
        # A hard link either makes the complete file appear under its name or fails because the name exists.
        if target.exists():
            return False
        with self._temporary(target, data) as temporary:
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
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
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _create_checked(self, key: str, body: bytes) -> bool:
        if self._fs.exists(self.path(key)):
            return False
        self._fs.pipe_file(self.path(key), body)
        return True

    def _create_conditional(self, key: str, body: bytes) -> bool:
        try:
            self._fs.pipe_file(self.path(key), body, mode="create")
        except FileExistsError:
            return False
        except OSError:
            # Drivers report a failed precondition in different ways; the key tells whether it was one.
            if self._fs.exists(self.path(key)):
                return False
            raise
        return True

    def _strip(self, path: str) -> str:
        return str(self._fs._strip_protocol(path))

    @contextlib.contextmanager
    def _explained(self, action: str, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NotFound(f"{self.address(key)} does not exist") from error
        except OSError as error:
            advice = {
                errno.ENOSPC: "the disk is full: free some space and run again; finished parts are kept",
                errno.EDQUOT: "the disk quota is used up: free some space and run again; finished parts are kept",
                errno.EACCES: "permission denied: check the owner of the folder or the credentials",
                errno.EROFS: "the file system is read-only: choose another `store` in the domain file",
            }.get(error.errno or 0, f"{type(error).__name__}: {error}")
            raise StorageError(f"cannot {action} {self.address(key)}: {advice}") from error


def _sync_folder(folder: Path) -> None:
    # Some shared file systems refuse to fsync a folder; the object itself is already on disk.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
