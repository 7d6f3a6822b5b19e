"""What a set of bags is: a bag, a batch of bags, and where bags are read from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypedDict, runtime_checkable

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Bag:
    """The instances of one slide, or the rows of it that were asked for.

    Attributes:
        features: ``(N, D)`` float32.
        coords: ``(N, 2)`` int64, ``x, y`` as the file stores them (level-0 pixels for CLAM and TRIDENT,
            micrometres rounded to whole ones for STAMP), or None.
        instance_labels: ``(N,)`` float32 in {0, 1}, or None where they are not known.
    """

    features: Tensor
    coords: Tensor | None = None
    instance_labels: Tensor | None = None


class _AlwaysInBatch(TypedDict):
    features: Tensor
    mask: Tensor
    label: Tensor
    slide: list[str]


class Batch(_AlwaysInBatch, total=False):
    """A padded batch of bags, as models receive it.

    Keys:
        features: ``(B, N, D)`` float32, zeros where there is no instance.
        mask: ``(B, N)`` bool, True where an instance exists. Always present, for a batch of one bag too.
        label: ``(B,)`` int64; -1 where the label is not known (prediction without a table).
        slide: names of the bags.
        coords: ``(B, N, 2)`` int64, only when every bag of the batch has coordinates; padded with -1.
        instance_labels: ``(B, N)`` float32, only when they are known for every bag of the batch; padded with
            0.
    """

    coords: Tensor
    instance_labels: Tensor


@runtime_checkable
class BagSource(Protocol):
    """Where bags come from: a table of slides in memory, and their instances read when they are asked for.

    Attributes:
        slides: a name for each bag, all different.
        labels: index of the class of each bag; -1 where it is not known.
        patients: the patient of each bag; bags of one patient never go to different splits.
        splits: ``"train"``, ``"val"``, ``"test"`` or None for each bag.
        folds: the fold of each bag, or None.
        classes: names of the classes.
        in_features: width D of the features.
        sizes: number of instances of each bag.
        standardize: whether the features are of such unlike scales that they should be standardized by
            default.
    """

    slides: list[str]
    labels: list[int]
    patients: list[str]
    splits: list[str | None]
    folds: list[int | None]
    classes: list[str]
    in_features: int
    sizes: list[int]
    standardize: bool

    def read(self, index: int, rows: np.ndarray | None = None) -> Bag:
        """Read one bag.

        Args:
            index: position of the bag in ``slides``.
            rows: ascending instance numbers to read, or None for all.

        Returns:
            The bag, in the order of ``rows``.
        """
        ...


@dataclass
class ArrayBags:
    """A :class:`BagSource` whose instances are in memory."""

    slides: list[str]
    labels: list[int]
    classes: list[str]
    bags: Sequence[Bag]
    patients: list[str] = field(default_factory=list)
    splits: list[str | None] = field(default_factory=list)
    folds: list[int | None] = field(default_factory=list)
    standardize: bool = False

    def __post_init__(self) -> None:
        count = len(self.slides)
        self.patients = self.patients or list(self.slides)
        self.splits = self.splits or [None] * count
        self.folds = self.folds or [None] * count
        lengths = {len(column) for column in (self.labels, self.bags, self.patients, self.splits, self.folds)}
        if count == 0 or lengths != {count}:
            raise ValueError(f"ArrayBags: {count} slides, but columns of lengths {sorted(lengths)}")
        self.in_features = int(self.bags[0].features.shape[1])
        self.sizes = [len(bag.features) for bag in self.bags]

    def read(self, index: int, rows: np.ndarray | None = None) -> Bag:
        """Return one bag, or the rows of it that are asked for."""
        bag = self.bags[index]
        if rows is None:
            return bag
        return Bag(
            bag.features[rows],
            None if bag.coords is None else bag.coords[rows],
            None if bag.instance_labels is None else bag.instance_labels[rows],
        )


__all__ = ["ArrayBags", "Bag", "BagSource", "Batch"]
