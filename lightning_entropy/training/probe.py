"""A forward beside the training: on a fixed batch, in evaluation mode, after which everything is as it was."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_entropy.training.lightning import LightningModule, MisconfigurationException, Trainer, submodule

ProbeForward = Callable[[Any, Any], Any]
_KEPT_BYTES = 16 * 2**20  # a larger batch does not go into checkpoints


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and afterwards the module and all random states as before.

    The flags are set directly: ``module.eval()`` may do more (adapters merge their weights). Buffers that the forward
    changed get their values back.
    """
    modes = [(m, m.training) for m in module.modules()]
    buffers = [
        # What a validation of Lightning's has made has no version, and nothing outside of one can write to it.
        (m, name, value, None if value.is_inference() else value._version, value.detach().clone())
        for m in module.modules()
        for name, value in m._buffers.items()
        if value is not None
    ]
    with submodule("utilities.seed").isolate_rng(), torch.no_grad():
        try:
            for m, _ in modes:
                m.training = False
            yield
        finally:
            for m, mode in modes:
                m.training = mode
            for m, name, value, version, kept in buffers:
                m._buffers[name] = value
                if version is not None and value._version != version:
                    value.copy_(kept)


def keep_batch(batch: Any) -> Any:
    """A copy of a batch on the CPU that nothing else holds."""
    move = submodule("utilities").move_data_to_device
    return copy.deepcopy(move(batch, torch.device("cpu")))


def fits_a_checkpoint(batch: Any) -> bool:
    """Whether a batch is made of plain values and tensors, and small enough to travel in every checkpoint."""

    def size(value: Any) -> float:
        if isinstance(value, torch.Tensor):
            return value.numel() * value.element_size() if type(value) is torch.Tensor else float("inf")
        if type(value) is dict:
            return sum(size(v) + size(k) for k, v in value.items())
        if type(value) in (list, tuple):
            return sum(size(v) for v in value)
        return len(value) if isinstance(value, str) else 8.0 if isinstance(value, int | float | None) else float("inf")

    return size(batch) <= _KEPT_BYTES


def run_probe(trainer: Trainer, module: LightningModule, batch: Any, forward: ProbeForward | None, owner: str) -> None:
    """Run the module on the batch, undisturbed, in the run's precision.

    ``forward(module, batch)`` if it is given; else the module's own ``predict_step``; else its ``forward`` on the
    batch: the tensor, the first of a list or tuple, or the entries of a dictionary that it takes by name. Training and
    validation steps are not called, since they log and count.

    Args:
        trainer: for its precision and device.
        module: the module.
        batch: what :func:`keep_batch` kept.
        forward: a function ``(module, batch)``.
        owner: the name in messages.

    Raises:
        MisconfigurationException: if the module has neither, or its forward does not take the batch.
    """
    batch = submodule("utilities").move_data_to_device(batch, module.device)
    with undisturbed(module), trainer.precision_plugin.forward_context():
        if forward is not None:
            forward(module, batch)
        elif type(module).predict_step is not LightningModule.predict_step:
            module.predict_step(batch, 0)
        else:
            _call_forward(module, batch, owner)


def _call_forward(module: LightningModule, batch: Any, owner: str) -> None:
    what = "a probe needs to run the module on a batch. Pass probe_forward=function(module, batch)"
    if type(module).forward is LightningModule.forward:
        raise MisconfigurationException(
            f"{owner}: {type(module).__name__} defines neither forward nor predict_step, and {what}, or read the "
            "training steps themselves with probe=None."
        )
    args: tuple[Any, ...] = (batch,)
    kwargs: dict[str, Any] = {}
    taken = inspect.signature(type(module).forward).parameters
    if isinstance(batch, list | tuple) and batch:
        args = (batch[0],)
    elif isinstance(batch, Mapping):
        everything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
        named = {k: v for k, v in batch.items() if everything or k in taken}
        if named:
            args, kwargs = (), named
    try:
        module(*args, **kwargs)
    except (TypeError, AttributeError, IndexError, KeyError, RuntimeError) as error:
        given = ", ".join([*(type(a).__name__ for a in args), *(f"{k}=" for k in kwargs)])
        raise MisconfigurationException(
            f"{owner}: {type(module).__name__}.forward failed on the probe batch (called with {given}; it takes "
            f"{', '.join(list(taken)[1:])}): {error}. If that is not how it is called, {what}."
        ) from error


__all__ = ["ProbeForward", "fits_a_checkpoint", "keep_batch", "run_probe", "undisturbed"]
