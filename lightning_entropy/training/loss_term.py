"""The loss term that every regularizer is: a Callback that adds a weighted number to the Trainer's loss."""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_entropy.observe import AttentionReader, AttentionRecord
from lightning_entropy.observe.reader import AttentionFunction
from lightning_entropy.observe.selection import as_patterns, describe, without_gradient
from lightning_entropy.training.backward import add_to_loss, check_supported
from lightning_entropy.training.lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
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

    def _prefix(self, trainer: Trainer) -> str:
        same = [c for c in trainer.callbacks if type(c) is type(self)]  # type: ignore[attr-defined]
        return self.log_name if len(same) < 2 else f"{self.log_name}_{same.index(self)}"

    def _log(self, trainer: Trainer, module: LightningModule, quantities: dict[str, Tensor | float]) -> None:
        prefix = self._prefix(trainer)
        if self.schedule.kind == "constant" and not self.schedule.warmup:
            quantities.pop("weight")
        values = {f"{prefix}/{key}": value for key, value in quantities.items()}
        module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint keeps: the arguments, so that a different configuration is noticed on resume."""
        return {"weight": self.weight, "end_weight": self.end_weight, "schedule": self.schedule.kind}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Say when the run goes on with other arguments than it had."""
        now = LossTerm.state_dict(self)
        changed = [f"{k} {state_dict[k]} -> {v}" for k, v in now.items() if state_dict.get(k, v) != v]
        if changed:
            announce(f"{self.name}: resumed with other arguments: {', '.join(changed)}")


class AttentionLossTerm(LossTerm):
    """A loss term on the attention distributions that the module computes.

    Args:
        weight: see :class:`LossTerm`.
        schedule: see :class:`LossTerm`.
        end_weight: see :class:`LossTerm`.
        modules: what to read (see :class:`lightning_entropy.observe.AttentionReader`); None selects automatically.
    """

    def __init__(
        self,
        weight: float,
        *,
        schedule: str | WeightSchedule = "constant",
        end_weight: float = 0.0,
        modules: str | list[str] | AttentionFunction | None = None,
    ) -> None:
        super().__init__(weight, schedule=schedule, end_weight=end_weight)
        if not callable(modules):
            as_patterns(modules)
        self.modules = modules
        self.reader: AttentionReader | None = None
        self._records: list[AttentionRecord] = []

    @abstractmethod
    def attention_term(self, records: list[AttentionRecord]) -> Tensor:
        """The number to add, from the records of one step."""

    def attention_quantities(self, records: list[AttentionRecord]) -> dict[str, Tensor | float]:
        """What to log of the records of one step, beside the loss."""
        return {}

    @property
    def state_key(self) -> str:
        """Distinct for instances that read different modules."""
        target = "function" if callable(self.modules) else self.modules
        return self._generate_state_key(modules=target)

    def attach(self, module: LightningModule) -> None:
        """Install the reader."""
        self.reader = AttentionReader(module, self.modules, owner=self.name)
        self.reader.attach()

    def detach(self) -> None:
        """Remove the reader."""
        self.forget()
        if self.reader is not None:
            self.reader.detach()
            self.reader = None

    def begin(self, batch: Any) -> None:
        """Read attention."""
        self._records = []
        if self.reader is not None:
            self.reader.start(batch)

    def end(self) -> None:
        """Read no further."""
        if self.reader is not None:
            self.reader.stop()

    def has_read(self) -> bool:
        """Whether attention was recorded."""
        return self.reader is not None and self.reader.has_read

    def forget(self) -> None:
        """Drop the records."""
        self._records = []
        if self.reader is not None:
            self.reader.clear()

    @torch.no_grad()
    def quantities(self) -> dict[str, Tensor | float]:
        """What to log of the step's records."""
        return self.attention_quantities(self._records)

    def term(self) -> Tensor | None:
        """Collect the step's records and hand them to :meth:`attention_term`."""
        assert self.reader is not None
        if self._said and not self.reader.has_read:
            return None  # a further backward pass of a step without a forward of its own
        records = self.reader.records
        if not records:
            if self.reader.only_single_instances:
                return None
            raise MisconfigurationException(
                f"{self.name}: no attention ran in this step in {_places(self.reader)}, where it was read before. If "
                "steps differ, name modules that run in every step with modules=."
            )
        if torch.is_grad_enabled():
            dead = without_gradient(records)
            if dead:
                raise MisconfigurationException(
                    f"{self.name}: the attention of {', '.join(dict.fromkeys(dead))} carries no gradient. It is "
                    "frozen, runs under torch.no_grad(), or under reentrant gradient checkpointing "
                    "(use_reentrant=False works). Name trainable modules with modules=."
                )
        self._records = records
        return self.attention_term(records)

    def describe(self) -> str:
        """The places that are read."""
        assert self.reader is not None
        places = {(r.module, r.source) for r in self._records}
        return f"{len(places)} attention{'s' * (len(places) > 1)} ({describe(self.reader.module, self._records)})"


def _places(reader: AttentionReader) -> str:
    names: Iterable[str] = dict.fromkeys(site.module or "the module itself" for site in reader.sites or [])
    return ", ".join(names) or "the function's result"
