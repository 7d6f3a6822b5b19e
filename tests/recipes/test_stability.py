from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_entropy.cli import main
from lightning_entropy.recipes import Comparison, compare
from lightning_entropy.recipes.catalog import find_recipe
from lightning_entropy.recipes.run_record import read_record
from lightning_entropy.recipes.stability import COLLAPSED, LOSS, LOWEST_HEAD, MEAN, draw, numbers, summarize
from lightning_entropy.recipes.step_record import StepRecord

METHODS = ["plain", "sigma_reparam", "entropy_floor", "qk_norm"]
TINY: dict[str, Any] = {
    "trainer.max_epochs": 2,
    "trainer.limit_train_batches": 3,
    "trainer.log_every_n_steps": 1,
    "callbacks.AttentionEntropyMonitor.every_n_steps": 1,
    "model.model_kwargs.depth": 1,
    "model.model_kwargs.embed_dim": 16,
}


def made(variant: str, *, seed: int, loss: list[float | None], lowest: list[float | None]) -> dict[str, Any]:
    steps = [5 * i + 4 for i in range(len(loss))]
    values = {LOSS: loss, LOWEST_HEAD: lowest, MEAN: [0.5] * len(loss), COLLAPSED: [*[0.0] * (len(loss) - 1), 0.25]}
    record: dict[str, Any] = {
        "variant": variant,
        "fold": None,
        "seed": seed,
        "steps": {name: {"step": steps, "value": value} for name, value in values.items()},
        "curves": {"train/loss": [2.0, loss[-1]], "val/accuracy": [0.1, 0.5 + 0.1 * seed]},
        "bags": {"train": 8, "test": 2},
        "best_epoch": None,
        "seconds": 1.0,
    }
    record["metrics"] = {"accuracy": 0.5, **summarize(record)}
    return record


def known() -> Comparison:
    runs = [
        made("plain", seed=0, loss=[2.0, 1.0, 4.0], lowest=[0.9, 0.05, 0.2]),
        made("plain", seed=1, loss=[4.0, None], lowest=[0.7, None]),
        made("qk", seed=0, loss=[1.0, 0.5, 0.2], lowest=[0.8, 0.6, 0.7]),
        made("qk", seed=1, loss=[3.0, 0.5, 0.4], lowest=[0.6, 0.6, 0.3]),
    ]
    return Comparison("vit-stability", runs, ["plain", "qk"])


def test_runs_are_summarized() -> None:
    plain, diverged, qk, _ = (run["metrics"] for run in known().runs)
    assert qk == {
        "accuracy": 0.5,
        "train_loss": 0.2,
        "lowest_entropy": 0.6,
        "final_entropy": 0.5,
        "collapsed": 0.25,
        "overloaded": None,
        "diverged": 0.0,
    }
    assert (plain["train_loss"], plain["lowest_entropy"], plain["diverged"]) == (4.0, 0.05, 0.0)
    assert (diverged["train_loss"], diverged["lowest_entropy"], diverged["diverged"]) == (None, 0.7, 1.0)
    assert summarize({"steps": {}, "curves": {"train/loss": [1.0]}})["lowest_entropy"] is None
    assert "diverged" in str(known())


def test_what_is_drawn_is_the_mean_over_runs() -> None:
    comparison = known()
    found = numbers(comparison)
    json.dumps(found, allow_nan=False)
    plain = found["plain"][LOSS]
    assert plain["at"] == [4, 9, 14]
    assert plain["mean"] == [3.0, 1.0, 4.0]  # where the other run had no loss, that of one
    assert plain["std"] == pytest.approx([np.std([2, 4], ddof=1), 0, 0])
    assert found["qk"]["val/accuracy"]["at"] == [1, 2]
    assert found["qk"]["val/accuracy"]["mean"] == pytest.approx([0.1, 0.55])
    axes = draw(comparison).axes
    assert axes[0].get_title() == "training cross-entropy"
    for axis in axes:
        assert [line.get_label() for line in axis.lines if not str(line.get_label()).startswith("_")] == ["plain", "qk"]
    np.testing.assert_allclose(axes[1].lines[0].get_ydata(), [0.8, 0.05, 0.2])


def test_steps_that_are_kept() -> None:
    record = StepRecord(["train/loss*", "attention_entropy/*"])
    record.log_metrics({"train/loss_step": 1.0, "val/loss": 2.0, "attention_entropy/mean": 0.5}, step=4)
    record.log_metrics({"train/loss_step": float("nan")}, step=9)
    assert record.values == {
        "train/loss_step": {"step": [4, 9], "value": [1.0, None]},
        "attention_entropy/mean": {"step": [4], "value": [0.5]},
    }


def test_the_four_are_compared(tmp_path: Path) -> None:
    options: dict[str, Any] = {"vary": {"method": METHODS}, "seeds": 1, "overrides": TINY, "show": False}
    found = compare("vit-stability", output=tmp_path, **options)
    assert found.variants == METHODS
    for method in METHODS:
        record = read_record(tmp_path / "runs" / f"{method}-seed0.json")
        assert record is not None
        assert (record["select"], record["best_epoch"]) == ("last", None)
        assert record["bags"] == {"train": 1169, "val": 269, "test": 359}
        for name in (LOSS, LOWEST_HEAD, MEAN):
            assert record["steps"][name]["step"] == list(range(6)), (method, name)
        for name in ("accuracy", "train_loss", "lowest_entropy", "final_entropy", "diverged"):
            assert record["metrics"][name] is not None, (method, name)
        assert 0 < record["metrics"]["lowest_entropy"] <= record["steps"][MEAN]["value"][0] <= 1
    start = {method: found.runs[i]["steps"][LOSS]["value"][0] for i, method in enumerate(METHODS)}
    # Equal initial weights and data: what only acts on the gradient or keeps the weights starts with the same loss.
    assert start["entropy_floor"] == start["plain"]
    assert start["sigma_reparam"] == pytest.approx(start["plain"], abs=1e-5)
    assert start["qk_norm"] != start["plain"]
    assert (tmp_path / "vit_stability.png").stat().st_size > 10_000
    assert list(json.loads((tmp_path / "vit_stability.json").read_text())) == METHODS


def test_a_run_that_diverges_is_a_result(tmp_path: Path) -> None:
    options: dict[str, Any] = {"vary": {"method": ["plain"]}, "seeds": 1, "show": False, "output": tmp_path}
    found = compare("vit-stability", overrides={**TINY, "model.lr": 1e30}, **options)
    metrics = found.runs[0]["metrics"]
    assert (metrics["diverged"], metrics["accuracy"], metrics["train_loss"], metrics["loss"]) == (1.0, 0.0, None, None)
    steps = found.runs[0]["steps"][LOSS]
    assert steps["value"][-1] is None
    assert len(steps["step"]) < 6  # it stopped there
    assert (tmp_path / "vit_stability.png").stat().st_size > 5_000


def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    small = [f"--{key.replace('callbacks', 'trainer.callbacks')}={value}" for key, value in TINY.items()]
    arguments = ["compare", "--recipe", "vit-stability", "--vary", "method=plain,warmup", "--seeds", "1"]
    assert main([*arguments, "--output", "out", *small]) == 0
    assert "curves.png, vit_stability.png, vit_stability.json, runs/" in capsys.readouterr().out
    assert Path("out/vit_stability.png").is_file()


@pytest.mark.filterwarnings("ignore:.*The dirpath has changed.*")
def test_fit_test_and_predict(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model.model_kwargs={patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}", "--model.qk_norm=true"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false"]
    few = ["--trainer.default_root_dir=run", "--trainer.limit_train_batches=5", "--trainer.max_epochs=1"]
    assert main(["fit", "--recipe", "vit-stability", *small, *quiet, *few]) == 0
    assert main(["test", "--recipe", "vit_stability", "--ckpt_path", "best", *small, *quiet, *few[:1]]) == 0
    assert "test/accuracy" in capsys.readouterr().out
    assert main(["predict", "--recipe", "vit-stability", "--ckpt_path", "last", *small, *quiet, *few[:1]]) == 0
    lines = Path("predictions.csv").read_text().splitlines()
    assert len(lines) == 1798
    assert lines[0].startswith("name,prediction,probability_0")


def test_the_recipe_is_found_with_dash_and_underscore() -> None:
    assert find_recipe("vit_stability") == find_recipe("vit-stability")
    assert find_recipe("vit-stability").path.is_file()
    assert find_recipe("mil").report_files == []


@pytest.mark.slow
def test_attention_collapses_without_help_and_not_with_qk_norm(tmp_path: Path) -> None:
    options: dict[str, Any] = {"seeds": 1, "overrides": {"trainer.max_epochs": 8}, "show": False}
    found = compare("vit-stability", vary={"method": ["plain", "qk_norm"]}, output=tmp_path, **options)
    plain, normed = (run["metrics"] for run in found.runs)
    assert plain["lowest_entropy"] < 0.1 < normed["lowest_entropy"]
    assert plain["train_loss"] > 1.2 * normed["train_loss"]
