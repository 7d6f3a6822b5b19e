"""The base of loss terms on the entropy of attention between tokens."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from lightning_entropy.observe import AttentionEntropyReader, LayerEntropy
from lightning_entropy.observe.selection import as_patterns
from lightning_entropy.training.lightning import LightningModule
from lightning_entropy.training.reader_term import ReaderTerm
from lightning_entropy.training.schedule import WeightSchedule
from lightning_entropy.verbosity import announce


class AttentionEntropyTerm(ReaderTerm):
    """A loss term on the entropy of every attention between tokens that the module computes.

    Args:
        weight: see :class:`lightning_entropy.training.LossTerm`.
        schedule: see :class:`lightning_entropy.training.LossTerm`.
        end_weight: see :class:`lightning_entropy.training.LossTerm`.
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

    def make_reader(self, module: LightningModule) -> AttentionEntropyReader:
        """A reader of attention between tokens."""
        self._frozen = set()
        return AttentionEntropyReader(module, self.modules, queries=self.queries, owner=self.name)

    def forget(self) -> None:
        """Drop what was read."""
        self._layers = []
        super().forget()

    @torch.no_grad()
    def quantities(self) -> dict[str, Tensor | float]:
        """What to log of the step."""
        return self.entropy_quantities(_by_module(self._layers))

    def term_of_step(self) -> Tensor | None:
        """Collect the step's entropies and hand them to :meth:`entropy_term`."""
        assert isinstance(self.reader, AttentionEntropyReader)
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
            raise self.no_gradient(sorted(broken or dead) or [type(module).__name__])
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
