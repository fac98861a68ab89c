"""Bytes of tables and arrays: Parquet and safetensors, nothing that could execute, the same bytes for the same rows."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import polars as pl
from safetensors import numpy as arrays


def parquet(frame: pl.DataFrame) -> bytes:
    """Parquet bytes that depend on the rows alone."""
    out = io.BytesIO()
    frame.write_parquet(out, compression="zstd", statistics=True)
    return out.getvalue()


def read_parquet(data: bytes, columns: list[str] | None = None) -> pl.DataFrame:
    """The rows of Parquet bytes; all columns, or some."""
    return pl.read_parquet(io.BytesIO(data), columns=columns)


def safetensors(**named: np.ndarray) -> bytes:
    """Safetensors bytes of named arrays."""
    return bytes(arrays.save({name: np.ascontiguousarray(array) for name, array in named.items()}))


def write_safetensors(
    path: Path, small: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], blocks: Iterable[np.ndarray]
) -> None:
    """A file with the bytes of :func:`safetensors`, of small arrays and one of float32 that comes in blocks of rows."""
    small = {each: np.ascontiguousarray(array) for each, array in small.items()}
    header, place = {}, 0
    sizes = {each: (_DTYPES[array.dtype.name], array.shape, array.nbytes) for each, array in small.items()}
    sizes[name] = ("F32", shape, 4 * math.prod(shape))
    order = sorted(sizes, key=lambda each: (-_ORDER.index(sizes[each][0]), each))
    for each in order:
        dtype, dims, size = sizes[each]
        header[each] = {"dtype": dtype, "shape": list(dims), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for each in order:
            for array in blocks if each == name else [small[each]]:
                out.write(np.ascontiguousarray(array).data)


_DTYPES = {"float16": "F16", "int32": "I32", "float32": "F32", "float64": "F64", "int64": "I64"}
_ORDER = ("F16", "I32", "F32", "F64", "I64")
"""As the library sorts them, the last first."""


def read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    """The named arrays of safetensors bytes."""
    return dict(arrays.load(data))


def are_in(wanted: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Which numbers are among sorted ones, ``(len(wanted),)`` bool."""
    if not len(there):
        return np.zeros(len(wanted), bool)
    found: np.ndarray = there[np.minimum(np.searchsorted(there, wanted), len(there) - 1)] == wanted
    return found
