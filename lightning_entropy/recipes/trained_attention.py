"""The attention that a trained classifier pays to the tiles of a slide, from its checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_entropy.data import Batch
from lightning_entropy.data.bag_dataset import CLIP
from lightning_entropy.files import read_stored
from lightning_entropy.observe import AttentionReader
from lightning_entropy.recipes.abmil import ABMIL, MeanPooling
from lightning_entropy.recipes.attention_map import AttentionMap
from lightning_entropy.recipes.mil import MILClassifier
from lightning_entropy.recipes.slide_features import SlideFeatures


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier as its checkpoint left it.

    Args:
        classifier: in evaluation mode.
        path: the checkpoint.
        moments: mean and standard deviation ``(D,)`` that features were standardized with, or ``None``.
        weight: weight of attention entropy maximization at the start, or ``None`` if it was not used.
    """

    classifier: MILClassifier
    path: Path
    moments: tuple[Tensor, Tensor] | None = None
    weight: float | None = None


def load_classifier(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> TrainedClassifier:
    """Load a ``MILClassifier`` with what its datamodule and callbacks left in the checkpoint.

    Args:
        path: a checkpoint of a Trainer.
        device: where to put the model.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint of a ``MILClassifier``.
    """
    path = Path(path)
    stored = read_stored(path)
    if not isinstance(stored, dict) or "state_dict" not in stored or "hyper_parameters" not in stored:
        found = sorted(map(str, stored))[:10] if isinstance(stored, dict) else type(stored).__name__
        raise ValueError(f"{path} is no checkpoint of a Trainer with hyperparameters; it holds {found}")
    hyperparameters = {k: v for k, v in stored["hyper_parameters"].items() if not k.startswith("_")}
    try:
        classifier = MILClassifier(**hyperparameters)
        classifier.configure_model()
        classifier.load_state_dict(stored["state_dict"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} is no checkpoint of MILClassifier, or of one that was given a module instead of its name: {error}"
        ) from error
    moments = [v for v in stored.values() if isinstance(v, dict) and set(v) == {"mean", "std"}]
    weights = [
        state["weight"]
        for key, state in (stored.get("callbacks") or {}).items()
        if key.startswith("AttentionEntropyMaximization") and "weight" in state
    ]
    return TrainedClassifier(
        classifier.to(device).eval(),
        path,
        (moments[0]["mean"], moments[0]["std"]) if moments else None,
        float(weights[0]) if weights else None,
    )


@torch.no_grad()
def branch_attention(trained: TrainedClassifier, features: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Classify a whole bag and read every attention distribution over its instances.

    Args:
        trained: the classifier.
        features: ``(N, D)`` as they are on disk.

    Returns:
        Class probabilities ``(C,)``, and attention ``(K, N)``: a row for each head, branch or class row.

    Raises:
        ValueError: if the width is another than the classifier's, or the model has no attention over the
            instances.
    """
    classifier, built = trained.classifier, trained.classifier.built
    if features.shape[1] != classifier.in_features:
        raise ValueError(
            f"features are {features.shape[1]} wide, {trained.path} was trained on {classifier.in_features}"
        )
    if isinstance(built.net, ABMIL) and isinstance(built.net.pool, MeanPooling):
        raise ValueError(f"{trained.path} pools by the mean: every tile counts the same, there is no attention to draw")
    if trained.moments is not None:
        mean, std = trained.moments
        features = ((features - mean) / std).clamp(-CLIP, CLIP)
    count = len(features)
    bag = features.float().unsqueeze(0).to(classifier.device)
    batch = Batch(
        features=bag,
        mask=torch.ones(1, count, dtype=torch.bool, device=bag.device),
        label=torch.zeros(1, dtype=torch.long, device=bag.device),
        slide=[""],
    )
    reader = AttentionReader(built.net, owner=f"heatmap of {trained.path}")
    reader.attach()
    try:
        reader.start({"features": batch["features"], "mask": batch["mask"]})
        probabilities = built.logits(built.net, batch).float().softmax(dim=-1)[0].cpu().numpy()
        reader.stop()
        if count == 1:
            return probabilities, np.ones((1, 1), dtype=np.float32)
        # Of several attentions over the instances the last counts, the one nearest to the bag's embedding.
        for record in reversed(reader.records):
            if record.instances == count:
                return probabilities, record.weights().reshape(-1, count).float().cpu().numpy()
    finally:
        reader.detach()
    raise ValueError(f"{trained.path}: {type(built.net).__name__} has no attention over all tiles of a slide at once")


def choose_branch(attention: NDArray[np.float32], branch: str | int) -> NDArray[np.float32]:
    """One distribution of several: the mean of the probabilities, or a row by its number.

    Args:
        attention: ``(K, N)``.
        branch: ``"mean"`` or 0 to K - 1.

    Raises:
        ValueError: if there is no such branch.
    """
    if branch == "mean":
        return attention.mean(axis=0, dtype=np.float64).astype(np.float32)
    if not str(branch).isdecimal() or int(branch) >= len(attention):
        raise ValueError(f"branch must be 'mean' or 0 to {len(attention) - 1}, got {branch!r}")
    return attention[int(branch)]


def attention_map(
    trained: TrainedClassifier, tiles: SlideFeatures, *, slide: str = "", branch: str | int = "mean"
) -> AttentionMap:
    """The attention of a classifier on the tiles of a slide.

    Args:
        trained: from `load_classifier`.
        tiles: from `lightning_entropy.recipes.slide_features.read_features`.
        slide: name of the slide.
        branch: ``"mean"`` over branches, heads and class rows, or the number of one.

    Raises:
        ValueError: see `branch_attention` and `choose_branch`.
    """
    probabilities, attention = branch_attention(trained, tiles.features)
    known: dict[str, Any] = {
        **tiles.attributes,
        "patch_size_source": tiles.patch_size_source,
        "checkpoint": trained.path.name,
        "weight": trained.weight,
        "probabilities": probabilities.tolist(),
    }
    return AttentionMap(
        choose_branch(attention, branch), tiles.coords, tiles.patch_size_level0, slide, str(branch), known
    )
