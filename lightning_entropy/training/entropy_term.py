"""The base of loss terms on the entropy of attention between tokens."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_entropy.observe import AttentionEntropyReader, LayerEntropy
from lightning_entropy.observe.selection import as_patterns
from lightning_entropy.training.lightning import LightningModule, MisconfigurationException
from lightning_entropy.training.loss_term import LossTerm
from lightning_entropy.training.schedule import WeightSchedule
from lightning_entropy.verbosity import announce


class AttentionEntropyTerm(LossTerm):
    """A loss term on the entropy of every attention between tokens that the module computes.

    Args:
        weight: see :class:`LossTerm`.
        schedule: see :class:`LossTerm`.
        end_weight: see :class:`LossTerm`.
        modules: shell patterns over dotted names of the modules whose attention is read; None reads all.
        queries: how many query rows of each attention are read (see
            :class:`lightning_entropy.observe.AttentionEntropyReader`); None reads all.
    """

    def __init__(
        self,
        weight: float,
        *,
        schedule: str | WeightSchedule = "constant",
        end_weight: float = 0.0,
        modules: str | list[str] | None = None,
        queries: int | None = None,
    ) -> None:
        super().__init__(weight, schedule=schedule, end_weight=end_weight)
        as_patterns(modules)
        if queries is not None and queries < 1:
            raise ValueError(f"queries must be at least 1, got {queries}")
        self.modules = modules
        self.queries = queries
        self.reader: AttentionEntropyReader | None = None
        self._layers: list[LayerEntropy] = []
        self._frozen: set[str] = set()

    @abstractmethod
    def entropy_term(self, layers: dict[str, list[LayerEntropy]]) -> Tensor:
        """The number to add, from the attentions of one step by the name of their module."""

    def entropy_quantities(self, layers: dict[str, list[LayerEntropy]]) -> dict[str, Tensor | float]:
        """What to log of one step, beside the loss."""
        return {}

    @property
    def state_key(self) -> str:
        """Distinct for instances that read different modules."""
        return self._generate_state_key(modules=self.modules)

    def attach(self, module: LightningModule) -> None:
        """Install the reader."""
        self._frozen = set()
        self.reader = AttentionEntropyReader(module, self.modules, queries=self.queries, owner=self.name)
        self.reader.attach()

    def detach(self) -> None:
        """Remove the reader."""
        self.forget()
        if self.reader is not None:
            self.reader.detach()
            self.reader = None

    def begin(self, batch: Any) -> None:
        """Read attention."""
        self._layers = []
        if self.reader is not None:
            self.reader.start()

    def end(self) -> None:
        """Read no further."""
        if self.reader is not None:
            self.reader.stop()

    def has_read(self) -> bool:
        """Whether attention was read."""
        return self.reader is not None and self.reader.has_read

    def forget(self) -> None:
        """Drop what was read."""
        self._layers = []
        if self.reader is not None:
            self.reader.clear()

    @torch.no_grad()
    def quantities(self) -> dict[str, Tensor | float]:
        """What to log of the step."""
        return self.entropy_quantities(_by_module(self._layers))

    def term(self) -> Tensor | None:
        """Collect the step's entropies and hand them to :meth:`entropy_term`."""
        assert self.reader is not None
        if self._said and not self.reader.has_read:
            return None  # a further backward pass of a step without a forward of its own
        layers = self.reader.layers
        if not layers:
            raise self.reader.nothing_read()
        if torch.is_grad_enabled():
            layers = self._with_gradient(layers)
        self._layers = layers
        return self.entropy_term(_by_module(layers))

    def _with_gradient(self, layers: list[LayerEntropy]) -> list[LayerEntropy]:
        """Leave out frozen attention; attention that ought to have a gradient and has none is an error."""
        assert self.reader is not None
        dead = {layer.module for layer in layers if not layer.entropy.requires_grad}
        module = self.reader.module
        broken = [n for n in dead if any(p.requires_grad for p in module.get_submodule(n).parameters())]
        alive = [layer for layer in layers if layer.entropy.requires_grad]
        if broken or not alive:
            places = ", ".join(sorted(broken or dead)) or type(module).__name__
            raise MisconfigurationException(
                f"{self.name}: the attention of {places} carries no gradient. It is frozen, runs under "
                "torch.no_grad(), or under reentrant gradient checkpointing (use_reentrant=False works). Name "
                "trainable modules with modules=."
            )
        new = dead - self._frozen
        if new:
            self._frozen |= new
            announce(
                f"{self.name}: {len(new)} frozen attention{'s' * (len(new) > 1)} left out: {', '.join(sorted(new))}"
            )
        return alive

    def describe(self) -> str:
        """The places that are read."""
        by_module = _by_module(self._layers)
        sizes = [layer.columns for layer in self._layers]
        span = f"{min(sizes):,}" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,}"
        sources = ", ".join(sorted({layer.source.replace("_", " ") for layer in self._layers}))
        names = [name or "the module itself" for name in by_module]
        places = ", ".join(names) if len(names) < 4 else f"{names[0]} ... {names[-1]}"
        return f"{len(names)} attention{'s' * (len(names) > 1)} ({places}; {sources} over {span} keys)"


def _by_module(layers: list[LayerEntropy]) -> dict[str, list[LayerEntropy]]:
    found: dict[str, list[LayerEntropy]] = {}
    for layer in layers:
        found.setdefault(layer.module, []).append(layer)
    return found


__all__ = ["AttentionEntropyTerm"]
