"""Figures into whatever logger the user has.

A method draws on ``matplotlib.figure.Figure`` (no pyplot, so that no window opens, no state is shared between
threads and nothing has to be closed by name) and hands the figure to `log_figure`, which knows how each
Lightning logger takes it. A logger that takes no pictures, such as the CSV logger, gets a PNG file beside its
other files.
"""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_entropy.training.files import atomic_write
from lightning_entropy.training.lightning import Trainer, submodule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib writes its version or the time into a file; without them equal figures are equal files.
_METADATA: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    ".svg": {"Date": None, "Creator": None},
}


def write_figure(figure: Figure, path: str | os.PathLike[str], *, dpi: float | None = None) -> Path:
    """Write a figure to a file, whole or not at all; the suffix is the format.

    Args:
        figure: a matplotlib figure.
        path: for example ``curves.png``, ``curves.pdf`` or ``curves.svg``.
        dpi: pixels an inch; ``None`` for the figure's own.

    Returns:
        The path that was written.
    """
    target = Path(path)
    with atomic_write(target) as temporary:
        figure.savefig(temporary, dpi="figure" if dpi is None else dpi, metadata=_METADATA.get(target.suffix.lower()))
    return target


def figure_array(figure: Figure) -> NDArray[np.uint8]:
    """The figure as pixels, ``(height, width, 3)`` RGB on white."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi="figure", metadata=_METADATA[".png"])
    buffer.seek(0)
    with Image.open(buffer) as image:
        paper = Image.new("RGB", image.size, (255, 255, 255))
        rgba = image.convert("RGBA")
        paper.paste(rgba, mask=rgba.getchannel("A"))
    return np.asarray(paper)


def log_figure(target: Any, tag: str, figure: Figure, *, step: int | None = None, close: bool = True) -> list[str]:
    """Hand a figure to a logger, or to all loggers of a Trainer. Only rank zero does anything.

    TensorBoard and Weights & Biases get pixels; MLflow, Comet and Neptune the figure; any other logger (CSV)
    a PNG at ``<log_dir>/figures/<tag>/step=<step>.png``.

    Args:
        target: a Trainer or a Lightning logger.
        tag: name of the figure, slashes allowed: ``"aem/attention"``.
        figure: a matplotlib figure.
        step: the step it belongs to; ``None`` takes the Trainer's global step (0 for a logger alone).
        close: release the figure afterwards (also when logging raises); it cannot be drawn again then.

    Returns:
        Where it went, one entry a logger: the logger's class name, or the path of the PNG.

    Raises:
        ValueError: if the tag is empty or climbs out of its folder.
    """
    parts = [re.sub(r"[^\w.=-]+", "_", part) for part in tag.split("/")]
    if not all(parts) or ".." in parts or "." in parts:
        raise ValueError(f"tag must be a name such as 'aem/attention', got {tag!r}")
    loggers = list(target.loggers) if isinstance(target, Trainer) else [target]
    if step is None:
        step = int(target.global_step) if isinstance(target, Trainer) else 0
    try:
        if submodule("utilities").rank_zero_only.rank != 0:
            return []
        places = [_hand_over(logger, tag, parts, figure, step) for logger in loggers]
    finally:
        if close:
            close_figure(figure)
    return [place for place in places if place is not None]


def close_figure(figure: Figure) -> None:
    """Free a figure's contents, and let pyplot forget it if pyplot made it."""
    figure.clear()
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        pyplot.close(figure)


def axes_or_new(ax: Axes | None) -> tuple[Figure, Axes]:
    """The axes and their figure, or new ones without pyplot.

    Args:
        ax: axes to draw on; ``None`` for a new figure.
    """
    from matplotlib.figure import Figure

    if ax is None:
        ax = Figure(figsize=(5, 3.5), layout="constrained").add_subplot()
    figure = ax.figure
    while not isinstance(figure, Figure):  # axes of a part of a figure
        figure = figure.figure
    return figure, ax


def _hand_over(logger: Any, tag: str, parts: list[str], figure: Figure, step: int) -> str | None:
    # By name, so that no logger's package is imported; a user's subclass counts as its base.
    kinds = {base.__name__ for base in type(logger).__mro__}
    name = type(logger).__name__
    if "TensorBoardLogger" in kinds:
        logger.experiment.add_image(tag, figure_array(figure), global_step=step, dataformats="HWC")
    elif "WandbLogger" in kinds:
        # Without a step: Weights & Biases drops what is logged for a step before its own counter.
        logger.log_image(key=tag, images=[figure_array(figure)], caption=[f"step {step}"])
    elif "MLFlowLogger" in kinds:
        logger.experiment.log_figure(logger.run_id, figure, "/".join(["figures", *parts, f"step={step:06d}.png"]))
    elif "CometLogger" in kinds:
        logger.experiment.log_figure(figure_name=tag, figure=figure, step=step)
    elif "NeptuneLogger" in kinds:
        logger.experiment[tag].append(figure, step=step)
    else:
        folder = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None)
        if folder is None:
            warnings.warn(f"{name} takes no figures and has no folder: {tag!r} is not logged there", stacklevel=3)
            return None
        path = Path(folder, "figures", *parts, f"step={step:06d}.png")
        return str(write_figure(figure, path))
    return name
