r"""Densities of a pre-activation: value, score, distribution function, samples and quadrature.

The score :math:`s(x) = \frac{d}{dx} \log p(x)` is what entropy-based activation optimisation needs: p' = p s. The
densities here are analytic; :class:`lightning_entropy.functional.EmpiricalDensity` is measured.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lightning_entropy.functional.quadrature import graded_edges, panel_nodes

_PANELS = 192


def positive(name: str, value: float) -> float:
    """The value, if it is finite and > 0; else a ValueError that names it."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and > 0, got {value}")
    return float(value)


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


class Density(ABC):
    """A density on the real line. Methods take tensors of any shape and keep their dtype.

    Args:
        loc: the centre.
        scale: the unit in which distances from the centre are measured, > 0.
    """

    analytic = True

    def __init__(self, loc: float, scale: float) -> None:
        self.loc = _finite("loc", loc)
        self.scale = positive("scale", scale)

    @abstractmethod
    def log_pdf(self, x: Tensor) -> Tensor:
        """Logarithm of the density."""

    @abstractmethod
    def score(self, x: Tensor) -> Tensor:
        """Derivative of the logarithm of the density."""

    @abstractmethod
    def cdf(self, x: Tensor) -> Tensor:
        """Mass at or below ``x``, differentiable; its derivative is :meth:`pdf`."""

    @abstractmethod
    def nodes(self, breaks: Iterable[float] = ()) -> tuple[Tensor, Tensor]:
        """Quadrature nodes and weights of expectations under this density, float64, ``(nodes,)`` each.

        Args:
            breaks: points where the integrand has a kink, a jump or a logarithmic singularity.
        """

    def pdf(self, x: Tensor) -> Tensor:
        """The density."""
        return self.log_pdf(x).exp()

    def pdf_derivative(self, x: Tensor) -> Tensor:
        """Derivative of the density, ``pdf(x) * score(x)``."""
        return self.pdf(x) * self.score(x)

    def expectation(self, function: Callable[[Tensor], Tensor], *, breaks: Iterable[float] = ()) -> Tensor:
        """Expected value of ``function``, by quadrature.

        Example:
            >>> round(float(Normal(2.0).expectation(lambda x: x**2)), 6)
            5.0
        """
        x, w = self.nodes(breaks)
        return (w * function(x)).sum()

    @property
    def mean(self) -> float:
        """First moment; NaN where it does not exist."""
        return self.loc

    @property
    def std(self) -> float:
        """Standard deviation; infinite where it does not exist."""
        return math.sqrt(float(self.expectation(lambda x: (x - self.mean) ** 2)))

    def entropy(self) -> float:
        """Differential entropy in nats."""
        return float(-self.expectation(self.log_pdf))

    def quantile(self, q: Tensor | float) -> Tensor:
        """Inverse of :meth:`cdf`, float64, by bisection; ``q`` strictly between 0 and 1.

        Raises:
            ValueError: if a value of ``q`` is not between 0 and 1.
        """
        q = torch.as_tensor(q, dtype=torch.float64)
        if not bool(((q > 0) & (q < 1)).all()):
            raise ValueError(f"q must lie strictly between 0 and 1, got {q.min().item()} to {q.max().item()}")
        # Bisection on the asinh scale, so that heavy tails take no more steps than light ones.
        low, high = torch.full_like(q, -80.0), torch.full_like(q, 80.0)
        for _ in range(70):
            middle = (low + high) / 2
            below = self.cdf(self.loc + self.scale * middle.sinh()) < q
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return self.loc + self.scale * ((low + high) / 2).sinh()

    def sample(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Independent draws, float64, ``(count,)``."""
        tiny = torch.finfo(torch.float64).tiny
        return self.quantile(torch.rand(count, dtype=torch.float64, generator=generator).clamp(min=tiny))

    def __repr__(self) -> str:
        values = ", ".join(f"{k}={v:g}" for k, v in vars(self).items() if k in ("df", "loc", "scale"))
        return f"{type(self).__name__}({values})"


class LocationScale(Density):
    """A location-scale family; ``reach`` standard units from the centre hold all but about 1e-14 of its mass."""

    reach = 40.0

    def _z(self, x: Tensor) -> Tensor:
        return (x - self.loc) / self.scale

    def nodes(self, breaks: Iterable[float] = ()) -> tuple[Tensor, Tensor]:
        """See :meth:`Density.nodes`. The panels are even on the asinh scale and meet at the centre."""
        end = math.asinh(self.reach)
        inner = [math.asinh((point - self.loc) / self.scale) for point in breaks]
        edges = graded_edges(-end, end, _PANELS, inner)  # an even number of panels: the centre is an edge
        t, w = panel_nodes(edges)
        x = self.loc + self.scale * t.sinh()
        return x, w * self.scale * t.cosh() * self.pdf(x)


class Normal(LocationScale):
    r"""Normal density, :math:`p(x) \propto e^{-(x-\mu)^2 / 2\sigma^2}`, score :math:`-(x-\mu)/\sigma^2`.

    Args:
        loc: mean.
        scale: standard deviation, > 0.

    Raises:
        ValueError: if an argument is not finite, or ``scale`` is not positive.

    Example:
        >>> round(Normal().entropy(), 6)
        1.418939
    """

    reach = 8.5

    def __init__(self, loc: float = 0.0, *, scale: float = 1.0) -> None:
        super().__init__(loc, scale)

    def log_pdf(self, x: Tensor) -> Tensor:
        """See :meth:`Density.log_pdf`."""
        return -0.5 * self._z(x) ** 2 - math.log(self.scale * math.sqrt(2 * math.pi))

    def score(self, x: Tensor) -> Tensor:
        """See :meth:`Density.score`."""
        return -self._z(x) / self.scale

    def cdf(self, x: Tensor) -> Tensor:
        """See :meth:`Density.cdf`."""
        return 0.5 * torch.special.erfc(-self._z(x) / math.sqrt(2))

    @property
    def std(self) -> float:
        """Standard deviation."""
        return self.scale

    def sample(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """See :meth:`Density.sample`."""
        return self.loc + self.scale * torch.randn(count, dtype=torch.float64, generator=generator)


class Laplace(LocationScale):
    r"""Laplace density, :math:`p(x) = e^{-|x-\mu|/b} / 2b`.

    Args:
        loc: mean.
        scale: b, > 0; the standard deviation is :math:`b \sqrt 2`.

    Raises:
        ValueError: if an argument is not finite, or ``scale`` is not positive.

    Example:
        >>> round(Laplace().entropy(), 6)  # 1 + ln 2
        1.693147
    """

    def __init__(self, loc: float = 0.0, *, scale: float = 1.0) -> None:
        super().__init__(loc, scale)

    def log_pdf(self, x: Tensor) -> Tensor:
        """See :meth:`Density.log_pdf`."""
        return -self._z(x).abs() - math.log(2 * self.scale)

    def score(self, x: Tensor) -> Tensor:
        """See :meth:`Density.score`; 0 at the centre, where the density has a kink."""
        return -self._z(x).sign() / self.scale

    def cdf(self, x: Tensor) -> Tensor:
        """See :meth:`Density.cdf`."""
        z = self._z(x)
        tail = 0.5 * torch.exp(-z.abs())
        return torch.where(z < 0, tail, 1 - tail)

    @property
    def std(self) -> float:
        """Standard deviation."""
        return self.scale * math.sqrt(2)


class Logistic(LocationScale):
    r"""Logistic density; its distribution function is :math:`\mathrm{sigmoid}((x-\mu)/s)`.

    Args:
        loc: mean.
        scale: s, > 0; the standard deviation is :math:`s \pi / \sqrt 3`.

    Raises:
        ValueError: if an argument is not finite, or ``scale`` is not positive.

    Example:
        >>> round(Logistic().entropy(), 6)
        2.0
    """

    def __init__(self, loc: float = 0.0, *, scale: float = 1.0) -> None:
        super().__init__(loc, scale)

    def log_pdf(self, x: Tensor) -> Tensor:
        """See :meth:`Density.log_pdf`."""
        z = self._z(x)
        return torch.nn.functional.logsigmoid(z) + torch.nn.functional.logsigmoid(-z) - math.log(self.scale)

    def score(self, x: Tensor) -> Tensor:
        """See :meth:`Density.score`."""
        return -torch.tanh(self._z(x) / 2) / self.scale

    def cdf(self, x: Tensor) -> Tensor:
        """See :meth:`Density.cdf`."""
        return torch.sigmoid(self._z(x))

    @property
    def std(self) -> float:
        """Standard deviation."""
        return self.scale * math.pi / math.sqrt(3)


__all__ = ["Density", "Laplace", "LocationScale", "Logistic", "Normal", "positive"]
