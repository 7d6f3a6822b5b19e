"""Batches and losses of a run before its optimizers exist, for methods that look at the data to choose."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

from torch import Tensor

from lightning_entropy.training.kept_state import generators_kept, metrics_kept, silent
from lightning_entropy.training.lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    submodule,
    training_loader,
)


@contextmanager
def training_batches(trainer: Trainer, module: LightningModule, count: int) -> Iterator[list[Any]]:
    """The first batches of the training data, on the module's device, after which the data is as it was.

    A loader is asked for as the fit will ask for it; random states, and the state of a loader that has one, are put
    back. The module must be on the device where it is to run.

    Args:
        trainer: inside ``fit``, from ``setup`` on.
        module: the module, for its device and its transfer hooks.
        count: of batches; fewer where the data has fewer.

    Yields:
        The batches.

    Raises:
        MisconfigurationException: if there is no batch.
    """
    with submodule("utilities.seed").isolate_rng():
        combined = submodule("utilities.combined_loader").CombinedLoader(training_loader(trainer), "max_size_cycle")
        with _unmoved(combined.flattened):
            batches = [batch for batch, _, _ in islice(iter(combined), count)]
        if not batches:
            raise MisconfigurationException("the training data gave no batch to look at before the fit")
        yield [trainer.strategy.batch_to_device(batch, module.device) for batch in batches]


@contextmanager
def _unmoved(loaders: list[Any]) -> Iterator[None]:
    """Loaders that are read and then stand where they stood."""
    stateful = [x for x in loaders if callable(getattr(x, "state_dict", None)) and hasattr(x, "load_state_dict")]
    states = [copy.deepcopy(loader.state_dict()) for loader in stateful]
    with generators_kept(*loaders):
        try:
            yield
        finally:
            for loader, state in zip(stateful, states):
                loader.load_state_dict(state)


def training_loss(module: LightningModule, batch: Any, batch_idx: int = 0) -> Tensor:
    """The loss of one training step, without its logging and without counting in its metrics.

    Args:
        module: in automatic optimization.
        batch: on its device.
        batch_idx: the index that the step is told.

    Raises:
        MisconfigurationException: under manual optimization, whose step trains; if the step returns no loss.
    """
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(module).__name__} optimizes manually: its training_step would train. Choose without data, or pass "
            "a selection that was made beforehand."
        )
    with silent(module), metrics_kept(module):
        output = module.training_step(batch, batch_idx)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(
            f"{type(module).__name__}.training_step returned {type(output).__name__} without a loss tensor"
        )
    return loss


__all__ = ["training_batches", "training_loss"]
