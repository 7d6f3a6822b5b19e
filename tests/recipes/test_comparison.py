from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_entropy.recipes import Comparison, compare, comparison, joint_table
from lightning_entropy.recipes.run_record import read_record

FEW = {"train_bags": 6, "val_bags": 4, "test_bags": 6, "bag_size": 12, "witness_rate": 0.3}
TINY: dict[str, Any] = {"trainer.max_epochs": 2, "data.options": FEW, "model.hidden": 4}


def run(output: Path, **options: Any) -> Comparison:
    defaults: dict[str, Any] = {
        "vary": {"aem": ["off", "constant"]},
        "seeds": 2,
        "overrides": TINY,
        "show": False,
        "output": output,
    }
    return compare("mil_digits", **{**defaults, **options})


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that were trained."""
    names: list[str] = []
    original = comparison.run_job

    def counted(job: Any) -> Path:
        names.append(job.path.stem)
        return original(job)

    monkeypatch.setattr(comparison, "run_job", counted)
    return names


def test_writes_everything_and_resumes(tmp_path: Path, trained: list[str]) -> None:
    first = run(tmp_path)
    assert sorted(trained) == ["constant-seed0", "constant-seed1", "off-seed0", "off-seed1"]
    for name in ("results.json", "results.csv", "intervals.png", "curves.png"):
        assert (tmp_path / name).stat().st_size > 100
    record = read_record(tmp_path / "runs" / "constant-seed1.json")
    assert record is not None
    assert record["bags"] == {"train": 6, "val": 4, "test": 6}
    assert {"torch", "python"} <= record["versions"].keys()
    assert len(record["curves"]["val/auc"]) == len(record["curves"]["aem/entropy"]) == 2
    assert record["best_epoch"] in (0, 1)
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [(row["variant"], row["seed"]) for row in rows[:2]] == [("off", "0"), ("constant", "0")]
    assert float(rows[1]["auc"]) == next(iter(first.values("constant", "auc").values()))

    trained.clear()
    before = (tmp_path / "runs" / "off-seed0.json").stat().st_mtime_ns
    (tmp_path / "runs" / "constant-seed1.json").unlink()
    (tmp_path / "runs" / "off-seed1.json").write_text('{"variant": "off", "metr')  # cut off
    again = run(tmp_path)
    assert sorted(trained) == ["constant-seed1", "off-seed1"]
    assert (tmp_path / "runs" / "off-seed0.json").stat().st_mtime_ns == before
    for variant in ("off", "constant"):
        for metric in first.metrics:
            assert again.values(variant, metric) == first.values(variant, metric)  # reproduced to the bit


def test_stops_and_continues(tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    counted = comparison.run_job

    def stops(job: Any) -> Path:
        if len(trained) == 2:
            raise KeyboardInterrupt
        return counted(job)

    monkeypatch.setattr(comparison, "run_job", stops)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert len(list((tmp_path / "runs").iterdir())) == 2
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setattr(comparison, "run_job", counted)
    run(tmp_path)
    assert len(trained) == len(set(trained)) == 4


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    run(tmp_path, seeds=1, vary={"aem": ["off"]})
    with pytest.raises(ValueError, match=r"off-seed0.json .*model.hidden: 4 there, 5 now"):
        run(tmp_path, seeds=1, vary={"aem": ["off"]}, overrides={**TINY, "model.hidden": 5})
    with pytest.raises(ValueError, match="select: 'best' there, 'last' now"):
        run(tmp_path, seeds=1, vary={"aem": ["off"]}, select="last")


def test_variants_share_data_and_initial_weights(tmp_path: Path) -> None:
    # A weight of 0 trains as without the callback: any difference of data or initial weights would show.
    found = run(tmp_path, seeds=1, vary={"weight": ["0"]})
    zero = run(tmp_path / "zero", seeds=1, vary={"callbacks.AttentionEntropyMaximization.weight": [0.0]})
    for metric in found.metrics:
        assert list(found.values("0", metric).values()) == list(zero.values("weight=0.0", metric).values())


def test_folds_workers_and_the_last_epoch(tmp_path: Path) -> None:
    vary = {"model.hidden": [3, 4]}
    found = run(tmp_path, vary=vary, folds=2, seeds=1, select="last", workers=2)
    assert [run["fold"] for run in found.runs] == [0, 0, 1, 1]
    assert {run["best_epoch"] for run in found.runs} == {None}
    alone = run(tmp_path / "alone", vary=vary, folds=2, seeds=1, select="last")
    for variant in found.variants:
        ours, theirs = found.values(variant, "loss"), alone.values(variant, "loss")
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-4)


def test_real_splits_overlap_and_draws_do_not(tmp_path: Path) -> None:
    drawn = run(tmp_path / "drawn", seeds=1, vary={"aem": ["off"]})
    assert drawn.independent
    assert drawn.test_per_train == 0
    options = {"trainer.max_epochs": 1, "model.hidden": 4}
    real = compare(
        "mil_ucsb", vary={"aem": ["off"]}, folds=5, seeds=1, overrides=options, show=False, output=tmp_path / "real"
    )
    assert not real.independent
    assert 0.2 < real.test_per_train < 0.4
    assert "Nadeau" in real.method
    assert sum(run["bags"]["test"] for run in real.runs) == 58


def _record(variant: str, seed: int, auc: float | None, loss: float) -> dict[str, Any]:
    return {
        "variant": variant,
        "fold": None,
        "seed": seed,
        "metrics": {"auc": auc, "loss": loss},
        "curves": {"train/loss": [1.0, None, loss]},
        "bags": {"train": 8, "test": 2},
        "best_epoch": None,
        "seconds": 1.0,
    }


def _known() -> Comparison:
    base, other = [0.5, 0.6, 0.7], [0.6, 0.9, 0.7]
    runs = [_record("off", i, auc, 1 - auc) for i, auc in enumerate(base)]
    runs += [_record("on", i, auc, 1 - auc) for i, auc in enumerate(other)]
    return Comparison(recipe="r", runs=runs, variants=["off", "on"], independent=True)


def test_summaries_by_hand() -> None:
    found = _known()
    on = found.summary("on", "auc")
    assert on is not None
    assert on.difference is not None
    d = np.array([0.1, 0.3, 0.0])
    half = 4.302653 * d.std(ddof=1) / math.sqrt(3)
    assert on.mean == pytest.approx(np.mean([0.6, 0.9, 0.7]))
    assert on.std == pytest.approx(np.std([0.6, 0.9, 0.7], ddof=1))
    assert on.difference.mean == pytest.approx(d.mean())
    assert (on.difference.low, on.difference.high) == pytest.approx((d.mean() - half, d.mean() + half), rel=1e-6)
    assert on.difference.wins == 2
    loss = found.summary("on", "loss")
    assert loss is not None
    assert loss.difference is not None
    assert loss.difference.wins == 2  # smaller is better
    off = found.summary("off", "auc")
    assert off is not None
    assert off.difference is None
    assert found.summary("on", "entropy") is None


def test_the_table_and_the_json_say_the_same() -> None:
    found = _known()
    text = str(found)
    assert "0.733±0.153" in text
    assert "+.133 2/3" in text
    data = json.loads(found.to_json())
    assert data["summary"]["on"]["auc"]["difference"] == pytest.approx(0.4 / 3)
    assert data["baseline"] == "off"
    overlapping = Comparison("r", found.runs, found.variants)
    assert overlapping.test_per_train == pytest.approx(0.25)
    assert joint_table({"one": found, "two": overlapping}).row_count == 6


def test_a_missing_value_drops_its_pair_only() -> None:
    found = _known()
    found.runs[0]["metrics"]["auc"] = None
    on = found.summary("on", "auc")
    assert on is not None
    assert on.runs == 3
    assert on.difference is not None
    assert on.difference.pairs == 2
    assert found.plot_curves().axes
    assert len(found.plot(["auc", "loss"]).axes) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds must be"),
        ({"seeds": [1, 1]}, "seeds must be"),
        ({"folds": 1}, "folds must be"),
        ({"select": "first"}, "select must be"),
        ({"workers": 0}, "workers must be"),
        ({"vary": {"model.lr": [1, "1"]}}, "given twice"),
        ({"vary": {"model.lr": ["a b", "a  b"]}}, "file names"),
        ({"overrides": {"model.nothing": 1}, "seeds": 1}, "nothing"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **options)
