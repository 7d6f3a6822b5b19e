r"""Condition numbers of weights, with a bound on their error, and what shape and precision alone make of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_entropy.functional.singular_spectrum import SingularSpectrum, singular_spectrum

_LAYOUTS = ("linear", "conv", "experts")
_SQUARE = 3.67  # median of kappa / n for square matrices of independent normal entries (Edelman)
_RANGE = 3  # greatest magnitude of a group of weights that share a scale, in units of their root mean square


class ConditionNumber(NamedTuple):
    """Float64 tensors: ``()`` for one matrix, ``(experts,)``, ``(parts,)`` or ``(experts, parts)`` for several.

    Attributes:
        value: largest over smallest singular value; inf where the matrix is 0 or its rank is deficient at the precision
            in which it is stored.
        error: bound on the relative error of ``value``; inf where ``value`` is.
        sigma_max: largest singular value.
        sigma_min: smallest of the min(rows, columns) singular values.
        resolvable: condition number from which on rounding to the stored precision decides the smallest singular value.
    """

    value: Tensor
    error: Tensor
    sigma_max: Tensor
    sigma_min: Tensor
    resolvable: Tensor


def condition_number(
    weight: Tensor,
    *,
    layout: str | None = None,
    parts: int = 1,
    rtol: float = 1e-6,
    stored_dtype: torch.dtype | int | None = None,
) -> ConditionNumber:
    r"""Condition number :math:`\kappa = \sigma_1 / \sigma_r`, *r* = min(rows, columns), with a bound on its error.

    Computed in float64 whatever the dtype, see :func:`singular_spectrum`. A rank-deficient matrix has
    :math:`\kappa = \infty`. A matrix whose rank was deficient before it was rounded to the precision of storage has a
    smallest singular value of about :math:`\epsilon \sqrt{m - n + 1}`, with :math:`\epsilon` the standard deviation
    of the rounding errors: what is not above that counts as deficient too, see :func:`resolvable_condition_number`.

    Args:
        weight: ``(rows, columns)``; a convolution kernel ``(out, in, *kernel)``, taken as (out, in x kernel); or
            ``(..., experts, rows, columns)``.
        layout: ``"linear"``, ``"conv"`` or ``"experts"``. None takes 2 dimensions as linear, and 4 or 5 as a
            convolution; 3 could be experts or a convolution over time, and must be told.
        parts: so many equal blocks of rows, such as 3 for a fused q, k, v, each with its own value.
        rtol: greatest bound on the relative error of the smallest singular value that is accepted without an SVD.
        stored_dtype: what the numbers were stored in, where that is not the dtype of the tensor: a dtype, or the bits
            of a quantised format.

    Returns:
        Value, error, extreme singular values and what is resolvable.

    Raises:
        ValueError: if the layout is unknown or does not fit the dimensions, the rows do not divide into parts, or the
            weight is empty or not finite.

    Reference:
        Ludwig, The Condition Number as a Scale-Invariant Proxy for Information Encoding in Neural Units, arXiv
        2506.16289, for the use of it.

    Example:
        >>> kappa = condition_number(torch.diag(torch.tensor([1.0, 2.0, 8.0])))
        >>> round(float(kappa.value), 9), bool(kappa.error < 1e-12)
        (8.0, True)
        >>> float(condition_number(torch.ones(3, 3)).value)
        inf
    """
    matrices = _matrices(weight, layout, parts)
    rows, columns = matrices.shape[-2:]
    stored = weight.dtype if stored_dtype is None else stored_dtype
    return condition_of_spectrum(singular_spectrum(matrices, rtol=rtol), rows, columns, stored)


def condition_of_spectrum(
    spectrum: SingularSpectrum, rows: int, columns: int, stored: torch.dtype | int
) -> ConditionNumber:
    """The condition number of matrices whose spectrum is there already, as :func:`condition_number` gives it.

    Args:
        spectrum: from :func:`singular_spectrum`.
        rows: of one matrix.
        columns: of one matrix.
        stored: see :func:`resolvable_condition_number`.

    Returns:
        Of the leading shape of the spectrum.

    Example:
        >>> spectrum = singular_spectrum(torch.eye(2))
        >>> float(condition_of_spectrum(spectrum, 2, 2, torch.float32).value)
        1.0
    """
    top, bottom = spectrum.values[..., 0], spectrum.values[..., -1]
    rms = spectrum.values.square().sum(-1).div(rows * columns).sqrt()
    resolvable = resolvable_condition_number(rows, columns, rms, stored, sigma_max=top)
    of_top, of_bottom = spectrum.errors[..., 0], spectrum.errors[..., -1]
    value = top / bottom
    full = (of_bottom < 1) & (value < resolvable)
    error = (1 + of_top) / (1 - of_bottom) - 1 + 4 * 2.0**-53
    infinite = torch.full_like(value, torch.inf)
    return ConditionNumber(
        torch.where(full, value, infinite), torch.where(full, error, infinite), top, bottom, resolvable
    )


def _matrices(weight: Tensor, layout: str | None, parts: int) -> Tensor:
    """``(..., rows, columns)``."""
    shape = tuple(weight.shape)
    if layout is None:
        if weight.dim() == 3:
            raise ValueError(
                f'a weight of shape {shape} can be a stack of experts or a convolution: pass layout="experts" or "conv"'
            )
        layout = "conv" if weight.dim() in (4, 5) else "linear"
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(_LAYOUTS)}, got {layout!r}")
    fits = {"linear": weight.dim() == 2, "conv": weight.dim() >= 3, "experts": weight.dim() >= 3}[layout]
    if not fits:
        raise ValueError(f"a weight of shape {shape} is no {layout!r} weight; pass another layout")
    matrices = weight.flatten(1) if layout == "conv" else weight
    if parts < 1 or matrices.shape[-2] % parts:
        raise ValueError(f"parts must divide the {matrices.shape[-2]} rows of a weight of shape {shape}, got {parts}")
    return matrices.unflatten(-2, (parts, -1)) if parts > 1 else matrices


def expected_condition_number(rows: int, columns: int) -> float:
    r"""Condition number of a matrix of independent entries of equal variance, by its shape alone.

    The ratio of the edges of the Marchenko-Pastur law, :math:`(1 + \sqrt y) / (1 - \sqrt y)` with *y* the smaller over
    the larger side, but never above 3.67 times the smaller side, which is the median for square matrices.

    Args:
        rows: number of rows.
        columns: number of columns.

    Returns:
        At least 1.

    Reference:
        Marchenko and Pastur (1967); Edelman, Eigenvalues and Condition Numbers of Random Matrices (1988).

    Example:
        >>> round(expected_condition_number(3072, 768), 2), round(expected_condition_number(768, 768))
        (3.0, 2819)
    """
    short, long = sorted((rows, columns))
    if short < 1:
        raise ValueError(f"rows and columns must be at least 1, got {rows} and {columns}")
    root = math.sqrt(short / long)
    edges = (1 + root) / (1 - root) if root < 1 else math.inf
    return min(edges, _SQUARE * short) if short > 1 else 1.0


def resolvable_condition_number(
    rows: int,
    columns: int,
    rms: Tensor | float,
    stored: torch.dtype | int,
    *,
    sigma_max: Tensor | float | None = None,
) -> Tensor:
    r"""Condition number from which on the rounding of the entries decides the smallest singular value.

    .. math:: \frac{\sigma_1}{\epsilon \sqrt{|m - n| + 1}}, \qquad
        \epsilon = \frac{\mathrm{eps}}{\sqrt{12}} \, \mathrm{rms}(W)

    A matrix with one singular value of 0, rounded, gets one of about :math:`\epsilon \sqrt{|m - n| + 1}` there: the
    rounding errors, with standard deviation :math:`\epsilon`, seen from the missing direction. Condition numbers
    change by a few per cent at a tenth of this number and say nothing beyond it.

    Args:
        rows: *m*.
        columns: *n*.
        rms: root of the mean square of the entries.
        stored: dtype of storage; or the bits of an integer format whose scale is set by the greatest magnitude of a
            group of weights, taken as three times their root mean square.
        sigma_max: largest singular value; None takes :math:`\mathrm{rms} (\sqrt m + \sqrt n)`, that of independent
            entries.

    Returns:
        Of the shape of ``rms``, float64; inf for a zero matrix.

    Raises:
        ValueError: if ``stored`` is neither a floating-point dtype nor a number of bits from 2.

    Example:
        >>> f"{float(resolvable_condition_number(768, 768, 0.02, torch.bfloat16)):.2g}"
        '2.5e+04'
    """
    if isinstance(stored, torch.dtype):
        if not stored.is_floating_point:
            raise ValueError(f"stored must be a floating-point dtype or a number of bits, got {stored}")
        step = torch.finfo(stored).eps
    else:
        if stored < 2:
            raise ValueError(f"stored must be a floating-point dtype or a number of bits from 2, got {stored}")
        step = 2 * _RANGE / (2**stored - 1)
    scale = torch.as_tensor(rms, dtype=torch.float64)
    top = scale * (math.sqrt(rows) + math.sqrt(columns)) if sigma_max is None else torch.as_tensor(sigma_max)
    floor = step / math.sqrt(12) * scale * math.sqrt(abs(rows - columns) + 1)
    return torch.where(floor > 0, top / floor, torch.inf)


__all__ = [
    "ConditionNumber",
    "condition_number",
    "condition_of_spectrum",
    "expected_condition_number",
    "resolvable_condition_number",
]
