"""Values that were rounded to bfloat16 or float16: recognised, and spread over the intervals that round to them."""

from __future__ import annotations

import torch
from torch import Tensor

_NARROW = (torch.bfloat16, torch.float16)
_FEW = 64  # distinct values: fewer are taken for a discrete distribution, not for rounding
_TIED = 0.05  # share of ties among the values that float32 values of a density never have
_SPIKE = 20.0  # times the density of its neighbours that makes a value an atom


def rounded_to(x: Tensor) -> torch.dtype | None:
    """The narrow type that the values were rounded to, or None.

    Wide tensors count too: an output of autocast that was cast to float32 keeps its ties.

    Example:
        >>> x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
        >>> rounded_to(x), rounded_to(x.bfloat16().float())
        (None, torch.bfloat16)
    """
    flat = x.detach().flatten()
    distinct = torch.unique(flat)
    if distinct.numel() < _FEW or 1 - distinct.numel() / flat.numel() < _TIED:
        return None
    if flat.dtype in _NARROW:
        return flat.dtype
    for narrow in _NARROW:
        if torch.equal(distinct.to(narrow).to(distinct.dtype), distinct):
            return narrow
    return None


def _beside(values: Tensor, narrow: torch.dtype, to: float) -> Tensor:
    """The next representable number of each value towards ``to``."""
    small = values.to(narrow)
    bits = small.view(torch.int16)
    up = to > 0
    grows = (small > 0) if up else (small < 0)
    moved = torch.where(grows, bits + 1, bits - 1)
    from_zero = torch.tensor(1 if up else -0x7FFF, dtype=torch.int16, device=values.device)
    moved = torch.where(small == 0, from_zero, moved)
    return moved.view(narrow).to(values.dtype)


def spread_rounding(x: Tensor, narrow: torch.dtype, *, atom_threshold: float = 1e-3) -> Tensor:
    """Spread the ties of rounded values evenly over the interval that rounds to them. Nothing is drawn at random.

    A value that is there k times becomes k values at the middles of k equal parts of its interval, in the order in
    which they stand. A value that is far more frequent than its neighbours is an atom and stays as it is.

    Args:
        x: values that are numbers of ``narrow``, in any floating-point type.
        narrow: ``torch.bfloat16`` or ``torch.float16``.
        atom_threshold: an atom has at least this share of the values.

    Returns:
        The shape of ``x``, float64 where ``x`` is, else float32.

    Example:
        >>> x = torch.tensor([1.0, 1.0, 2.0])
        >>> spread_rounding(x, torch.bfloat16)
        tensor([0.9995, 1.0024, 2.0000])
    """
    if narrow not in _NARROW:
        raise ValueError(f"narrow must be torch.bfloat16 or torch.float16, got {narrow}")
    wide = x.detach().to(torch.float64)
    values, inverse, counts = torch.unique(wide.flatten(), return_inverse=True, return_counts=True)
    low = (values + _beside(values, narrow, -1.0)) / 2
    high = (values + _beside(values, narrow, 1.0)) / 2
    density = counts / (high - low)
    around = torch.stack([torch.roll(density, k) for k in (-2, -1, 1, 2)]).median(0).values
    atom = (counts > max(atom_threshold * wide.numel(), 2)) & (density > _SPIKE * around)
    # The rank of each value among its equals, in the order in which they stand.
    order = torch.argsort(inverse, stable=True)
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(inverse)
    rank[order] = torch.arange(inverse.numel(), device=x.device) - first[inverse[order]]
    share = (rank + 0.5) / counts[inverse]
    spread = low[inverse] + share * (high - low)[inverse]
    alone = atom | (counts == 1)
    out = torch.where(alone[inverse], wide.flatten(), spread).view(x.shape)
    return out if x.dtype == torch.float64 else out.float()


__all__ = ["rounded_to", "spread_rounding"]
