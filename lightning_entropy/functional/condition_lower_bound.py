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
    tall,
)

_FIRST_LOOK = 8
_LOOK_WITHIN = 6
_SOONER = 0.8  # when to look again, in units of the steps that are missing at the pace of the last ones
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
    vectors = basis.double().mT @ torch.from_numpy(right).to(basis.device).mT
    bound = _certified(matrix, greatest, vectors[:, [0, -1]])
    if bound == 1 and not bool(matrix.any()):
        return math.inf
    if inverse and not (stop_above is not None and bound > stop_above):
        low = _lowest_direction(matrix, vectors[:, -_INVERSE_VECTORS:])
        if low is not None:
            bound = max(bound, _certified(matrix, greatest, torch.cat([vectors[:, :1], low], dim=1)))
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
    v = v / _norm(v)
    basis[0] = v
    u = w @ v
    alphas, betas = [_norm(u)], list[float]()
    taken, looked, before, look = 1, 0, 1.0, _FIRST_LOOK
    while True:
        closed = taken == steps or not alphas[-1] > 1e-6 * max(alphas)
        if not closed:
            u = u / alphas[-1]
            r = w.T @ u - alphas[-1] * v
            r = r - basis[:taken].T @ (basis[:taken] @ r)
            beta = _norm(r)
            closed = not beta > 1e-6 * max(alphas)
        if closed or (stop_above is not None and taken == look):
            _, values, right = np.linalg.svd(np.diag(alphas) + np.diag(betas, 1))
            if closed or stop_above is None:
                break
            now = float(values[0] / max(values[-1], 1e-300))
            pace = (now / before) ** (1 / (taken - looked))
            hopeless = looked > 0 and now * pace ** (steps - taken) < stop_above
            if now > stop_above * (1 + 1e-3) or hopeless:
                break
            missing = math.log(stop_above / now) / math.log(max(pace, 1 + 1e-9))
            looked, before, look = taken, now, taken + min(max(2, round(_SOONER * min(missing, steps))), _LOOK_WITHIN)
        v = r / beta
        basis[taken] = v
        taken += 1
        u = w @ v - beta * u
        alphas.append(_norm(u))
        betas.append(beta)
    return torch.as_tensor(basis[:taken]), right


def _norm(vector: Any) -> float:
    return math.sqrt(float(vector @ vector))


def _lowest_direction(matrix: Tensor, start: Tensor) -> Tensor | None:
    """About the right singular vector of the smallest singular value, ``(columns, 1)``; None for a deficient matrix."""
    factor, failed = torch.linalg.cholesky_ex(gram_matrix(matrix))
    if bool(failed):
        return None
    vectors = start
    for _ in range(_INVERSE_ITERATIONS):
        vectors = torch.cholesky_solve(vectors, factor)
        vectors = vectors / torch.linalg.vector_norm(vectors, dim=0)
    space = torch.linalg.qr(vectors).Q
    # The factor maps as the matrix does, up to a rotation.
    return space @ torch.linalg.svd(factor.mT @ space, full_matrices=False).Vh[-1:].mT


def _certified(matrix: Tensor, greatest: float, vectors: Tensor) -> float:
    """The quotient of the lengths to which a matrix takes two vectors, less what rounding can have added."""
    m, n = matrix.shape
    squares = sum(product(block, vectors).square().sum(0) for block in row_blocks(matrix, _CACHE))
    assert isinstance(squares, Tensor)
    image_x, image_y = squares.sqrt().tolist()
    length_x, length_y = torch.linalg.vector_norm(vectors, dim=0).tolist()
    # Sums of squares are off by gamma(terms and a few); the products by what the module's docstring says.
    slack = gamma(m + n + 16)
    rounding = gamma(n + 2) * math.sqrt(m * n) * greatest * (1 + slack)
    most = (image_x * (1 - slack) / (1 + slack)) / length_x - rounding
    least = (image_y * (1 + slack) / (1 - slack)) / length_y + rounding
    return max(1.0, most / least * (1 - 1e-14)) if least > 0 else 1.0


__all__ = ["condition_lower_bound"]
