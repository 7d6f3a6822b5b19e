"""A slide as OpenSlide reads it: size, bounds, pixel size and a thumbnail aligned to level 0."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_entropy.extras import require
from lightning_entropy.recipes.attention_raster import Canvas

_BLOCK = 4096  # pixels a side that are read at once: 64 MiB


class SlideView:
    """A slide opened for reading; use it as a context manager.

    Args:
        path: a whole-slide image.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if OpenSlide cannot read it.
        ImportError: if openslide is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"slide {self.path} does not exist")
        openslide = require("openslide", extra="wsi")
        try:
            self._slide: Any = openslide.OpenSlide(str(self.path))
        except openslide.OpenSlideError as error:
            raise ValueError(
                f"slide {self.path}: OpenSlide cannot read it ({error}). Expected a format that OpenSlide "
                "knows (SVS, NDPI, MRXS, SCN, pyramidal tiled TIFF, ...); without a slide the map is drawn "
                "on a plain canvas"
            ) from error

    def __enter__(self) -> SlideView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._slide.close()

    @property
    def dimensions(self) -> tuple[int, int]:
        """Width and height of level 0 in pixels."""
        width, height = self._slide.dimensions
        return int(width), int(height)

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """Left, top, width and height of the part that was scanned, in level-0 pixels; else the whole slide.

        Formats such as MIRAX put the scanned part somewhere in a much larger plane. Coordinates of tiles are
        those of the plane; QuPath shows the scanned part only and counts from its corner.
        """
        names = [f"openslide.bounds-{name}" for name in ("x", "y", "width", "height")]
        found = [self._slide.properties.get(name) for name in names]
        if any(value is None for value in found):
            return 0, 0, *self.dimensions
        left, top, width, height = (int(value) for value in found)
        return left, top, width, height

    @property
    def mpp(self) -> float | None:
        """Micrometres a level-0 pixel, along x; ``None`` when the file does not say."""
        value = self._slide.properties.get("openslide.mpp-x")
        return float(value) if value is not None else None

    @property
    def level_downsamples(self) -> tuple[float, ...]:
        """Downsample of each stored level."""
        return tuple(float(value) for value in self._slide.level_downsamples)

    def thumbnail(self, canvas: Canvas) -> NDArray[np.uint8]:
        """The canvas' rectangle of the slide, ``(rows, columns, 3)`` RGB.

        Canvas pixel ``(r, c)`` shows level-0 pixels ``left + c * downsample`` to ``left + (c + 1) *
        downsample``. It is read block by block from the nearest finer level, so that a large slide with one
        level does not fill the memory. What the scanner left out is white.
        """
        image = require("PIL.Image", extra="wsi")
        step_x, step_y = canvas.downsample
        level = int(self._slide.get_best_level_for_downsample(min(step_x, step_y) * 1.0001))
        down = self.level_downsamples[level]
        picture = np.empty((canvas.rows, canvas.columns, 3), dtype=np.uint8)
        block = max(1, int(_BLOCK * down / max(step_x, step_y)) - 2)
        for row in range(0, canvas.rows, block):
            for column in range(0, canvas.columns, block):
                rows, columns = min(block, canvas.rows - row), min(block, canvas.columns - column)
                left, top = canvas.left + column * step_x, canvas.top + row * step_y
                x0, y0 = int(np.floor(left / down)), int(np.floor(top / down))
                x1 = int(np.ceil((left + columns * step_x) / down))
                y1 = int(np.ceil((top + rows * step_y) / down))
                # OpenSlide takes the corner in level-0 pixels and the size in pixels of the level.
                region = self._slide.read_region(
                    (round(x0 * down), round(y0 * down)), level, (max(1, x1 - x0), max(1, y1 - y0))
                )
                paper = image.new("RGB", region.size, (255, 255, 255))
                paper.paste(region, mask=region.getchannel("A"))
                part = (left / down - x0, top / down - y0)
                box = (*part, part[0] + columns * step_x / down, part[1] + rows * step_y / down)
                box = (box[0], box[1], min(box[2], region.size[0]), min(box[3], region.size[1]))
                picture[row : row + rows, column : column + columns] = np.asarray(
                    paper.resize((columns, rows), image.Resampling.BOX, box=box)
                )
        return picture
