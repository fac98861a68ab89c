"""What a file holds, as a number."""

import functools
import hashlib
from pathlib import Path


def digest_of_file(path: Path) -> str:
    """sha256 of a local file, hex. Every stage asks; weights of one size and time are read once in a process."""
    at = path.stat()
    return _digest(path, at.st_size, at.st_mtime_ns)


@functools.cache
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
