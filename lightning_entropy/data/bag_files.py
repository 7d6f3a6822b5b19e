"""The layouts that bags of features come in: what a file of each holds, and how its rows are read.

=========  ================================================================================================
``pt``     CLAM: one tensor ``(N, D)`` saved with ``torch.save``
``h5``     CLAM and TRIDENT: ``features`` ``(N, D)`` and ``coords`` ``(N, 2)``
``stamp``  STAMP: ``feats`` (or ``patch_embeddings``) and ``coords`` in micrometres
``aem``    the AEM authors' one file: a group a slide with ``feat``, ``coords`` and the attribute ``label``
``npz``    ``features``, and ``coords`` and ``instance_labels`` where they exist
``npy``    ``NAME.npy``, and ``NAME.coords.npy`` and ``NAME.instance_labels.npy`` where they exist
=========  ================================================================================================

HDF5 files of the first two layouts may hold ``instance_labels`` ``(N,)`` too. A leading axis of 1 is dropped,
and ``(0,)`` is a slide without instances.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from lightning_entropy.data.h5_rows import H5Handles, h5_rows
from lightning_entropy.data.problems import BagFileError
from lightning_entropy.data.rows import BFLOAT16, ContiguousRows, Rows, WholeRows
from lightning_entropy.data.source import Bag

SUFFIXES = {"pt": ".pt", "h5": ".h5", "stamp": ".h5", "npz": ".npz", "npy": ".npy"}
LAYOUTS = ("pt", "h5", "stamp", "aem", "npz", "npy")
SIDECARS = (".coords.npy", ".instance_labels.npy")
FEATURE_KEYS = {"h5": ("features",), "stamp": ("feats", "patch_embeddings"), "aem": ("feat",)}


@dataclass(frozen=True)
class BagFile:
    """Where the arrays of one bag lie; opening it has read shapes only."""

    path: Path
    features: Rows
    coords: Rows | None = None
    instance_labels: Rows | None = None

    def read(self, rows: np.ndarray | None = None) -> Bag:
        """Read the bag, or some of its instances."""
        coords, known = self.coords, self.instance_labels
        xy = None if coords is None else coords.read(rows)
        if xy is not None and xy.is_floating_point():
            xy = xy.round()
        return Bag(
            self.features.read(rows).float(),
            None if xy is None else xy.long(),
            None if known is None else known.read(rows).float().reshape(-1),
        )


def two_dimensional(shape: tuple[int, ...], *, what: str) -> tuple[int, int]:
    """``(N, D)`` of a stored shape: a leading axis of 1 dropped, ``(0,)`` as no instances of unknown width.

    Raises:
        BagFileError: for any other shape.
    """
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if shape == (0,):
        return 0, 0
    if len(shape) != 2:
        raise BagFileError(f"{what} has shape {tuple(shape)}, expected (N, D) or (1, N, D)")
    return int(shape[0]), int(shape[1])


def open_bag_file(path: Path, *, layout: str, handles: H5Handles, group: str | None = None) -> BagFile:
    """Look into a feature file.

    Args:
        path: the file.
        layout: one of ``LAYOUTS``.
        handles: HDF5 files that are kept open.
        group: group of the slide, for ``aem``.

    Raises:
        BagFileError: if the file is not there, is damaged, or does not hold what the layout says.
    """
    if not path.is_file():
        raise BagFileError("no such file")
    opener: Callable[[], BagFile] = {
        "pt": lambda: BagFile(path, _pt_rows(path)),
        "npz": lambda: _open_npz(path),
        "npy": lambda: _open_npy(path),
    }.get(layout, lambda: _open_h5(path, layout, handles, group))
    try:
        bag = opener()
    except (BagFileError, ImportError):
        raise
    except Exception as error:  # whatever a damaged file makes a reader raise is a finding about that file
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BagFileError(f"cannot be read as {layout}: {first_line[:200]}") from error
    count = bag.features.count
    for what, rows, width in (("coords", bag.coords, 2), ("instance_labels", bag.instance_labels, 1)):
        if rows is not None and count and (rows.count, rows.width) != (count, width):
            raise BagFileError(
                f"{what} is {rows.count} x {rows.width}, expected {count} x {width} as features have rows"
            )
    return bag


def _open_h5(path: Path, layout: str, handles: H5Handles, group: str | None) -> BagFile:
    node: Any = handles.get(path)
    prefix = ""
    if group is not None:
        if group not in node:
            raise BagFileError(f"has no group {group!r}")
        node, prefix = node[group], f"{group}/"
    present = [key for key in FEATURE_KEYS[layout] if key in node]
    if len(present) != 1:
        expected = " or ".join(FEATURE_KEYS[layout])
        raise BagFileError(f"holds {sorted(node)}, expected {expected} (layout {layout})")

    def rows(key: str) -> Rows | None:
        if key not in node:
            return None
        shape = node[key].shape
        if key == "instance_labels":
            if len(shape) != 1:
                raise BagFileError(f"instance_labels has shape {shape}, expected (N,)")
            count, width = shape[0], 1
        else:
            count, width = two_dimensional(shape, what=key)
        return h5_rows(handles, path, prefix + key, shape=(count, width))

    features = rows(present[0])
    assert features is not None
    if features.count == 0:
        return BagFile(path, features)
    return BagFile(path, features, rows("coords"), rows("instance_labels"))


def _npy_rows(path: Path, stream: IO[bytes], start: int, *, key: str | None) -> Rows:
    """Rows of an array in numpy's format that begins at byte ``start`` of ``path``; ``stream`` stands at its
    begin.
    """
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(stream)
    what = key or "the array"
    if dtype.kind not in "fiub":
        raise BagFileError(f"{what} holds {dtype}, not numbers")
    count, width = (shape[0], 1) if key == "instance_labels" and len(shape) == 1 else two_dimensional(shape, what=what)
    if fortran and min(count, width) > 1:
        raise BagFileError(f"{what} is stored column by column; save np.ascontiguousarray(array) instead")
    return ContiguousRows(path, start + stream.tell(), count, width, dtype.str)


def _open_npy(path: Path) -> BagFile:
    found: dict[str, Rows] = {}
    for name, suffix in (("features", ".npy"), ("coords", SIDECARS[0]), ("instance_labels", SIDECARS[1])):
        part = path.with_name(path.name[: -len(".npy")] + suffix)
        if name == "features" or part.is_file():
            with part.open("rb") as stream:
                found[name] = _npy_rows(part, stream, 0, key=name)
    return BagFile(path, found["features"], found.get("coords"), found.get("instance_labels"))


def _data_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored member begin: after its local header, whose lengths may differ from the
    directory's.
    """
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        lengths = file.read(4)
    return member.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def _open_npz(path: Path) -> BagFile:
    found: dict[str, Rows] = {}
    with zipfile.ZipFile(path) as archive:
        members = {Path(info.filename).stem: info for info in archive.infolist()}
        if "features" not in members:
            raise BagFileError(f"holds {sorted(members)}, expected features (layout npz)")
        for key in ("features", "coords", "instance_labels"):
            if key not in members:
                continue
            info = members[key]
            with archive.open(info) as stream:
                rows = _npy_rows(path, stream, _data_offset(path, info), key=key) if _stored(info) else None
                if rows is None:
                    rows = _compressed_rows(path, stream, key)
            found[key] = rows
    return BagFile(path, found["features"], found.get("coords"), found.get("instance_labels"))


def _stored(info: zipfile.ZipInfo) -> bool:
    return info.compress_type == zipfile.ZIP_STORED


def _compressed_rows(path: Path, stream: IO[bytes], key: str) -> Rows:
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if dtype.kind not in "fiub":
        raise BagFileError(f"{key} holds {dtype}, not numbers")
    count, width = (shape[0], 1) if key == "instance_labels" and len(shape) == 1 else two_dimensional(shape, what=key)
    return WholeRows(path, key, count, width, dtype.str)


def _pt_rows(path: Path) -> Rows:
    is_zip = zipfile.is_zipfile(path)
    value = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    if not isinstance(value, torch.Tensor):
        inside = f" with {sorted(map(str, value))[:10]}" if isinstance(value, dict) else ""
        raise BagFileError(f"holds a {type(value).__name__}{inside}, expected one tensor (N, D)")
    if value.is_complex() or value.is_quantized or value.layout != torch.strided:
        raise BagFileError(f"holds a tensor of {value.dtype} and {value.layout}, not plain numbers")
    count, width = two_dimensional(tuple(value.shape), what="the tensor")
    dtype = BFLOAT16 if value.dtype == torch.bfloat16 else np.dtype(str(value.dtype).removeprefix("torch.")).str
    if is_zip and value.is_contiguous() and count:
        with zipfile.ZipFile(path) as archive:
            storages = [info for info in archive.infolist() if info.filename.split("/")[-2:-1] == ["data"]]
            orders = [archive.read(i).decode() for i in archive.infolist() if i.filename.endswith("/byteorder")]
        if len(storages) == 1 and _stored(storages[0]) and orders in ([], [sys.byteorder]):
            start = _data_offset(path, storages[0]) + int(value.storage_offset()) * value.element_size()
            return ContiguousRows(path, start, count, width, dtype)
    return WholeRows(path, None, count, width, dtype)


__all__ = ["LAYOUTS", "SIDECARS", "SUFFIXES", "BagFile", "open_bag_file", "two_dimensional"]
