"""Evaluating loaders that are not the Trainer's, in the middle of a fit, which goes on as if nothing had been."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_entropy.training.kept_state import generators_kept
from lightning_entropy.training.lightning import LightningModule, MisconfigurationException, Trainer, submodule
from lightning_entropy.training.probe import undisturbed

Loader = DataLoader[Any] | Iterable[Any]
HOOK = "old_task_dataloaders"
_SEED = 0  # every evaluation draws the same: shuffling and augmentation differ neither between readings nor ranks


class HeldOutBatch(NamedTuple):
    """One batch of an evaluation.

    Attributes:
        number: of the batch, over all processes.
        output: what the step gave.
        batch: what it was given, on the module's device.
    """

    number: int
    output: Any
    batch: Any


def find_loaders(
    given: Any, trainer: Trainer, module: LightningModule, *, owner: str, unnamed: str
) -> dict[str, Loader]:
    """The loaders by the name of their task.

    Args:
        given: a loader, a mapping of names to loaders, or None: what ``old_task_dataloaders()`` of the datamodule, else
            of the module, returns.
        trainer: has the datamodule.
        module: the module.
        owner: the name in messages.
        unnamed: the name of a loader that comes without one.

    Raises:
        MisconfigurationException: if there are none.
    """
    source = "loaders"
    if given is None:
        datamodule: Any = getattr(trainer, "datamodule", None)
        holders = [h for h in (datamodule, module) if callable(getattr(h, HOOK, None))]
        if not holders:
            looked = " and ".join(type(h).__name__ for h in (datamodule, module) if h is not None)
            raise MisconfigurationException(
                f"{owner} found no old-task data: loaders is None and {looked} has no method {HOOK}(). Pass "
                f"loaders=DataLoader(...) or loaders={{name: DataLoader(...)}}, or let {HOOK}() of the datamodule or "
                "of the module return one of the two."
            )
        source = f"{type(holders[0]).__name__}.{HOOK}()"
        given = getattr(holders[0], HOOK)()
    loaders = dict(given) if isinstance(given, Mapping) else {unnamed: given}
    wrong = [f"{name}: {type(v).__name__}" for name, v in loaders.items() if not _is_loader(v)]
    if wrong or not loaders or not all(isinstance(name, str) and name for name in loaders):
        raise MisconfigurationException(
            f"{owner}: {source} must be a DataLoader or a mapping of names to DataLoaders, got "
            f"{', '.join(wrong) or type(given).__name__}"
            f"{' with ' + repr(list(loaders)) + ' as names' if not wrong else ''}."
        )
    return {name: _own_copy(loader) for name, loader in loaders.items()}


def _is_loader(value: Any) -> bool:
    # An iterator is spent after one evaluation.
    return isinstance(value, Iterable) and not isinstance(value, Iterator | str | bytes | Mapping | torch.Tensor)


def _own_copy(loader: Loader) -> Loader:
    """A loader that shares the data and no iterator: the Trainer may be in the middle of the same one."""
    if not isinstance(loader, DataLoader):
        return loader
    mine = copy.copy(loader)
    mine._iterator = None  # persistent workers are this copy's own
    return mine


def evaluate_held_out(
    trainer: Trainer,
    module: LightningModule,
    loader: Loader,
    step: Callable[[Any], Any],
    consume: Callable[[HeldOutBatch], None],
    *,
    limit: int | None = None,
    owner: str = "the evaluation",
) -> None:
    """Run a step on this process's share of a loader's batches. Every process must call it.

    The batches of a loader are dealt out to the processes in turn, each batch once, so that nothing is padded. A loader
    whose sampler already deals out (``num_replicas`` above 1), or whose dataset is iterable, is taken as this process's
    share. All processes run the same number of forwards, as sharded models need; what one runs too many is dropped.

    The module is in evaluation mode and without gradients meanwhile, under DDP with rank zero's buffers. Afterwards it
    and all random states are as before, also after an exception.

    Args:
        trainer: for its precision and processes.
        module: the module.
        loader: what is read, from its beginning.
        step: of a batch on the module's device.
        consume: gets what this process has run, batch after batch.
        limit: evaluate this many batches, over all processes.
        owner: the name in messages.

    Raises:
        MisconfigurationException: if a process has no batch.
    """
    world, rank = trainer.world_size, trainer.global_rank
    shared = world > 1 and not _deals_out(loader)
    rounds = None if limit is None else -(-limit // world)
    spare: list[Any] = []
    with _evaluating(trainer, module), generators_kept(loader):
        batches = iter(loader)
        for number in itertools.count(rank, world):
            if rounds is not None and number >= rounds * world:
                break
            # Of a common loader each process takes its own of a group of `world` batches.
            group = list(itertools.islice(batches, world if shared else 1))
            own = group[rank if shared else 0 :][:1] if limit is None or number < limit else []
            spare = own or group[:1] or spare
            having = _gathered((bool(own), bool(spare))) if world > 1 else [(bool(own), True)]
            if not any(has for has, _ in having):
                break
            if not all(can for _, can in having):
                empty = [process for process, (_, can) in enumerate(having) if not can]
                raise MisconfigurationException(f"{owner}: the loader of process {empty[0]} gave no batch.")
            batch = _to_device(trainer, module, spare[0])
            with trainer.precision_plugin.forward_context():
                output = _through(trainer, module, step, batch)
            if own:
                consume(HeldOutBatch(number, output, batch))
    if not spare:
        raise MisconfigurationException(f"{owner}: the loader gave no batch.")


def _gathered(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def gathered_rows(rows: list[Any]) -> list[Any]:
    """The rows of all processes, in the order of their first entry, the number of the batch; the same in each."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        rows = [row for part in _gathered(rows) for row in part]
    return sorted(rows, key=lambda row: row[0])


@contextmanager
def _evaluating(trainer: Trainer, module: nn.Module) -> Iterator[None]:
    # Validation runs in inference mode, whose tensors a module that caches some could not use in training.
    with torch.inference_mode(False), undisturbed(module), untouched_random_state():
        if isinstance(trainer.model, nn.parallel.DistributedDataParallel):
            _share_buffers(module)
        yield


def _share_buffers(module: nn.Module) -> None:
    """Give all processes rank zero's buffers, those of its checkpoints: each has running statistics of its own."""
    for buffer in module.buffers():
        if not buffer.is_inference():
            # A collective changes a tensor without its version, by which it is put back.
            received = buffer.contiguous().clone()
            torch.distributed.broadcast(received, src=0)
            buffer.copy_(received)


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """All random states as before afterwards, and the same ones within, whenever and in whichever process."""
    with submodule("utilities.seed").isolate_rng():
        random.seed(_SEED)
        np.random.seed(_SEED)  # noqa: NPY002 - what a data set of the user's may draw from
        torch.manual_seed(_SEED)
        yield


def _deals_out(loader: Loader) -> bool:
    """Whether each process's loader gives other batches."""
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return True
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    return any(getattr(s, "num_replicas", 1) not in (None, 1) for s in samplers)


def _to_device(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    batch = trainer.precision_plugin.convert_input(batch)
    return module.transfer_batch_to_device(batch, module.device, 0)


def _through(trainer: Trainer, module: LightningModule, step: Callable[[Any], Any], batch: Any) -> Any:
    """Run the step; inside the forward of what shards the module's parameters, which gathers them."""
    outer: Any = trainer.model if _shards(trainer.model) else module
    if not _shards(outer):
        return step(batch)
    own = module.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = own  # type: ignore[method-assign]

    def forward(inner: Any) -> Any:
        restore()
        return step(inner)

    module.forward = forward  # type: ignore[method-assign]
    try:
        return outer(batch)
    finally:
        restore()


def _shards(model: Any) -> bool:
    kinds = {base.__name__ for base in type(model).__mro__}
    return bool(kinds & {"FSDPModule", "FullyShardedDataParallel"})


__all__ = [
    "HOOK",
    "HeldOutBatch",
    "Loader",
    "evaluate_held_out",
    "find_loaders",
    "gathered_rows",
    "untouched_random_state",
]
