"""A local folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from latteflow.storage.errors import DataError, StorageError

_LEFTOVER_SECONDS = 86_400


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of ``folder`` when the body ends without an error.

    It lies beside it, hidden, so that taking its place is a rename. Until then whatever is under the name stays as it
    is; after an error nothing is left of the new one. What a killed process left is removed a day later, but for the
    folder whose place it was just taking, which gets its name back first.

    Raises:
        DataError: there can be no such folder: it is a file, a mount point, the working folder, or its parent is
            missing.
        StorageError: the disk is full, or the parent may not be written to.
    """
    check_place(folder)
    folder = folder.resolve()
    new, old = (folder.parent / f".{folder.name}.{kind}-{uuid.uuid4().hex}" for kind in ("new", "old"))
    try:
        new.mkdir()
        _put_back(folder)
        _sweep(folder, new)
        yield new
        _replace(folder, new, old)
    except OSError as error:
        raise StorageError(f"folder {folder} cannot be written: {error.strerror or error}") from error
    finally:
        for each in (new, old):
            shutil.rmtree(each, ignore_errors=True)


def check_place(folder: Path) -> None:
    """Whether a folder of that name could appear.

    Raises:
        DataError: as :func:`whole_folder`.
    """
    real = folder.resolve()
    if folder.is_symlink() and not folder.exists():
        raise DataError(f"folder {folder} is a link to nothing; give another")
    if real.exists() and not real.is_dir():
        raise DataError(f"{folder} is a file; give a folder")
    if not real.parent.is_dir():
        raise DataError(f"folder {folder}: there is no folder {real.parent} to put it into; create it first")
    if real == Path.cwd() or real.is_mount():
        what = "the working folder" if real == Path.cwd() else "a mount point"
        raise DataError(f"folder {folder} is {what}, which no other can take the place of; give a folder in it")


def carry(source: Path, target: Path, *, without: set[str]) -> None:
    """What lies in one folder, into another of the same file system beside what is there, by hard links where it can.

    Args:
        without: names that are left out, as are those that the target has.
    """
    for each in source.iterdir():
        place = target / each.name
        if each.name in without or place.exists():
            continue
        if each.is_dir() and not each.is_symlink():
            shutil.copytree(each, place, symlinks=True, copy_function=_link)
        else:
            _link(each, place)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without links
        shutil.copy2(source, target, follow_symlinks=False)


def _replace(folder: Path, new: Path, old: Path) -> None:
    if not folder.exists():
        new.rename(folder)
        return
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise


def _put_back(folder: Path) -> None:
    """Undo the first of two renames after which a process was killed."""
    old = _leftovers(folder, "old")
    if old and not folder.exists():
        max(old, key=lambda each: each.stat().st_mtime).rename(folder)


def _sweep(folder: Path, fresh: Path) -> None:
    """Remove what killed processes left beside a folder, by the file system's own clock."""
    now = fresh.stat().st_mtime
    for each in _leftovers(folder, "old") + _leftovers(folder, "new"):
        if now - each.stat().st_mtime > _LEFTOVER_SECONDS:
            shutil.rmtree(each, ignore_errors=True)


def _leftovers(folder: Path, kind: str) -> list[Path]:
    prefix = f".{folder.name}.{kind}-"
    return [each for each in folder.parent.glob(f"{glob.escape(prefix)}*") if len(each.name) == len(prefix) + 32]
