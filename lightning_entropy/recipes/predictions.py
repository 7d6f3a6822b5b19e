"""Predictions of slides or images as a table."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lightning_entropy.training.files import atomic_write


def _rows(predictions: Sequence[dict[str, Any]]) -> list[tuple[str, list[float]]]:
    return [
        (name, row)
        for batch in predictions
        for name, row in zip(batch[_column(batch)], batch["probabilities"].cpu().tolist())
    ]


def _column(batch: dict[str, Any]) -> str:
    return "slide" if "slide" in batch else "name"


def write_predictions(
    predictions: Sequence[dict[str, Any]],
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
) -> Path:
    """Write the predicted class and the probabilities of every slide or image, one line each, in order of their
    names.

    With several processes all of them must call this; the first writes.

    Args:
        predictions: what ``Trainer.predict`` returned for a
            :class:`~lightning_entropy.recipes.mil.MILClassifier` or a
            :class:`~lightning_entropy.recipes.vit.ViTClassifier`.
        path: the CSV file: ``slide,prediction,probability_CLASS,...`` (``name`` instead of ``slide`` for images).
        classes: names of the classes; their numbers if ``None``.

    Raises:
        ValueError: if there is no prediction.
    """
    rows = _rows(predictions)
    first = True
    if dist.is_available() and dist.is_initialized():
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, rows)
        rows = [row for part in gathered for row in part]
        first = dist.get_rank() == 0
    if not rows:
        raise ValueError("there is no prediction to write")
    names = [str(name) for name in classes or range(len(rows[0][1]))]
    target = Path(path)
    if first:
        with atomic_write(target) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            column = _column(predictions[0]) if predictions else "slide"
            writer.writerow([column, "prediction", *(f"probability_{name}" for name in names)])
            for name, row in sorted(dict(rows).items()):  # a sampler may give one to two processes
                writer.writerow([name, names[row.index(max(row))], *(f"{value:.6f}" for value in row)])
    return target


__all__ = ["write_predictions"]
