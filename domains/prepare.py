"""Write the images of the built-in domains: `python -m domains.prepare demo`, or any names below, or `all`.

A domain's folder `data/<name>/` holds `train/` and `test/` (image files), `labels.csv` (columns path, class; the test
images only; nothing but evaluation reads it), for some domains `texts.csv` (columns path, text) and, written last,
`prepared.json`. A folder is made beside its place and moved in by a rename, so it is whole or absent. Images you add
to `train/` or `test/` stay; the files listed in `prepared.json` are the preparer's, and are restored when missing.
"""

import argparse
import csv
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from latteflow.domains.clipart import clipart
from latteflow.domains.emoji import emoji_animals, emoji_coarse
from latteflow.domains.fashion import demo, fashion
from latteflow.domains.picture import Picture
from latteflow.domains.sources import SourceError

log = logging.getLogger("domains.prepare")

Preparer = Callable[[Path], Iterator[Picture]]

DOMAINS: dict[str, tuple[int, Preparer]] = {
    "demo": (1, demo),
    "fashion": (1, fashion),
    "clipart": (1, clipart),
    "emoji_coarse": (1, emoji_coarse),
    "emoji_animals": (1, emoji_animals),
}
"""Version and preparer of each domain. Raise the version when the files change."""

RECORD = "prepared.json"


def prepare(name: str, data: Path, work: Path) -> bool:
    """Make `data/<name>` whole.

    Args:
        name: a key of `DOMAINS`.
        data: folder of all domains; made if absent.
        work: scratch folder for fetched packages.

    Returns:
        False when there was nothing to do.

    Raises:
        SourceError: the images cannot be had on this machine. `data/<name>` is as it was.
    """
    version, preparer = DOMAINS[name]
    target, fresh, replaced = data / name, data / f".{name}.new", data / f".{name}.replaced"
    data.mkdir(parents=True, exist_ok=True)
    with _locked(data):
        if replaced.exists() and not target.exists():  # killed between the two renames below
            replaced.rename(target)
        for leftover in (fresh, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        if is_complete(target, version):
            return False
        try:
            _write(preparer(work), fresh, version)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        if target.exists():
            _carry_over(target, fresh)
            target.rename(replaced)
        fresh.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    return True


def is_complete(target: Path, version: int) -> bool:
    """True when this version wrote the folder and every file it wrote is there in its size; other files are ignored."""
    record = _read_record(target)
    return record.get("version") == version and all(
        _size(target / path) == size_bytes for path, size_bytes in record["files"].items()
    )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _write(pictures: Iterator[Picture], folder: Path, version: int) -> None:
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
    sizes, digests, labels, texts = {}, {}, [], []
    for picture in pictures:
        with (folder / picture.path).open("xb") as file:  # x: two pictures of one name are a mistake
            file.write(picture.png)
        sizes[picture.path] = len(picture.png)
        digests[picture.path] = hashlib.sha256(picture.png).hexdigest()
        if picture.split == "test":
            labels.append((picture.path, picture.label))
        if picture.text is not None:
            texts.append((picture.path, picture.text))
    tables = {"labels.csv": ("class", labels)} | ({"texts.csv": ("text", texts)} if texts else {})
    for table, (column, rows) in tables.items():
        content = _csv([("path", column), *sorted(rows)])
        (folder / table).write_bytes(content)
        sizes[table] = len(content)
        digests[table] = hashlib.sha256(content).hexdigest()
    record = {
        "version": version,
        "sha256": hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest(),
        "files": dict(sorted(sizes.items())),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=0) + "\n")


def _csv(rows: list[tuple[str, str]]) -> bytes:
    buffer = StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue().encode()


def _read_record(target: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((target / RECORD).read_text())
        return record
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return {}


def _carry_over(old: Path, new: Path) -> None:
    """Copy the files a user added to the old folder into the new one."""
    prepared = _read_record(old).get("files", {})
    for path in old.rglob("*"):
        relative = path.relative_to(old)
        is_folder = path.is_dir() and not path.is_symlink()
        if is_folder or relative.as_posix() in prepared or (new / relative).exists():
            continue
        (new / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, new / relative, follow_symlinks=False)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One preparer at a time; the lock goes with the process, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 when a domain asked for by name could not be prepared."""
    parser = argparse.ArgumentParser(
        prog="python -m domains.prepare", description="Write the images of the built-in domains."
    )
    parser.add_argument(
        "names", nargs="+", choices=[*DOMAINS, "all"], metavar="NAME", help=", ".join([*DOMAINS, "all"])
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of all domains (default: data)")
    options = parser.parse_args(arguments)
    names = list(DOMAINS) if "all" in options.names else list(dict.fromkeys(options.names))
    skipped = []
    with tempfile.TemporaryDirectory(prefix="domains-") as work:
        for name in names:
            try:
                done = prepare(name, options.data, Path(work))
            except SourceError as error:
                log.warning("%s skipped: %s", name, error)
                skipped.append(name)
            else:
                record = _read_record(options.data / name)
                count = sum(path.endswith(".png") for path in record["files"])
                log.info(
                    "%s %s images=%d sha256=%s", name, "done" if done else "unchanged", count, record["sha256"][:12]
                )
    return 1 if skipped and "all" not in options.names else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())
