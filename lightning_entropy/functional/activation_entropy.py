r"""Entropy of what an activation puts out, from samples: atoms and continuous part apart, raw and standardised.

An activation function can put out values that have no density: ReLU's zeros are an atom, and the differential entropy
of a distribution with an atom is minus infinity. So the two parts are told apart, and each has its own entropy. And
differential entropy is not invariant to scale, H(aY) = H(Y) + ln |a|: the standardised entropy H - ln(std) is given
beside the raw one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_entropy.functional.rounding import rounded_to, spread_rounding

_METHODS = ("vasicek", "ebrahimi", "van_es")


class ActivationEntropy(NamedTuple):
    """Entropies in nats; 0-dimensional, or one value a channel.

    Attributes:
        entropy: differential entropy of the continuous part, given that part; NaN where there is none. Without atoms
            this is the entropy.
        standardized: ``entropy`` minus the logarithm of ``std``: does not change when the activation is scaled.
        atom_mass: share of the values that repeat too often to have a density.
        atom_entropy: Shannon entropy of which atom, given an atom; 0 for one atom or none.
        mixed: H_b(m) + m * atom_entropy + (1 - m) * entropy with m the atom mass: density for the continuous part,
            probability for the atoms. Comparable only between distributions with equal atoms.
        std: standard deviation of all values.
        atoms: number of atoms.
    """

    entropy: Tensor
    standardized: Tensor
    atom_mass: Tensor
    atom_entropy: Tensor
    mixed: Tensor
    std: Tensor
    atoms: Tensor


def spacing_entropy(x: Tensor, *, method: str = "vasicek", window: int | None = None) -> Tensor:
    r"""Differential entropy of samples without ties, from the spacings of their order statistics, in nats.

    .. math:: H = \frac{1}{n} \sum_i \log\left(\frac{n}{2m} (x_{(i+m)} - x_{(i-m)})\right)

    with m about the square root of n and the order statistics held at the ends (Vasicek). Differentiable.

    Args:
        x: ``(samples,)``, at least 4.
        method: ``"vasicek"``, ``"ebrahimi"`` (spacings at the ends counted with the width that they have) or
            ``"van_es"``.
        window: m; None takes the integer nearest to the square root of n.

    Returns:
        0-dimensional, float32 or wider.

    Raises:
        ValueError: if the method is unknown, the samples are too few, or the window does not fit.

    Reference:
        Vasicek, A Test for Normality Based on Sample Entropy (1976); Ebrahimi, Pflughoeft and Soofi (1994); van Es
        (1992).

    Example:
        >>> x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
        >>> round(float(spacing_entropy(x)), 1)  # 1.4189 exactly
        1.4
    """
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    n = x.numel()
    if x.dim() != 1 or n < 4:
        raise ValueError(f"x must be one-dimensional with at least 4 values, got shape {tuple(x.shape)}")
    m = min(math.floor(math.sqrt(n) + 0.5), (n - 1) // 2) if window is None else window
    if not 1 <= m < n / 2:
        raise ValueError(f"window must be at least 1 and less than half of {n} samples, got {m}")
    x = (x if x.dtype == torch.float64 else x.float()).sort().values
    tiny = torch.finfo(x.dtype).tiny
    if method == "van_es":
        spacing = (x[m:] - x[:-m]).clamp(min=tiny)
        harmonic = sum(1 / k for k in range(m, n + 1))
        return ((n + 1) / m * spacing).log().mean() + harmonic + math.log(m) - math.log(n + 1)
    at = torch.arange(n, device=x.device)
    spacing = (x[(at + m).clamp(max=n - 1)] - x[(at - m).clamp(min=0)]).clamp(min=tiny)
    if method == "vasicek":
        return (n / (2 * m) * spacing).log().mean()
    from_end = torch.minimum(at, n - 1 - at).to(x.dtype)
    widths = torch.where(from_end < m, 1 + from_end / m, torch.full_like(from_end, 2.0))
    return (n / (widths * m) * spacing).log().mean()


def _one(x: Tensor, method: str, window: int | None, atom_threshold: float) -> ActivationEntropy:
    n = x.numel()
    values, counts = torch.unique(x.detach(), return_counts=True)
    # A value that is there once or twice is no atom, however few the samples.
    heavy = counts > max(atom_threshold * n, 2)
    masses = counts[heavy].to(x.dtype) / n
    atom_mass = masses.sum()
    rest = x
    if bool(heavy.any()):
        rest = x[~torch.isin(x.detach(), values[heavy])]
    std = x.std(correction=0)
    nan = torch.full_like(std, math.nan)
    enough = rest.numel() >= 4 and float(rest.detach().max() - rest.detach().min()) > 0
    continuous = spacing_entropy(rest, method=method, window=window) if enough else nan
    atom_entropy = -torch.special.xlogy(masses, masses / atom_mass.clamp(min=1e-12)).sum() / atom_mass.clamp(min=1e-12)
    free = 1 - atom_mass
    binary = -torch.special.xlogy(atom_mass, atom_mass) - torch.special.xlogy(free, free)
    share = free * continuous if enough else torch.zeros_like(free)
    mixed = binary + atom_mass * atom_entropy + share
    count = heavy.sum()
    return ActivationEntropy(continuous, continuous - std.log(), atom_mass, atom_entropy, mixed, std, count)


def activation_entropy(
    x: Tensor,
    *,
    method: str = "vasicek",
    window: int | None = None,
    standardize: bool = True,
    channel_dim: int | None = None,
    atom_threshold: float = 1e-3,
    rounding: str = "error",
) -> ActivationEntropy:
    r"""Entropy of activations from samples, with atoms and continuous part apart.

    Args:
        x: activations, any shape; 1e4 to 2e5 values are enough and quick.
        method: estimator of the continuous part, see :func:`spacing_entropy`.
        window: see :func:`spacing_entropy`.
        standardize: subtract the logarithm of the standard deviation in ``standardized``; False leaves it equal to
            ``entropy``.
        channel_dim: one entropy for each index of this dimension; None pools all values. A pooled entropy mixes the
            scales of the channels.
        atom_threshold: a value with a larger share of the samples is an atom.
        rounding: what to do with values that were rounded to bfloat16 or float16, whose ties are no atoms:
            ``"error"`` says so; ``"spread"`` spreads each tie evenly over the interval that rounds to it
            (:func:`spread_rounding`); ``"keep"`` takes the values as they are.

    Returns:
        :class:`ActivationEntropy`, float32 or wider. Never minus infinity: a distribution that is all atoms has a NaN
        ``entropy`` and a finite ``mixed``.

    Raises:
        ValueError: if an argument is out of range, values are not finite, or they were rounded (see ``rounding``).

    Example:
        >>> x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
        >>> h = activation_entropy(torch.relu(x))
        >>> print(f"{h.atom_mass:.1f} of the values are one atom, the others have {h.entropy:.1f} nats")
        0.5 of the values are one atom, the others have 0.7 nats
    """
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    if rounding not in ("error", "spread", "keep"):
        raise ValueError(f"rounding must be 'error', 'spread' or 'keep', got {rounding!r}")
    if not 0 < atom_threshold < 1:
        raise ValueError(f"atom_threshold must be between 0 and 1, got {atom_threshold}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"x must be finite, got {int((~torch.isfinite(x)).sum())} of {x.numel()} values that are not")
    narrow = rounded_to(x) if rounding != "keep" else None
    if narrow is not None and rounding == "error":
        raise ValueError(
            f"x holds {torch.unique(x).numel():,} distinct values among {x.numel():,}, all of them {narrow}: ties of "
            "rounding would be taken for atoms and spacings of 0. Recompute the activation in float32 from its "
            "input, or pass rounding='spread' (rounding='keep' takes them as they are)."
        )
    wide = x if x.dtype == torch.float64 else x.float()
    parts = [wide.flatten()] if channel_dim is None else list(wide.movedim(channel_dim, 0).flatten(1))
    if parts[0].numel() < 4:
        raise ValueError(f"x must hold at least 4 values{'' if channel_dim is None else ' a channel'}, got {x.shape}")
    if narrow is not None:
        parts = [spread_rounding(part, narrow) for part in parts]
    found = [_one(part, method, window, atom_threshold) for part in parts]
    if not standardize:
        found = [h._replace(standardized=h.entropy) for h in found]
    return found[0] if channel_dim is None else ActivationEntropy(*(torch.stack(v) for v in zip(*found)))


__all__ = ["ActivationEntropy", "activation_entropy", "spacing_entropy"]
