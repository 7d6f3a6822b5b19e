"""One conversion that makes bags fast to sample from: plain rows in place of chunks and compression."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lightning_entropy.data.bag_files import SIDECARS, BagFile, open_bag_file
from lightning_entropy.data.bag_layout import find_layout
from lightning_entropy.data.h5_rows import H5Handles
from lightning_entropy.data.problems import BagFileError, Problems
from lightning_entropy.data.rows import BFLOAT16, Rows, stream
from lightning_entropy.extras import require
from lightning_entropy.training.files import atomic_write

_TARGETS = ("h5", "npy")


class Conversion(NamedTuple):
    """What :func:`convert_bags` did.

    Attributes:
        written: files that were written.
        kept: files that were there already, from a run before.
    """

    written: list[Path]
    kept: list[Path]


def convert_bags(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    layout: str = "h5",
    source_layout: str = "auto",
    dtype: str | None = None,
) -> Conversion:
    """Rewrite bags so that any rows of them are read without the others.

    Chunked and compressed HDF5, compressed ``.npz`` and old ``.pt`` files must be read (nearly) whole to
    sample from them. The files written here hold the same numbers contiguously. A file appears when it is
    complete; calling again goes on where the call before was stopped.

    Args:
        source: folder of feature files, or the AEM authors' one file.
        target: folder to write to; not the folder of the source.
        layout: ``"h5"``: ``features`` and ``coords`` as CLAM and TRIDENT name them, contiguous, readable by
            every tool that reads theirs; attributes are copied. ``"npy"``: ``NAME.npy`` with
            ``NAME.coords.npy`` beside it.
        source_layout: layout of the source, as in ``SlideBags(layout=...)``.
        dtype: ``"float16"`` or ``"float32"`` for the features; None keeps the stored one (bfloat16, which
            neither format has, becomes float32).

    Returns:
        The files that were written, and those that were there.

    Raises:
        ValueError: if an argument is out of its range, or, after all other files were converted, for those
            that cannot be read or hold numbers that ``dtype`` cannot.
    """
    from rich.console import Console
    from rich.progress import track

    if layout not in _TARGETS:
        raise ValueError(f"layout must be one of {', '.join(_TARGETS)}, got {layout!r}")
    if dtype not in (None, "float16", "float32"):
        raise ValueError(f"dtype must be float16, float32 or None, got {dtype!r}")
    source, target = Path(source), Path(target)
    handles = H5Handles()
    folder = find_layout(source, layout=source_layout, handles=handles)
    if target.resolve() in (source.resolve(), folder.root.resolve()):
        raise ValueError(f"target {target} is the source; give another folder")
    problems = Problems(f"convert_bags({source}, {target})")
    written, kept = [], []
    console = Console(stderr=True)
    names = folder.names(handles)
    for name in track(names, "converting bags", console=console, disable=not console.is_terminal):
        path, place = folder.find(name), target / f"{name}.{layout}"
        group = name if folder.layout == "aem" else None
        try:
            bag = open_bag_file(path, layout=folder.layout, handles=handles, group=group)
            if _is_done(bag, place, layout):
                kept.append(place)
                continue
            if layout == "npy":
                _write_npy(bag, place, dtype)
            else:
                node = handles.get(path) if path.suffix in (".h5", ".hdf5") else None
                _write_h5(
                    bag,
                    place,
                    dtype,
                    attributes=_attributes(node[group] if node is not None and group is not None else node, node),
                )
            written.append(place)
        except (BagFileError, OverflowError) as error:
            problems.add(f"{path}{'' if group is None else f' group {group}'}: {error}")
    handles.close()
    problems.raise_any()
    return Conversion(written, kept)


def _is_done(bag: BagFile, place: Path, layout: str) -> bool:
    """Whether the target is at least as new as its source and has its shape."""
    if not place.is_file() or place.stat().st_mtime_ns < bag.path.stat().st_mtime_ns:
        return False
    reader = H5Handles()
    try:
        there = open_bag_file(place, layout=layout, handles=reader)
    except BagFileError:
        return False
    finally:
        reader.close()
    return (there.features.count, there.features.width) == (bag.features.count, bag.features.width)


def _target_dtype(rows: Rows, dtype: str | None) -> np.dtype[Any]:
    if dtype is not None:
        return np.dtype(dtype)
    return np.dtype("float32" if rows.dtype == BFLOAT16 else rows.dtype).newbyteorder("=")


def _blocks(rows: Rows, wanted: np.dtype[Any]) -> Iterator[tuple[slice, np.ndarray]]:
    for start, block in stream(rows):
        values = (block.float() if block.dtype == torch.bfloat16 else block).numpy()
        with np.errstate(over="ignore"):
            narrowed = values.astype(wanted)
        if wanted == np.float16 and values.dtype != np.float16 and (np.isinf(narrowed) & np.isfinite(values)).any():
            raise OverflowError(f"holds {np.abs(values).max():.3g}, and float16 ends at 65504; pass dtype='float32'")
        yield slice(start, start + len(values)), narrowed


def _parts(bag: BagFile) -> dict[str, Rows]:
    parts = {"features": bag.features, "coords": bag.coords, "instance_labels": bag.instance_labels}
    return {name: rows for name, rows in parts.items() if rows is not None}


def _shape(name: str, rows: Rows) -> tuple[int, ...]:
    return (rows.count,) if name == "instance_labels" else (rows.count, rows.width)


def _attributes(node: Any, file: Any) -> dict[str, dict[str, Any]]:
    """Attributes of the file (patch sizes, units, versions) and of the coordinates (as CLAM writes them)."""
    if node is None:
        return {}
    coords = dict(node["coords"].attrs) if "coords" in node else {}
    return {"": {**dict(file.attrs), **dict(node.attrs)}, "coords": coords}


def _write_h5(bag: BagFile, place: Path, dtype: str | None, *, attributes: dict[str, dict[str, Any]]) -> None:
    h5py = require("h5py", extra="mil")
    with atomic_write(place) as part, h5py.File(part, "w") as file:
        for name, rows in _parts(bag).items():
            wanted = _target_dtype(rows, dtype if name == "features" else None)
            dataset = file.create_dataset(name, shape=_shape(name, rows), dtype=wanted)
            for where, values in _blocks(rows, wanted):
                dataset[where] = values.reshape(len(values), *dataset.shape[1:])
            dataset.attrs.update(attributes.get(name, {}))
        file.attrs.update(attributes.get("", {}))


def _write_npy(bag: BagFile, place: Path, dtype: str | None) -> None:
    base = place.name.removesuffix(".npy")
    beside = dict(zip(("coords", "instance_labels"), SIDECARS))
    # The features last: when they are there, everything is.
    for name, rows in reversed(_parts(bag).items()):
        wanted = _target_dtype(rows, dtype if name == "features" else None)
        with atomic_write(place.with_name(base + beside.get(name, ".npy"))) as part, part.open("wb") as file:
            header = {"descr": wanted.str, "fortran_order": False, "shape": _shape(name, rows)}
            np.lib.format.write_array_header_1_0(file, header)
            for _, values in _blocks(rows, wanted):
                file.write(np.ascontiguousarray(values).tobytes())


__all__ = ["Conversion", "convert_bags"]
