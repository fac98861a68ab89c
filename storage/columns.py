"""The image column of a Parquet or Arrow file, read row by row with a few rows in memory."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latteflow.storage.errors import ColumnBroken, DataError

_ROWS = 16
"""Rows decoded together."""
_BATCHES = 4
"""Decoded batches kept, since several threads read neighbouring rows."""
_ADDRESS = re.compile(r"(.*_)?(url|uri)s?", re.IGNORECASE)
"""Names of columns with addresses of images, in data sets that are published without them."""


class ImageColumn:
    """Images of one file: a column of structs with ``bytes`` (as Hugging Face ``datasets`` writes them) or of binary.

    Args:
        opened: opens the file.
        is_parquet: Parquet, else Arrow IPC (stream or file).
        column: name of the column; None: found by its type.
        what: the file's name, for messages.

    Raises:
        ColumnBroken: the file cannot be read or has no such column.
        DataError: several columns could hold the images, or there are only their addresses.
    """

    def __init__(self, opened: Callable[[], BinaryIO], *, is_parquet: bool, column: str | None, what: str) -> None:
        self._open, self._is_parquet, self._what = opened, is_parquet, what
        self._lock = threading.Lock()
        self._recent: dict[int, list[bytes | None]] = {}
        self._batches: Iterator[tuple[int, list[bytes | None]]] | None = None
        self._next = 0
        with self._explained():
            schema = pq.read_schema(opened()) if is_parquet else self._arrow(opened()).schema
            self.column = _find_column(schema, column, what)
            self._place = schema.get_field_index(self.column)
            self._is_struct = pa.types.is_struct(schema.field(self._place).type)

    def rows(self, size: int) -> Iterator[int]:
        """The numbers of the rows.

        Args:
            size: of the file in bytes. It cannot hold more images than that, whatever it says.

        Raises:
            ColumnBroken: after the last row that is there.
        """
        found = 0
        with self._explained():
            if self._is_parquet:
                counts = iter([pq.read_metadata(self._open()).num_rows])
            else:
                counts = (batch.num_rows for batch in self._arrow(self._open(), self._place))
            for count in counts:
                if not 0 <= found + count <= size:
                    raise ColumnBroken(f"{self._what} claims to hold {found + count:,} rows in {size:,} bytes")
                yield from range(found, found + count)
                found += count

    def read(self, row: int) -> bytes:
        """The bytes of one image.

        Raises:
            ColumnBroken: the file is damaged there, or the row holds no bytes.
        """
        with self._lock, self._explained():
            found = self._recall(row)
            if found is None:
                if self._batches is None or row < self._next:
                    self._batches, self._next = self._from(row), 0
                try:
                    found = self._advance(row)
                except BaseException:
                    self._batches = None
                    raise
        if found is None:
            raise ColumnBroken(f"{self._what} has no row {row}")
        start, values = found
        value = values[row - start]
        if value is None:
            raise ColumnBroken(
                f"row {row} of {self._what} holds no bytes in {self.column!r}; a path alone is not followed"
            )
        return value

    def _advance(self, row: int) -> tuple[int, list[bytes | None]] | None:
        for start, values in self._batches or ():
            self._next = start + len(values)
            self._recent[start] = values
            while len(self._recent) > _BATCHES:
                del self._recent[next(iter(self._recent))]
            if row < self._next:
                break
        return self._recall(row)

    def _recall(self, row: int) -> tuple[int, list[bytes | None]] | None:
        return next(
            ((start, values) for start, values in self._recent.items() if start <= row < start + len(values)), None
        )

    def _from(self, row: int) -> Iterator[tuple[int, list[bytes | None]]]:
        """Batches from the one that holds ``row`` (or from an earlier one), each with the number of its first row."""
        start = 0
        if self._is_parquet:
            file = pq.ParquetFile(self._open())
            group = 0
            while group < file.num_row_groups and start + file.metadata.row_group(group).num_rows <= row:
                start += file.metadata.row_group(group).num_rows
                group += 1
            leaf = f"{self.column}.bytes" if self._is_struct else self.column
            # One by one: of a struct with a dictionary, Arrow makes no batch that lies in two of them.
            batches = (
                batch
                for each in range(group, file.num_row_groups)
                for batch in file.iter_batches(_ROWS, [each], [leaf], use_threads=False)
            )
        else:
            batches = iter(self._arrow(self._open(), self._place))
        for batch in batches:
            for begin in range(0, batch.num_rows, _ROWS):
                piece = batch.slice(begin, _ROWS).column(0)
                if start + len(piece) > row:
                    piece.validate(full=True)  # offsets from outside could point anywhere
                    values = pc.struct_field(piece, "bytes") if self._is_struct else piece
                    yield start, values.to_pylist()
                start += len(piece)

    @staticmethod
    def _arrow(file: BinaryIO, place: int | None = None) -> Any:
        options = pa.ipc.IpcReadOptions(included_fields=None if place is None else [place])
        magic = file.read(6)
        file.seek(0)
        if magic == b"ARROW1":
            reader = pa.ipc.open_file(file, options=options)
            return _FileBatches(reader)
        return pa.ipc.open_stream(file, options=options)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            first = str(error).strip().split("\n")[0][:200]
            raise ColumnBroken(f"{self._what} cannot be read: {first or type(error).__name__}") from error


class _FileBatches:
    """An Arrow file as an iterator, which streams are already."""

    def __init__(self, reader: Any) -> None:
        self._reader, self.schema = reader, reader.schema

    def __iter__(self) -> Iterator[Any]:
        return (self._reader.get_batch(number) for number in range(self._reader.num_record_batches))


def _find_column(schema: pa.Schema, wanted: str | None, what: str) -> str:
    structs = [field.name for field in schema if _is_image_struct(field.type)]
    plain = [field.name for field in schema if _is_binary(field.type)]
    addresses = [name for name in schema.names if _ADDRESS.fullmatch(name)]
    if addresses and not structs + plain:
        raise DataError(
            f"{what} has addresses of images ({', '.join(addresses)}) and no images: nothing is fetched from there; "
            "download them first, for example with img2dataset, and give its tars"
        )
    if wanted is not None:
        if wanted in structs + plain:
            return wanted
        raise ColumnBroken(f"{what} has no column of images {wanted!r}; its columns are {', '.join(schema.names)}")
    candidates = structs or plain
    if not candidates:
        raise ColumnBroken(f"{what} has no column of images; its columns are {', '.join(schema.names)}")
    if len(candidates) > 1:
        raise DataError(
            f"{what} has {len(candidates)} columns that could be the images ({', '.join(candidates)}): "
            f"name one, for example `shard: {{image_column: {candidates[0]}}}`"
        )
    return candidates[0]


def _is_binary(kind: pa.DataType) -> bool:
    """Bytes of any length, however Arrow lays them out: polars writes views, pyarrow keeps dictionaries."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_image_struct(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
