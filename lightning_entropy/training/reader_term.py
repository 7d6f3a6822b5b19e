"""Loss terms on what a reader of the module records in a step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_entropy.observe import AttentionReader, AttentionRecord
from lightning_entropy.observe.reader import AttentionFunction
from lightning_entropy.observe.selection import as_patterns, describe, without_gradient
from lightning_entropy.training.lightning import LightningModule, MisconfigurationException
from lightning_entropy.training.loss_term import LossTerm
from lightning_entropy.training.schedule import WeightSchedule


class Reader(Protocol):
    """What a term asks of a reader; those of :mod:`lightning_entropy.observe` have it."""

    module: nn.Module

    @property
    def has_read(self) -> bool:
        """Whether something was read since :meth:`start`."""

    def attach(self) -> None:
        """Install the hooks."""

    def start(self, batch: Any = None) -> None:
        """Forget what was read, and read from here on."""

    def stop(self) -> None:
        """Read no further."""

    def clear(self) -> None:
        """Drop what was read."""

    def detach(self) -> None:
        """Remove every hook."""


class ReaderTerm(LossTerm):
    """A loss term on what a reader records between the start of a step and its backward pass."""

    reader: Reader | None = None

    @abstractmethod
    def make_reader(self, module: LightningModule) -> Reader:
        """The reader of a module; it raises where its patterns match nothing."""

    @abstractmethod
    def term_of_step(self) -> Tensor | None:
        """The number to add, from what the reader has recorded in this step."""

    def attach(self, module: LightningModule) -> None:
        """Install the reader."""
        self.reader = self.make_reader(module)
        self.reader.attach()

    def detach(self) -> None:
        """Remove the reader."""
        self.forget()
        if self.reader is not None:
            self.reader.detach()
            self.reader = None

    def begin(self, batch: Any) -> None:
        """Read."""
        self.forget()
        if self.reader is not None:
            self.reader.start(batch)

    def end(self) -> None:
        """Read no further."""
        if self.reader is not None:
            self.reader.stop()

    def has_read(self) -> bool:
        """Whether something was recorded."""
        return self.reader is not None and self.reader.has_read

    def forget(self) -> None:
        """Drop what was recorded."""
        if self.reader is not None:
            self.reader.clear()

    def term(self) -> Tensor | None:
        """The number of the step; None in a further backward pass of a step without a forward of its own."""
        assert self.reader is not None
        if self._said and not self.reader.has_read:
            return None
        return self.term_of_step()

    def no_gradient(self, places: Iterable[str]) -> MisconfigurationException:
        """The error for attention that ought to have a gradient and has none."""
        return MisconfigurationException(
            f"{self.name}: the attention of {', '.join(dict.fromkeys(places))} carries no gradient. It is frozen, runs "
            "under torch.no_grad(), or under reentrant gradient checkpointing (use_reentrant=False works). Name "
            "trainable modules with modules=."
        )


class AttentionLossTerm(ReaderTerm):
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

    def make_reader(self, module: LightningModule) -> AttentionReader:
        """A reader of distributions over instances."""
        return AttentionReader(module, self.modules, owner=self.name)

    def forget(self) -> None:
        """Drop the records."""
        self._records = []
        super().forget()

    @torch.no_grad()
    def quantities(self) -> dict[str, Tensor | float]:
        """What to log of the step's records."""
        return self.attention_quantities(self._records)

    def term_of_step(self) -> Tensor | None:
        """Collect the step's records and hand them to :meth:`attention_term`."""
        assert isinstance(self.reader, AttentionReader)
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
                raise self.no_gradient(dead)
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
