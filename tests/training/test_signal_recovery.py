from __future__ import annotations

import math

import pytest

from lightning_entropy.training.layer_report import LayerDiagnosis, LayerRow
from lightning_entropy.training.signal_recovery import SignalReading, recovery_figure, signal_recovery


def diagnosis(inputs: list[float], error: float = 1.0) -> LayerDiagnosis:
    rows = tuple(LayerRow(f"l.{i}", input_gradient=g, gradient=2 * g, entropy=0.5) for i, g in enumerate(inputs))
    return LayerDiagnosis(rows, output_error=error, loss=0.7)


def test_the_mean_is_over_the_chosen_layers_and_those_below() -> None:
    found = signal_recovery(diagnosis([1.0, 2.0, 4.0]), diagnosis([2.0, 16.0, 400.0], 0.5), ["l.1"], 7)
    assert found.recovery == pytest.approx(math.sqrt(2 * 8))
    assert found.relative_recovery == pytest.approx(2 * math.sqrt(2 * 8))
    assert found.gradient_norm == {"l.0": 4.0, "l.1": 32.0, "l.2": 800.0}
    assert found.entropy["l.2"] == 0.5
    assert (found.step, found.loss) == (7, 0.7)
    assert SignalReading(**found.record()) == found


def test_layers_that_nothing_reaches_are_left_out() -> None:
    found = signal_recovery(diagnosis([0.0, 2.0]), diagnosis([1.0, 6.0], math.nan), ["l.0", "l.1"], 1)
    assert found.recovery == pytest.approx(3.0)
    assert math.isnan(found.relative_recovery)
    assert math.isnan(signal_recovery(diagnosis([0.0]), diagnosis([1.0]), ["l.0"], 1).recovery)
    with pytest.raises(ValueError, match="must be among both"):
        signal_recovery(diagnosis([1.0]), diagnosis([1.0]), ["other"], 1)
    with pytest.raises(ValueError, match="must be among both"):
        signal_recovery(diagnosis([1.0]), diagnosis([1.0, 1.0]), ["l.0"], 1)


def test_the_figure() -> None:
    readings = [signal_recovery(diagnosis([1.0, 2.0]), diagnosis([k, 2.0 * k]), ["l.1"], k) for k in (1, 2, 4)]
    figure = recovery_figure(readings, "title")
    left, right = figure.axes
    assert list(left.get_lines()[0].get_ydata()) == pytest.approx([1.0, 2.0, 4.0])
    assert len(right.get_lines()) == 3
