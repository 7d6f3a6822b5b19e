from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from lightning_entropy.functional.random_spectrum import expected_stable_rank
from lightning_entropy.observe.model_weights import model_weights
from lightning_entropy.observe.spectral_report import COLUMNS, SpectralReport, spectral_report
from lightning_entropy.observe.spectral_rows import SpectralRow, spectral_rows


def with_spectrum(values: list[float], rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64, generator=generator)).Q
    return u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v.mT


def model_of(*weights: Tensor) -> nn.Sequential:
    layers = []
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        layer.weight.data.copy_(weight)
        layers.append(layer)
    return nn.Sequential(*layers)


def test_a_row_says_what_the_spectrum_is() -> None:
    values = [6.0, 3.0, 2.0, 0.5]
    row = spectral_report(model_of(with_spectrum(values, 9, 4))).rows[0]
    assert (row.name, row.module, row.shape, row.layout, row.precision) == (
        "0.weight",
        "0",
        (9, 4),
        "linear",
        "float64",
    )
    assert row.sigma_max == pytest.approx(6)
    assert row.sigma_min == pytest.approx(0.5)
    assert row.kappa == row.kappa_mean == pytest.approx(12)
    assert row.kappa_error < 1e-6
    volume = sum(math.log(s) for s in values)
    square = sum(s * s for s in values)
    assert row.log_volume == pytest.approx(volume)
    assert row.deficit == pytest.approx(2 * math.log(square / 4) - volume)
    assert row.deficit_per_dimension == pytest.approx(row.deficit / 4)
    assert row.stable_rank == pytest.approx(square / 36)
    weights = [s / sum(values) for s in values]
    assert row.effective_rank == pytest.approx(math.exp(-sum(p * math.log(p) for p in weights)))
    ratio = math.sqrt(4 / 9)
    assert row.shape_kappa == pytest.approx(12 * (1 - ratio) / (1 + ratio))


def test_of_experts_the_worst_matrix_is_told_and_the_mean_kept() -> None:
    module = nn.Module()
    module.experts = nn.Module()
    stack = torch.stack([with_spectrum([2.0, 1.0], 3, 2, 1), with_spectrum([5.0, 1.0], 3, 2, 2)])
    module.experts.down_proj = nn.Parameter(stack)
    row = spectral_report(module).rows[0]
    assert (row.matrices, row.rows, row.columns) == (2, 3, 2)
    assert row.kappa == pytest.approx(5)
    assert row.kappa_mean == pytest.approx(3.5)
    assert row.sigma_max == pytest.approx(5)


def test_zero_and_rank_deficient_weights_are_infinite_and_reported() -> None:
    repeated = torch.randn(4, 6, dtype=torch.float64)
    repeated[1] = repeated[0]
    report = spectral_report(model_of(torch.zeros(3, 3), repeated, torch.eye(3)))
    assert [math.isinf(row.kappa) for row in report] == [True, True, False]
    assert "inf" in report.table()


def test_a_bfloat16_weight_has_the_kappa_that_bfloat16_resolves() -> None:
    torch.manual_seed(0)
    wide = spectral_report(model_of(torch.randn(64, 64))).rows[0]
    narrow = spectral_report(model_of(torch.randn(64, 64).bfloat16())).rows[0]
    assert narrow.precision == "bfloat16"
    assert narrow.resolvable_kappa < wide.resolvable_kappa / 1e3


def test_what_has_numbers_that_are_not_finite_is_skipped_by_name() -> None:
    bad = torch.randn(3, 3)
    bad[0, 0] = math.nan
    report = spectral_report(model_of(bad, torch.eye(3)))
    assert report.skipped == {"0.weight": "1 of its numbers are not finite"}
    with pytest.raises(KeyError, match="not finite"):
        report["0.weight"]


def test_a_group_of_equal_shapes_gives_the_rows_of_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weights = model_weights(nn.Sequential(*(nn.Linear(6, 5) for _ in range(4))))
    alone = list(spectral_rows(weights))
    monkeypatch.setattr("lightning_entropy.observe.spectral_rows._batches", lambda weights: [weights])
    together = list(spectral_rows(weights))
    for one, other in zip(alone, together):
        assert isinstance(one, SpectralRow)
        assert isinstance(other, SpectralRow)
        assert one.name == other.name
        assert one.kappa == pytest.approx(other.kappa, rel=1e-9)
        assert one.stable_rank == pytest.approx(other.stable_rank, rel=1e-9)


def test_json_and_csv_and_back(tmp_path: Path) -> None:
    report = spectral_report(model_of(torch.zeros(3, 3), torch.eye(4)[:3]))
    path = report.save(tmp_path / "report.json")
    again = SpectralReport.load(path)
    assert again.record() == report.record()
    assert math.isinf(again.rows[0].kappa)
    assert again.fingerprint == report.fingerprint != ""
    rows = list(csv.reader(io.StringIO(report.save(tmp_path / "report.csv").read_text())))
    assert rows[0] == list(COLUMNS)
    assert rows[2][COLUMNS.index("shape")] == "3x4"
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json is no saved SpectralReport: .*KeyError: 'rows'"):
        SpectralReport.load(tmp_path / "other.json")


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_fits_the_terminal(width: int) -> None:
    torch.manual_seed(0)
    report = spectral_report(nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 8)))
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(report)
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= width
    assert ("resolvable" in text) == (width == 200)
    assert "1 skipped: rows of an embedding" in " ".join(text.split())
    assert "skipped 0.weight" in str(report)


def test_the_figure_draws_every_weight(tmp_path: Path) -> None:
    figure = spectral_report(model_of(torch.zeros(3, 3), torch.eye(3), torch.randn(3, 5))).plot()
    figure.savefig(tmp_path / "figure.png")
    drawn = [len(line.get_xdata()) for line in figure.axes[0].lines]
    assert sum(drawn) == 6  # three weights and what each can resolve


def test_progress_is_told_weight_by_weight() -> None:
    told: list[tuple[int, int, str]] = []
    spectral_report(model_of(torch.eye(2), torch.eye(3)), progress=lambda *step: told.append(step))
    assert told == [(0, 2, "0.weight"), (1, 2, "1.weight"), (2, 2, "")]


def test_a_bar_is_drawn_when_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    spectral_report(model_of(torch.eye(2)), progress=True)
    spectral_report(model_of(torch.eye(2)))
    assert capsys.readouterr().out == ""


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="parts must be 'whole' or 'blocks', got 'heads'"):
        spectral_report(model_of(torch.eye(2)), parts="heads")
    with pytest.raises(TypeError, match="takes a module or the path of safetensors files, got a int"):
        spectral_report(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"found no weight of a linear layer.* in ReLU"):
        spectral_report(nn.ReLU())


def test_a_gaussian_matrix_has_the_spectrum_of_its_shape() -> None:
    torch.manual_seed(0)
    row = spectral_report(nn.Linear(1000, 200, bias=False)).rows[0]
    assert row.shape_kappa == pytest.approx(1, rel=0.1)
    assert row.stable_rank == pytest.approx(expected_stable_rank(200, 1000), rel=0.1)
