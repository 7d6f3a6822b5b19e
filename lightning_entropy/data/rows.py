"""Arrays on disk, of which any rows can be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_entropy.data.gather import gather, read_stretch
from lightning_entropy.data.problems import BagFileError

BLOCK_BYTES = 8 * 2**20  # of one step when a whole array is streamed
BFLOAT16 = "bfloat16"  # the one dtype of torch that numpy has no name for


class Rows(Protocol):
    """A two-dimensional array on disk, ``(count, width)``; one-dimensional ones have width 1."""

    @property
    def count(self) -> int:
        """Number of rows."""
        ...

    @property
    def width(self) -> int:
        """Numbers in a row."""
        ...

    @property
    def dtype(self) -> str:
        """A numpy type string, or ``"bfloat16"``."""
        ...

    def read(self, rows: np.ndarray | None = None) -> Tensor:
        """Read rows, ascending and without repetition, or all: ``(len(rows), width)`` in the stored
        precision.
        """
        ...

    def block(self) -> int:
        """How many rows to stream at a time."""
        ...


def stream(array: Rows) -> Iterator[tuple[int, Tensor]]:
    """All rows of an array in order: the number of the first row, and a block of rows, a few megabytes at a
    time.
    """
    step = array.block()
    if step >= array.count:
        if array.count:
            yield 0, array.read()
        return
    for start in range(0, array.count, step):
        yield start, array.read(np.arange(start, min(start + step, array.count)))


def item_size(dtype: str) -> int:
    """Bytes of one number."""
    return 2 if dtype == BFLOAT16 else np.dtype(dtype).itemsize


def as_tensor(raw: np.ndarray, *, dtype: str, width: int) -> Tensor:
    """Bytes as numbers: ``(rows, width)``, in the byte order of this machine.

    Args:
        raw: ``(rows, width * item size)`` uint8, contiguous.
        dtype: a numpy type string, or ``"bfloat16"``.
        width: numbers in a row.
    """
    if dtype == BFLOAT16:
        return torch.from_numpy(raw).view(torch.bfloat16)
    array = raw.view(dtype).reshape(len(raw), width)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def default_block(width: int, dtype: str) -> int:
    """Rows that make up one block of a stream."""
    return max(1, BLOCK_BYTES // max(1, width * item_size(dtype)))


def is_stretch(rows: np.ndarray) -> bool:
    """Whether ascending row numbers, at least one, leave none out."""
    return int(rows[-1]) - int(rows[0]) == len(rows) - 1


def runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Positions ``(start, stop)`` of the stretches of consecutive numbers in ascending ``rows``."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    starts = [0, *breaks.tolist()]
    yield from zip(starts, [*breaks.tolist(), len(rows)])


@dataclass(frozen=True)
class ContiguousRows:
    """Rows that follow one another in a file: ``.npy``, stored ``.npz`` and ``.pt`` members, contiguous
    HDF5.
    """

    path: Path
    offset: int
    count: int
    width: int
    dtype: str

    def __post_init__(self) -> None:
        need, have = self.offset + self.count * self.row_bytes, self.path.stat().st_size
        if need > have:
            raise BagFileError(f"truncated: its data end at byte {need:,} and the file has {have:,}")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.width * item_size(self.dtype)

    def block(self) -> int:
        """How many rows to stream at a time."""
        return default_block(self.width, self.dtype)

    def read(self, rows: np.ndarray | None = None) -> Tensor:
        """Read the rows that are asked for: a stretch in one go, others without what lies between them."""
        if rows is None:
            rows = np.arange(self.count)
        if len(rows) and is_stretch(rows):
            raw = np.empty((len(rows), self.row_bytes), dtype=np.uint8)
            read_stretch(self.path, self.offset + int(rows[0]) * self.row_bytes, raw)
        else:
            raw = gather(self.path, self.offset + rows * self.row_bytes, length=self.row_bytes)
        return as_tensor(raw, dtype=self.dtype, width=self.width)


@dataclass(frozen=True)
class WholeRows:
    """Rows of a file that cannot be read in part: compressed ``.npz``, ``.pt`` of the old format or of odd
    strides.
    """

    path: Path
    key: str | None  # name in an npz; None for a pt file
    count: int
    width: int
    dtype: str

    def block(self) -> int:
        """All rows: reading a part would read the whole each time."""
        return max(1, self.count)

    def read(self, rows: np.ndarray | None = None) -> Tensor:
        """Read the file and keep the rows that are asked for."""
        if self.key is None:
            tensor = torch.load(self.path, map_location="cpu", weights_only=True)
        else:
            with np.load(self.path, allow_pickle=False) as archive:
                tensor = torch.from_numpy(np.ascontiguousarray(archive[self.key]))
        tensor = tensor.reshape(self.count, self.width)
        return tensor if rows is None else tensor[torch.from_numpy(rows)]


__all__ = [
    "BFLOAT16",
    "ContiguousRows",
    "Rows",
    "WholeRows",
    "as_tensor",
    "default_block",
    "is_stretch",
    "item_size",
    "runs",
    "stream",
]
