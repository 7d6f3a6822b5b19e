"""Bags as a map-style dataset, and their padding into batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_entropy.data.source import Bag, BagSource, Batch

CLIP = 5.0  # standard deviations; the raw features of the UCSB set reach 1e4, and single values would rule a bag


class Sample(TypedDict):
    """One bag with its label and its name."""

    bag: Bag
    label: int
    slide: str


class BagDataset(Dataset[Sample]):
    """Some bags of a source, with instances sampled in training.

    Which instances are drawn is a function of ``(seed, epoch, slide)`` alone: neither the number of workers,
    nor the order of the bags, nor a resumed run changes it.

    Args:
        source: where the bags are read from.
        indices: which bags of the source.
        max_instances: draw at most this many instances of each bag, without replacement and in ascending
            order; None for all.
        seed: of the drawing.
        mean: ``(D,)``, subtracted from the features when given, with ``std``.
        std: ``(D,)``, divides the features, which are then clipped at 5 standard deviations.

    Raises:
        ValueError: if ``max_instances`` is under 1, or only one of ``mean`` and ``std`` is given.
    """

    def __init__(
        self,
        source: BagSource,
        *,
        indices: Sequence[int],
        max_instances: int | None = None,
        seed: int = 0,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ) -> None:
        if max_instances is not None and max_instances < 1:
            raise ValueError(f"max_instances must be at least 1 or None, got {max_instances}")
        if (mean is None) != (std is None):
            raise ValueError("mean and std are given together or not at all")
        self.source = source
        self.indices = list(indices)
        self.max_instances = max_instances
        self.seed = seed
        self.mean = mean
        self.std = std
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def slides(self) -> list[str]:
        """Names of the bags."""
        return [self.source.slides[i] for i in self.indices]

    @property
    def labels(self) -> list[int]:
        """Classes of the bags."""
        return [self.source.labels[i] for i in self.indices]

    @property
    def patients(self) -> list[str]:
        """Patients of the bags."""
        return [self.source.patients[i] for i in self.indices]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that plain integer indices draw for (a loader with ``EpochSampler`` says it by
        itself).
        """
        self.epoch = epoch

    def rows(self, position: int, *, epoch: int) -> np.ndarray | None:
        """Which instances of a bag an epoch uses: ascending numbers, or None for all.

        Args:
            position: of the bag in this dataset.
            epoch: number of the epoch, from 0.
        """
        index = self.indices[position]
        size = self.source.sizes[index]
        if self.max_instances is None or size <= self.max_instances:
            return None
        generator = np.random.default_rng([self.seed, epoch, index])
        return np.sort(generator.choice(size, self.max_instances, replace=False, shuffle=False))

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """Read one bag; ``key`` is its position, or ``(epoch, position)`` as ``EpochSampler`` gives it."""
        epoch, position = (self.epoch, key) if not isinstance(key, tuple) else key
        index = self.indices[position]
        bag = self.source.read(index, self.rows(position, epoch=epoch))
        if self.mean is not None and self.std is not None:
            features = ((bag.features - self.mean) / self.std).clamp_(-CLIP, CLIP)
            bag = Bag(features, bag.coords, bag.instance_labels)
        return Sample(bag=bag, label=self.source.labels[index], slide=self.source.slides[index])


def _pad(parts: list[Tensor], *, size: int, value: float) -> Tensor:
    if len(parts) == 1:  # the usual batch of one bag: no copy
        return parts[0].unsqueeze(0)
    padded = parts[0].new_full((len(parts), size, *parts[0].shape[1:]), value)
    for row, part in zip(padded, parts):
        row[: len(part)] = part
    return padded


def collate_bags(samples: Sequence[Sample]) -> Batch:
    """Pad bags to the largest of them.

    Args:
        samples: items of a :class:`BagDataset`.

    Returns:
        A :class:`Batch`: its ``mask`` is True where an instance exists.
    """
    bags = [sample["bag"] for sample in samples]
    sizes = torch.tensor([len(bag.features) for bag in bags])
    longest = int(sizes.max())
    batch = Batch(
        features=_pad([bag.features for bag in bags], size=longest, value=0.0),
        mask=torch.arange(longest)[None, :] < sizes[:, None],
        label=torch.tensor([sample["label"] for sample in samples], dtype=torch.long),
        slide=[sample["slide"] for sample in samples],
    )
    coords = [bag.coords for bag in bags if bag.coords is not None]
    if len(coords) == len(bags):
        batch["coords"] = _pad(coords, size=longest, value=-1)
    instance_labels = [bag.instance_labels for bag in bags if bag.instance_labels is not None]
    if len(instance_labels) == len(bags):
        batch["instance_labels"] = _pad(instance_labels, size=longest, value=0.0)
    return batch


__all__ = ["BagDataset", "Sample", "collate_bags"]
