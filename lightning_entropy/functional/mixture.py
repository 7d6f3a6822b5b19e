"""Mixtures of densities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_entropy.functional.density import Density, positive


class Mixture(Density):
    r"""Mixture :math:`p = \sum_i w_i p_i`; the score is the mean of the scores under the responsibilities.

    Args:
        components: densities.
        weights: one positive number each, rescaled to sum 1; None: equal.

    Raises:
        ValueError: if there is no component, or the weights do not fit.

    Example:
        >>> from lightning_entropy.functional import Normal
        >>> two = Mixture([Normal(-2.0), Normal(2.0)])
        >>> round(float(two.cdf(torch.tensor(0.0))), 6)
        0.5
    """

    def __init__(self, components: Sequence[Density], *, weights: Sequence[float] | None = None) -> None:
        if not components:
            raise ValueError("components must hold at least one density, got none")
        given = [1.0] * len(components) if weights is None else [positive("weights", w) for w in weights]
        if len(given) != len(components):
            raise ValueError(f"weights must be one for each of {len(components)} components, got {len(given)}")
        total = sum(given)
        self.components = tuple(components)
        self.weights = tuple(w / total for w in given)
        centre = sum(w * c.loc for w, c in zip(self.weights, self.components))
        spread = sum(w * (c.scale**2 + (c.loc - centre) ** 2) for w, c in zip(self.weights, self.components))
        super().__init__(centre, math.sqrt(spread))

    def _joint(self, x: Tensor) -> Tensor:
        return torch.stack([math.log(w) + c.log_pdf(x) for w, c in zip(self.weights, self.components)])

    def log_pdf(self, x: Tensor) -> Tensor:
        """See :meth:`Density.log_pdf`."""
        return torch.logsumexp(self._joint(x), 0)

    def score(self, x: Tensor) -> Tensor:
        """See :meth:`Density.score`."""
        return (torch.softmax(self._joint(x), 0) * torch.stack([c.score(x) for c in self.components])).sum(0)

    def cdf(self, x: Tensor) -> Tensor:
        """See :meth:`Density.cdf`."""
        return torch.stack([w * c.cdf(x) for w, c in zip(self.weights, self.components)]).sum(0)

    def nodes(self, breaks: Iterable[float] = ()) -> tuple[Tensor, Tensor]:
        """See :meth:`Density.nodes`: the nodes of all components."""
        points = list(breaks)
        parts = [c.nodes(points) for c in self.components]
        return torch.cat([x for x, _ in parts]), torch.cat([w * v for w, (_, v) in zip(self.weights, parts)])

    @property
    def mean(self) -> float:
        """First moment; NaN where a component has none."""
        return sum(w * c.mean for w, c in zip(self.weights, self.components))

    @property
    def std(self) -> float:
        """Standard deviation; infinite where a component's is."""
        mean = self.mean
        return math.sqrt(sum(w * (c.std**2 + (c.mean - mean) ** 2) for w, c in zip(self.weights, self.components)))

    def sample(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """See :meth:`Density.sample`."""
        weights = torch.tensor(self.weights, dtype=torch.float64)
        which = torch.multinomial(weights, count, replacement=True, generator=generator)
        out = torch.empty(count, dtype=torch.float64)
        for i, component in enumerate(self.components):
            chosen = which == i
            out[chosen] = component.sample(int(chosen.sum()), generator=generator)
        return out

    def __repr__(self) -> str:
        inner = ", ".join(f"{w:g} * {c!r}" for w, c in zip(self.weights, self.components))
        return f"Mixture({inner})"


__all__ = ["Mixture"]
