"""Backgrounds for generated objects: crops of two real photographs, and textures that are drawn.

The photographs are the two that scikit-learn ships (``china.jpg`` and ``flower.jpg``, CC BY). A set of images must not
depend on what else happens to be installed, so no other package's pictures are used.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from lightning_entropy.extras import require

BACKGROUNDS = ("china", "flower", "clouds", "pebbles", "grain")
_PHOTOS = ("china", "flower")
_CROP = (64, 240)  # side of a crop of a photograph (427 x 640 pixels) before it is brought to size


def background(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a background.

    Args:
        kind: ``"china"`` or ``"flower"`` (crops of photographs of 64 to 240 pixels), ``"clouds"``, ``"pebbles"`` or
            ``"grain"`` (drawn, in random colours).
        size: height and width.
        rng: what it is drawn with.

    Returns:
        ``(size, size, 3)`` float32 in [0, 1].

    Raises:
        ImportError: if scikit-learn is needed and not installed.
    """
    if kind in _PHOTOS:
        found = _crop(_photo(kind), size, rng)
    elif kind == "pebbles":
        found = _pebbles(size, rng)
    else:
        coarse, fine = (2, 16) if kind == "clouds" else (size // 4, size)
        found = _noise(size, coarse, fine, rng)
    return np.clip(found, 0, 1).astype(np.float32)


@cache
def _photo(name: str) -> np.ndarray:
    pixels: np.ndarray = require("sklearn.datasets", extra="demo").load_sample_image(f"{name}.jpg")
    return pixels


def _crop(photo: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    from PIL import Image

    height, width = photo.shape[:2]
    side = int(rng.integers(_CROP[0], _CROP[1] + 1))
    top, left = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
    crop = Image.fromarray(photo[top : top + side, left : left + side])
    pixels = np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def _noise(size: int, coarse: int, fine: int, rng: np.random.Generator) -> np.ndarray:
    """Two colours, mixed by smooth noise of several grid sizes from ``coarse`` to ``fine``."""
    from PIL import Image

    mix, cells = np.zeros((size, size), np.float32), coarse
    while cells <= fine:
        grid = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
        mix += np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)) * (coarse / cells) ** 0.5
        cells *= 2
    mix = 1 / (1 + np.exp(-1.5 * mix / mix.std()))
    one, other = rng.random((2, 3))
    return mix[..., None] * one + (1 - mix[..., None]) * other


def _pebbles(size: int, rng: np.random.Generator) -> np.ndarray:
    """Cells around random points, each of a shade of one colour and darker towards its border."""
    points = rng.random((30, 2)) * size
    places = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1) + 0.5
    distances = np.sqrt(((places[:, :, None] - points) ** 2).sum(-1))
    nearest = distances.argmin(-1)
    first, second = np.partition(distances, 1, axis=-1)[..., :2].transpose(2, 0, 1)
    shade = rng.uniform(0.5, 1.0, len(points))[nearest] * np.clip(0.4 + (second - first) / 4, 0, 1)
    return shade[..., None] * rng.uniform(0.3, 1.0, 3)


__all__ = ["BACKGROUNDS", "background"]
