"""The features of slides as files, with where each tile lies and how large it is at level 0."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_entropy.data.bag_files import FEATURE_KEYS, SUFFIXES, open_bag_file
from lightning_entropy.data.bag_layout import find_layout
from lightning_entropy.data.h5_rows import H5Handles
from lightning_entropy.data.rows import BagFileError
from lightning_entropy.recipes.attention_files import plain
from lightning_entropy.recipes.tile_grid import grid_step


@dataclass(frozen=True)
class FeatureFile:
    """Where the features of one slide are.

    Args:
        slide: name of the slide.
        path: the file.
        layout: one of ``lightning_entropy.data.bag_files.LAYOUTS``.
        group: group of the slide in the file of layout ``aem``.
    """

    slide: str
    path: Path
    layout: str
    group: str | None = None


@dataclass(frozen=True)
class SlideFeatures:
    """The tiles of one slide.

    Args:
        features: ``(N, D)`` float32.
        coords: ``(N, 2)`` level-0 pixels.
        patch_size_level0: side of a tile in level-0 pixels.
        patch_size_source: where that number is from, in words.
        attributes: attributes of the coordinates in the file.
    """

    features: Tensor
    coords: NDArray[np.int64]
    patch_size_level0: int
    patch_size_source: str
    attributes: Mapping[str, Any]


def find_features(paths: Sequence[str | os.PathLike[str]]) -> list[FeatureFile]:
    """The slides in feature files and folders of them, in the order given, sorted inside a folder.

    Args:
        paths: files (``.h5`` of CLAM, TRIDENT, STAMP or the AEM authors, ``.npz``, ``.npy``, ``.pt``) or
            folders.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if a path is not known to hold features, or holds none.
    """
    found: list[FeatureFile] = []
    handles = H5Handles()
    try:
        for path in map(Path, paths):
            found.extend(_in_file(path, handles) if path.is_file() else _in_folder(path, handles))
    finally:
        handles.close()
    if not found:
        raise ValueError(f"no features in {', '.join(map(str, paths)) or 'no path at all'}")
    return found


def _in_folder(path: Path, handles: H5Handles) -> Iterator[FeatureFile]:
    folder = find_layout(path, handles=handles)
    for slide in folder.names(handles):
        yield FeatureFile(slide, folder.find(slide), folder.layout)


def _in_file(path: Path, handles: H5Handles) -> Iterator[FeatureFile]:
    if path.suffix not in SUFFIXES.values():
        raise ValueError(f"{path}: features are {', '.join(sorted(set(SUFFIXES.values())))} files, or a folder of them")
    if path.suffix != ".h5":
        yield FeatureFile(path.stem, path, path.suffix[1:])
        return
    try:
        file = handles.get(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as HDF5: {error}") from error
    for layout in ("h5", "stamp"):
        if any(key in file for key in FEATURE_KEYS[layout]):
            yield FeatureFile(path.stem, path, layout)
            return
    groups = [name for name in sorted(file) if hasattr(file[name], "keys") and "feat" in file[name]]
    if not groups:
        raise ValueError(
            f"{path} holds {sorted(file)[:10]}: expected features (CLAM, TRIDENT), feats or patch_embeddings (STAMP), "
            "or a group for each slide with feat in it (AEM authors)"
        )
    for name in groups:
        yield FeatureFile(name, path, "aem", name)


def read_features(
    file: FeatureFile,
    *,
    patch_size: int | None = None,
    mpp: float | None = None,
    level_downsamples: Sequence[float] | None = None,
) -> SlideFeatures:
    """Read all tiles of a slide with their places.

    Args:
        file: from `find_features`.
        patch_size: side of a tile in level-0 pixels; ``None`` takes it from the file, see
            `patch_size_level0`.
        mpp: micrometres a level-0 pixel; needed for STAMP, whose coordinates are micrometres.
        level_downsamples: of the slide's levels, where the slide is at hand.

    Raises:
        ValueError: if the file is damaged or empty, has no coordinates, or the patch size cannot be told.
    """
    where = f"{file.path}" + (f" group {file.group}" if file.group else "")
    handles = H5Handles()
    try:
        bag = open_bag_file(file.path, layout=file.layout, handles=handles, group=file.group)
        if bag.features.count == 0:
            raise BagFileError("no tiles, so there is no attention to draw")
        if bag.coords is None:
            hint = " CLAM keeps coordinates in h5_files: pass that file." if file.layout == "pt" else ""
            raise BagFileError(f"no coords, so attention cannot be placed on the slide.{hint}")
        attributes = _attributes(file, handles)
        places = bag.coords.read().double().numpy()
        features = bag.features.read().float()
    except BagFileError as error:
        raise ValueError(f"{where}: {error}") from error
    finally:
        handles.close()
    if attributes.get("unit") == "um" or file.layout == "stamp":
        if mpp is None:
            raise ValueError(
                f"{where}: coordinates are micrometres (STAMP); pass the slide, or mpp (micrometres a level-0 pixel)"
            )
        places = places / mpp
    coords = np.rint(places).astype(np.int64)
    try:
        size, source = patch_size_level0(
            attributes, coords, given=patch_size, mpp=mpp, level_downsamples=level_downsamples
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return SlideFeatures(features, coords, size, source, attributes)


def _attributes(file: FeatureFile, handles: H5Handles) -> dict[str, Any]:
    """Attributes of the file, its group and its coordinates, the nearest counting."""
    if file.layout not in ("h5", "stamp", "aem"):
        return {}
    root = handles.get(file.path)
    node = root if file.group is None else root[file.group]
    return {name: plain(value) for part in (root, node, node["coords"]) for name, value in part.attrs.items()}


def patch_size_level0(
    attributes: Mapping[str, Any],
    coords: NDArray[np.int64],
    *,
    given: int | None = None,
    mpp: float | None = None,
    level_downsamples: Sequence[float] | None = None,
) -> tuple[int, str]:
    """Side of a tile in level-0 pixels, and where it is from.

    In this order: the argument; ``patch_size_level0`` (TRIDENT); ``patch_size`` times the downsample of
    ``patch_level`` (CLAM) or the ratio of magnifications; ``tile_size_um`` over ``mpp`` (STAMP); the step of
    the grid that the coordinates form, which is the size of a tile unless tiles overlap.

    Args:
        attributes: of the coordinates.
        coords: ``(N, 2)`` level-0 pixels.
        given: the user's word.
        mpp: micrometres a level-0 pixel.
        level_downsamples: of the slide's levels.

    Raises:
        ValueError: if none of these gives a size.
    """
    if given is not None:
        if given < 1:
            raise ValueError(f"patch_size must be at least 1 level-0 pixel, got {given}")
        return int(given), "argument"
    if "patch_size_level0" in attributes:
        return round(float(attributes["patch_size_level0"])), "attribute patch_size_level0"
    factor, how = _downsample(attributes, level_downsamples)
    if "patch_size" in attributes and factor is not None:
        return round(float(attributes["patch_size"]) * factor), f"attribute patch_size, {how}"
    micrometres = attributes.get("tile_size_um", attributes.get("tile_size"))
    if micrometres is not None and mpp is not None:
        return round(float(micrometres) / mpp), "attribute tile_size_um"
    step = grid_step(coords)
    if step is None:
        raise ValueError("the size of a tile is in no attribute, and no two tiles are in a row: pass patch_size")
    return step, f"grid of the coordinates (step {step})"


def _downsample(attributes: Mapping[str, Any], level_downsamples: Sequence[float] | None) -> tuple[float | None, str]:
    if "level0_magnification" in attributes and "target_magnification" in attributes:
        ratio = float(attributes["level0_magnification"]) / float(attributes["target_magnification"])
        return ratio, f"magnification ratio {ratio:g}"
    level = attributes.get("patch_level")
    if level is None or int(level) == 0:
        return 1.0, "level 0"
    if "downsample" in attributes:
        factor = float(np.asarray(attributes["downsample"]).reshape(-1)[0])  # CLAM stores the pair (x, y)
        return factor, f"downsample {factor:g}"
    if level_downsamples is not None and int(level) < len(level_downsamples):
        factor = float(level_downsamples[int(level)])
        return factor, f"downsample {factor:g} of the slide's level {level}"
    return None, ""
