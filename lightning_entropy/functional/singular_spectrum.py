r"""All singular values of a weight, with a bound on the error of each, in a fraction of the time of an SVD.

The matrix is turned tall and multiplied with itself in float64, :math:`G = W^\top W`; entries of float32 and narrower
multiply exactly there. The eigenvalues of *G* are the squares of the singular values, off by at most

.. math:: \delta = \gamma_m \, \mathrm{tr}(G) + 10 \, n u \, \lambda_1 , \qquad \gamma_m = \frac{m u}{1 - m u}

with *u* = 2^-53. The first term is proven: it holds for sums of *m* products in any order, as the norm of
:math:`|W|^\top |W|` is at most the trace. The second is the backward error of the eigensolver, for which LAPACK
promises a modest multiple of *u*; 10 *n* is taken, where about 1 is seen. Relative to a small value the whole is
:math:`\delta / 2\lambda`, which grows with the square of the condition number.

Where this is too much for the smallest value, its singular vectors *u*, *v* are found by inverse iteration, and the
value is bounded by their residual instead: some singular value lies within

.. math:: \rho = \lVert (W v - s u, \; W^\top u - s v) \rVert / \lVert (u, v) \rVert

of *s*, and where :math:`(s + \rho)^2` is below the second smallest eigenvalue less its error, that one is the smallest.
This bound grows with the condition number only, not with its square. Where it is too much because of the rounding of
:math:`W v`, *u* is corrected by :math:`-W G^{-1} (W^\top u - s v)`. Where it does not hold or is still too much, the
matrix is decomposed: QR, then the singular values of R, in float64, with an error of at most
:math:`10 \, m u \, \sigma_1`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_UNIT = 2.0**-53
_SOLVER = 10  # error of an eigensolver or SVD in units of the size times the rounding unit times the norm
_CHUNK = 1 << 24  # numbers of a matrix that are widened to float64 at once
_SHIFT = 0.0005  # distance of the shift from the smallest eigenvalue, in units of the gap to the second
_ITERATIONS = 3


class SingularSpectrum(NamedTuple):
    """Singular values and how far they can be from the true ones.

    Attributes:
        values: ``(..., min(rows, columns))``, float64, descending.
        errors: bound on the relative error of each value, of the same shape; inf where a value cannot be told from 0.
        rank: ``(...)``, how many values can be told from 0 in float64.
    """

    values: Tensor
    errors: Tensor
    rank: Tensor

    @property
    def error(self) -> Tensor:
        """Bound on the relative error of the smallest value, ``(...)``."""
        return self.errors[..., -1]


@torch.no_grad()
def singular_spectrum(matrix: Tensor, *, rtol: float = 1e-6) -> SingularSpectrum:
    r"""All singular values in float64, with a bound on the relative error of each.

    :math:`\sigma_i(W) = \sqrt{\lambda_i(W^\top W)}` where the bound on the smallest is at most ``rtol``, refined or by
    an SVD where it is not (see the module). The bound is reported as it is, so it can exceed ``rtol`` after an SVD, for
    condition numbers above about 1e8. Not differentiable; ``torch.linalg.svdvals`` is.

    Args:
        matrix: ``(..., rows, columns)``, finite, any floating-point dtype. Leading dimensions are decomposed together.
        rtol: greatest bound on the relative error of the smallest value that is accepted without an SVD. 0 decomposes
            everything.

    Returns:
        Values, errors and rank, on the device of the matrix (on the CPU for devices without float64).

    Raises:
        ValueError: if the matrix is empty, is no matrix of floating-point numbers, or is not finite.

    Reference:
        Higham, Accuracy and Stability of Numerical Algorithms (2002), sections 3.5 and 19.3; Parlett, The Symmetric
        Eigenvalue Problem (1998), section 4.5 (residual bound) and 1.6 (Weyl, Jordan-Wielandt matrix).

    Example:
        >>> spectrum = singular_spectrum(torch.diag(torch.tensor([1.0, 3.0, 2.0])))
        >>> spectrum.values
        tensor([3., 2., 1.], dtype=torch.float64)
        >>> bool(spectrum.error < 1e-13), int(spectrum.rank)
        (True, 3)
    """
    if not rtol >= 0:
        raise ValueError(f"rtol must be >= 0, got {rtol}")
    matrix, greatest = finite_matrix(matrix)
    lead = matrix.shape[:-2]
    flat = tall(matrix).flatten(0, -3) if lead else tall(matrix).unsqueeze(0)
    size = max(1, _CHUNK // (flat.shape[1] * flat.shape[2]))
    pieces = [_decompose(part, rtol, greatest) for part in flat.split(size)]
    values, errors = (torch.cat(piece).unflatten(0, lead) if lead else piece[0][0] for piece in zip(*pieces))
    return SingularSpectrum(values, errors, (errors < 1).sum(-1))


def finite_matrix(matrix: Tensor) -> tuple[Tensor, float]:
    """The matrix, detached, of a dtype with arithmetic and on a device with float64, and its greatest magnitude.

    Raises:
        ValueError: for what is no finite matrix of floating-point numbers.
    """
    if matrix.dim() < 2 or not matrix.is_floating_point():
        raise ValueError(
            f"matrix must be (..., rows, columns) of floating-point numbers, got {matrix.dtype} of shape "
            f"{tuple(matrix.shape)}"
        )
    if matrix.numel() == 0:
        raise ValueError(f"matrix must not be empty, got shape {tuple(matrix.shape)}")
    matrix = matrix.detach()
    if matrix.device.type == "mps":
        matrix = matrix.cpu()
    if matrix.dtype.itemsize == 1:  # float8 has no arithmetic
        matrix = matrix.float()
    low, high = torch.aminmax(matrix)
    greatest = max(-float(low), float(high))
    if not math.isfinite(float(low) + greatest) and not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"matrix of shape {tuple(matrix.shape)} has values that are not finite")
    return matrix, greatest


def tall(matrix: Tensor) -> Tensor:
    """The matrix or its transpose, whichever has at least as many rows as columns."""
    return matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT


def gamma(terms: int) -> float:
    """Bound on the relative error of a sum of so many products in float64, added in any order."""
    return terms * _UNIT / (1 - terms * _UNIT)


def row_blocks(matrix: Tensor, numbers: int = _CHUNK) -> Iterator[Tensor]:
    """The rows in float64, at most so many numbers at once, so that a large matrix is never there a second time."""
    if matrix.dtype == torch.float64:
        yield matrix
        return
    for block in matrix.split(max(1, numbers // math.prod((*matrix.shape[:-2], matrix.shape[-1]))), dim=-2):
        yield block.double()


def product(matrix: Tensor, vectors: Tensor) -> Tensor:
    """A matrix times few vectors; on the CPU by numpy, which took a tenth of the time of torch for two of them."""
    if matrix.device.type == "cpu":
        return torch.from_numpy(matrix.numpy() @ vectors.numpy())
    return matrix @ vectors


def gram_matrix(matrix: Tensor) -> Tensor:
    """W^T W in float64, ``(..., columns, columns)``."""
    total: Tensor | None = None
    for block in row_blocks(matrix):
        if block.device.type == "cpu":
            # numpy sees that this is one matrix twice and computes half of the products (BLAS syrk); torch does not.
            array = block.numpy()
            gram = torch.from_numpy(np.matmul(np.swapaxes(array, -1, -2), array))
        else:
            gram = block.mT @ block
        total = gram if total is None else total.add_(gram)
    assert total is not None
    return total


def solved(factor: Tensor, vectors: Tensor) -> Tensor:
    """The solution for a matrix of a Cholesky factor; cholesky_solve copies the factor each time, which costs more."""
    half = torch.linalg.solve_triangular(factor, vectors, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def _eigenvalues(symmetric: Tensor) -> Tensor:
    """Descending."""
    if symmetric.device.type == "cpu":  # numpy's LAPACK took two thirds of the time of torch's
        return torch.from_numpy(np.linalg.eigvalsh(symmetric.numpy())).flip(-1)
    return torch.linalg.eigvalsh(symmetric).flip(-1)


def _decompose(stack: Tensor, rtol: float, greatest: float) -> tuple[Tensor, Tensor]:
    """Values and errors, each ``(matrices, columns)``, of tall matrices ``(matrices, rows, columns)``."""
    stack, exponent = moderate(stack, greatest)
    m, n = stack.shape[-2:]
    if rtol > 0:
        wide = stack.double() if stack.numel() <= _CHUNK else stack  # a larger one is widened in blocks, when needed
        gram = gram_matrix(wide)
        squares = _eigenvalues(gram)
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        delta = gamma(m + 1) * trace + _SOLVER * n * _UNIT * squares[..., 0].abs()
        values = squares.clamp(min=0).sqrt()
        # sqrt(l) against the least root that is possible, sqrt(l - delta).
        share = delta.unsqueeze(-1) / squares
        errors = torch.where(squares > delta.unsqueeze(-1), (1 - share).rsqrt() - 1 + 4 * _UNIT, torch.inf)
        for i in (errors[:, -1] > rtol).nonzero().flatten().tolist():
            refined = _refine(wide[i], gram[i], squares[i], float(delta[i]), rtol) if n > 1 else None
            if refined is not None:
                values[i, -1], errors[i, -1] = refined
            else:
                values[i], errors[i] = _svd(wide[i])
    else:
        values, errors = (torch.stack(parts) for parts in zip(*(_svd(one) for one in stack)))
    if exponent is not None:
        values = _times_power_of_two(values, exponent.flatten(1))
    return values, errors


def moderate(stack: Tensor, greatest: float) -> tuple[Tensor, Tensor | None]:
    """float64 matrices times powers of 2, so that squares neither vanish nor overflow, and the exponents to undo it."""
    if stack.dtype != torch.float64 or 1e-100 < greatest < 1e100:
        return stack, None
    exponent = torch.frexp(torch.linalg.vector_norm(stack, ord=torch.inf, dim=(-2, -1), keepdim=True)).exponent
    return _times_power_of_two(stack, -exponent), exponent


def _times_power_of_two(numbers: Tensor, exponent: Tensor) -> Tensor:
    half = exponent // 2  # in two steps, since 2^1074 is no float64
    return torch.ldexp(torch.ldexp(numbers, half), exponent - half)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    m, n = matrix.shape
    matrix = matrix.double()
    if m > n:
        matrix = torch.linalg.qr(matrix, mode="r").R
    values = torch.linalg.svdvals(matrix)
    absolute = _SOLVER * m * _UNIT * values[0]
    # A value v is off by at most `absolute`, and so by absolute / (v - absolute) of the true one.
    return values, torch.where(values > absolute, absolute / (values - absolute), torch.inf)


def _refine(matrix: Tensor, gram: Tensor, squares: Tensor, delta: float, rtol: float) -> tuple[float, float] | None:
    """The smallest singular value from its vectors, with a bound on its relative error; None where that fails.

    ``gram`` is overwritten.
    """
    m, n = matrix.shape
    first, second = float(squares[-1]), float(squares[-2])
    frobenius = math.sqrt(float(gram.diagonal().sum())) * (1 + gamma(m + 2))
    gram.diagonal().sub_(first - max(_SHIFT * (second - first), 20 * _UNIT * float(squares[0])))
    factor, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed):
        return None
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(n, 1, generator=generator, dtype=torch.float64).to(gram.device)
    for _ in range(_ITERATIONS):
        v = solved(factor, v)
        v = v / torch.linalg.vector_norm(v)
    wv = _times(matrix, v)
    value = float(torch.linalg.vector_norm(wv))
    if not value > 0:
        return None
    u, uncorrected = wv / value, True
    # The products are off by gamma(.) |W| |v|, whose norm is at most that of W; u and v are unit vectors to rounding.
    rounding = (gamma(n + 4) + gamma(m + 4)) * frobenius * (1 + 1e-9)
    while True:
        first_residual = float(torch.linalg.vector_norm(wv - value * u))
        second_residual = _transposed_times(matrix, u).sub_(v, alpha=value)
        radius = math.hypot(first_residual, float(torch.linalg.vector_norm(second_residual))) + rounding
        radius = radius / math.sqrt(2) * (1 + 1e-9)
        apart = radius < value and (value + radius) ** 2 < second - delta
        if apart and radius / (value - radius) <= rtol:
            return value, radius / (value - radius)
        if not uncorrected:
            return None
        # The rounding of W v is large beside the smallest value: the u nearby that W^T takes to a multiple of v.
        u = u - _times(matrix, solved(factor, second_residual))
        u, uncorrected = u / torch.linalg.vector_norm(u), False


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.cat([product(block, vector) for block in row_blocks(matrix)])


def _transposed_times(matrix: Tensor, vector: Tensor) -> Tensor:
    row, total = 0, vector.new_zeros(matrix.shape[1], 1)
    for block in row_blocks(matrix):
        total += product(block.mT, vector[row : row + len(block)])
        row += len(block)
    return total


__all__ = ["SingularSpectrum", "singular_spectrum"]
