"""Bags of digit images with known instance labels: the generated benchmark that the documentation reports.

An instance is an 8 x 8 image of scikit-learn's digits (64 pixels in [0, 1]) with Gaussian noise added,
followed by 16 values of the same noise alone. A bag is positive when it holds images of the
digit 9. The images of the training, validation and test bags are disjoint, so that nothing but the concept
carries over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from lightning_entropy.data.source import ArrayBags, Bag
from lightning_entropy.extras import require

KEY_DIGIT, ARTEFACT_DIGIT, NOISE_FEATURES = 9, 0, 16
_ARTEFACTS = 2  # instances of the artefact in a bag that has it
_POOLS = {"train": (0.0, 0.6), "val": (0.6, 0.7), "test": (0.7, 1.0)}
PRESETS: Mapping[str, Mapping[str, float | int | bool]] = {
    "fewbags": {},
    "manybags": {"train_bags": 100},
    "shortcut": {"train_bags": 60, "bag_size": 120, "witness_rate": 0.2, "artefact": True},
    "tiny": {"train_bags": 60, "witness_rate": 2 / 150, "noise": 0.08},
}


@dataclass(frozen=True)
class _Recipe:
    bag_size: int
    witness_rate: float
    noise: float
    artefact: bool


def digit_bags(
    *,
    seed: int = 0,
    draw: int = 0,
    preset: str = "fewbags",
    train_bags: int | None = None,
    val_bags: int = 20,
    test_bags: int = 120,
    bag_size: int | None = None,
    witness_rate: float | None = None,
    noise: float | None = None,
    artefact: bool | None = None,
) -> ArrayBags:
    """Generate bags of digits; half of them, alternating, are positive.

    Args:
        seed: of images, noise and bags.
        draw: number of an independent draw of the same seed; ``SlideBags(fold=...)`` passes the fold here.
        preset: values for what is left at None. ``"fewbags"``: 20 training bags of 150 instances, a tenth of
            the instances of a positive bag are 9s. ``"manybags"``: 100 of them.
            ``"shortcut"``: 60 bags of 120, a fifth, and two images of
            the digit 0 in 95 % of the positive and 5 % of the negative training bags but in half of the other
            bags whatever their label. ``"tiny"``: 60 bags of 150, two 9s in a positive bag, less noise.
        train_bags: number of training bags.
        val_bags: number of validation bags; 0 leaves their images to the test bags.
        test_bags: number of test bags.
        bag_size: instances of a bag.
        witness_rate: share of the instances of a positive bag that show the key digit, at least one.
        noise: standard deviation of the noise, on the pixels and alone (0.15, and 0.08 in ``"tiny"``).
        artefact: whether bags get the artefact of ``"shortcut"``.

    Returns:
        A source with ``splits`` and instance labels; features ``(bag_size, 80)``.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if the preset does not exist or a number is out of its range.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    given = {
        "train_bags": train_bags,
        "bag_size": bag_size,
        "witness_rate": witness_rate,
        "noise": noise,
        "artefact": artefact,
    }
    options: dict[str, float | int | bool] = {
        **{"train_bags": 20, "bag_size": 150, "witness_rate": 0.1, "noise": 0.15, "artefact": False},
        **PRESETS[preset],
        **{name: value for name, value in given.items() if value is not None},
    }
    recipe = _Recipe(
        int(options["bag_size"]),
        float(options["witness_rate"]),
        float(options["noise"]),
        bool(options["artefact"]),
    )
    counts = {"train": int(options["train_bags"]), "val": val_bags, "test": test_bags}
    if not 0 < recipe.witness_rate <= 1 or recipe.noise < 0:
        raise ValueError(
            f"witness_rate must be in (0, 1] and noise at least 0, got {recipe.witness_rate}, {recipe.noise}"
        )
    if recipe.bag_size < 1 + 2 * recipe.artefact * _ARTEFACTS or min(counts.values()) < 0 or counts["train"] < 2:
        raise ValueError(f"bag_size {recipe.bag_size} or number of bags {counts} is too small")

    digits = require("sklearn.datasets", extra="demo").load_digits()
    images = (digits.data / 16).astype(np.float32)
    rng = np.random.default_rng([seed, draw])
    shuffled = {digit: rng.permutation(np.flatnonzero(digits.target == digit)) for digit in range(10)}
    slides, labels, splits, bags = [], [], [], []
    for split, (low, high) in _POOLS.items():
        if split == "test" and val_bags == 0:
            low = _POOLS["val"][0]
        pool = {d: rows[int(low * len(rows)) : int(high * len(rows))] for d, rows in shuffled.items()}
        for number in range(counts[split]):
            label = number % 2
            slides.append(f"{split}-{number:03d}")
            labels.append(label)
            splits.append(split)
            bags.append(_bag(images, pool, label, recipe, training=split == "train", rng=rng))
    return ArrayBags(slides, labels, [f"without {KEY_DIGIT}", f"with {KEY_DIGIT}"], bags, splits=list(splits))


def _bag(
    images: np.ndarray,
    pool: dict[int, np.ndarray],
    label: int,
    recipe: _Recipe,
    *,
    training: bool,
    rng: np.random.Generator,
) -> Bag:
    keys = max(1, round(recipe.witness_rate * recipe.bag_size)) if label else 0
    chosen = [rng.choice(pool[KEY_DIGIT], keys)]
    if recipe.artefact:
        present = 0.5 if not training else (0.95 if label else 0.05)
        if rng.random() < present:
            chosen.append(rng.choice(pool[ARTEFACT_DIGIT], min(_ARTEFACTS, recipe.bag_size - keys)))
    apart = {KEY_DIGIT, ARTEFACT_DIGIT} if recipe.artefact else {KEY_DIGIT}
    others = np.concatenate([rows for digit, rows in pool.items() if digit not in apart])
    chosen.append(rng.choice(others, recipe.bag_size - sum(map(len, chosen))))
    rows = np.concatenate(chosen)
    is_key = np.zeros(len(rows), dtype=np.float32)
    is_key[:keys] = 1
    order = rng.permutation(len(rows))
    pixels = images[rows[order]]
    pixels = pixels + rng.normal(0, recipe.noise, pixels.shape).astype(np.float32)
    features = np.concatenate(
        [pixels, rng.normal(0, recipe.noise, (len(rows), NOISE_FEATURES)).astype(np.float32)], axis=1
    )
    return Bag(torch.from_numpy(features), None, torch.from_numpy(is_key[order]))


__all__ = ["PRESETS", "digit_bags"]
