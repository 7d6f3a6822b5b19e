"""The attention of one slide's tiles, and what it is written as: PNG, GeoJSON, h5 and a summary in JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_entropy import functional
from lightning_entropy.recipes import attention_files
from lightning_entropy.recipes.attention_figure import Scale, attention_figure
from lightning_entropy.recipes.slide_view import SlideView
from lightning_entropy.training.files import atomic_write


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """Attention over the tiles of a slide.

    Args:
        attention: ``(N,)`` probabilities over the tiles; kept as float32.
        coords: ``(N, 2)`` x and y of each tile's upper left corner in level-0 pixels; kept as int64.
        patch_size_level0: side of a tile in level-0 pixels.
        slide: name of the slide.
        branch: which attention this is: ``"mean"`` over branches and heads, or the index of one.
        attributes: what else is known (attributes of the coordinates in the features file, the checkpoint,
            the weight of the regularizer, ...); goes into the h5.

    Raises:
        ValueError: if shapes disagree, there is no tile, attention is not a distribution (finite, not
            negative, sum within 1e-3 of 1), or the patch size is not positive.
    """

    attention: NDArray[np.float32]
    coords: NDArray[np.int64]
    patch_size_level0: int
    slide: str = ""
    branch: str = "mean"
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        attention = np.asarray(self.attention, dtype=np.float32)
        found = np.asarray(self.coords)
        who = f"attention map of {self.slide!r}: "
        if attention.ndim != 1 or len(attention) == 0:
            raise ValueError(f"{who}attention must be (N,) with N >= 1, got shape {attention.shape}")
        if found.shape != (len(attention), 2):
            raise ValueError(f"{who}coords must be ({len(attention)}, 2) for {len(attention)} tiles, got {found.shape}")
        if not np.isfinite(found).all():
            raise ValueError(f"{who}coords must be finite, row {int(np.argmin(np.isfinite(found).all(axis=1)))} is not")
        if not np.isfinite(attention).all() or (attention < 0).any():
            row = int(np.argmin(np.isfinite(attention) & (attention >= 0)))
            raise ValueError(f"{who}attention must be finite and not negative, row {row} is {attention[row]}")
        total = float(attention.sum(dtype=np.float64))
        if abs(total - 1.0) > 1e-3:
            raise ValueError(f"{who}attention must sum to 1 over the tiles, it sums to {total:.6g}")
        if int(self.patch_size_level0) < 1:
            raise ValueError(f"{who}patch_size_level0 must be at least 1, got {self.patch_size_level0}")
        object.__setattr__(self, "attention", attention)
        object.__setattr__(self, "coords", np.rint(found).astype(np.int64))
        object.__setattr__(self, "patch_size_level0", int(self.patch_size_level0))
        object.__setattr__(self, "branch", str(self.branch))

    def __len__(self) -> int:
        return len(self.attention)

    @property
    def entropy(self) -> float:
        """``-sum a log a`` in nats."""
        return float(functional.entropy(torch.from_numpy(self.attention).double()))

    @property
    def normalized_entropy(self) -> float:
        """Entropy divided by ``log N``; 1 for one tile, where there is nothing to spread."""
        return self.entropy / float(np.log(len(self))) if len(self) > 1 else 1.0

    @property
    def effective_number(self) -> float:
        """``exp(entropy)``: how many tiles a uniform attention of this entropy would cover."""
        return float(np.exp(self.entropy))

    def top_mass(self, count: int) -> float:
        """Attention on the ``count`` tiles that have most of it."""
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        return float(np.sort(self.attention)[::-1][:count].sum(dtype=np.float64))

    @property
    def caption(self) -> str:
        """One line of numbers for under a title."""
        return (
            f"{len(self)} tiles, effective number {self.effective_number:.1f} "
            f"(H/log N {self.normalized_entropy:.2f}), top 10: {self.top_mass(10):.0%}"
        )

    def summary(self) -> dict[str, Any]:
        """The numbers of the map: entropy in nats, effective number, top masses, where the largest is."""
        best = int(self.attention.argmax())
        return {
            "slide": self.slide,
            "branch": self.branch,
            "tiles": len(self),
            "patch_size_level0": self.patch_size_level0,
            "entropy": self.entropy,
            "normalized_entropy": self.normalized_entropy,
            "effective_number": self.effective_number,
            "top1_mass": self.top_mass(1),
            "top10_mass": self.top_mass(10),
            "largest": {
                "row": best,
                "x": int(self.coords[best, 0]),
                "y": int(self.coords[best, 1]),
                "attention": float(self.attention[best]),
            },
            "attributes": {name: attention_files.plain(value) for name, value in self.attributes.items()},
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The summary as JSON text, also written to ``path`` when it is given."""
        text = json.dumps(self.summary(), indent=2, allow_nan=False)
        if path is not None:
            with atomic_write(path) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
        return text

    def to_h5(self, path: str | os.PathLike[str]) -> Path:
        """Write ``attention`` (N,) float32 beside ``coords`` (N, 2), as TRIDENT's tools read it.

        Args:
            path: the file to write.
        """
        return attention_files.write_h5(self, path)

    @classmethod
    def from_h5(cls, path: str | os.PathLike[str]) -> AttentionMap:
        """Read what `to_h5` wrote.

        Raises:
            ValueError: if the file has no ``attention`` or no ``coords``.
        """
        return cls(**attention_files.read_h5(path))

    def to_geojson(
        self,
        path: str | os.PathLike[str],
        *,
        object_type: Literal["detection", "annotation", "tile"] = "detection",
        scale: Scale = "log",
        top: int | None = None,
        origin: tuple[int, int] = (0, 0),
    ) -> Path:
        """Write one square a tile, as QuPath opens it (drag the file onto the slide).

        Args:
            path: the file to write.
            object_type: QuPath's kind of object; detections stay fast when there are many.
            scale: of the colours; the measurements hold both.
            top: only the ``top`` tiles with most attention.
            origin: level-0 corner from which the viewer counts. QuPath shows the scanned part of a slide that
                has OpenSlide bounds and counts from its corner: give ``SlideView.bounds[:2]``.
        """
        return attention_files.write_geojson(self, path, object_type=object_type, scale=scale, top=top, origin=origin)

    def to_png(
        self,
        path: str | os.PathLike[str],
        *,
        scale: Scale = "linear",
        slide: str | os.PathLike[str] | SlideView | None = None,
        region: Literal["slide", "tiles"] = "slide",
        max_side: int = 1600,
        opacity: float = 0.65,
        colormap: str | None = None,
        dpi: int = 200,
    ) -> Path:
        """Draw the map, beside and over the slide's thumbnail where a slide is given.

        Args:
            path: the file to write.
            scale: ``"linear"``: attention; ``"log"``: ``log(a N)``, 0 is uniform.
            slide: a slide that OpenSlide reads, or one that is open; ``None`` draws on a plain canvas.
            region: ``"slide"`` or ``"tiles"`` (the rectangle of the tiles).
            max_side: longer side of the drawn image in pixels.
            opacity: of the tiles over the thumbnail.
            colormap: a matplotlib colour map; ``None`` for that of the scale.
            dpi: pixels an inch of the figure.

        Raises:
            ValueError: if the scale is unknown, the slide cannot be read, or tiles start outside it.
        """
        return write_png(
            {f"attention, branch {self.branch}": self},
            path,
            scale=scale,
            slide=slide,
            region=region,
            max_side=max_side,
            opacity=opacity,
            colormap=colormap,
            dpi=dpi,
        )


def write_png(
    maps: Mapping[str, AttentionMap],
    path: str | os.PathLike[str],
    *,
    scale: Scale = "linear",
    slide: str | os.PathLike[str] | SlideView | None = None,
    dpi: int = 200,
    **options: Any,
) -> Path:
    """Draw several maps of one slide beside each other with the same colours, for example two checkpoints.

    Args:
        maps: title of each panel -> map.
        path: the file to write.
        scale: ``"linear"`` or ``"log"``.
        slide: a slide that OpenSlide reads, or one that is open, or ``None``.
        dpi: pixels an inch of the figure.
        options: further arguments of `attention_figure`.

    Returns:
        The path that was written.
    """
    if slide is not None and not isinstance(slide, SlideView):
        with SlideView(slide) as opened:
            return write_png(maps, path, scale=scale, slide=opened, dpi=dpi, **options)
    figure = attention_figure(maps, scale=scale, slide=slide, **options)
    attention_files.write_figure(figure, path, dpi=dpi)
    return Path(path)
