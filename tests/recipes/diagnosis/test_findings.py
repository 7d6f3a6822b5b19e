from __future__ import annotations

import math

import pytest
import torch

from lightning_entropy.observe.massive_activations import LayerMagnitude
from lightning_entropy.recipes.diagnosis.findings import (
    activation_findings,
    attention_findings,
    gradient_findings,
    magnitude_findings,
    most_severe_first,
    spectrum_findings,
)
from lightning_entropy.training.attention_report import AttentionEntropyReport


def heads(normalized: list[float], sink: float = 0.1, rest: float = 0.9) -> torch.Tensor:
    row = torch.tensor(normalized)
    return torch.stack([row * math.log(8), row, torch.full_like(row, sink), torch.full_like(row, rest)])


def test_collapse_names_its_layers_and_counts_heads() -> None:
    report = AttentionEntropyReport({"blocks.0.attn": heads([0.5, 0.6]), "blocks.1.attn": heads([0.01, 0.7])})
    (found,) = attention_findings(report)
    assert "collapsed in 1 of 4 heads (blocks.1.attn)" in found.what
    assert "0.01" in found.what
    assert "floor" in found.code


def test_a_sink_is_no_collapse() -> None:
    report = AttentionEntropyReport({"a": heads([0.01, 0.02], sink=0.99, rest=0.8)})
    assert attention_findings(report) == []


def test_uniform_heads_are_told_apart_from_collapsed_ones() -> None:
    report = AttentionEntropyReport({"a": heads([0.999, 0.01])})
    told = most_severe_first(attention_findings(report))
    assert ["collapsed" in f.what for f in told] == [True, False]
    assert "uniform in 1 of 2 heads" in told[1].what


@pytest.mark.parametrize(("drop", "told"), [(2.0, 0), (40.0, 1), (math.inf, 1)])
def test_gradient_drop_is_told_where_it_is_steep(drop: float, told: int) -> None:
    gradients = [1.0 / drop, 1.0, 1.0]
    found = gradient_findings(["l0", "l1", "l2"], gradients, ["l0"])
    assert len(found) == told
    if told:
        assert "from l2 to l0" in found[0].what
        assert ("to zero" if math.isinf(drop) else "40x") in found[0].what
        assert found[0].code == 'InflectionLoRA(diagnosis="report.json")'


def test_without_an_inflection_layer_no_diagnosis_file_is_advised() -> None:
    (found,) = gradient_findings(["l0", "l1"], [0.01, 1.0], [])
    assert "InflectionLoRA" not in found.code


def test_dead_units_and_narrow_inputs() -> None:
    row = {"site": "act", "activation": "ReLU", "atom_mass": 0.9, "input_std": 0.1}
    dead, narrow = activation_findings([row, {**row, "site": "b", "atom_mass": 0.5, "input_std": math.nan}])
    assert "90% of the output is one value in 1 of 2 activations (act)" in dead.what
    assert 'old="relu"' in dead.code
    assert "below 0.3 (down to 0.1: act)" in narrow.what


def test_massive_needs_size_and_ratio() -> None:
    assert magnitude_findings([LayerMagnitude("a", 99.0, 0.01, 3), LayerMagnitude("b", 200.0, 1.0, 3)]) == []
    (found,) = magnitude_findings([LayerMagnitude("a", 500.0, 0.1, 7)])
    assert "channel 7 of a, 5e+03 times the median" in found.what


def test_singular_weights_are_never_the_least_specialised() -> None:
    rows = [
        {"name": "zero", "condition_number": math.inf, "shape_normalized": math.inf, "parameters": 4},
        {"name": "a", "condition_number": 3.0, "shape_normalized": 2.0, "parameters": 4},
        {"name": "b", "condition_number": 9.0, "shape_normalized": 1.0, "parameters": 4},
    ]
    singular, range_ = spectrum_findings(rows)
    assert "1 of 3 weight matrices are rank-deficient (zero)" in singular.what
    assert "from 3 to 9" in range_.what
    assert "least specialised weights are b" in range_.what
