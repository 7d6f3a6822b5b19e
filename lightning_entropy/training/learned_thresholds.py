"""Thresholds that a loss term learns beside the model, one a layer and head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_entropy.training.lightning import Trainer


class LearnedThresholds:
    """Parameters that appear as their layers are first seen, with an optimizer of their own.

    They are no parameters of the module: its heads are counted when attention runs, which is after its optimizer was
    built, and nothing but the term has a gradient for them. AdamW without weight decay; one step with each step of the
    Trainer's first optimizer; the gradient is averaged over processes.

    Args:
        lr: the learning rate; None takes that of the first parameter group of the optimizer that steps.
    """

    def __init__(self, lr: float | None) -> None:
        self.lr = lr
        self.values: dict[str, Tensor] = {}
        self._optimizers: dict[str, torch.optim.AdamW] = {}
        self._loaded: dict[str, Any] = {}

    def begin(self) -> None:
        """A run starts: begin anew, or where the state that was loaded left off."""
        self.values.clear()
        self._optimizers.clear()
        self._resumed, self._loaded = self._loaded, {}

    def get(self, name: str, start: Tensor) -> Tensor:
        """The thresholds of a layer, as constants; they begin at ``start`` (heads,)."""
        if name not in self.values:
            stored = self._resumed.get(name)
            value = start if stored is None else stored["value"].to(start)
            self.values[name] = value.detach().clone().requires_grad_()
            self._optimizers[name] = torch.optim.AdamW([self.values[name]], lr=self.lr or 1e-3, weight_decay=0.0)
            if stored is not None:
                self._optimizers[name].load_state_dict(stored["optimizer"])
        return self.values[name].detach()

    def leaf(self, name: str) -> Tensor:
        """The thresholds of a layer, to differentiate by."""
        return self.values[name]

    @torch.enable_grad()
    def add_gradient(self, name: str, value: Tensor) -> None:
        """Accumulate the gradient of a number by a layer's thresholds."""
        theta = self.values[name]
        (gradient,) = torch.autograd.grad(value, theta)
        theta.grad = gradient if theta.grad is None else theta.grad + gradient

    def step(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Take one step, with the first of the Trainer's optimizers."""
        first = trainer.optimizers[0] if trainer.optimizers else optimizer
        if optimizer is not first and optimizer is not getattr(first, "optimizer", first):
            return
        for name, theta in self.values.items():
            gradient = torch.zeros_like(theta) if theta.grad is None else theta.grad
            theta.grad = trainer.strategy.reduce(gradient, reduce_op="mean")
            for group in self._optimizers[name].param_groups:
                group["lr"] = optimizer.param_groups[0]["lr"] if self.lr is None else self.lr
            self._optimizers[name].step()
            theta.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Values and optimizer states by layer."""
        return {
            name: {"value": theta.detach().clone(), "optimizer": self._optimizers[name].state_dict()}
            for name, theta in self.values.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a state for the run that starts."""
        self._loaded = state


__all__ = ["LearnedThresholds"]
