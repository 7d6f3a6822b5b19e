from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_entropy.training.forgetting_figure import plot_forgetting, plot_tradeoff
from lightning_entropy.training.forgetting_history import ForgettingHistory, choose_new_task, old_at


def run(*points: tuple[float, float | None], before: float | None = 0.5) -> list:
    """A run of (old loss, new score)."""
    history = ForgettingHistory()
    if before is not None:
        history.add(step=0, epoch=0, when="before", old={"old": {"loss": before}})
    for i, (old, new) in enumerate(points):
        reading = history.add(step=10 * (i + 1), epoch=i, when="validation", old={"old": {"loss": old}})
        if new is not None:
            reading["new"]["val_acc"] = new
    return history.readings


def test_increase_is_counted_from_the_first_reading() -> None:
    readings = run((0.75, 0.6), (1.5, 0.8))
    assert [r["old"]["old"]["increase"] for r in readings] == [0.0, 0.25, 1.0]


def test_a_reading_of_the_same_step_is_replaced() -> None:
    history = ForgettingHistory()
    for when in ("step", "validation"):
        history.add(step=4, epoch=0, when=when, old={"a": {"loss": 1.0}})
    assert [r["when"] for r in history.readings] == ["validation"]


def test_long_runs_are_thinned_and_keep_their_ends() -> None:
    history = ForgettingHistory(most=10)
    for step in range(1000):
        history.add(step=step, epoch=0, when="step", old={"a": {"loss": float(step)}})
        assert len(history) <= 10
        assert history.readings[0]["step"] == 0
        assert history.last["step"] == step
        assert history.last["old"]["a"]["increase"] == step
    with pytest.raises(ValueError, match="at least 4"):
        ForgettingHistory(most=3)


def test_the_file_is_valid_json(tmp_path: Path) -> None:
    history = ForgettingHistory()
    history.add(step=0, epoch=0, when="before", old={"a": {"loss": math.nan, "perplexity": math.inf, "n": 1.0}})
    history.write(tmp_path / "f.json", metric="perplexity")
    stored = json.loads((tmp_path / "f.json").read_text())
    assert stored["metric"] == "perplexity"
    assert stored["readings"][0]["old"]["a"] == {"loss": None, "perplexity": None, "n": 1.0, "increase": None}


def test_a_state_shares_nothing() -> None:
    history = ForgettingHistory()
    history.add(step=0, epoch=0, when="before", old={"a": {"loss": 1.0}})
    state = history.state_dict()
    state[0]["old"]["a"]["loss"] = 5.0
    state[0]["new"]["x"] = 1.0
    assert history.readings[0]["old"]["a"]["loss"] == 1.0
    assert history.readings[0]["new"] == {}
    other = ForgettingHistory()
    other.load_state_dict(history.state_dict())
    assert other.readings == history.readings


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["train_loss", "val_loss", "val_acc"], "val_acc"),
        (["train_loss", "val_loss"], "val_loss"),
        (["train_loss", "train_f1"], "train_f1"),
        (["epoch", "step", "lr-AdamW"], None),
        ([], None),
    ],
)
def test_what_the_new_task_is_judged_by(names: list[str], chosen: str | None) -> None:
    assert choose_new_task(names) == chosen


def test_old_loss_at_equal_new_score() -> None:
    rising = run((1.0, 0.5), (2.0, 0.7), (3.0, 0.9))
    assert old_at(rising, new_task="val_acc", level=0.6) == pytest.approx(1.5)
    assert old_at(rising, new_task="val_acc", level=0.5) == 1.0
    assert old_at(rising, new_task="val_acc", level=0.9) == pytest.approx(3.0)
    assert old_at(rising, new_task="val_acc", level=0.95) is None
    assert old_at(rising, new_task="val_acc", level=0.6, quantity="increase") == pytest.approx(1.0)
    assert old_at(rising, new_task="other", level=0.6) is None
    falling = run((1.0, 2.0), (3.0, 1.0))
    assert old_at(falling, new_task="val_acc", level=1.25) == pytest.approx(2.5)
    wavering = run((1.0, 0.5), (2.0, 0.7), (3.0, 0.4), (4.0, 0.8))
    assert old_at(wavering, new_task="val_acc", level=0.6) == pytest.approx(1.5), "the first time"


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 1)), min_size=2, max_size=8), st.floats(0, 1))
def test_what_is_found_lies_between_readings(points: list[tuple[float, float]], level: float) -> None:
    found = old_at(run(*points), new_task="val_acc", level=level)
    scores = [score for _, score in points]
    if found is None:
        assert not any(min(a, b) <= level <= max(a, b) and a != b for a, b in itertools.pairwise(scores))
    else:
        losses = [loss for loss, _ in points]
        assert min(losses) - 1e-9 <= found <= max(losses) + 1e-9


def test_figure_of_methods() -> None:
    runs = {"full": [run((1.0, 0.5), (2.0, 0.8)), run((1.1, 0.5), (2.2, 0.8))], "lora": run((0.6, 0.4), (0.7, None))}
    figure = plot_tradeoff(runs, new_task="val_acc")
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["full", "lora"]
    curves = [line for line in axes.lines if line.get_marker() == "."]
    assert [line.get_xdata().tolist() for line in curves] == [[1.0, 2.0], [1.1, 2.2], [0.6]]
    assert [line.get_ydata().tolist() for line in curves] == [[0.5, 0.8], [0.5, 0.8], [0.4]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("old task: loss", "new task: val_acc")
    with pytest.raises(
        ValueError, match="no reading has both 'loss' of the old task and 'f1' of the new one; logged were val_acc"
    ):
        plot_tradeoff(runs, new_task="f1")


def test_figure_of_one_run_without_a_score_of_the_new_task() -> None:
    (axes,) = plot_forgetting(run((1.0, None)), new_task=None).axes
    assert axes.get_ylabel() == "old task: loss"
    (axes,) = plot_forgetting(run((1.0, None)), new_task="val_acc", quantity="accuracy").axes
    assert axes.lines[0].get_ydata().tolist() == [0.5, 1.0], "what it has, where it has not what was asked for"
