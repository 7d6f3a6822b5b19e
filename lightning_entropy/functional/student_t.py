"""Student's t density, for pre-activations with heavy tails."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_entropy.functional.density import LocationScale
from lightning_entropy.functional.incomplete_beta import regularized_incomplete_beta


class StudentT(LocationScale):
    r"""Student's t density, :math:`p(x) \propto (1 + z^2/\nu)^{-(\nu+1)/2}`, for heavy tails.

    Args:
        df: degrees of freedom, at least 0.5.
        loc: centre.
        scale: unit, > 0.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> round(StudentT(1.0).entropy(), 5)  # Cauchy: ln 4 pi
        2.53102
    """

    def __init__(self, df: float, *, loc: float = 0.0, scale: float = 1.0) -> None:
        super().__init__(loc, scale)
        if not (math.isfinite(df) and df >= 0.5):
            raise ValueError(f"df must be finite and >= 0.5, got {df}")
        self.df = float(df)
        self.reach = min(10.0 ** (14 / self.df + 2), 1e30)
        half = (self.df + 1) / 2
        self._constant = math.lgamma(half) - math.lgamma(self.df / 2) - 0.5 * math.log(self.df * math.pi)

    def log_pdf(self, x: Tensor) -> Tensor:
        """See :meth:`Density.log_pdf`."""
        z = self._z(x)
        return self._constant - math.log(self.scale) - (self.df + 1) / 2 * torch.log1p(z * z / self.df)

    def score(self, x: Tensor) -> Tensor:
        """See :meth:`Density.score`."""
        z = self._z(x)
        return -(self.df + 1) * z / (self.df + z * z) / self.scale

    def cdf(self, x: Tensor) -> Tensor:
        """See :meth:`Density.cdf`."""
        result: Tensor = _StudentCdf.apply(x, self)
        return result

    @property
    def mean(self) -> float:
        """First moment; NaN for ``df <= 1``."""
        return self.loc if self.df > 1 else math.nan

    @property
    def std(self) -> float:
        """Standard deviation; infinite for ``df <= 2``."""
        return self.scale * math.sqrt(self.df / (self.df - 2)) if self.df > 2 else math.inf

    def sample(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """See :meth:`Density.sample`."""
        normal = torch.randn(count, dtype=torch.float64, generator=generator)
        gamma = torch._standard_gamma(torch.full((count,), self.df / 2, dtype=torch.float64), generator=generator)
        return self.loc + self.scale * normal / (2 * gamma / self.df).sqrt()


class _StudentCdf(torch.autograd.Function):
    """Student's distribution function; torch has no incomplete beta function, whose derivative is known anyway."""

    @staticmethod
    def forward(x: Tensor, density: StudentT) -> Tensor:  # type: ignore[override]
        z = ((x - density.loc) / density.scale).double()
        # The tail from its own small argument, and so the body: one of them alone would lose the other's digits.
        whole = density.df + z * z
        tail = 0.5 * regularized_incomplete_beta(density.df / whole, density.df / 2, 0.5)
        body = 0.5 * regularized_incomplete_beta(z * z / whole, 0.5, density.df / 2)
        outer = torch.where(z > 0, 1 - tail, tail)
        return torch.where(z * z < density.df, 0.5 + z.sign() * body, outer).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, StudentT], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.density = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * ctx.density.pdf(x), None


__all__ = ["StudentT"]
