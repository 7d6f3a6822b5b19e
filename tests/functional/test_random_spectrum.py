from __future__ import annotations

import math

import pytest
import torch

from lightning_entropy.functional.random_spectrum import (
    expected_entropy_deficit,
    expected_log_volume,
    expected_stable_rank,
)


@pytest.mark.parametrize(("rows", "columns"), [(16, 48), (24, 24), (40, 8)])
def test_the_expectations_are_the_means_of_draws(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(400, rows, columns, dtype=torch.float64, generator=generator)
    s = torch.linalg.svdvals(draws)
    small = min(rows, columns)
    volume = s.log().sum(-1)
    deficit = small / 2 * (s.square().sum(-1) / small).log() - volume
    for found, sample in (
        (expected_log_volume(rows, columns), volume),
        (expected_entropy_deficit(rows, columns), deficit),
    ):
        error = float(sample.std()) / math.sqrt(len(sample))
        assert abs(found - float(sample.mean())) < 4 * error


def test_the_log_volume_of_one_number_is_that_of_a_normal_one() -> None:
    # E ln|x| of a standard normal number: -(gamma + ln 2) / 2
    assert expected_log_volume(1, 1) == pytest.approx(-(0.5772156649015329 + math.log(2)) / 2)
    assert expected_log_volume(16, 48) == pytest.approx(29.356, abs=5e-4)


def test_the_stable_rank_of_large_matrices() -> None:
    matrix = torch.randn(300, 900, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(matrix)
    assert expected_stable_rank(300, 900) == pytest.approx(float((s / s[0]).square().sum()), rel=0.03)


def test_a_matrix_and_its_transpose_expect_the_same() -> None:
    for expected in (expected_entropy_deficit, expected_log_volume, expected_stable_rank):
        assert expected(7, 30) == expected(30, 7)
    with pytest.raises(ValueError, match="must be >= 1, got 0 and 3"):
        expected_stable_rank(0, 3)
