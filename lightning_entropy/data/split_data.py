"""What the DataModules of this package share: one source, its splits, and their loaders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence, Sized
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader

from lightning_entropy.data.epoch_sampler import EpochSampler, ResumableLoader
from lightning_entropy.training.lightning import LightningDataModule


class HasClasses(Protocol):
    """A source of labelled items."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes."""


Source = TypeVar("Source", bound=HasClasses)
Part = TypeVar("Part", bound=Sized)


class SplitLoaders(LightningDataModule, ABC, Generic[Part]):
    """Items that are split into train, val and test, read by loaders that leave no trace.

    A subclass sets ``_splits`` in :meth:`setup`, and ``batch_size``, ``num_workers``, ``pin_memory`` and ``seed``
    before.
    """

    items: ClassVar[str]
    batch_size: int
    num_workers: int
    pin_memory: bool
    seed: int

    def __init__(self) -> None:
        super().__init__()
        self._splits: dict[str, Part] = {}

    @abstractmethod
    def setup(self, stage: str | None = None) -> None:
        """Open what is read and split it; once, whatever the stages that follow."""

    @property
    def train(self) -> Part:
        """The items that train."""
        return self._split("train")

    @property
    def val(self) -> Part:
        """The items that validate."""
        return self._split("val")

    @property
    def test(self) -> Part:
        """The items that test."""
        return self._split("test")

    def _split(self, name: str) -> Part:
        if name not in self._splits:
            raise RuntimeError(
                f"{type(self).__name__} has no {name} {self.items} yet: call setup() first (a Trainer does)"
            )
        return self._splits[name]

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The validation items, whole; no loader when there are none."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The test items, whole; no loader when there are none."""
        return self._evaluation_loader("test")

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled items, in another order in every epoch; what is over a whole number of batches is left out."""
        sampler = self._train_sampler()
        whole = len(sampler) >= self.batch_size  # a small last batch is noise at a large learning rate
        dataset: Any = self.train
        return ResumableLoader(dataset, sampler=sampler, drop_last=whole, **self._loader_options())

    def _evaluation_loader(self, name: str) -> DataLoader[Any] | list[DataLoader[Any]]:
        return self._whole(self._split(name))

    def _whole(self, dataset: Any, **changes: Any) -> DataLoader[Any] | list[DataLoader[Any]]:
        """All of some items in their order; no loader when there are none."""
        options = {**self._loader_options(), **changes}
        return DataLoader(dataset, shuffle=False, **options) if len(dataset) else []

    def _train_sampler(self) -> EpochSampler:
        """Another order in every epoch; each process its share, where the Trainer has several."""
        ranks = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        dataset: Any = self.train
        return EpochSampler(dataset, seed=self.seed, **(ranks or {}))

    def _loader_options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": self.pin_memory,
            # A generator of its own: reading takes nothing from the random numbers of the training.
            "generator": torch.Generator().manual_seed(self.seed),
        }


class SplitData(SplitLoaders[Part], Generic[Source, Part]):
    """A source whose items are split into train, val and test (and predict), read by loaders that leave no trace.

    A subclass sets ``_source`` too in :meth:`setup`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._source: Source | None = None

    @property
    def source(self) -> Source:
        """Where the items are read from."""
        if self._source is None:
            raise RuntimeError(f"{type(self).__name__} has read nothing yet: call setup() first (a Trainer does)")
        return self._source

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return list(self.source.classes)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.source.classes)

    def predict_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """All items, or those that the subclass chooses for prediction."""
        return self._evaluation_loader("predict")


__all__ = ["SplitData", "SplitLoaders"]
