from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_entropy.cli import main
from lightning_entropy.recipes import Comparison, compare
from lightning_entropy.recipes.catalog import find_recipe
from lightning_entropy.recipes.forgetting import INCREASE, NEW, OLD, SCORE, across, draw, numbers, readings, summarize
from lightning_entropy.recipes.run_record import read_record
from lightning_entropy.recipes.variants import read_yaml, variants, with_seed
from tests.recipes.text_cases import tiny_bert, tiny_llama, write_lines, write_reviews

METHODS = ["full", "lora", "kappatune", "kappatune_lora", "shape", "deficit", "spectrum", "random", "highest"]


def made(variant: str, *, seed: int, new: list[float], old: list[float]) -> dict[str, Any]:
    """A run that was validated before training and three times in it."""
    kept = [
        {
            "step": 20 * i,
            "epoch": 0,
            "when": "validation" if i else "before",
            "old": {"old": {OLD: value, INCREASE: value - old[0], "recall_at_1": 0.5 / value}},
            "new": {NEW: new[i], SCORE: 1 - new[i]} if i else {},
        }
        for i, value in enumerate(old)
    ]
    record: dict[str, Any] = {
        "variant": variant,
        "fold": None,
        "seed": seed,
        "before": {NEW: new[0], SCORE: 1 - new[0]},
        "readings": kept,
        "curves": {"train/loss": [new[-1]]},
        "trained_parameters": 100,
        "bags": {"train": 8, "test": 2},
        "best_epoch": None,
        "seconds": 1.0,
    }
    record["metrics"] = {"accuracy": 0.7, **summarize(record)}
    return record


def known() -> list[dict[str, Any]]:
    return [
        made("full", seed=0, new=[0.7, 0.5, 0.4, 0.3], old=[1.0, 2.0, 3.0, 5.0]),
        made("full", seed=1, new=[0.7, 0.6, 0.5, 0.6], old=[1.0, 1.0, 2.0, 2.0]),
        made("kappa", seed=0, new=[0.8, 0.6, 0.45, 0.45], old=[1.0, 1.0, 1.5, 1.25]),
        made("kappa", seed=1, new=[0.7, 0.4, 0.3, 0.2], old=[1.0, 2.5, 2.0, 1.0]),
    ]


def test_runs_are_summarized() -> None:
    metrics = known()[0]["metrics"]
    assert metrics == {
        "accuracy": 0.7,
        "trained_parameters": 100,
        "old_loss_before": 1.0,
        "old_loss": 5.0,
        "forgetting": 4.0,
        "old_recall_at_1": 0.1,
    }
    assert [reading["new"].get(NEW) for reading in readings(known()[0])] == [0.7, 0.5, 0.4, 0.3]
    nothing = summarize({"curves": {}})
    assert set(nothing.values()) == {None}


def test_at_equal_loss_by_hand() -> None:
    """Seed 0: both reach 0.45 (full by half of its second stretch); seed 1: both reach 0.5."""
    found = across(known())
    assert [row["equal_loss"] for row in found] == [0.45, 0.5, 0.45, 0.5]
    assert [row["forgetting_at_equal_loss"] for row in found] == pytest.approx([1.5, 1.0, 0.5, 1.0])


def test_without_a_common_loss_there_is_no_number() -> None:
    runs = known()[:2]
    runs[0]["before"] = {}
    for reading in runs[0]["readings"]:
        reading["new"] = {NEW: None}
    assert across(runs)[0] == {"forgetting_at_equal_loss": None, "equal_loss": None}
    assert across(runs)[1]["equal_loss"] == 0.5


def test_what_is_drawn_is_the_mean_over_runs() -> None:
    runs = known()
    for run, more in zip(runs, across(runs)):
        run["metrics"] |= more
    comparison = Comparison("kappatune-text", runs, ["full", "kappa"])
    found = numbers(comparison)
    json.dumps(found, allow_nan=False)
    assert found["full"]["path"]["step"] == [0, 20, 40, 60]
    assert [cell["mean"] for cell in found["full"]["path"][INCREASE]] == [0.0, 0.5, 1.5, 2.5]
    assert found["full"]["path"][NEW][1] == {"mean": 0.55, "std": pytest.approx(np.std([0.5, 0.6], ddof=1)), "runs": 2}
    assert found["kappa"]["final"]["forgetting_at_equal_loss"]["mean"] == pytest.approx(0.75)
    path, end, equal = draw(comparison).axes
    assert [line.get_label() for line in path.lines] == ["full", "kappa"]
    np.testing.assert_allclose(path.lines[1].get_xdata(), [0.75, 0.5, 0.375, 0.325])
    assert path.xaxis_inverted()
    assert len(end.containers) == 2
    assert equal.get_title() == "at equal validation loss (0.475 on average)"
    assert "increase at equal loss" in str(comparison)


def test_a_seed_in_the_variants_is_that_of_the_run() -> None:
    value = {"a": [{"seed": "{seed}"}, "{seed}"], "b": "a {seed}"}
    assert with_seed(value, 3) == {"a": [{"seed": 3}, 3], "b": "a {seed}"}
    assert value["a"][1] == "{seed}"


def test_the_recipe_has_every_arm() -> None:
    recipe = find_recipe("kappatune_text")
    assert list(read_yaml(recipe.variants_path)["method"]) == METHODS
    named = variants(recipe, {"method": METHODS})
    assert named["random"]["callbacks.KappaTune"]["seed"] == "{seed}"


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """Settings that make the recipe small: a random BERT, sentences of a file."""
    return {
        "model.model": tiny_bert(tmp_path / "bert"),
        "data.texts": str(write_reviews(tmp_path / "reviews.csv")),
        "data.old_task": str(write_lines(tmp_path / "old.txt")),
        "data.old_pairs": 20,
        "data.old_words": 10,
        "trainer.val_check_interval": 2,
    }


def test_full_training_is_compared(tmp_path: Path, tiny: dict[str, Any]) -> None:
    found = compare("kappatune-text", vary={"method": ["full"]}, seeds=2, overrides=tiny, show=False, output=tmp_path)
    record = read_record(tmp_path / "runs" / "full-seed1.json")
    assert record is not None
    assert [(reading["step"], reading["when"]) for reading in record["readings"]] == [
        (0, "before"),
        (2, "validation"),
        (4, "validation"),
    ]
    assert set(record["before"]) >= {NEW, SCORE}
    assert record["before"][NEW] == pytest.approx(0.69, abs=0.1)
    assert record["metrics"]["forgetting"] == pytest.approx(record["readings"][-1]["old"]["old"][INCREASE])
    assert "equal_loss" not in record["metrics"]  # it depends on the other runs
    values = found.values("full", "equal_loss")
    assert values[None, 1] == min(record["before"][NEW], *(reading["new"][NEW] for reading in record["readings"][1:]))
    assert (tmp_path / "kappatune_text.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "kappatune_text.json").read_text())["full"]["runs"] == 2


def test_the_arms_train_what_they_say(tmp_path: Path, tiny: dict[str, Any]) -> None:
    found = compare("kappatune-text", vary={"method": METHODS}, seeds=1, overrides=tiny, show=False, output=tmp_path)
    trained = {name: next(iter(found.values(name, "trained_parameters").values())) for name in METHODS}
    head = 2 * 16 + 2
    linears = 2 * (4 * 16 * 16 + 2 * 16 * 64)
    assert trained["full"] > linears
    assert trained["lora"] == head + 2 * 4 * (4 * 32 + 2 * 80)
    for name in ("kappatune", "shape", "deficit", "spectrum", "random", "highest"):
        assert head < trained[name] <= head + 0.39 * linears, name
    starts = {name: run["before"][NEW] for name, run in zip(METHODS, found.runs)}
    assert len(set(starts.values())) == 1, starts  # equal weights and equal head to start from
    assert "trained" in str(found)


def test_on_the_command_line(tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    small = [f"--{key}={value}" for key, value in tiny.items()]
    arguments = ["compare", "--recipe", "kappatune-text", "--vary", "method=kappatune,full", "--seeds", "1"]
    assert main([*arguments, "--output", "out", *small]) == 0
    assert "curves.png, kappatune_text.png, kappatune_text.json, runs/" in capsys.readouterr().out
    assert Path("out/kappatune_text.png").is_file()


def test_a_decoder_is_compared_by_perplexity(tmp_path: Path) -> None:
    small: dict[str, Any] = {
        "model.model": tiny_llama(tmp_path / "llama"),
        "data.train": str(write_lines(tmp_path / "novel.txt")),
        "data.old_task": str(write_reviews(tmp_path / "reviews.csv")),
        "data.length": 16,
        "trainer.accelerator": "cpu",
        "trainer.val_check_interval": 4,
    }
    options: dict[str, Any] = {"vary": {"method": ["kappatune", "full"]}, "seeds": 1, "show": False}
    found = compare("kappatune-lm", overrides=small, output=tmp_path / "out", **options)
    kappatune, full = (run["metrics"] for run in found.runs)
    assert kappatune["perplexity"] == pytest.approx(np.exp(kappatune["loss"]), rel=1e-5)
    assert kappatune["old_perplexity"] == pytest.approx(np.exp(kappatune["old_loss"]), rel=1e-5)
    assert kappatune["trained_parameters"] < 0.25 * full["trained_parameters"]
    assert "forgetting_at_equal_loss" in found.metrics
    assert draw(found).axes[1].get_xlabel() == "new task: test perplexity"


@pytest.mark.filterwarnings("ignore:.*The dirpath has changed.*")
def test_fit_test_and_predict(tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    small = [f"--{key}={value}" for key, value in tiny.items()]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false"]
    root = ["--trainer.default_root_dir=run"]
    assert main(["fit", "--recipe", "kappatune-text", *small, *quiet, *root]) == 0
    assert main(["test", "--recipe", "kappatune_text", "--ckpt_path", "best", *small, *quiet, *root]) == 0
    assert "test/accuracy" in capsys.readouterr().out
    assert main(["predict", "--recipe", "kappatune-text", "--ckpt_path", "last", *small, *quiet, *root]) == 0
    lines = Path("predictions.csv").read_text().splitlines()
    assert len(lines) == 121
    assert lines[0] == "name,prediction,probability_bad,probability_good"
