"""Shuffling that knows its epoch, and a loader that continues in the middle of one.

Lightning (2.4 to 2.6) creates the iterator of the training loader when it sets the data up, which on a
resumed run is before it tells the sampler the epoch; with workers the first batches would then be those of
epoch 0. It also leaves to the loader the skipping of the batches that an interrupted epoch had already used.
Both are settled here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_entropy.data.source import Batch


class EpochSampler(DistributedSampler):  # type: ignore[type-arg]
    """A shuffled order of a dataset for each epoch, dealt out to the ranks, as ``(epoch, position)`` pairs.

    The pair carries the epoch to the worker process that reads the bag. A ``DistributedSampler`` is left in
    place by Lightning, which only calls ``set_epoch``.

    Args:
        dataset: the dataset whose positions are shuffled.
        num_replicas: number of processes that share the epoch.
        rank: number of this process.
        seed: of the order; the order is a function of ``(seed, epoch)``.
    """

    def __init__(self, dataset: Dataset[Any], *, num_replicas: int = 1, rank: int = 0, seed: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed)
        self.skip = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        order = list(super().__iter__())
        start, self.skip = self.skip, 0
        yield from ((self.epoch, position) for position in order[start:])


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` that Lightning can save and restore in the middle of an epoch.

    It is iterated lazily: workers start when the first batch is asked for, which is after the epoch has been
    set. The state is the epoch and the number of batches that were handed out in it, so that a state restored
    at the end of an epoch does not shorten the next one.
    """

    _handed_out = 0
    _restored: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        sampler, restored = self.sampler, self._restored
        self._restored = None
        self._handed_out = 0
        if isinstance(sampler, EpochSampler):
            sampler.skip = 0
            if restored is not None and restored["epoch"] == sampler.epoch:
                self._handed_out = restored["batches"]
                sampler.skip = restored["batches"] * (self.batch_size or 1)
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches have been handed out."""
        if self._restored is not None:  # nothing was read since the state was restored
            return dict(self._restored)
        return {"epoch": int(getattr(self.sampler, "epoch", 0)), "batches": self._handed_out}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after the batches that ``state_dict`` counts, if the next iteration is of its epoch."""
        self._restored = {"epoch": int(state_dict["epoch"]), "batches": int(state_dict["batches"])}


__all__ = ["EpochSampler", "ResumableLoader"]
