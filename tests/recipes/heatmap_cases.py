"""Synthetic slides, features and checkpoints for the tests of the heatmap."""

from __future__ import annotations

import argparse
from pathlib import Path

import h5py
import numpy as np
import tifffile

from lightning_entropy.recipes import MILClassifier
from lightning_entropy.recipes.heatmap import add_arguments
from lightning_entropy.training.lightning import Trainer


def grid(columns: int, rows: int, step: int, *, left: int = 0, top: int = 0) -> np.ndarray:
    x, y = np.meshgrid(np.arange(columns), np.arange(rows))
    return np.stack([x.ravel() * step + left, y.ravel() * step + top], axis=1).astype(np.int64)


def write_pyramid(path: Path, picture: np.ndarray, *, levels: int = 4) -> None:
    """A pyramidal tiled TIFF that OpenSlide reads, 0.5 micrometres a pixel."""
    with tifffile.TiffWriter(path) as file:
        for level in range(levels):
            file.write(
                picture[:: 2**level, :: 2**level],
                subfiletype=0 if level == 0 else 1,
                tile=(256, 256),
                photometric="rgb",
                resolution=(20000 / 2**level, 20000 / 2**level),
                resolutionunit="CENTIMETER",
                metadata=None,
            )


def write_features(
    path: Path, coords: np.ndarray | None, *, width: int = 8, key: str = "features", **attributes: object
) -> Path:
    rng = np.random.default_rng(0)
    count = 30 if coords is None else len(coords)
    with h5py.File(path, "w") as file:
        file[key] = rng.normal(size=(count, width)).astype(np.float32)
        if coords is not None:
            file["coords"] = coords
            file["coords"].attrs.update(attributes)
    return path


def save_checkpoint(path: Path, **arguments: object) -> Path:
    """A classifier with random weights, saved as a Trainer saves it."""
    model = MILClassifier(**{"in_features": 8, "num_classes": 2, **arguments})  # type: ignore[arg-type]
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        max_epochs=1,
        barebones=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return path


def parsed(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(word) for word in words])
