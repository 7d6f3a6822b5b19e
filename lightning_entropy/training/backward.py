"""Adding a term to the loss that a Trainer is about to backpropagate."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_entropy.training.lightning import LightningModule, MisconfigurationException, Trainer

_UNSUPPORTED = {
    "DeepSpeedStrategy": "DeepSpeed scales and accumulates the loss inside its own engine",
    "XLAStrategy": "XLA was not tested",
    "SingleDeviceXLAStrategy": "XLA was not tested",
}


def check_supported(trainer: Trainer, owner: str) -> None:
    """Refuse Trainers in which a loss term would not have its stated weight.

    Raises:
        MisconfigurationException: naming the strategy and the reason.
    """
    for base in type(trainer.strategy).__mro__:
        if base.__name__ in _UNSUPPORTED:
            raise MisconfigurationException(
                f"{owner} does not work with {base.__name__}: {_UNSUPPORTED[base.__name__]}. Use ddp, fsdp or a single "
                "device."
            )


def _saves_its_result(loss: Tensor) -> bool:
    """Whether the loss's last operation keeps its output for backward, so that adding to it in place would fail."""
    node = loss.grad_fn
    if node is None:
        return False
    pointer = loss.untyped_storage().data_ptr()
    saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    if hasattr(node, "saved_tensors"):
        saved.extend(node.saved_tensors)
    flat = [t for s in saved for t in (s if isinstance(s, list | tuple) else (s,)) if isinstance(t, Tensor)]
    return any(t.untyped_storage().data_ptr() == pointer for t in flat)


def add_to_loss(trainer: Trainer, module: LightningModule, loss: Tensor, term: Tensor, owner: str) -> None:
    """Add a term to the loss in hand, so that its gradient joins the one backward pass.

    The term is divided by the number of accumulated batches and scaled as the precision plugin scaled the loss, so
    that its weight means the same in every precision and at every accumulation. In automatic optimization ``loss``
    is a fresh quotient, safe to change in place. In manual optimization it is the user's tensor: where changing it
    in place would break autograd, the term is backpropagated alone first.

    Args:
        trainer: the running Trainer.
        module: the LightningModule.
        loss: what ``on_before_backward`` received.
        term: a scalar with a graph, weight included.
        owner: the name that messages carry.

    Raises:
        MisconfigurationException: in manual optimization with several processes, if the loss ends in an operation
            that saves its result (exp, sqrt, sigmoid, logsumexp, a norm).
    """
    if module.automatic_optimization:
        term = term / trainer.accumulate_grad_batches
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        term = scaler.scale(term)
    term = term.to(device=loss.device)
    if not module.automatic_optimization and (loss.is_leaf or _saves_its_result(loss)):
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"{owner}: the loss given to manual_backward ends in {loss.grad_fn}, which keeps its result for "
                "backward, so that no term can be added to it in place, and with several processes the term cannot "
                "have a backward of its own. Call self.manual_backward(loss * 1.0) instead."
            )
        term.backward(retain_graph=True)
        return
    with torch.autograd.set_grad_enabled(True):
        loss.add_(term.reshape(loss.shape).to(loss.dtype))
