r"""Polynomial compositions, PolyReLU and PolyNorm (Zhuo et al., arXiv 2411.03884), for comparison.

.. math:: \mathrm{PolyReLU}(x) = \sum_{i=0}^{r} a_i \max(0, x)^i, \qquad
    \mathrm{PolyNorm}(x) = a_0 + \sum_{i=1}^{r} a_i \frac{x^i}{\mathrm{rms}(x^i)}

with all :math:`a_i` learnable, :math:`a_0 = 0` and the others :math:`1/r` at the start, and r = 3 in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _Polynomial(nn.Module):
    def __init__(self, order: int = 3, *, inplace: bool | None = None) -> None:
        super().__init__()
        if order < 1:
            raise ValueError(f"order must be >= 1, got {order}")
        self.order = order
        self.weight = nn.Parameter(torch.full((order,), 1 / order))
        self.bias = nn.Parameter(torch.zeros(1))

    def extra_repr(self) -> str:
        """The order."""
        return f"order={self.order}"


class PolyReLU(_Polynomial):
    """A polynomial of ReLU.

    Args:
        order: r, >= 1.
        inplace: taken and ignored.

    Raises:
        ValueError: if ``order`` is less than 1.

    Reference:
        Zhuo et al. (2024), Polynomial Composition Activations, arXiv 2411.03884.

    Example:
        >>> PolyReLU()(torch.tensor([-1.0, 2.0])).tolist()  # (2 + 4 + 8) / 3
        [0.0, 4.666666507720947]
    """

    def forward(self, x: Tensor) -> Tensor:
        """The activation of ``x``."""
        positive = torch.relu(x)
        total = self.weight[-1] * positive
        for i in range(self.order - 2, -1, -1):  # Horner's scheme
            total = (total + self.weight[i]) * positive
        return (total + self.bias).to(x.dtype)


class PolyNorm(_Polynomial):
    """A sum of powers, each divided by its root mean square over the last dimension.

    It is no function of one number: it mixes the channels of a token, and so is for the last dimension only.

    Args:
        order: r, >= 1.
        floor: added to the mean square.
        inplace: taken and ignored.

    Raises:
        ValueError: if ``order`` is less than 1.

    Reference:
        Zhuo et al. (2024), Polynomial Composition Activations, arXiv 2411.03884.

    Example:
        >>> [round(y, 4) for y in PolyNorm()(torch.tensor([2.0, -2.0])).tolist()]  # (1 + 1 + 1) / 3, (-1 + 1 - 1) / 3
        [1.0, -0.3333]
    """

    def __init__(self, order: int = 3, *, floor: float = 1e-6, inplace: bool | None = None) -> None:
        super().__init__(order)
        self.floor = floor

    def forward(self, x: Tensor) -> Tensor:
        """The activation of ``x``."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # cubes leave float16 at 40
        total = self.bias.to(wide.dtype)
        power = torch.ones_like(wide)
        for i in range(self.order):
            power = power * wide
            total = total + self.weight[i] * power * torch.rsqrt(power.square().mean(-1, keepdim=True) + self.floor)
        return total.to(x.dtype)
