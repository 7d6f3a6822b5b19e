r"""How alike two sets of representations of the same inputs are: linear CKA, and change in a shared basis.

.. math:: \mathrm{CKA}(X, Y) = \frac{\mathrm{HSIC}(XX^\top, YY^\top)}
    {\sqrt{\mathrm{HSIC}(XX^\top, XX^\top)\, \mathrm{HSIC}(YY^\top, YY^\top)}}

With linear kernels everything follows from :math:`\lVert X^\top Y \rVert_F^2` and the row lengths, so that no matrix of
rows x rows is needed where there are more rows than features.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def _centred(x: Tensor) -> Tensor:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"representations must be floating-point (rows, features), got {x.dtype} {tuple(x.shape)}")
    wide = x.float() if x.device.type == "mps" else x.double()
    return wide - wide.mean(0)


def _pair(x: Tensor, y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    if x.shape[:1] != y.shape[:1]:
        raise ValueError(
            f"representations must be of the same rows, got {tuple(x.shape)} and {tuple(y.shape)}: row i of both must "
            "come from the same input"
        )
    if len(x) < least:
        raise ValueError(f"at least {least} rows are needed, got {len(x)}")
    return _centred(x), _centred(y)


def _hsic(x: Tensor, y: Tensor, debiased: bool) -> Tensor:
    """Of centred representations."""
    n, p, q = len(x), x.shape[1], y.shape[1]
    # <XX', YY'> = |X'Y|^2, whichever of the two is smaller
    cross = ((x @ x.T) * (y @ y.T)).sum() if n * (p + q) < p * q else (x.T @ y).square().sum()
    if not debiased:
        return cross / (n - 1) ** 2
    # The rows of a kernel matrix of centred rows sum to 0: without its diagonal, to minus the diagonal's entries.
    in_x, in_y = x.square().sum(1), y.square().sum(1)
    both = in_x @ in_y
    return (cross - both + in_x.sum() * in_y.sum() / ((n - 1) * (n - 2)) - 2 * both / (n - 2)) / (n * (n - 3))


def linear_hsic(x: Tensor, y: Tensor, *, debiased: bool = True) -> Tensor:
    r"""Hilbert-Schmidt independence criterion with linear kernels.

    With :math:`\tilde K` the kernel matrix with a zero diagonal and n rows:

    .. math:: \mathrm{HSIC}_u = \frac{1}{n(n-3)} \left[ \mathrm{tr}(\tilde K \tilde L)
        + \frac{1^\top \tilde K 1 \; 1^\top \tilde L 1}{(n-1)(n-2)} - \frac{2}{n-2} 1^\top \tilde K \tilde L 1 \right]

    Args:
        x: ``(rows, features)``.
        y: ``(rows, other features)``, of the same rows.
        debiased: the unbiased estimator, which needs 4 rows; False gives
            :math:`\lVert X^\top Y \rVert_F^2 / (n-1)^2` of the centred representations.

    Returns:
        0-dimensional, float64; the unbiased estimate can be negative where x is not y.

    Raises:
        ValueError: if the rows do not fit or are too few.

    Reference:
        Song, Smola, Gretton, Bedo and Borgwardt, Feature Selection via Dependence Maximization (2012), equation 5.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> round(float(linear_hsic(x, x, debiased=False)), 4)  # the variance squared
        2.7778
    """
    return _hsic(*_pair(x, y, 4 if debiased else 2), debiased)


def linear_cka(x: Tensor, y: Tensor, *, debiased: bool = False) -> Tensor:
    r"""Linear centred kernel alignment: 1 for representations that are equal up to rotation, scale and shift.

    .. math:: \frac{\lVert Y^\top X \rVert_F^2}{\lVert X^\top X \rVert_F \lVert Y^\top Y \rVert_F}

    of the centred representations. With many features and few rows this is far above 0 for representations that have
    nothing to do with each other; the debiased form is then about 0.

    Args:
        x: ``(rows, features)``.
        y: ``(rows, other features)``, of the same rows.
        debiased: use the unbiased HSIC (:func:`linear_hsic`) in all three places.

    Returns:
        0-dimensional, float64, differentiable; NaN where a representation is the same in all rows. Debiased it can be
        slightly negative or above 1.

    Raises:
        ValueError: if the rows do not fit or are too few (2, debiased 4).

    Reference:
        Kornblith, Norouzi, Lee and Hinton, Similarity of Neural Network Representations Revisited (2019).

    Example:
        >>> x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
        >>> round(float(linear_cka(x, 3 * x + 1)), 6)
        1.0
    """
    x, y = _pair(x, y, 4 if debiased else 2)
    own = _hsic(x, x, debiased) * _hsic(y, y, debiased)
    return _hsic(x, y, debiased) / own.sqrt()


class MinibatchCKA:
    r"""Linear CKA from minibatches: the three HSICs are unbiased in each batch, and their means are taken.

    The mean over all ways to cut the rows into batches is the debiased HSIC of all rows, so that the batch size does
    not shift the result as it does with the biased estimator. Nothing but three sums is kept.

    Raises:
        ValueError: by :meth:`update` for fewer than 4 rows, by :meth:`compute` before any.

    Reference:
        Nguyen, Raghu and Kornblith, Do Wide and Deep Networks Learn the Same Things? (2021), equation 3.

    Example:
        >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> cka = MinibatchCKA()
        >>> for rows in x.split(16):
        ...     cka.update(rows, -rows)
        >>> round(float(cka.compute()), 6)
        1.0
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64)  # HSIC of xy, xx, yy, each times the rows; rows

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> None:
        """Add a batch: ``(rows, features)`` and ``(rows, other features)``."""
        x, y = _pair(x, y, 4)
        found = torch.stack([_hsic(x, y, True), _hsic(x, x, True), _hsic(y, y, True)]) * len(x)
        self.sums += torch.cat([found.cpu().double(), torch.tensor([float(len(x))], dtype=torch.float64)])

    def merge(self, other: MinibatchCKA) -> None:
        """Add what another one has seen, in another process for example."""
        self.sums += other.sums

    def compute(self) -> Tensor:
        """CKA of all that was seen, 0-dimensional float64."""
        if self.sums[3] == 0:
            raise ValueError("MinibatchCKA.compute() needs at least one update()")
        xy, xx, yy = self.sums[:3] / self.sums[3]
        return xy / (xx * yy).sqrt()


class SharedBasis(NamedTuple):
    """Principal components of two sets of representations together.

    Attributes:
        components: ``(features, k)``, orthonormal columns, float64.
        retained: share of the variance of both that lies in their span.
        retained_before: that share for the first set alone.
        retained_after: that share for the second set alone.
    """

    components: Tensor
    retained: Tensor
    retained_before: Tensor
    retained_after: Tensor


def shared_pca(before: Tensor, after: Tensor, *, components: int = 64) -> SharedBasis:
    """One PCA basis for two sets of representations, each centred on its own mean.

    Args:
        before: ``(rows, features)``.
        after: ``(rows, features)``; the rows need not be the same ones.
        components: k; at most as many as there are features.

    Returns:
        :class:`SharedBasis`. What happens outside its span cannot be seen in it: look at ``retained``.

    Raises:
        ValueError: if the features differ or ``components`` is below 1.

    Example:
        >>> x = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.1, 0.0], [0.0, -0.1, 0.0]])
        >>> round(float(shared_pca(x, 2 * x, components=1).retained), 3)
        0.99
    """
    if components < 1:
        raise ValueError(f"components must be at least 1, got {components}")
    x, y = _centred(before), _centred(after)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"a shared basis needs as many features before as after, got {x.shape[1]} and {y.shape[1]}")
    total = x.T @ x + y.T @ y
    k = min(components, x.shape[1])
    basis = torch.linalg.eigh(total).eigenvectors[:, -k:].flip(1)

    def share(*parts: Tensor) -> Tensor:
        inside = sum((part @ basis).square().sum() for part in parts)
        return torch.as_tensor(inside / sum(part.square().sum() for part in parts)).clamp(max=1)

    return SharedBasis(basis, share(x, y), share(x), share(y))


class DeltaCKA(NamedTuple):
    """How much a layer's representations changed.

    Attributes:
        change: 1 - CKA; 0 where they are equal up to rotation, scale and shift.
        retained: share of the variance that the shared basis holds.
        debiased: whether the unbiased estimator was used.
        rows: how many rows it was estimated from.
    """

    change: float
    retained: float
    debiased: bool
    rows: int


@torch.no_grad()
def delta_cka(before: Tensor, after: Tensor, *, components: int = 64, debiased: bool | None = None) -> DeltaCKA:
    """1 - CKA between a layer's representations of the same rows at two moments, in one PCA basis.

    Args:
        before: ``(rows, features)``.
        after: ``(rows, features)``, of the same rows.
        components: of the shared basis; with as many as there are features the basis changes nothing.
        debiased: see :func:`linear_cka`; None uses it where there are fewer than ten rows a component.

    Returns:
        :class:`DeltaCKA`; ``change`` is NaN where a representation is the same in all rows.

    Raises:
        ValueError: as :func:`linear_cka` and :func:`shared_pca` do.

    Reference:
        Delta-CKA of arXiv 2511.00797. Components, rows and estimator of the paper are not known; these are ours.

    Example:
        >>> x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> abs(round(delta_cka(x, 2 * x.flip(1)).change, 6))
        0.0
    """
    basis = shared_pca(before, after, components=components)
    k = basis.components.shape[1]
    unbiased = len(before) < 10 * k if debiased is None else debiased
    x, y = (_centred(part) @ basis.components for part in (before, after))
    change = 1 - float(linear_cka(x, y, debiased=unbiased))
    retained = float(basis.retained)
    return DeltaCKA(change, 1.0 if math.isnan(retained) else retained, unbiased, len(before))


__all__ = ["DeltaCKA", "MinibatchCKA", "SharedBasis", "delta_cka", "linear_cka", "linear_hsic", "shared_pca"]
