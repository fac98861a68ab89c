"""Coverage-guided fuzzing of our own parsers, by atheris: each input goes through one of them, and some things hold.

Run by `test_untrusted.py` for some seconds, and by hand for as long as you like::

    PYTHONPATH=. python tests/faults/fuzz.py tars [-max_total_time=600] [-seed=1] [CORPUS]

What follows the parser's name is libFuzzer's. It ends a run that hangs or that takes too much memory; an input that
breaks something is written to a file, which reproduces it as the last argument.
"""

import contextlib
import io
import os
import re
import sys

import atheris

with atheris.instrument_imports(
    include=["latteflow.storage.tars", "latteflow.storage.names", "latteflow.storage.columns"]
):
    from latteflow.storage.columns import ImageColumn
    from latteflow.storage.errors import ColumnBroken, DataError
    from latteflow.storage.names import member_path, printable, raw
    from latteflow.storage.tars import BLOCK, Member, TarBroken, members

HEADER = 1 << 20
"""No part of a tar that is not image data is larger, or it is passed over."""
ROWS = 64
INFLATED = 1000
"""How much larger than its file the content of a table may be: that much Parquet's codecs do for rows of zeros."""
ODD = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Forward(io.BytesIO):
    """Bytes that are read forwards and in small pieces."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET and offset >= self.tell()
        return super().seek(offset)

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None and 0 <= size <= HEADER
        return super().read(size)


def tars(data: bytes) -> None:
    """As it is, and with every checksum set right, so that what is behind them is reached."""
    for archive in (data, mended(data)):
        found: list[Member] = []
        with contextlib.suppress(TarBroken):
            found.extend(members(Forward(archive), len(archive)))
        end = 0
        for member in found:
            assert end < member.offset and member.offset % BLOCK == 0 and member.size >= 0
            end = member.offset + member.size
            assert end <= len(archive)


def mended(data: bytes) -> bytes:
    archive = bytearray(data)
    for at in range(0, len(archive) - BLOCK + 1, BLOCK):
        if any(archive[at : at + BLOCK]):
            archive[at + 148 : at + 156] = b" " * 8
            archive[at + 148 : at + 156] = b"%06o\0 " % sum(archive[at : at + BLOCK])
    return bytes(archive)


def names(data: bytes) -> None:
    """What a file system may give comes back, and what anybody may write leads nowhere."""
    name = os.fsdecode(data)
    shown, path = printable(name), member_path(name)
    assert raw(shown) == name and len(raw(name)) <= len(name) and len(shown) <= 6 * len(name)
    assert not ODD.search(shown + path)
    assert not path or not {"", ".", ".."} & {*path.split("/")}


def columns(data: bytes) -> None:
    for is_parquet in (True, False):
        with contextlib.suppress(ColumnBroken, DataError):
            column = ImageColumn(lambda: io.BytesIO(data), is_parquet=is_parquet, column=None, what="a table")
            rows = [row for row, _ in zip(column.rows(len(data)), range(ROWS), strict=False)]
            assert rows == list(range(len(rows)))
            for row in (*rows, *rows[:1]):
                with contextlib.suppress(ColumnBroken):
                    assert len(column.read(row)) <= INFLATED * len(data)


if __name__ == "__main__":
    parser = {"tars": tars, "names": names, "columns": columns}[sys.argv.pop(1)]
    # The resident size that it sees begins with that of the process which started this one: a whole fault suite.
    limits = ["-timeout=10", "-malloc_limit_mb=768", "-rss_limit_mb=6000"]
    atheris.Setup([*sys.argv[:1], *limits, *sys.argv[1:]], parser)
    atheris.Fuzz()
