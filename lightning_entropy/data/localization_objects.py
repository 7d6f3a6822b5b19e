"""Generated objects with exact boxes and masks, on which weakly supervised localization can be told apart.

What such a set needs (and blood cells lack): a small part that suffices for the class, a body that carries weaker
evidence of it, a background that carries none, and objects away from the middle. Here the part is a bright digit at one
end of an ellipse, the weaker evidence is the direction of stripes on the ellipse.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from lightning_entropy.data.localization_backgrounds import BACKGROUNDS, background
from lightning_entropy.data.localization_picture import LocalizationSource, Picture
from lightning_entropy.extras import require

SIZE = 64
_CLASSES = 4
_GLYPH, _BORDER = 12, 16  # pixels: side of the digit, least distance of the object's centre from the border
_LONG, _SHORT = (9.0, 15.0), (7.0, 11.0)  # semi-axes
_PERIOD = 6.0  # of the stripes
_POOLS = {"train": (0.0, 0.6), "val": (0.6, 0.7), "test": (0.7, 1.0)}  # shares of the scanned digits


def generated_objects(
    *,
    seed: int = 0,
    strength: float = 0.6,
    background_correlation: float = 0.0,
    train_count: int = 1500,
    val_count: int = 150,
    test_count: int = 250,
) -> LocalizationSource:
    """Images of 64 x 64 pixels with one object each, drawn when they are first read and then kept.

    The object is an ellipse (semi-axes 9 to 15 and 7 to 11 pixels, any direction, random tint and noise) whose centre
    is at least 16 pixels from the border. One of scikit-learn's digits 0 to 3, its class, stands in 12 x 12 bright
    pixels at one end. Stripes on the ellipse run in a direction of the class (0, 45, 90, 135 degrees). Image i of a
    split is a function of ``seed``, the split and i; sets that differ in ``strength`` alone differ in nothing else.
    The digits of the three splits are different scans.

    Args:
        seed: of everything that is drawn.
        strength: contrast of the stripes, 0 for none to 1.
        background_correlation: share of the images, in every split, whose background is of the kind of their class;
            the others have any of five kinds (see :mod:`~lightning_entropy.data.localization_backgrounds`).
        train_count: number of images in train; classes take turns.
        val_count: number of images in val.
        test_count: number of images in test.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if a share is not in [0, 1].
    """
    for name, share in (("strength", strength), ("background_correlation", background_correlation)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {share}")
    counts = {"train": train_count, "val": val_count, "test": test_count}
    places = [(split, i) for split, count in counts.items() for i in range(count)]
    return LocalizationSource(
        names=[f"{split}/{number:05d}" for split, number in places],
        labels=[(number % _CLASSES,) for _, number in places],
        classes=[f"digit {label}" for label in range(_CLASSES)],
        splits=[split for split, _ in places],
        multilabel=False,
        has_masks=True,
        mask_classes=False,
        image_size=SIZE,
        mirrored=False,  # mirrored stripes are those of another class, and a mirrored digit is none
        read=_Drawn(places, seed, strength, background_correlation),
    )


class _Drawn:
    """Draws an image when it is first asked for."""

    def __init__(self, places: list[tuple[str, int]], seed: int, strength: float, correlation: float) -> None:
        self.places, self.seed, self.strength, self.correlation = places, seed, strength, correlation
        self.pools = _glyphs(seed)
        self.kept: dict[int, Picture] = {}

    def __call__(self, index: int) -> Picture:
        if index not in self.kept:
            split, number = self.places[index]
            key = (self.seed, list(_POOLS).index(split), number)
            self.kept[index] = _draw(key, self.pools[split], number % _CLASSES, self.strength, self.correlation)
        return self.kept[index]


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Digits as 12 x 12 pixels in [0, 1], and which they are."""
    from PIL import Image

    found = require("sklearn.datasets", extra="demo").load_digits()
    known = found.target < _CLASSES
    glyphs = [
        np.asarray(Image.fromarray(pixels.astype(np.float32) / 16).resize((_GLYPH, _GLYPH), Image.Resampling.BILINEAR))
        for pixels in found.images[known]
    ]
    return np.stack(glyphs), found.target[known]


def _glyphs(seed: int) -> dict[str, list[np.ndarray]]:
    """The digits of each split: for each class ``(n, 12, 12)``."""
    glyphs, digits = _scans()
    rng = np.random.default_rng(seed)
    order = [rng.permutation(np.flatnonzero(digits == label)) for label in range(_CLASSES)]
    return {
        split: [glyphs[rows[int(low * len(rows)) : int(high * len(rows))]] for rows in order]
        for split, (low, high) in _POOLS.items()
    }


def _draw(
    key: tuple[int, int, int], pool: list[np.ndarray], label: int, strength: float, correlation: float
) -> Picture:
    rng = np.random.default_rng([*key, 0])
    across = rng.uniform(_BORDER, SIZE - _BORDER, 2)  # row and column of the centre
    long, short, turn = rng.uniform(*_LONG), rng.uniform(*_SHORT), rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    down, right = rows - across[0], columns - across[1]
    along = right * np.cos(turn) + down * np.sin(turn)
    aside = down * np.cos(turn) - right * np.sin(turn)
    body = (along / long) ** 2 + (aside / short) ** 2 <= 1

    angle = label * np.pi / _CLASSES
    wave = np.sin(2 * np.pi / _PERIOD * (right * np.cos(angle) + down * np.sin(angle)) + rng.uniform(0, 2 * np.pi))
    tint, noise = rng.uniform(0.25, 0.6, 3), rng.normal(0, 0.05, (SIZE, SIZE, 3))
    surface = np.clip(tint * (1 + strength * wave[..., None]) + noise, 0, 1)

    glyph = np.zeros((SIZE, SIZE, 1))
    reach = long - _GLYPH / 2
    top = round(across[0] + reach * np.sin(turn) - _GLYPH / 2)
    left = round(across[1] + reach * np.cos(turn) - _GLYPH / 2)
    glyphs = pool[label]
    glyph[top : top + _GLYPH, left : left + _GLYPH, 0] = glyphs[rng.integers(len(glyphs))]

    behind = np.random.default_rng([*key, 1])
    own, other = behind.random() < correlation, int(behind.integers(len(BACKGROUNDS)))
    pixels = np.where(body[..., None], surface, background(BACKGROUNDS[label if own else other], SIZE, behind))
    pixels = pixels * (1 - glyph) + glyph
    mask = body | (glyph[..., 0] >= 0.5)
    return Picture(np.rint(pixels * 255).astype(np.uint8), _box(mask), mask.astype(np.uint8), (SIZE, SIZE))


def _box(mask: np.ndarray) -> torch.Tensor:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]], dtype=torch.float64)


__all__ = ["generated_objects"]
