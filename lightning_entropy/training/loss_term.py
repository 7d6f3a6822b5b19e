"""The loss term that every regularizer is: a Callback that adds a weighted number to the Trainer's loss."""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_entropy.training.backward import add_to_loss, check_supported
from lightning_entropy.training.lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    log_prefix,
    logs_this_step,
)
from lightning_entropy.training.schedule import WeightSchedule
from lightning_entropy.verbosity import announce


class LossTerm(Callback, ABC):
    """A term added to the loss of any LightningModule, without editing it.

    A subclass says what to observe (:meth:`attach`, :meth:`detach`) and what to add (:meth:`term`). This class
    keeps the weight and its schedule, places the term in the backward pass exactly once, logs, and leaves nothing
    behind after ``fit``, also when it ends in an exception. Instances can be used for any number of fits.

    Args:
        weight: factor of the term; with a schedule the weight at the start.
        schedule: ``"constant"``, ``"linear"``, ``"cosine"``, ``"warmup"`` (by epoch), or a :class:`WeightSchedule`.
        end_weight: the weight at the end of a linear or cosine schedule.

    Raises:
        ValueError: if a weight is negative or not finite, or the schedule is unknown.
    """

    log_name: ClassVar[str]

    def __init__(self, weight: float, *, schedule: str | WeightSchedule = "constant", end_weight: float = 0.0) -> None:
        for name, value in (("weight", weight), ("end_weight", end_weight)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        self.weight = float(weight)
        self.end_weight = float(end_weight)
        self.schedule = WeightSchedule(schedule) if isinstance(schedule, str) else schedule
        self._length = 1
        self._pending = False
        self._added: list[weakref.ref[Tensor]] = []
        self._said = False

    # What a subclass gives.

    @abstractmethod
    def attach(self, module: LightningModule) -> None:
        """Start observing the module. Called once a fit, when the model is built and its weights are loaded."""

    @abstractmethod
    def detach(self) -> None:
        """Leave nothing behind. Called any number of times, at any moment."""

    @abstractmethod
    def begin(self, batch: Any) -> None:
        """A training step starts, or goes on after a backward pass: read from here on, forget what was read."""

    @abstractmethod
    def end(self) -> None:
        """A backward pass or the step's end: read no further."""

    @abstractmethod
    def term(self) -> Tensor | None:
        """The number to add, without weight; None: nothing in this step."""

    def quantities(self) -> dict[str, Tensor | float]:
        """What to log beside the term; asked for after :meth:`term`, only in steps whose values are logged."""
        return {}

    @abstractmethod
    def describe(self) -> str:
        """What is observed, for the line that is said once."""

    # What the Trainer calls.

    @property
    def name(self) -> str:
        """The class's name, for messages."""
        return type(self).__name__

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything is built."""
        if stage == "fit":
            check_supported(trainer, self.name)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach: the model is whole now, also when it was built in ``configure_model``."""
        self.detach()
        self._length = 0
        self._said = False
        self.attach(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Read this step."""
        if self._length == 0:
            self._length = self.schedule.run_length(trainer)
        self._batch = batch
        self._pending = True
        self._added.clear()
        self.begin(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add the term to the loss and log."""
        self.end()
        if any(seen() is loss for seen in self._added):
            return  # the same tensor is backpropagated again and has the term in it
        if not self._pending:
            return
        weight = self.current_weight(trainer)
        if weight == 0 and self._said and not logs_this_step(trainer):
            self._pending = False  # a number that nobody sees and nothing learns from
            return
        with torch.set_grad_enabled(weight != 0):
            term = self.term()
        if not self._said and term is not None:
            self._said = True
            how = self.schedule.describe(self.weight, self.end_weight, self._length)
            announce(f"{self.name}: reading {self.describe()}; {how}")
        if term is None:
            return
        self._pending = False
        if weight != 0:
            add_to_loss(trainer, pl_module, loss, weight * term, self.name)
            self._added.append(weakref.ref(loss))
        if logs_this_step(trainer):  # what no logger sees is not computed
            self._log(trainer, pl_module, {"loss": term.detach(), "weight": weight, **self.quantities()})

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read on: with manual optimization, or a closure that is called again, another forward may follow."""
        self._pending = True
        self.begin(self._batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the step; a step without a backward pass that Lightning knows of is an error."""
        self.end()
        missed = not pl_module.automatic_optimization and not self._said and self.has_read()
        self._batch = None
        self.forget()
        if missed:
            raise MisconfigurationException(
                f"{self.name}: {type(pl_module).__name__} uses manual optimization and its training_step never called "
                "self.manual_backward(loss), so the term could not be added. Replace loss.backward() by "
                "self.manual_backward(loss)."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach."""
        self.detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach."""
        self.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach: Lightning calls no teardown after an exception."""
        self.detach()

    # Shared by all terms.

    @abstractmethod
    def has_read(self) -> bool:
        """Whether something was read since :meth:`begin`."""

    @abstractmethod
    def forget(self) -> None:
        """Drop what was read, and the graph it holds."""

    def current_weight(self, trainer: Trainer) -> float:
        """The weight at the Trainer's time."""
        return self.schedule.value(self.schedule.now(trainer), max(self._length, 1), self.weight, self.end_weight)

    def _log(self, trainer: Trainer, module: LightningModule, quantities: dict[str, Tensor | float]) -> None:
        prefix = log_prefix(self, self.log_name, trainer)
        if self.schedule.kind == "constant" and not self.schedule.warmup and not self.schedule.begin:
            quantities.pop("weight")
        values = {f"{prefix}/{key}": value for key, value in quantities.items()}
        module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint keeps: the arguments, so that a different configuration is noticed on resume."""
        now = {"weight": self.weight, "end_weight": self.end_weight, "schedule": self.schedule.kind}
        return {**now, "begin": self.schedule.begin} if self.schedule.begin else now

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Say when the run goes on with other arguments than it had."""
        now = LossTerm.state_dict(self)
        changed = [f"{k} {state_dict[k]} -> {v}" for k, v in now.items() if state_dict.get(k, v) != v]
        if changed:
            announce(f"{self.name}: resumed with other arguments: {', '.join(changed)}")
