"""Matrices that are read by rows: features of millions of images on disk, where there is no room in memory.

What works block by block takes a :class:`Rows` where it takes a tensor: a slice or row numbers of either are a tensor.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from latteflow.models.errors import ModelError

At = slice | Tensor
"""Rows in a stretch without steps, or by their numbers, int64."""
_SCATTERED = 1024
"""Rows of a file that are looked up at once: the system maps 64 kB around each."""


class Rows:
    """Rows that are read, or made, when they are asked for.

    Args:
        shape: ``(n, width)``.
        read: rows to a float32 tensor ``(m, width)``.
        device: where it is.
    """

    ndim = 2
    dtype = torch.float32

    def __init__(
        self, shape: tuple[int, int], read: Callable[[At], Tensor], device: torch.device | str = "cpu"
    ) -> None:
        self.shape, self._read, self.device = shape, read, torch.device(device)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at: At) -> Tensor:
        return self._read(at)

    def is_floating_point(self) -> bool:
        """Always, as a tensor of features would say."""
        return True

    def through(self, change: Callable[[Tensor], Tensor], width: int | None = None) -> Rows:
        """The same rows behind a function that takes each by itself.

        Args:
            width: of what it gives, if that is another.
        """
        return Rows((len(self), width or self.shape[1]), lambda at: change(self[at]), self.device)

    def take(self, rows: Tensor) -> Rows:
        """Some of the rows, ``(m,)`` int64, in this order; a row of zeros for -1."""
        rows = rows.to(self.device)

        def read(at: At) -> Tensor:
            chosen = rows[at]
            return torch.where(chosen[:, None] >= 0, self[chosen.clamp(min=0)], 0)

        return Rows((len(rows), self.shape[1]), read, self.device)

    def to(self, device: torch.device) -> Rows | Tensor:
        """The same on a device; a GPU that has twice the room takes them all, as a tensor."""
        if device.type == "cuda" and 8 * math.prod(self.shape) < torch.cuda.mem_get_info(device)[0]:
            found = torch.empty(self.shape, device=device)
            for at, block in blocks(self):
                found[at] = block
            return found
        return Rows(self.shape, lambda at: self[at if isinstance(at, slice) else at.to(self.device)].to(device), device)

    def kept(self) -> Rows:
        """The same, made once, into a file."""
        found = Stored(*self.shape, device=self.device)
        for at, block in blocks(self):
            found[at] = block
        return found


class Stored(Rows):
    """Rows in a temporary file without a name, which ends with the process. Where nothing was written are zeros.

    Raises:
        ModelError: the temporary folder is full.
    """

    def __init__(self, n: int, width: int, device: torch.device | str = "cpu") -> None:
        super().__init__((n, width), self._from_file, device)
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - as long as the rows
        with _room():
            self._file.truncate(4 * n * width)

    def kept(self) -> Rows:
        """Itself."""
        return self

    def __setitem__(self, at: slice, values: Tensor) -> None:
        left = values.detach().to("cpu", torch.float32).contiguous().view(-1).view(torch.uint8).numpy().data
        place = 4 * self.shape[1] * at.indices(len(self))[0]
        while left:
            with _room():
                done = os.pwrite(self._file.fileno(), left, place)
            left, place = left[done:], place + done

    def _from_file(self, at: At) -> Tensor:
        if isinstance(at, slice):
            start, stop, _ = at.indices(len(self))
            found = np.empty((max(0, stop - start), self.shape[1]), np.float32)
            left, place = found.reshape(-1).view(np.uint8).data, 4 * self.shape[1] * start
            while left:
                done = os.preadv(self._file.fileno(), [left], place)
                left, place = left[done:], place + done
        else:
            numbers = at.cpu().numpy()
            found = np.empty((len(numbers), self.shape[1]), np.float32)
            for first in range(0, len(numbers), _SCATTERED):  # what was looked at before does not stay in memory
                some = slice(first, first + _SCATTERED)
                with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    table = np.frombuffer(data, np.float32).reshape(self.shape)
                    np.take(table, numbers[some], axis=0, out=found[some], mode="clip")
                    del table  # or the map cannot be closed
        return torch.from_numpy(found).to(self.device)


def mapped(shape: tuple[int, int]) -> np.ndarray:
    """Zeros, float32, in a temporary file without a name, of which the system keeps in memory what it has room for.

    Raises:
        ModelError: the temporary folder is full.
    """
    with tempfile.TemporaryFile() as file:
        with _room():
            os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))  # or a full disk would be the end of the process
        return np.memmap(file, np.float32, "r+", shape=shape)


Matrix = Tensor | Rows
Filled = Tensor | Stored
"""A matrix that can be written by stretches."""


def together(parts: list[Matrix]) -> Matrix:
    """Matrices of one width, one below the other."""
    if all(isinstance(part, Tensor) for part in parts):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    ends = torch.tensor([len(part) for part in parts]).cumsum(0)
    width, device = parts[0].shape[1], parts[0].device

    def read(at: At) -> Tensor:
        numbers = torch.arange(int(ends[-1]))[at] if isinstance(at, slice) else at.cpu()
        found = torch.empty((len(numbers), width), device=device)
        of = torch.searchsorted(ends, numbers, right=True)
        for place, part in enumerate(parts):
            mine = (of == place).nonzero()[:, 0]
            if len(mine):
                first = int(ends[place]) - len(part)
                found[mine.to(device)] = part[(numbers[mine] - first).to(device)]
        return found

    return Rows((int(ends[-1]), width), read, device)


def room(n: int, width: int, like: Matrix) -> Filled:
    """A matrix to be filled by stretches: on disk beside rows on disk, else a tensor of their type beside a tensor."""
    if isinstance(like, Rows):
        return Stored(n, width, like.device)
    return like.new_empty(n, width)


def kept(matrix: Matrix) -> Matrix:
    """What is read again and again: a tensor as it is, rows that are made anew each time once for all."""
    return matrix.kept() if isinstance(matrix, Rows) else matrix


def take(matrix: Matrix, rows: Tensor) -> Matrix:
    """Some of the rows, ``(m,)`` int64, in this order; a row of zeros for -1."""
    if isinstance(matrix, Rows):
        return matrix.take(rows)
    if not len(matrix):
        return matrix.new_zeros(len(rows), matrix.shape[1])
    return torch.where(rows[:, None] >= 0, matrix[rows.clamp(min=0)], 0)


def through(matrix: Matrix, change: Callable[[Tensor], Tensor]) -> Matrix:
    """The same behind a function that takes each row by itself: at once of a tensor, else as rows are asked for."""
    return matrix.through(change) if isinstance(matrix, Rows) else change(matrix)


def in_memory(matrix: Matrix) -> Tensor:
    """All of it as a tensor."""
    return matrix[:] if isinstance(matrix, Rows) else matrix


BLOCK_NUMBERS = 1 << 23
"""Numbers in a block: 32 MB, whatever the number of images. A GPU gets 16 times that, as small ones leave it idle."""


def blocks(matrix: Matrix, rows: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Stretches of rows in their order, and where they lie; of a file the next is read while one is in work.

    Args:
        rows: of a stretch; by default those of BLOCK_NUMBERS numbers.
    """
    size = rows or block_rows(matrix.shape[1], matrix.device)
    stretches = [slice(first, min(first + size, len(matrix))) for first in range(0, len(matrix), size)]
    if isinstance(matrix, Tensor) or len(stretches) == 1:
        yield from ((at, matrix[at]) for at in stretches)
        return
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(matrix.__getitem__, stretches[0])
        for at, after in zip(stretches, [*stretches[1:], None], strict=True):
            block = following.result()
            if after is not None:
                following = pool.submit(matrix.__getitem__, after)
            yield at, block


def block_rows(width: int, device: torch.device) -> int:
    """How many rows of this width are a block."""
    return max(1, (BLOCK_NUMBERS << 4 if device.type == "cuda" else BLOCK_NUMBERS) // width)


class Spread:
    """Mean and standard deviation of numbers that come in blocks."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def add(self, numbers: Tensor) -> None:
        wide = numbers.double()
        self.count += wide.numel()
        self._sum = self._sum + wide.sum()  # where they are: to ask a GPU for each would stop it each time
        self._squares = self._squares + wide.square().sum()

    @property
    def deviation(self) -> float:
        """Of these numbers, not an estimate from a sample."""
        mean = float(self._sum) / max(self.count, 1)
        return math.sqrt(max(float(self._squares) / max(self.count, 1) - mean * mean, 0.0))


@contextlib.contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"features do not fit into the temporary folder ({error}): free some space in {tempfile.gettempdir()}, or "
            "set TMPDIR to another folder"
        ) from error
