"""The matrices of lowest condition number, with certainty and without computing them all.

A lower bound that costs a few products with a vector excludes a matrix for good once it exceeds what the budget can
still reach. What no bound excludes is computed, by the same function that would compute everything, so the result is
the one of computing everything and sorting: also for ties, whose order is the position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_entropy.functional.condition_lower_bound import condition_lower_bound
from lightning_entropy.functional.condition_number import condition_number, expected_condition_number
from lightning_entropy.functional.singular_spectrum import tall

_STEPS = 40
_SVD_ERROR = (
    1e-15  # relative error of an SVD for each row and unit of condition number, as singular_spectrum reports it
)
_NEAR = 1.5
_INVERSE = 4


@dataclass(frozen=True)
class CertifiedSelection:
    """What was chosen and why; everything by position in ``matrices``.

    Attributes:
        chosen: positions, lowest score first.
        values: scores (condition number over scale) where they were computed, None where a lower bound decided; inf
            for zero and rank-deficient matrices, which are never chosen.
        errors: bound on the relative error of each value, None where there is no value.
        lower_bounds: numbers that the true scores are not below; beside a value, the value less its error.
        evaluations: how many values were computed.
    """

    chosen: list[int]
    values: list[float | None]
    errors: list[float | None]
    lower_bounds: list[float]
    evaluations: int


@dataclass(frozen=True)
class _Budget:
    """One of: so many, up to a score, or the longest ascending prefix whose sizes add up to at most a limit."""

    count: int | None
    threshold: float | None
    sizes: Sequence[int] | None
    limit: float | None

    def take(self, scores: dict[int, float]) -> tuple[list[int], float]:
        """What is chosen of the scores, and a score above which nothing can be chosen, however many are added."""
        order = [i for _, i in sorted((score, i) for i, score in scores.items() if score < math.inf)]
        if self.threshold is not None:
            return [i for i in order if scores[i] <= self.threshold], self.threshold
        if self.count is not None:
            full = len(order) >= self.count > 0
            cut = scores[order[self.count - 1]] if full else (math.inf if self.count else -math.inf)
            return order[: self.count], cut
        assert self.sizes is not None
        assert self.limit is not None
        total = 0
        for place, i in enumerate(order):
            total += self.sizes[i]
            if total > self.limit:
                return order[:place], scores[i]
        return order, math.inf


def lowest_condition_numbers(
    matrices: Sequence[Callable[[], Tensor]],
    count: int | None = None,
    *,
    threshold: float | None = None,
    sizes: Sequence[int] | None = None,
    limit: float | None = None,
    scale: Sequence[float] | None = None,
    shapes: Sequence[Sequence[int]] | None = None,
    stored: Sequence[torch.dtype | int | None] | None = None,
    rtol: float = 1e-6,
    progress: Callable[[int, int], None] | None = None,
) -> CertifiedSelection:
    """The matrices of lowest score, identical to computing every score and sorting.

    The score is the condition number over ``scale``. Exactly one budget is given: ``count``, ``threshold``, or
    ``sizes`` with ``limit``. Candidates whose shape lets them in are computed first; the others must then be excluded
    by certified lower bounds, and are computed where they cannot. In the worst case, all scores alike, everything is.

    Args:
        matrices: each gives ``(rows, columns)``, or a stack ``(..., rows, columns)``, whose score is its greatest. A
            callable, so that one matrix is held at a time; called up to three times.
        count: how many of the lowest; fewer come back where fewer are finite.
        threshold: the greatest score that is chosen.
        sizes: cost of each matrix, such as its number of parameters.
        limit: the longest prefix of the ascending order is chosen whose costs add up to at most this.
        scale: positive numbers by which condition numbers are divided, such as what their shape leads to expect.
        shapes: shape of each matrix where it is known without a call.
        stored: what each matrix was stored in, see :func:`lightning_entropy.functional.condition_number`; None where
            that is its dtype.
        rtol: see :func:`lightning_entropy.functional.condition_number`.
        progress: called with how many are decided, and of how many.

    Returns:
        Positions and scores.

    Raises:
        ValueError: if not exactly one budget is given, lengths differ or a scale is not positive.

    Example:
        >>> matrices = [torch.eye(4), torch.zeros(4, 4), torch.diag(torch.tensor([1.0, 2.0, 3.0]))]
        >>> lowest_condition_numbers([lambda m=m: m for m in matrices], 2).chosen
        [0, 2]
    """
    budget = _checked(len(matrices), count, threshold, sizes, limit, scale=scale, shapes=shapes, stored=stored)
    scales = [1.0] * len(matrices) if scale is None else [float(s) for s in scale]
    values: dict[int, float] = {}
    errors: dict[int, float] = {}
    bounds = [1 / s for s in scales]
    for done, i in enumerate(_order(matrices, shapes, scales, budget)):
        matrix = matrices[i]()
        _, cut = budget.take(values)
        slack = 0.0
        if cut < math.inf:
            bound, slack = _bound(matrix, cut * scales[i], rtol)
            bounds[i] = bound / scales[i]
        if not bounds[i] * (1 - slack) > cut:
            kappa = condition_number(
                matrix,
                layout="linear" if matrix.dim() == 2 else "experts",
                rtol=rtol,
                stored_dtype=stored[i] if stored is not None else None,
            )
            worst = int(kappa.value.flatten().argmax())
            values[i] = float(kappa.value.flatten()[worst]) / scales[i]
            errors[i] = float(kappa.error.flatten()[worst])
            if errors[i] < 1:
                bounds[i] = values[i] / (1 + errors[i])
        if progress is not None:
            progress(done + 1, len(matrices))
    places = range(len(matrices))
    chosen, _ = budget.take(values)
    return CertifiedSelection(
        chosen, [values.get(i) for i in places], [errors.get(i) for i in places], bounds, len(values)
    )


def _checked(
    number: int,
    count: int | None,
    threshold: float | None,
    sizes: Sequence[int] | None,
    limit: float | None,
    **others: Sequence[Any] | None,
) -> _Budget:
    given = [
        name
        for name, there in (
            ("count", count is not None),
            ("threshold", threshold is not None),
            ("sizes and limit", sizes is not None or limit is not None),
        )
        if there
    ]
    if len(given) != 1 or (sizes is None) != (limit is None):
        raise ValueError(
            "exactly one budget must be given: count, threshold, or sizes with limit; got "
            + (", ".join(given) if given else "none")
            + ("" if (sizes is None) == (limit is None) else " (one of the two is missing)")
        )
    if count is not None and count < 0:
        raise ValueError(f"count must be >= 0, got {count}")
    for name, numbers in {"sizes": sizes, **others}.items():
        if numbers is not None and len(numbers) != number:
            raise ValueError(f"{name} must have one entry for each of {number} matrices, got {len(numbers)}")
    if sizes is not None and min(sizes, default=1) < 0:
        raise ValueError(f"sizes must be >= 0, got {min(sizes)}")
    wrong = [s for s in others.get("scale") or () if not 0 < s < math.inf]
    if wrong:
        raise ValueError(f"scale must be positive and finite, got {wrong[0]}")
    return _Budget(count, threshold, sizes, limit)


def _order(
    matrices: Sequence[Callable[[], Tensor]],
    shapes: Sequence[Sequence[int]] | None,
    scales: list[float],
    budget: _Budget,
) -> list[int]:
    """In which order to look: what is likely to be chosen comes first. Changes how much is computed, no result."""
    positions = list(range(len(matrices)))
    if budget.threshold is not None:  # what can be chosen is known from the start
        return positions
    expected = {}
    for i in positions:
        rows, columns = (shapes[i] if shapes is not None else matrices[i]().shape)[-2:]
        expected[i] = expected_condition_number(rows, columns) / scales[i]
    likely, cut = budget.take(expected)
    near = {i for i in positions if expected[i] <= _NEAR * cut}
    if cut == math.inf or len(near) == len(likely):
        return sorted(positions, key=lambda i: (expected[i], i))
    guess = {i: _column_ratio(matrices[i]()) / scales[i] for i in near}
    return sorted(positions, key=lambda i: (i not in near, round(expected[i], 6), guess.get(i, 0.0), i))


def _column_ratio(matrix: Tensor) -> float:
    """Greatest over least norm of a column, which the condition number is not below; follows it in trained weights."""
    norms = tall(matrix.detach()).float().square().sum(-2).sqrt()
    ratios = norms.amax(-1) / norms.amin(-1)
    return float(ratios.nan_to_num(math.inf).max())


def _bound(matrix: Tensor, cut: float, rtol: float) -> tuple[float, float]:
    """A lower bound of the greatest condition number of a stack, and by how much a value computed may be below it."""
    small, size = sorted(matrix.shape[-2:])
    inverse = size <= _INVERSE * small  # of longer ones the Gram matrix costs as much as its eigenvalues
    bound = 1.0
    for one in matrix.flatten(0, -3) if matrix.dim() > 2 else [matrix]:
        needed = cut * (1 + _slack(size, cut, rtol)) * (1 + 1e-9)
        bound = max(bound, float(condition_lower_bound(one, _STEPS, stop_above=needed, inverse=inverse)))
        if bound > needed:
            break
    return bound, _slack(size, bound, rtol)


def _slack(size: int, condition: float, rtol: float) -> float:
    return min(2 * max(rtol, _SVD_ERROR * size * condition), 1.0)


__all__ = ["CertifiedSelection", "lowest_condition_numbers"]
