"""A forward and backward beside the training, after which the module is as it was: mode, gradients, states, hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_entropy.training.kept_state import generators_kept, metrics_kept, silent
from lightning_entropy.training.lightning import LightningModule, submodule
from lightning_entropy.training.probe import undisturbed

Loss = Callable[[nn.Module, Any], Any]


@contextmanager
def undisturbed_backward(module: nn.Module, data: Any = None) -> Iterator[None]:
    """Evaluation mode with gradients enabled and none accumulated; afterwards everything as before.

    That is: mode, buffers (BatchNorm), random states, the gradients that parameters had, the states of torchmetrics,
    and hooks. What a parameter's post-accumulate hooks do (an optimizer step, for example) is not done meanwhile, what
    a LightningModule logs is dropped, and compiled modules run as they were written.

    Args:
        module: any module.
        data: a loader whose generators get their states back.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(undisturbed(module))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(generators_kept(data))
        stack.enter_context(_gradients(module))
        stack.enter_context(metrics_kept(module))
        stack.enter_context(silent(module))
        stance = getattr(torch.compiler, "set_stance", None)
        if stance is not None:
            stack.enter_context(stance("force_eager"))
        yield


@contextmanager
def _gradients(module: nn.Module) -> Iterator[None]:
    parameters = list(module.parameters())
    kept = [p.grad for p in parameters]
    hooks = [(h, dict(h)) for p in parameters if (h := getattr(p, "_post_accumulate_grad_hooks", None))]
    try:
        for p in parameters:
            p.grad = None
        for current, _ in hooks:
            current.clear()
        yield
    finally:
        for current, before in hooks:
            current.update(before)
        for p, grad in zip(parameters, kept):
            p.grad = grad


def place_of(module: nn.Module) -> torch.device:
    """The device of the module's first parameter or buffer; the CPU without any."""
    tensor = next(module.parameters(), next(module.buffers(), torch.zeros(0)))
    return tensor.device


def on_device(batch: Any, device: torch.device) -> Any:
    """The batch on a device, as Lightning moves it."""
    return submodule("utilities").move_data_to_device(batch, device)


def run_loss(module: nn.Module, batch: Any, loss: Loss | None, owner: str) -> Any:
    """Whatever computes the loss of a batch, run once.

    ``loss(module, batch)`` if it is given; else the ``training_step`` of a LightningModule; else the ``loss`` of what
    the module returns for a mapping (as models of transformers do that are given labels).

    Args:
        module: the module.
        batch: on its device.
        loss: a function that returns a scalar, or a scalar and the output z that it is computed from.
        owner: the name in messages.

    Raises:
        ValueError: if the module has none of these.
    """
    if loss is not None:
        return loss(module, batch)
    if isinstance(module, LightningModule):
        return _training_step(module, batch, owner)
    if isinstance(batch, Mapping) or hasattr(batch, "keys"):
        return module(**batch)
    raise ValueError(
        f"{owner}: {type(module).__name__} is no LightningModule and the batch is a {type(batch).__name__}: pass "
        "loss=function(module, batch) that returns a scalar."
    )


def loss_of(module: nn.Module, batch: Any, loss: Loss | None, owner: str) -> tuple[Tensor, Tensor | None]:
    """The loss of a batch, and the output whose error it is where ``loss`` returns that too; see :func:`run_loss`.

    Raises:
        ValueError: if there is no loss, or it is no finite scalar with a gradient.
    """
    found = run_loss(module, batch, loss, owner)
    output = None
    if loss is not None and isinstance(found, tuple | list) and len(found) == 2:
        found, output = found
    elif not isinstance(found, Tensor):
        found = found.get("loss") if isinstance(found, Mapping) else getattr(found, "loss", found)
    if not isinstance(found, Tensor) or found.numel() != 1:
        got = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"{type(found).__name__}"
        raise ValueError(
            f"{owner}: a scalar loss is needed to look at gradients, got {got} from {type(module).__name__}. Give the "
            "batches their labels, or pass loss=function(module, batch)."
        )
    if not found.requires_grad:
        raise ValueError(
            f"{owner}: the loss of {type(module).__name__} has no gradient: nothing between its layers and the loss is "
            "differentiable (a no_grad block, or integers)."
        )
    if not bool(torch.isfinite(found)):
        raise ValueError(f"{owner}: the loss is {found.item()}, so that no gradient means anything.")
    return found.reshape(()), output


def _training_step(module: LightningModule, batch: Any, owner: str) -> Any:
    name = type(module).__name__
    if not module.automatic_optimization:
        raise ValueError(
            f"{owner}: {name} optimizes manually, so that its training_step would take a step. Pass "
            "loss=function(module, batch) that returns the loss alone."
        )
    if type(module).training_step is LightningModule.training_step:
        raise ValueError(f"{owner}: {name} has no training_step. Pass loss=function(module, batch).")
    taken = list(inspect.signature(module.training_step).parameters)
    args = (batch, 0, 0)[: max(1, min(len(taken), 3))]
    return module.training_step(*args)


def samples_in(batch: Any) -> int:
    """How many samples a batch has: the first dimension of its first tensor."""
    pending = [batch]
    while pending:
        value = pending.pop(0)
        if isinstance(value, Tensor) and value.dim():
            return max(1, value.shape[0])
        if isinstance(value, Mapping) or (hasattr(value, "keys") and hasattr(value, "items")):
            pending = [v for _, v in value.items()] + pending
        elif isinstance(value, list | tuple):
            pending = list(value) + pending
    return 1


__all__ = ["Loss", "loss_of", "on_device", "place_of", "run_loss", "samples_in", "undisturbed_backward"]
