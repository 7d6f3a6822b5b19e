r"""Entropy of a linear unit y = W x with Gaussian inputs, and the numbers of a spectrum that it is made of.

Where a number depends on the singular values alone, a function takes a matrix ``(..., rows, columns)``, then it is
differentiable, or a :class:`SingularSpectrum`, so that one decomposition serves several. *r* is min(rows, columns).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_entropy.functional.singular_spectrum import SingularSpectrum, singular_spectrum


def _values(weight: Tensor | SingularSpectrum) -> Tensor:
    """Singular values in float64, descending; 0 what cannot be told from it."""
    if isinstance(weight, Tensor):
        if weight.requires_grad and torch.is_grad_enabled():
            return torch.linalg.svdvals(weight.double())
        weight = singular_spectrum(weight)
    return torch.where(weight.errors < 1, weight.values, 0.0)


def _relative(values: Tensor) -> Tensor:
    """Values over the largest; 0 for a zero matrix."""
    top = values[..., :1]
    return values / torch.where(top > 0, top, 1.0)


def log_volume(weight: Tensor | SingularSpectrum) -> Tensor:
    r"""Logarithm of the volume to which the unit cube is mapped, :math:`V = \sum_i \log \sigma_i`, in nats.

    Half the log-determinant of the smaller Gram matrix.

    Args:
        weight: ``(..., rows, columns)`` or a spectrum.

    Returns:
        ``(...)``, float64; -inf where a singular value cannot be told from 0.

    Example:
        >>> round(float(log_volume(torch.diag(torch.tensor([2.0, 3.0])))), 4)  # log 6
        1.7918
    """
    return _values(weight).log().sum(-1)


def entropy_deficit(weight: Tensor | SingularSpectrum) -> Tensor:
    r"""How much entropy of the output is lost to unequal singular values, in nats.

    .. math:: D = \frac{r}{2} \log \frac{\lVert W \rVert_F^2}{r} - \sum_i \log \sigma_i \ge 0

    The log-volume at this Frobenius norm is greatest, and D = 0, where all singular values are equal. D does not change
    when W is scaled or rotated on either side.

    Args:
        weight: ``(..., rows, columns)`` or a spectrum.

    Returns:
        ``(...)``, float64; inf where a singular value cannot be told from 0.

    Reference:
        Ludwig (KappaTune), arXiv 2506.16289, for the argument; the inequality is that of the arithmetic and
        geometric means.

    Example:
        >>> float(entropy_deficit(torch.eye(3)))
        0.0
    """
    relative = _relative(_values(weight))
    return (
        (relative.shape[-1] / 2 * relative.square().mean(-1).log() - relative.log().sum(-1))
        .clamp(min=0)
        .nan_to_num(nan=math.inf, posinf=math.inf)
    )


def spectral_flatness(weight: Tensor | SingularSpectrum) -> Tensor:
    r"""Geometric over arithmetic mean of the squared singular values, :math:`\exp(-2 D / r)` with the deficit D.

    Args:
        weight: ``(..., rows, columns)`` or a spectrum.

    Returns:
        ``(...)``, float64, from 0 (rank-deficient) to 1 (all equal).

    Example:
        >>> float(spectral_flatness(torch.eye(3)))
        1.0
    """
    rank = weight.values.shape[-1] if isinstance(weight, SingularSpectrum) else min(weight.shape[-2:])
    return (-2 / rank * entropy_deficit(weight)).exp()


def stable_rank(weight: Tensor | SingularSpectrum) -> Tensor:
    r"""Squared Frobenius over squared spectral norm, :math:`\sum_i \sigma_i^2 / \sigma_1^2`.

    Args:
        weight: ``(..., rows, columns)`` or a spectrum.

    Returns:
        ``(...)``, float64, from 1 to r; 0 for a zero matrix.

    Reference:
        Rudelson and Vershynin, Sampling from Large Matrices (2007).

    Example:
        >>> float(stable_rank(torch.diag(torch.tensor([2.0, 1.0]))))
        1.25
    """
    return _relative(_values(weight)).square().sum(-1)


def effective_rank(weight: Tensor | SingularSpectrum) -> Tensor:
    r"""Exponential of the Shannon entropy of :math:`\sigma_i / \sum_j \sigma_j`.

    Args:
        weight: ``(..., rows, columns)`` or a spectrum.

    Returns:
        ``(...)``, float64, from 1 to r; 0 for a zero matrix.

    Reference:
        Roy and Vetterli, The Effective Rank (2007).

    Example:
        >>> round(float(effective_rank(torch.eye(5))), 9)
        5.0
    """
    relative = _relative(_values(weight))
    total = relative.sum(-1, keepdim=True)
    shares = relative / total.clamp(min=1.0)  # the largest is 1, or all are 0
    return torch.where(total[..., 0] > 0, torch.special.entr(shares).sum(-1).exp(), 0.0)


def gaussian_output_entropy(weight: Tensor, covariance: Tensor | float = 1.0, *, pseudo: bool = False) -> Tensor:
    r"""Differential entropy of y = W x with normal x, in nats.

    .. math:: h = \frac{m}{2} \log(2 \pi e) + \frac{1}{2} \log \det (W \Sigma W^\top)

    Args:
        weight: W, ``(..., rows, columns)``; differentiable.
        covariance: :math:`\Sigma` of x, positive definite, ``(..., columns, columns)``; a number is a variance.
        pseudo: for an output that lies in a subspace, whose density in all *m* dimensions does not exist: give the
            entropy within the subspace instead of -inf.

    Returns:
        ``(...)``, float64.

    Raises:
        ValueError: if the covariance has another size or is not positive definite.

    Example:
        >>> round(float(gaussian_output_entropy(torch.eye(1))), 4)
        1.4189
    """
    m, n = weight.shape[-2:]
    if isinstance(covariance, Tensor) and covariance.dim() >= 2:
        if covariance.shape[-2:] != (n, n):
            raise ValueError(f"covariance must be ({n}, {n}) for {n} inputs, got {tuple(covariance.shape)}")
        factor, failed = torch.linalg.cholesky_ex(covariance.double())
        if bool((failed > 0).any()):
            raise ValueError("covariance must be positive definite: its Cholesky decomposition failed")
        weight, variance = weight.double() @ factor, torch.ones((), dtype=torch.float64)
    else:
        variance = torch.as_tensor(covariance, dtype=torch.float64)
        if not bool((variance > 0).all()):
            raise ValueError(f"a variance must be positive, got {covariance}")
    values = _values(weight)
    there = values > 0
    dimensions = there.sum(-1)
    logs = torch.where(there, values, 1.0).log().sum(-1)
    entropy = dimensions / 2 * (2 * math.pi * math.e * variance.to(values.device)).log() + logs
    return entropy if pseudo else torch.where(dimensions == m, entropy, -torch.inf)


# Greatest slope of activations that take no value twice. The others have no such bound.
_SLOPES = {
    "identity": 1.0,
    "tanh": 1.0,
    "sigmoid": 0.25,
    "softplus": 1.0,
    "softsign": 1.0,
    "logsigmoid": 1.0,
    "elu": 1.0,
    "celu": 1.0,
    "leaky_relu": 1.0,
    "selu": 1.7580993408473766,
}
_FOLDED = ("relu", "relu6", "gelu", "silu", "swish", "mish", "hardswish", "hardtanh")


def activation_entropy_bound(
    entropy: Tensor | float, dimensions: int, *, activation: str | None = None, lipschitz: float | None = None
) -> Tensor:
    r"""An upper bound of the entropy after an activation that takes no value twice, in nats.

    .. math:: h(\varphi(Y)) = h(Y) + \sum_i \mathbb{E} \log |\varphi'(Y_i)| \le h(Y) + m \log L

    with L the greatest slope, and *m* dimensions. GELU (slopes up to 1.129) and SiLU (1.0998) take values twice, and
    ReLU puts an atom at 0, where there is no density: for them this change of variables does not hold and there is an
    error.

    Args:
        entropy: h(Y), such as from :func:`gaussian_output_entropy`.
        dimensions: m.
        activation: name of a known activation, such as ``"tanh"``.
        lipschitz: L of another one that takes no value twice.

    Returns:
        Of the shape of ``entropy``, float64.

    Raises:
        ValueError: if not exactly one of ``activation`` and ``lipschitz`` is given, the activation is unknown or takes
            a value twice, or L is not positive.

    Example:
        >>> float(activation_entropy_bound(3.0, 2, activation="tanh"))
        3.0
    """
    if (activation is None) == (lipschitz is None):
        raise ValueError("exactly one of activation and lipschitz must be given")
    if activation is not None:
        if activation in _FOLDED:
            raise ValueError(f"{activation} takes values twice, so that the entropy after it has no such bound")
        if activation not in _SLOPES:
            raise ValueError(f"activation must be one of {', '.join(_SLOPES)}, got {activation!r}; or pass lipschitz")
        lipschitz = _SLOPES[activation]
    assert lipschitz is not None
    if not lipschitz > 0:
        raise ValueError(f"lipschitz must be positive, got {lipschitz}")
    return torch.as_tensor(entropy, dtype=torch.float64) + dimensions * math.log(lipschitz)


__all__ = [
    "activation_entropy_bound",
    "effective_rank",
    "entropy_deficit",
    "gaussian_output_entropy",
    "log_volume",
    "spectral_flatness",
    "stable_rank",
]
