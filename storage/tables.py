"""Bytes of tables and arrays: Parquet and safetensors, nothing that could execute, the same bytes for the same rows."""

from __future__ import annotations

import io

import numpy as np
import polars as pl
from safetensors import numpy as arrays


def parquet(frame: pl.DataFrame) -> bytes:
    """Parquet bytes that depend on the rows alone."""
    out = io.BytesIO()
    frame.write_parquet(out, compression="zstd", statistics=True)
    return out.getvalue()


def read_parquet(data: bytes) -> pl.DataFrame:
    """The rows of Parquet bytes."""
    return pl.read_parquet(io.BytesIO(data))


def safetensors(**named: np.ndarray) -> bytes:
    """Safetensors bytes of named arrays."""
    return bytes(arrays.save({name: np.ascontiguousarray(array) for name, array in named.items()}))


def read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    """The named arrays of safetensors bytes."""
    return dict(arrays.load(data))


def are_in(wanted: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Which numbers are among sorted ones, ``(len(wanted),)`` bool."""
    if not len(there):
        return np.zeros(len(wanted), bool)
    found: np.ndarray = there[np.minimum(np.searchsorted(there, wanted), len(there) - 1)] == wanted
    return found
