from __future__ import annotations

import math

import pytest

from lightning_entropy.recipes.paired_statistics import mean_and_deviation, paired_difference, t_cdf, t_quantile

# Two-sided 95 % and 99 % points of printed tables of Student's t.
TABLE = {
    1: (12.706, 63.657),
    2: (4.303, 9.925),
    4: (2.776, 4.604),
    9: (2.262, 3.250),
    30: (2.042, 2.750),
    120: (1.980, 2.617),
}


@pytest.mark.parametrize(("df", "points"), TABLE.items())
def test_quantile_against_printed_tables(df: int, points: tuple[float, float]) -> None:
    assert t_quantile(0.975, df=df) == pytest.approx(points[0], abs=5e-4)
    assert t_quantile(0.995, df=df) == pytest.approx(points[1], abs=5e-4)
    assert t_quantile(0.025, df=df) == -t_quantile(0.975, df=df)


@pytest.mark.parametrize("p", [0.51, 0.9, 0.975, 0.999, 0.001])
def test_closed_forms(p: float) -> None:
    assert t_quantile(p, df=1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9)
    a = 4 * p * (1 - p)
    assert t_quantile(p, df=2) == pytest.approx(2 * (p - 0.5) * math.sqrt(2 / a), rel=1e-9)
    assert t_cdf(t_quantile(p, df=3.5), df=3.5) == pytest.approx(p, abs=1e-12)


def test_quantile_refuses_what_is_none() -> None:
    with pytest.raises(ValueError, match="probability"):
        t_quantile(1.0, df=3)


def test_paired_difference_by_hand() -> None:
    found = paired_difference([0.9, 0.8, 1.0], [0.8, 0.8, 0.7])
    mean, sd = 0.4 / 3, math.sqrt(((0.1 - 0.4 / 3) ** 2 + (0.4 / 3) ** 2 + (0.3 - 0.4 / 3) ** 2) / 2)
    assert found.mean == pytest.approx(mean)
    assert found.high - found.mean == pytest.approx(4.302653 * sd / math.sqrt(3), rel=1e-6)
    assert (found.wins, found.pairs) == (2, 3)
    corrected = paired_difference([0.9, 0.8, 1.0], [0.8, 0.8, 0.7], test_per_train=0.25)
    assert corrected.high - corrected.mean == pytest.approx(4.302653 * sd * math.sqrt(1 / 3 + 0.25), rel=1e-6)
    assert paired_difference([1.0, 2.0], [2.0, 1.0], better=-1).wins == 1
    assert paired_difference([1.0, 2.0], [2.0, 1.0], better=0).wins is None


def test_one_pair_has_no_interval() -> None:
    found = paired_difference([1.0], [0.5])
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    with pytest.raises(ValueError, match="as many"):
        paired_difference([1.0], [])


def test_mean_and_deviation_leave_out_what_is_no_number() -> None:
    found = mean_and_deviation([1.0, None, 2.0, math.nan, 6.0, math.inf])
    assert found == {"mean": 3.0, "std": pytest.approx(7**0.5), "runs": 3}
    assert mean_and_deviation([2.0]) == {"mean": 2.0, "std": None, "runs": 1}
    assert mean_and_deviation([None]) == {"mean": None, "std": None, "runs": 0}
