"""Bags sampled from the tiles of one real slide region, which is shipped with the package."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lightning_entropy.data.source import ArrayBags, Bag
from lightning_entropy.extras import require

_FOLDER = Path(__file__).parent / "cmu_small_region"
_UPPER = 0.6  # share of the tiles, from the top of the region, that training and validation bags are drawn from


class SlideRegion(NamedTuple):
    """The files of the shipped region.

    Attributes:
        svs: CMU-1-Small-Region, 2220 x 2967 pixels at 0.499 micrometres, Aperio SVS, CC0.
        features: its 183 tissue tiles of 112 pixels in CLAM's layout: ``features`` (183, 384), ``coords``
            (183, 2) at level 0, and the constructed ``nuclei_share`` and ``dense`` (183,).
    """

    svs: Path
    features: Path


def slide_region() -> SlideRegion:
    """Paths of the slide region and of its tile features; ``cmu_small_region/LICENSE.md`` says where they are
    from.
    """
    return SlideRegion(_FOLDER / "cmu_small_region.svs", _FOLDER / "cmu1_small_dinov2_s14_p112.h5")


def region_bags(
    *,
    seed: int = 0,
    draw: int = 0,
    train_bags: int = 40,
    val_bags: int = 20,
    test_bags: int = 60,
    bag_size: int = 24,
    witness_rate: float = 0.125,
) -> ArrayBags:
    """Sample bags from the region's tiles; half of them, alternating, hold tiles dense with nuclei.

    The label is constructed and no pathologist's: ``dense`` marks the eighth of the tiles with the largest
    share of hematoxylin. Training and validation bags are drawn from the upper 60 % of the tiles, test bags
    from the lower 40 %, so that no tile is in both. It is one slide: what is learned here says nothing about
    other slides.

    Args:
        seed: of the bags.
        draw: number of an independent draw of the same seed; ``SlideBags(fold=...)`` passes the fold here.
        train_bags: number of training bags.
        val_bags: number of validation bags.
        test_bags: number of test bags.
        bag_size: tiles of a bag, drawn without replacement.
        witness_rate: share of the tiles of a positive bag that are dense, at least one tile.

    Returns:
        A source with ``splits``, coordinates and instance labels; features ``(bag_size, 384)``.

    Raises:
        ValueError: if a part of the region has fewer tiles than a bag needs.
    """
    with require("h5py", extra="mil").File(slide_region().features, "r") as file:
        features, coords, dense = (file[name][()] for name in ("features", "coords", "dense"))
    from_top = np.argsort(coords[:, 1], kind="stable")
    border = coords[from_top[int(_UPPER * len(from_top))], 1]  # a whole row of tiles belongs to one part
    upper = coords[:, 1] < border
    keys = max(1, round(witness_rate * bag_size))
    rng = np.random.default_rng([seed, draw])
    slides, labels, splits, bags = [], [], [], []
    for split, count in (("train", train_bags), ("val", val_bags), ("test", test_bags)):
        part = ~upper if split == "test" else upper
        dense_tiles, other_tiles = np.flatnonzero(part & dense), np.flatnonzero(part & ~dense)
        if keys > min(len(dense_tiles), bag_size) or bag_size > len(other_tiles):
            raise ValueError(
                f"bags of {bag_size} tiles with {keys} dense ones cannot be drawn from "
                f"{len(dense_tiles)} dense and {len(other_tiles)} other tiles of the {split} part"
            )
        for number in range(count):
            label = number % 2
            rows = rng.permutation(
                np.concatenate(
                    [
                        rng.choice(dense_tiles, keys * label, replace=False),
                        rng.choice(other_tiles, bag_size - keys * label, replace=False),
                    ]
                )
            )
            slides.append(f"{split}-{number:03d}")
            labels.append(label)
            splits.append(split)
            bags.append(
                Bag(
                    torch.from_numpy(features[rows].astype(np.float32)),
                    torch.from_numpy(coords[rows].astype(np.int64)),
                    torch.from_numpy(dense[rows].astype(np.float32)),
                )
            )
    return ArrayBags(slides, labels, ["no dense tile", "dense tiles"], bags, splits=list(splits))


__all__ = ["SlideRegion", "region_bags", "slide_region"]
