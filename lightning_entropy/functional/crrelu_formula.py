r"""CRReLU and its derivatives written out, for compilers, exporters and derivatives of any order.

With :math:`t = (x - \mu) / \sigma` and :math:`E = e^{-t^2/2}`:

.. math:: f = \max(0, x) + \varepsilon \sigma t E, \qquad \partial_x f = [x > 0] + \varepsilon (1 - t^2) E, \qquad
    \partial_\varepsilon f = \sigma t E, \qquad \partial_x^2 f = \varepsilon (t^3 - 3t) E / \sigma, \qquad
    \partial_x \partial_\varepsilon f = (1 - t^2) E

where *t* is kept from reaching 40, so that infinity times 0 does not occur; E is 0 there in every dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

FAR_AWAY = 40.0


def crrelu_formula(x: Tensor, eps: Tensor, mu: Tensor | None, sigma: Tensor | None) -> Tensor:
    """CRReLU from torch's operations, differentiated by autograd.

    Args:
        x: floating, any shape.
        eps: broadcastable to ``x``.
        mu: broadcastable to ``x``; None for 0.
        sigma: likewise; None for 1.

    Returns:
        Shape and dtype of ``x``; the mathematics is in float32, or float64 for float64.
    """
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    z = wide if mu is None else wide - mu
    if sigma is not None:
        z = z / sigma
    t = z.masked_fill(z.abs() >= 40.0, 0.0)  # where the bump is 0; as a clamp it would cost a fifth more when compiled
    bump = t * torch.exp(-0.5 * t * t)
    if sigma is not None:
        bump = bump * sigma
    return (torch.relu(wide) + eps.to(wide.dtype) * bump).to(x.dtype)


def along_channels(parameter: Tensor, dims: int, channel_dim: int) -> Tensor:
    """One value for each channel, ``(channels,)``, in the shape that broadcasts over ``dims`` dimensions."""
    if dims == 0:
        return parameter
    shape = [1] * dims
    shape[channel_dim] = -1
    return parameter.view(shape)


class Terms:
    """What the derivatives consist of, in the dtype of the mathematics; differentiable."""

    def __init__(self, x: Tensor, eps: Tensor, mu: Tensor | None, sigma: Tensor | None) -> None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        self.x = x.to(dtype)
        self.eps = eps.to(dtype)
        self.sigma = x.new_ones((), dtype=dtype) if sigma is None else sigma.to(dtype)
        z = self.x if mu is None else self.x - mu.to(dtype)
        self.t = (z / self.sigma).clamp(-FAR_AWAY, FAR_AWAY)
        self.gaussian = torch.exp(-0.5 * self.t * self.t)

    def by_x(self) -> Tensor:
        """First derivative by x, like x."""
        return (self.x > 0).to(self.t.dtype) + self.eps * self.by_x_and_eps()

    def by_eps(self) -> Tensor:
        """First derivative by eps, before it is summed to the shape of eps."""
        return self.sigma * self.t * self.gaussian

    def by_x_twice(self) -> Tensor:
        """Second derivative by x."""
        return self.eps * (self.t**3 - 3 * self.t) * self.gaussian / self.sigma

    def by_x_and_eps(self) -> Tensor:
        """Second derivative by x and eps, before it is summed."""
        return (1 - self.t * self.t) * self.gaussian
