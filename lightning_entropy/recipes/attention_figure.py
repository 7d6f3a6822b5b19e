"""Attention on a slide as a figure: thumbnail, attention over it, colour bar that says what uniform is.

Two scales. ``linear`` shows the attention ``a`` of a tile, from 0 to the largest. ``log`` shows ``log(a N)``
on a diverging colour map centred at 0, which is uniform attention: +0.69 is twice the uniform share, -0.69
half of it. A map that has collapsed onto a few tiles looks empty on the linear scale; the log scale shows the
rest. Ranks are not offered: they look the same whether attention is collapsed or flat.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_entropy.recipes.attention_raster import (
    Canvas,
    bounding_rectangle,
    log_ratio,
    rasterize,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_entropy.recipes.attention_map import AttentionMap
    from lightning_entropy.recipes.slide_view import SlideView

Scale = Literal["linear", "log"]
SCALES: tuple[Scale, ...] = ("linear", "log")
COLORMAPS: dict[Scale, str] = {"linear": "YlOrRd", "log": "RdBu_r"}
_PAPER = 0.84  # grey of the part of a plain canvas that no tile covers
_LINE = 0.35  # grey of the line around the tiles
_PANEL_INCHES = 5.0
_TITLE_INCHES = 3.6  # width of a caption


def color_limits(maps: list[AttentionMap], scale: Scale) -> tuple[float, float]:
    """The colour range that all maps share.

    Args:
        maps: the maps that are drawn beside each other.
        scale: ``"linear"`` or ``"log"``.

    Returns:
        Linear: 0 and the largest attention. Log: minus and plus the same value, so that 0 is the middle
        colour: the larger of the highest ``log(a N)`` and of the depth of its lowest percentile, the latter
        cut at ``log N`` (which is what the highest can reach), and at least 0.1, so that rounding is not
        drawn as structure.

    Raises:
        ValueError: if ``scale`` is unknown.
    """
    if scale == "linear":
        return 0.0, max(float(one.attention.max()) for one in maps)
    if scale != "log":
        raise ValueError(f"scale must be 'linear' or 'log', got {scale!r}")
    limit = 0.1
    for one in maps:
        ratio = log_ratio(one.attention, len(one))
        depth = min(-float(np.percentile(ratio, 1.0)), float(np.log(len(one))))
        limit = max(limit, float(ratio.max()), depth)
    return -limit, limit


def scaled_raster(one: AttentionMap, scale: Scale, canvas: Canvas) -> NDArray[np.float64]:
    """The map on a canvas in the units of a scale, NaN where there is no tile: ``a`` or ``log(a N)``."""
    raster = rasterize(one.attention, one.coords, one.patch_size_level0, canvas)
    return raster if scale == "linear" else log_ratio(raster, len(one))


def compose(
    raster: NDArray[np.float64],
    limits: tuple[float, float],
    *,
    colormap: str,
    background: NDArray[np.uint8] | None = None,
    opacity: float = 0.65,
) -> NDArray[np.float64]:
    """Colour a raster and lay it over a grey version of the background.

    Args:
        raster: ``(rows, columns)``, NaN where there is no tile.
        limits: values of the first and of the last colour; beyond them the colour stays.
        colormap: a matplotlib colour map.
        background: ``(rows, columns, 3)`` thumbnail; ``None`` for plain paper, on which tiles are opaque.
        opacity: of the tiles over the background, in [0, 1].

    Returns:
        ``(rows, columns, 3)`` RGB in [0, 1].
    """
    from matplotlib import colormaps

    low, high = limits
    colors = np.asarray(colormaps[colormap](np.clip((raster - low) / (high - low), 0.0, 1.0)))[..., :3]
    covered = ~np.isnan(raster)[..., None]
    if background is None:
        picture = np.where(covered, colors, _PAPER)
    else:
        grey = (background.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255.0)[..., None]
        picture = np.where(covered, opacity * colors + (1.0 - opacity) * grey, grey * 0.6 + 0.4)
    picture[_outline(covered[..., 0])] = _LINE
    return picture


def _outline(covered: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A line around the tiles, outside them: a tile of uniform attention is white, and so is glass."""
    grown = covered
    for _ in range(max(1, max(covered.shape) // 500)):
        padded = np.pad(grown, 1)
        grown = grown | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return grown & ~covered


def attention_canvas(
    maps: list[AttentionMap],
    slide: SlideView | None,
    *,
    region: Literal["slide", "tiles"] = "slide",
    max_side: int = 1600,
) -> Canvas:
    """The canvas for maps of one slide.

    Args:
        maps: maps of the same slide.
        slide: the slide, or ``None``.
        region: ``"slide"`` for the scanned part of the slide, ``"tiles"`` for the rectangle of the tiles with
            one tile of margin. Without a slide it is always the latter.
        max_side: longer side of the canvas in pixels.

    Raises:
        ValueError: if tiles start outside the slide, which means another slide or coordinates of another
            level.
    """
    if region not in ("slide", "tiles"):
        raise ValueError(f"region must be 'slide' or 'tiles', got {region!r}")
    if slide is not None:
        width, height = slide.dimensions
        for one in maps:
            outside = (one.coords < 0).any(axis=1) | (one.coords >= np.array([width, height])).any(axis=1)
            if outside.any():
                x, y = one.coords[outside][0].tolist()
                raise ValueError(
                    f"{int(outside.sum())} of {len(one)} tiles of {one.slide!r} start outside slide "
                    f"{slide.path} ({width} x {height}), the first at ({x}, {y}): coordinates must be "
                    "level-0 pixels of this slide"
                )
        if region == "slide":
            return Canvas.fitting(slide.bounds, max_side=max_side)
    rectangles = [bounding_rectangle(one.coords, one.patch_size_level0, margin=one.patch_size_level0) for one in maps]
    left, top = min(r[0] for r in rectangles), min(r[1] for r in rectangles)
    right, bottom = max(r[0] + r[2] for r in rectangles), max(r[1] + r[3] for r in rectangles)
    if slide is not None:
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    return Canvas.fitting((left, top, right - left, bottom - top), max_side=max_side)


def attention_figure(
    maps: Mapping[str, AttentionMap],
    *,
    scale: Scale = "linear",
    slide: SlideView | None = None,
    region: Literal["slide", "tiles"] = "slide",
    max_side: int = 1600,
    opacity: float = 0.65,
    colormap: str | None = None,
    mpp: float | None = None,
) -> Figure:
    """Draw one or several maps of a slide beside its thumbnail, with one colour bar.

    Args:
        maps: title of each panel -> map; all of the same slide.
        scale: ``"linear"`` or ``"log"``, see the module.
        slide: the slide for the thumbnail; ``None`` draws on a plain canvas.
        region: see `attention_canvas`.
        max_side: longer side of the drawn image in pixels.
        opacity: of the tiles over the thumbnail.
        colormap: a matplotlib colour map; ``None`` for that of the scale.
        mpp: micrometres a level-0 pixel for the scale bar; ``None`` asks the slide.

    Returns:
        A ``matplotlib.figure.Figure`` that belongs to no pyplot state.

    Raises:
        ValueError: if there is no map, the scale is unknown, or tiles start outside the slide.
    """
    from matplotlib.figure import Figure

    if not maps:
        raise ValueError("attention_figure needs at least one map, got none")
    listed = list(maps.values())
    limits = color_limits(listed, scale)
    canvas = attention_canvas(listed, slide, region=region, max_side=max_side)
    thumbnail = slide.thumbnail(canvas) if slide is not None else None
    mpp = mpp if mpp is not None or slide is None else slide.mpp
    chosen = colormap or COLORMAPS[scale]

    panels = len(listed) + (thumbnail is not None)
    wide = float(np.clip(_PANEL_INCHES * canvas.width / canvas.height, _TITLE_INCHES, 7.5))
    tall = float(np.clip(wide * canvas.height / canvas.width, 1.6, _PANEL_INCHES))
    figure = Figure(figsize=(wide * panels + 1.2, tall + 0.8), dpi=200, layout="compressed")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if thumbnail is not None:
        _show(axes[0], thumbnail, "slide", canvas)
    for axis, (title, one) in zip(axes[-len(listed) :], maps.items()):
        image = compose(
            scaled_raster(one, scale, canvas), limits, colormap=chosen, background=thumbnail, opacity=opacity
        )
        _show(axis, image, f"{title}\n{one.caption}", canvas)
    if mpp is not None:
        _scale_bar(axes[0], canvas, mpp)
    _color_bar(figure, axes[-len(listed) :], listed, limits, scale, chosen)
    figure.suptitle(listed[0].slide or "attention", fontsize=11)
    return figure


def _show(axis: Any, image: NDArray[Any], title: str, canvas: Canvas) -> None:
    """Show an image in level-0 pixels, so that what is drawn on top uses the tiles' coordinates."""
    right, bottom = canvas.left + canvas.width, canvas.top + canvas.height
    axis.imshow(image, extent=(canvas.left, right, bottom, canvas.top), interpolation="antialiased", aspect="equal")
    # A narrow slide gets margins as wide as its title needs, so that titles do not run into each other.
    margin = max(0.0, canvas.height * _TITLE_INCHES / _PANEL_INCHES - canvas.width) / 2.0
    axis.set_xlim(canvas.left - margin, right + margin)
    axis.set_title(title, fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color("0.7")


def _scale_bar(axis: Any, canvas: Canvas, mpp: float) -> None:
    """A bar of a round length, about a fifth of the width, in the lower left corner."""
    target = canvas.width * mpp / 5.0
    power = 10.0 ** np.floor(np.log10(target))
    length = max(step * power for step in (1.0, 2.0, 5.0) if step * power <= target)
    label = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    x, y = canvas.left + 0.03 * canvas.width, canvas.top + 0.965 * canvas.height
    axis.plot([x, x + length / mpp], [y, y], color="black", linewidth=2.5, solid_capstyle="butt")
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1.0}
    above = canvas.top + 0.95 * canvas.height
    axis.text(x, above, label, fontsize=7, va="bottom", ha="left", bbox=box)


def _color_bar(
    figure: Figure,
    axes: list[Any],
    maps: list[AttentionMap],
    limits: tuple[float, float],
    scale: Scale,
    colormap: str,
) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    cut = scale == "log" and any(float(log_ratio(one.attention, len(one)).min()) < limits[0] for one in maps)
    mappable = ScalarMappable(norm=Normalize(*limits), cmap=colormap)
    bar = figure.colorbar(mappable, ax=axes, extend="min" if cut else "neither", fraction=0.05, pad=0.02, aspect=30)
    bar.ax.tick_params(labelsize=7)
    if scale == "log":
        bar.set_label("log(a N), 0 = uniform", fontsize=8)
        return
    bar.set_label(f"attention a, 1/N = {1 / len(maps[0]):.2g}", fontsize=8)
    if 1 / len(maps[0]) <= limits[1]:
        bar.ax.axhline(1 / len(maps[0]), color="black", linewidth=1.0)
