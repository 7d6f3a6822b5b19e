r"""A lower bound of a condition number from a few products with the matrix, certain in spite of rounding.

For any vectors x and y that are not zero, :math:`\lVert W x \rVert / \lVert x \rVert \le \sigma_1` and
:math:`\lVert W y \rVert / \lVert y \rVert \ge \sigma_r`, so that the first over the second never exceeds the condition
number. Golub-Kahan bidiagonalisation in float32 supplies good x and y; how it was rounded does not matter, since the
two quotients are computed anew from the vectors, in float64, with the error of that added on the safe side:

.. math:: | \mathrm{fl}(W x) - W x | \le \gamma_n |W| |x| , \qquad
    \big\lVert |W| |x| \big\rVert \le \sqrt{m n} \, \max |w_{ij}| \, \lVert x \rVert
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_entropy.functional.singular_spectrum import (
    finite_matrix,
    gamma,
    gram_matrix,
    moderate,
    product,
    row_blocks,
    solved,
    tall,
)

_CORRECTION = 1.2  # what the first estimate of the ratio is taken to be too low by
_PACE = 6  # steps between which it is seen how fast the bound rises
_SAMPLED_ROWS = 64
_SHORTNESS = 3  # power of its squared length by which a column has less weight in the start
_LEAST_WEIGHT = 1e-3  # of what the shortest column has: enough for the longest ones to be found
_INVERSE_VECTORS = 4
_INVERSE_ITERATIONS = 3
_CACHE = 1 << 16  # numbers widened at once: freshly allocated memory costs more than the product


@torch.no_grad()
def condition_lower_bound(
    matrix: Tensor, steps: int = 24, *, stop_above: float | None = None, inverse: bool = False
) -> Tensor:
    r"""A number that the condition number of a matrix is certainly not below.

    The largest over the smallest value of ``steps`` steps of Golub-Kahan bidiagonalisation, from a fixed start and
    certified in float64 (see the module). A few per cent low for matrices with unequal sides, far too low for square
    ones, whose smallest singular value no short Krylov space finds; costs about ``2 * steps`` products with a vector.

    Args:
        matrix: ``(..., rows, columns)``, finite, any floating-point dtype; a stack is bounded matrix by matrix.
        steps: dimension of the Krylov space.
        stop_above: a number of interest: return when the certified bound exceeds it, or when the steps that are left
            would not bring it there at the pace of the last ones.
        inverse: where that did not bring the bound above ``stop_above``, look for the smallest singular value by
            inverse iteration with the Cholesky factor of the Gram matrix: close to the condition number for square
            matrices too, at about half the cost of all singular values.

    Returns:
        ``(...)``, float64, on the CPU, at least 1; inf for a zero matrix.

    Raises:
        ValueError: if ``steps`` is less than 1, or the matrix is empty, is no matrix of floating-point numbers, or is
            not finite.

    Reference:
        Golub and Kahan, Calculating the Singular Values and Pseudo-Inverse of a Matrix (1965); Higham, Accuracy and
        Stability of Numerical Algorithms (2002), section 3.5.

    Example:
        >>> float(condition_lower_bound(torch.diag(torch.tensor([8.0, 4.0, 2.0])))) <= 4
        True
        >>> 0.99 < float(condition_lower_bound(torch.eye(3))) <= 1
        True
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    matrix, greatest = finite_matrix(matrix)
    matrix = tall(matrix)
    stack, exponent = moderate(matrix.flatten(0, -3) if matrix.dim() > 2 else matrix.unsqueeze(0), greatest)
    greatest = greatest if exponent is None else 1.0
    bounds = torch.tensor([_bound(one, greatest, steps, stop_above, inverse) for one in stack], dtype=torch.float64)
    return bounds.unflatten(0, matrix.shape[:-2]) if matrix.dim() > 2 else bounds[0]


def _bound(matrix: Tensor, greatest: float, steps: int, stop_above: float | None, inverse: bool) -> float:
    basis, right = _krylov(matrix, greatest, min(steps, matrix.shape[1]), stop_above)
    basis = basis.double()
    x, y = torch.from_numpy(right[[0, -1]]).to(basis.device) @ basis
    bound = _certified(matrix, greatest, x, y)
    if bound == 1 and not bool(matrix.any()):
        return math.inf
    if inverse and not (stop_above is not None and bound > stop_above):
        start = basis.mT @ torch.from_numpy(right[-_INVERSE_VECTORS:]).to(basis.device).mT
        low = _lowest_direction(matrix, start)
        if low is not None:
            bound = max(bound, _certified(matrix, greatest, x, low))
    return bound


def _krylov(matrix: Tensor, greatest: float, steps: int, stop_above: float | None) -> tuple[Tensor, np.ndarray]:
    """A Krylov space, as rows, and the right singular vectors of the matrix within it, as rows, from the largest on."""
    # The same operators on arrays of numpy, whose calls cost less than torch's, and on tensors of an accelerator.
    w: Any = matrix if matrix.dtype == torch.float64 else matrix.float()
    if not 1e-12 < greatest < 1e12:  # only directions come of this, so that it may be scaled to where squares fit
        w = w / w.abs().max().clamp(min=torch.finfo(w.dtype).tiny)
    basis: Any = w.new_empty(steps, matrix.shape[1])
    v: Any = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(w)
    if w.device.type == "cpu":
        w, basis, v = w.numpy(), basis.numpy(), v.numpy()
    v = v * _shortness(w)
    v = v / _norm(v)
    basis[0] = v
    u = w @ v
    alphas, betas = [_norm(u)], list[float]()
    watch = _Watch(steps, stop_above)
    while True:
        taken, greatest_alpha = len(alphas), max(alphas)
        closed = taken == steps or not alphas[-1] > 1e-6 * greatest_alpha
        if not closed:
            u /= alphas[-1]
            r = w.T @ u - alphas[-1] * v
            known, length = basis[:taken], _norm(r)
            r -= known.T @ (known @ r)
            beta = _norm(r)
            if beta < 0.5 * length:  # again, since what is left of the space in a remainder grows from step to step
                r -= known.T @ (known @ r)
                beta = _norm(r)
            closed = not beta > 1e-6 * greatest_alpha
        if closed or watch.is_due(alphas[-1], betas[-1] if betas else 0.0):
            _, values, right = np.linalg.svd(np.diag(alphas) + np.diag(betas, 1))
            if closed or watch.ends(float(values[0] / max(values[-1], 1e-300))):
                return torch.as_tensor(basis[:taken]), right
        v = r / beta
        basis[taken] = v
        u = w @ v - beta * u
        alphas.append(_norm(u))
        betas.append(beta)


def _shortness(matrix: Any) -> Any:
    """Weights for a start that is mostly of the shortest columns, which in trained weights point to small values.

    There a space of the same dimension has its smallest value a fifth to a half lower than from a random start; where
    all columns are alike, so are the starts. A sample of the rows tells the lengths well enough.
    """
    sample = matrix[:: max(1, len(matrix) // _SAMPLED_ROWS)]
    squares = (sample * sample).sum(0).clip(min=1e-37)
    return ((squares.min() / squares) ** _SHORTNESS).clip(min=_LEAST_WEIGHT)


class _Watch:
    """When the singular values of the bidiagonal matrix *B* are worth computing, by what its entries say of them.

    The columns of the inverse of *B* have lengths that follow from each other, and the root of the sum of their squares
    is at least 1 over the smallest singular value and seldom twice that; the largest is at least the length of a column
    of *B*. What the product of the two is off by is seen at a look, and changes little from there on.
    """

    def __init__(self, steps: int, stop_above: float | None) -> None:
        self.steps = steps
        self.stop_above = math.inf if stop_above is None else max(stop_above, 1.0)  # no bound is below 1
        self.longest = self.column = self.inverse = 0.0
        self.estimates: list[float] = []
        self.correction = _CORRECTION

    def is_due(self, alpha: float, beta: float) -> bool:
        """Whether to look, now that a column ``(beta, alpha)`` is there."""
        if self.stop_above == math.inf:
            return False
        self.longest = max(self.longest, alpha**2 + beta**2)
        self.column = (1 + beta**2 * self.column) / alpha**2
        self.inverse += self.column
        self.estimates.append(math.sqrt(self.longest * self.inverse))
        return self.estimates[-1] * self.correction > self.stop_above or self._is_hopeless()

    def ends(self, ratio: float) -> bool:
        """Whether enough was done, for the ratio of the singular values that was seen at a look."""
        self.correction = ratio / self.estimates[-1]
        return ratio > self.stop_above * (1 + 1e-3) or self._is_hopeless()

    def _is_hopeless(self) -> bool:
        """Whether the steps that are left would not do at the pace of the last ones."""
        taken = len(self.estimates)
        if taken <= _PACE or taken % _PACE:
            return False
        now, before = math.log(self.estimates[-1]), math.log(self.estimates[-1 - _PACE])
        rise = (now - before) / _PACE * (self.steps - taken)
        return now + math.log(self.correction) + rise < math.log(self.stop_above)


def _square(vector: Any) -> float:
    return float(vector @ vector)


def _norm(vector: Any) -> float:
    return math.sqrt(_square(vector))


def _lowest_direction(matrix: Tensor, start: Tensor) -> Tensor | None:
    """About the right singular vector of the smallest singular value, ``(columns,)``; None for a deficient matrix."""
    factor, failed = torch.linalg.cholesky_ex(gram_matrix(matrix))
    if bool(failed):
        return None
    vectors = start
    for _ in range(_INVERSE_ITERATIONS):
        vectors = solved(factor, vectors)
        vectors = vectors / torch.linalg.vector_norm(vectors, dim=0)
    space = torch.linalg.qr(vectors).Q
    # The factor maps as the matrix does, up to a rotation.
    return space @ torch.linalg.svd(factor.mT @ space, full_matrices=False).Vh[-1]


def _certified(matrix: Tensor, greatest: float, x: Tensor, y: Tensor) -> float:
    """The quotient of the lengths to which a matrix takes two vectors, less what rounding can have added."""
    m, n = matrix.shape
    square_x = square_y = 0.0
    for block in row_blocks(matrix, _CACHE):
        # Each vector alone: numpy took half the time that it takes for both at once.
        square_x += _square(product(block, x))
        square_y += _square(product(block, y))
    image_x, image_y = math.sqrt(square_x), math.sqrt(square_y)
    length_x, length_y = _norm(x), _norm(y)
    # Sums of squares are off by gamma(terms and a few); the products by what the module's docstring says.
    slack = gamma(m + n + 16)
    rounding = gamma(n + 2) * math.sqrt(m * n) * greatest * (1 + slack)
    most: float = (image_x * (1 - slack) / (1 + slack)) / length_x - rounding
    least = (image_y * (1 + slack) / (1 - slack)) / length_y + rounding
    return max(1.0, most / least * (1 - 1e-14)) if least > 0 else 1.0


__all__ = ["condition_lower_bound"]
