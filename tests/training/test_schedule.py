from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_entropy.training import WeightSchedule


def test_cosine_at_its_three_points() -> None:
    s = WeightSchedule("cosine")
    assert s.value(0, 50, 0.1, 0.0) == pytest.approx(0.1)
    assert s.value(25, 50, 0.1, 0.0) == pytest.approx(0.05)
    assert s.value(50, 50, 0.1, 0.0) == pytest.approx(0, abs=1e-17)
    assert s.value(60, 50, 0.1, 0.02) == pytest.approx(0.02)
    assert s.value(10, 50, 0.1, 0.02) == pytest.approx(0.02 + 0.08 * (1 + math.cos(math.pi / 5)) / 2)


@given(st.sampled_from(["linear", "cosine"]), st.integers(0, 99), st.floats(0, 1), st.floats(0, 1))
def test_monotone_between_its_ends(kind: str, t: int, start: float, end: float) -> None:
    s = WeightSchedule(kind)
    a, b = s.value(t, 100, start, end), s.value(t + 1, 100, start, end)
    assert min(start, end) - 1e-12 <= a <= max(start, end) + 1e-12
    assert (b - a) * (end - start) >= -1e-15


def test_warmup() -> None:
    tenth = WeightSchedule("warmup")
    assert [tenth.value(t, 20, 0.4, 0.0) for t in (0, 1, 2, 19)] == pytest.approx([0, 0.2, 0.4, 0.4])
    fixed = WeightSchedule("constant", warmup=4)
    assert [fixed.value(t, 1, 0.4, 0.0) for t in (0, 2, 4, 9)] == pytest.approx([0, 0.2, 0.4, 0.4])


def test_nothing_before_it_begins() -> None:
    later = WeightSchedule("linear", begin=3)
    trainer = SimpleNamespace(max_epochs=13, current_epoch=3)
    length = later.run_length(trainer)
    assert length == 10
    assert [later.value(t, length, 0.4, 0.0) for t in (0, 2, 3, 8, 13)] == pytest.approx([0, 0, 0.4, 0.2, 0])
    constant = WeightSchedule(begin=2, warmup=2)
    assert [constant.value(t, 1, 1.0, 0.0) for t in (0, 1, 2, 3, 4, 9)] == pytest.approx([0, 0, 0, 0.5, 1, 1])
    assert WeightSchedule(begin=2).describe(1.0, 0.0, 1) == "weight 0 for 2 epochs, then weight 1"
    assert WeightSchedule("linear", begin=9).run_length(SimpleNamespace(max_epochs=5)) == 1  # never begins


def test_time_and_length_come_from_the_trainer() -> None:
    trainer = SimpleNamespace(max_epochs=7, estimated_stepping_batches=35, current_epoch=3, global_step=17)
    by_epoch, by_step = WeightSchedule("linear"), WeightSchedule("linear", unit="step")
    assert (by_epoch.run_length(trainer), by_epoch.now(trainer)) == (7, 3)
    assert (by_step.run_length(trainer), by_step.now(trainer)) == (35, 17)
    assert WeightSchedule("cosine", length=9).run_length(trainer) == 9
    endless = SimpleNamespace(max_epochs=-1, estimated_stepping_batches=float("inf"))
    assert WeightSchedule("constant").run_length(endless) == 1
    for unit in ("epoch", "step"):
        with pytest.raises(ValueError, match=r"set max_epochs, or pass schedule=WeightSchedule\('cosine'"):
            WeightSchedule("cosine", unit=unit).run_length(endless)


@pytest.mark.parametrize(
    "options",
    [{"kind": "exponential"}, {"unit": "batch"}, {"length": 0}, {"warmup": -1}, {"begin": -1}],
    ids=lambda o: next(iter(o)),
)
def test_bad_arguments(options: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        WeightSchedule(**options)
