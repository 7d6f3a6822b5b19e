"""Rows of HDF5 datasets: straight from the file where they lie plainly in it, else chunk by chunk."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_entropy.data.gather import gather
from lightning_entropy.data.problems import BagFileError
from lightning_entropy.data.rows import (
    ContiguousRows,
    Rows,
    as_tensor,
    default_block,
    is_stretch,
    item_size,
    runs,
)
from lightning_entropy.extras import require

_OPEN_FILES = 4  # one costs megabytes when its dataset has ten thousand chunks, and opening takes a millisecond
_MAP_BYTES = 64 * 2**20  # of tables that say where chunks lie: 4 bytes a chunk; CLAM writes a chunk a tile
_BAND_BYTES = 2**20  # of neighbouring compressed chunks that are read in one call


class H5Handles:
    """Files kept open, for this process only.

    An HDF5 handle does not survive a fork or a pickle. After either, the files are opened anew.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._files: OrderedDict[Path, Any] = OrderedDict()
        self._places: OrderedDict[tuple[Path, str], np.ndarray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def get(self, path: Path) -> Any:
        """The open ``h5py.File`` of a path."""
        if self._process != os.getpid():
            self._process, self._files = os.getpid(), OrderedDict()
        file = self._files.pop(path, None)
        if file is None:
            file = require("h5py", extra="mil").File(path, "r")
            while len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files[path] = file
        return file

    def chunk_places(self, path: Path, key: str, *, chunk: tuple[int, int]) -> np.ndarray:
        """Where the chunks of a dataset begin: ``(chunks down, chunks across)``, 0 for one never written.

        The tables of the files used last are kept, 64 MB in all.
        """
        places = self._places.pop((path, key), None)
        if places is None:
            dataset = self.get(path)[key]
            shape = [-(-size // step) for size, step in zip(dataset.shape[-2:], chunk)]
            known = np.zeros(shape, dtype=np.int64)  # 0 is the begin of the file and of no chunk

            def note(info: Any) -> None:
                top, left = info.chunk_offset[-2:]
                known[top // chunk[0], left // chunk[1]] = info.byte_offset

            dataset.id.chunk_iter(note)
            places = known.astype(np.uint32) if known.max(initial=0) < 2**32 else known
            self._files.pop(path).close()  # its index of chunks fills memory, and the table is what is needed of it
            while self._places and sum(table.nbytes for table in self._places.values()) > _MAP_BYTES:
                self._places.popitem(last=False)
        self._places[path, key] = places
        return places

    def close(self) -> None:
        """Close all files of this process."""
        if self._process == os.getpid():
            for file in self._files.values():
                file.close()
        self._files = OrderedDict()


@dataclass(frozen=True)
class ChunkedRows:
    """Rows of a chunked dataset.

    Without filters a chunk lies in the file as it is, and single rows are taken out of it. Compressed chunks
    are read by h5py, each at most once a call and only those that hold a row that is asked for: with a tenth
    of the rows sampled that is nearly all of them, so compressed files gain little; ``convert_bags`` makes
    files that do.
    """

    handles: H5Handles
    path: Path
    key: str
    count: int
    width: int
    dtype: str
    chunk: tuple[int, int]
    leading: bool  # a leading axis of 1, as old TRIDENT files have
    flat: bool  # one-dimensional
    plain: bool

    def block(self) -> int:
        """How many rows to stream at a time: whole chunks."""
        return -(-default_block(self.width, self.dtype) // self.chunk[0]) * self.chunk[0]

    def read(self, rows: np.ndarray | None = None) -> Tensor:
        """Read the rows that are asked for."""
        if rows is not None and len(rows) == 0:
            return self._numbers(np.empty((0, self.width), dtype=self.dtype))
        if self.plain and (self.chunk[0] == 1 or (rows is not None and not is_stretch(rows))):
            taken = self._from_plain_chunks(np.arange(self.count) if rows is None else rows)
            if taken is not None:
                return taken
        dataset = self.handles.get(self.path)[self.key]
        if rows is None:
            return self._numbers(self._slice(dataset, 0, self.count))
        return self._from_bands(dataset, rows)

    def _numbers(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))

    def _slice(self, dataset: Any, start: int, stop: int) -> np.ndarray:
        block = dataset[0, start:stop] if self.leading else dataset[start:stop]
        return block.reshape(stop - start, self.width)

    def _from_bands(self, dataset: Any, rows: np.ndarray) -> Tensor:
        height = self.chunk[0]
        most = max(1, _BAND_BYTES // (height * self.width * item_size(self.dtype)))
        out = np.empty((len(rows), self.width), dtype=self.dtype)
        chunks = np.unique(rows // height)
        for first, last in runs(chunks):
            for start in range(first, last, most):
                low = int(chunks[start]) * height
                high = min((int(chunks[min(start + most, last) - 1]) + 1) * height, self.count)
                begin, end = np.searchsorted(rows, [low, high])
                out[begin:end] = self._slice(dataset, low, high)[rows[begin:end] - low]
        return self._numbers(out)

    def _from_plain_chunks(self, rows: np.ndarray) -> Tensor | None:
        """Take rows out of chunks as they lie in the file; None when a chunk was never written."""
        height, breadth = self.chunk
        item = item_size(self.dtype)
        places = self.handles.chunk_places(self.path, self.key, chunk=self.chunk)[rows // height]
        if not places.all():
            return None
        # (rows, chunks across): where the part of each row in each of its chunks begins.
        offsets = places.astype(np.int64) + ((rows % height) * breadth * item)[:, None]
        whole, rest = divmod(self.width, breadth)
        out = np.empty((len(rows), self.width * item), dtype=np.uint8)
        if whole:
            pieces = gather(self.path, offsets[:, :whole].reshape(-1), length=breadth * item)
            out[:, : whole * breadth * item] = pieces.reshape(len(rows), -1)
        if rest:
            out[:, whole * breadth * item :] = gather(self.path, offsets[:, whole], length=rest * item)
        return as_tensor(out, dtype=self.dtype, width=self.width)


def h5_rows(handles: H5Handles, path: Path, key: str, *, shape: tuple[int, int]) -> Rows:
    """Find the fastest exact way to read rows of a dataset.

    Args:
        handles: open files.
        path: the file.
        key: name of the dataset in it.
        shape: ``(count, width)``, after a leading axis of 1 was dropped.

    Raises:
        BagFileError: if the dataset does not hold numbers.
    """
    dataset = handles.get(path)[key]
    count, width = shape
    if dataset.dtype.kind not in "fiub":
        raise BagFileError(f"{key} holds {dataset.dtype}, not numbers")
    dtype, flat, leading = dataset.dtype.str, dataset.ndim == 1, dataset.ndim == 3
    if count and dataset.chunks is None and not dataset.is_virtual and not dataset.external:
        offset = dataset.id.get_offset()
        if offset is not None:
            contiguous = ContiguousRows(path, offset, count, width, dtype)
            if _agrees(dataset, contiguous):
                return contiguous
    plain = (
        dataset.chunks is not None
        and not flat
        and handles.get(path).userblock_size == 0  # offsets would not count from the begin of the file
        and dataset.id.get_create_plist().get_nfilters() == 0
        and hasattr(dataset.id, "chunk_iter")  # needs HDF5 1.10.10, 1.12.3 or later under h5py
    )
    chunk = (1024, width) if dataset.chunks is None else (*dataset.chunks[leading:], 1)[:2]
    return ChunkedRows(handles, path, key, count, width, dtype, chunk, leading, flat, plain)


def _agrees(dataset: Any, rows: Rows) -> bool:
    """Whether first and last row, read past the library, are those that it reads (a user block moves
    offsets).
    """
    wanted = np.unique([0, rows.count - 1])
    got = rows.read(wanted).numpy()
    expected = np.stack([dataset[0, row] if dataset.ndim == 3 else dataset[row] for row in wanted])
    return expected.astype(got.dtype).tobytes() == got.tobytes()


__all__ = ["ChunkedRows", "H5Handles", "h5_rows"]
