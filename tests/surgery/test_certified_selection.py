"""Certified selection must be what computing everything and sorting gives, with fewer values computed."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_entropy.functional import condition_number, expected_condition_number
from lightning_entropy.surgery import CertifiedSelection, lowest_condition_numbers


def with_condition(rows: int, columns: int, kappa: float, generator: torch.Generator) -> Tensor:
    small = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(n, small, generator=generator, dtype=torch.float64)).Q for n in (rows, columns)
    )
    return (left * torch.logspace(0, -math.log10(kappa), small, dtype=torch.float64)) @ right.mT


def bag(seed: int) -> list[Tensor]:
    """Matrices of several shapes, dtypes and condition numbers, with exact ties, zeros, deficient ones and stacks."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    matrices: list[Tensor] = []
    for _ in range(rng.randint(1, 14)):
        rows, columns = rng.choice([(8, 8), (20, 20), (24, 12), (12, 48), (40, 20), (1, 6), (3, 3)])
        kind = rng.choice(["normal", "normal", "kappa", "zero", "deficient", "tie", "tie", "turned", "stack"])
        matrix = torch.randn(rows, columns, generator=generator)
        if kind == "kappa":
            matrix = with_condition(rows, columns, 10 ** rng.uniform(0, 9), generator)
        elif kind == "zero":
            matrix = torch.zeros(rows, columns)
        elif kind == "deficient":
            matrix[:, -1] = matrix[:, 0]
            matrix[-1] = matrix[0]
        elif kind == "stack":
            matrix = torch.randn(3, rows, columns, generator=generator)
        elif kind in ("tie", "turned") and matrices:
            matrix = rng.choice(matrices)
            matrix = matrix.mT if kind == "turned" else matrix * rng.choice([1.0, 2.0])
        matrices.append(matrix.to(rng.choice([matrix.dtype, matrix.dtype, torch.bfloat16])))
    return matrices


def every_score(matrices: list[Tensor], scale: list[float] | None) -> list[float]:
    scores = []
    for i, matrix in enumerate(matrices):
        kappa = condition_number(matrix, layout="linear" if matrix.dim() == 2 else "experts")
        scores.append(float(kappa.value.max()) / (1.0 if scale is None else scale[i]))
    return scores


def brute_force(scores: list[float], budget: dict[str, Any]) -> list[int]:
    order = [i for i in sorted(range(len(scores)), key=lambda i: (scores[i], i)) if scores[i] < math.inf]
    if "count" in budget:
        return order[: budget["count"]]
    if "threshold" in budget:
        return [i for i in order if scores[i] <= budget["threshold"]]
    chosen: list[int] = []
    while len(chosen) < len(order) and sum(budget["sizes"][i] for i in order[: len(chosen) + 1]) <= budget["limit"]:
        chosen.append(order[len(chosen)])
    return chosen


def select(matrices: list[Tensor], **options: Any) -> CertifiedSelection:
    return lowest_condition_numbers([lambda m=m: m for m in matrices], **options)


@pytest.mark.parametrize("part", range(8))
def test_identical_to_brute_force_on_200_bags(part: int) -> None:
    saved = 0
    for seed in range(25 * part, 25 * part + 25):
        matrices, rng = bag(seed), random.Random(seed)
        scale = None
        if rng.random() < 0.5:
            scale = [expected_condition_number(*m.shape[-2:]) for m in matrices]
        scores = every_score(matrices, scale)
        sizes = [m.numel() for m in matrices]
        finite = [s for s in scores if s < math.inf]
        budgets: list[dict[str, Any]] = [
            {"count": rng.randint(0, len(matrices) + 1)},
            {"count": 1},
            {"threshold": rng.choice([*finite, 10.0, 0.5])},
            {"sizes": sizes, "limit": rng.uniform(0, 1.2) * sum(sizes)},
        ]
        for budget in budgets:
            found = select(matrices, scale=scale, **budget)
            assert found.chosen == brute_force(scores, budget), (seed, budget)
            assert found.evaluations == sum(v is not None for v in found.values) <= len(matrices)
            saved += len(matrices) - found.evaluations
            for i, (value, error, bound) in enumerate(zip(found.values, found.errors, found.lower_bounds)):
                assert value is None or value == scores[i]
                assert (value is None) == (error is None)
                assert bound <= scores[i] * (1 + 1e-3 if scores[i] > 1e8 else 1 + 2e-6)
                assert i not in found.chosen or value is not None
    assert saved > 50


def test_what_is_far_is_never_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    near = [with_condition(96, 32, k, generator) for k in (9.0, 5.0, 7.0)]
    far = [with_condition(64, 64, k, generator) for k in (3000.0, 10**5, 10**7)]
    found = select([far[0], near[0], far[1], near[1], near[2], far[2]], count=2)
    assert found.chosen == [3, 4]
    assert [value is None for value in found.values] == [True, True, True, False, False, True]
    assert found.evaluations == 2
    assert all(bound > 7 for i, bound in enumerate(found.lower_bounds) if i not in found.chosen)
    # In the worst case, all alike, nothing can be excluded, and all is computed.
    alike = [with_condition(32, 32, 50.0, generator) for _ in range(4)]
    assert select(alike, count=2).evaluations == 4


def test_a_budget_that_reaches_square_matrices_excludes_by_inverse_iteration() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [with_condition(48, 48, k, generator) for k in (2000, 900, 1100, 5000, 2500, 1300)]
    found = select(matrices, count=2)
    assert found.chosen == [1, 2]
    assert found.evaluations < 6
    assert all(bound > 1100 for i, bound in enumerate(found.lower_bounds) if i not in (1, 2))


def test_progress_precision_and_loading() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [with_condition(16, 16, k, generator) for k in (10.0, 700.0, 20.0)]
    said: list[tuple[int, int]] = []
    calls: list[int] = []

    def load(i: int) -> Tensor:
        calls.append(i)
        return matrices[i]

    loaders = [lambda i=i: load(i) for i in range(3)]
    found = lowest_condition_numbers(loaders, threshold=50.0, progress=lambda done, of: said.append((done, of)))
    assert found.chosen == [0, 2]
    assert said == [(1, 3), (2, 3), (3, 3)]
    assert calls == [0, 1, 2]  # once each where nothing needs to be ordered
    # Stored in 4 bits, a condition number of 700 is rounding.
    assert select(matrices, count=3, stored=[4, 4, None]).chosen == [0, 2]
    assert select(matrices, count=3, shapes=[(16, 16)] * 3).chosen == [0, 2, 1]
    assert select([], count=3).chosen == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "got none"),
        ({"count": 1, "threshold": 2.0}, "got count, threshold"),
        ({"sizes": [1]}, "one of the two is missing"),
        ({"count": -1}, "count must be >= 0, got -1"),
        ({"count": 1, "scale": [1.0, 2.0]}, "scale must have one entry for each of 1 matrices, got 2"),
        ({"count": 1, "scale": [0.0]}, "scale must be positive and finite, got 0.0"),
        ({"sizes": [-1], "limit": 3}, "sizes must be >= 0"),
    ],
)
def test_budgets_that_are_none(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        select([torch.eye(2)], **options)
