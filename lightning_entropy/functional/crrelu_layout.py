"""How a tensor and the channels of its parameters lie in memory, for kernels that walk over it once."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """A dense tensor as ``(outer, channels, inner)`` in the order of its memory.

    Attributes:
        outer: how often the channels repeat.
        channels: number of parameters; 1 for one parameter.
        inner: neighbouring numbers that share a parameter.
        plain: mu is 0 and sigma is 1.
        order: dimensions of the tensor, from the slowest to the fastest.
    """

    outer: int
    channels: int
    inner: int
    plain: bool
    order: tuple[int, ...]

    def flat(self, x: Tensor) -> Tensor:
        """A view of ``x``, which lies in memory as this says, as a row of numbers."""
        return x.view(-1) if x.is_contiguous() else x.permute(self.order).reshape(-1)


def memory_order(x: Tensor) -> tuple[int, ...] | None:
    """Dimensions of ``x`` from the slowest to the fastest if it has neither gaps nor repeats in memory, else None.

    Example:
        >>> memory_order(torch.empty(2, 3, 4, 5, memory_format=torch.preserve_format).transpose(1, 3))
        (0, 3, 2, 1)
        >>> memory_order(torch.empty(4, 6)[:, ::2]) is None
        True
    """
    order = tuple(range(x.dim()))
    if x.is_contiguous():
        return order
    order = tuple(sorted(order, key=lambda d: x.stride()[d], reverse=True))  # a stable sort, reversed too
    return order if x.permute(order).is_contiguous() else None


def layout_of(x: Tensor, eps: Tensor, mu: Tensor | None, sigma: Tensor | None) -> Layout | None:
    """The layout of a dense tensor, or None where the parameters vary along more than one dimension.

    Args:
        x: any shape.
        eps: broadcastable to ``x``.
        mu: broadcastable to ``eps``, or None for 0.
        sigma: likewise, or None for 1.
    """
    order = memory_order(x)
    if order is None:
        return None
    if any(t is not None and t.numel() > 1 and t.shape != eps.shape for t in (mu, sigma)):
        return None
    plain = mu is None and sigma is None
    if eps.numel() == 1:
        return Layout(1, 1, x.numel(), plain, order)
    offset = x.dim() - eps.dim()
    varying = [d + offset for d, size in enumerate(eps.shape) if size > 1]
    if len(varying) != 1 or x.shape[varying[0]] != eps.numel():
        return None
    place = order.index(varying[0])
    sizes = [x.shape[d] for d in order]
    return Layout(math.prod(sizes[:place]), eps.numel(), math.prod(sizes[place + 1 :]), plain, order)


def parameter_table(eps: Tensor, mu: Tensor | None, sigma: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Values of eps and, where they are not 0 and 1, mu, sigma and 1 / sigma per channel: ``(1 or 4, channels)``."""
    row = eps.detach().reshape(1, -1).to(dtype)
    if mu is None and sigma is None:
        return row.contiguous()
    table = row.new_empty((4, row.shape[1]))
    table[0] = row[0]
    table[1] = 0.0 if mu is None else mu.detach().reshape(-1)
    table[2] = 1.0 if sigma is None else sigma.detach().reshape(-1)
    torch.reciprocal(table[2], out=table[3])
    return table
