"""Taking pieces out of a file without reading the rest of it.

Pieces are copied out of memory maps of at most 32 MB that are made and dropped one after the other. A read
call a piece costs five times as much (a thousand calls a bag), and one map of the whole file makes the
process hold whatever the kernel maps around the pages that are touched, which for a tenth of the rows is most
of the file.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from lightning_entropy.data.problems import BagFileError

WINDOW_BYTES = 32 * 2**20  # mapped at a time


def gather(path: Path, offsets: np.ndarray, *, length: int) -> np.ndarray:
    """Read pieces of equal length.

    Args:
        path: the file.
        offsets: ``(pieces,)`` int64, where each begins, in bytes, in any order.
        length: bytes of a piece.

    Returns:
        ``(pieces, length)`` uint8, in the order of ``offsets``.

    Raises:
        BagFileError: if the file ends before the last piece does.
    """
    out = np.empty((len(offsets), length), dtype=np.uint8)
    if out.size == 0:
        return out
    order = None if bool((offsets[1:] >= offsets[:-1]).all()) else np.argsort(offsets, kind="stable")
    ascending = offsets if order is None else offsets[order]
    # Rows of an array that lies plainly in the file: a whole number of pieces apart.
    on_grid = order is None and not ((ascending - ascending[0]) % length).any()
    with path.open("rb", buffering=0) as file:
        # Touching a map beyond the end of its file would kill the process.
        if int(ascending[-1]) + length > os.fstat(file.fileno()).st_size:
            raise BagFileError("the file ends before its data do: it is truncated, or was changed while in use")
        begin = 0
        while begin < len(ascending):
            first = int(ascending[begin])
            start = first - first % mmap.ALLOCATIONGRANULARITY
            end = int(np.searchsorted(ascending, max(first, start + WINDOW_BYTES - length), side="right"))
            where = ascending[begin:end] - start
            size = int(where[-1]) + length
            with mmap.mmap(file.fileno(), size, offset=start, access=mmap.ACCESS_READ) as window:
                if on_grid:
                    grid = np.frombuffer(window, np.uint8, offset=first - start).reshape(-1, length)
                    np.take(grid, (where - where[0]) // length, axis=0, out=out[begin:end], mode="clip")
                else:
                    grid = np.ndarray((size - length + 1, length), np.uint8, window, 0, (1, 1))
                    out[slice(begin, end) if order is None else order[begin:end]] = grid[where]
                del grid  # the map cannot be closed while an array looks into it
            begin = end
    return out


def read_stretch(path: Path, offset: int, target: np.ndarray) -> None:
    """Fill a contiguous uint8 array with the bytes from one position of a file on.

    Raises:
        BagFileError: if the file ends before.
    """
    view = memoryview(target).cast("B")  # type: ignore[arg-type]
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while len(view):
            got = file.readinto(view)
            if not got:
                raise BagFileError("the file ends before its data do: it is truncated, or was changed while in use")
            view = view[got:]


__all__ = ["WINDOW_BYTES", "gather", "read_stretch"]
