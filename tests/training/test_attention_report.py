"""Reports, alarms, the bounded history with its CSV file, and the figure."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_entropy.observe import LayerEntropy
from lightning_entropy.training.attention_report import AttentionEntropyReport, HeadLimits, heads_of, mean_of_readings
from lightning_entropy.training.entropy_alarm import EntropyAlarm
from lightning_entropy.training.entropy_history import EntropyHistory, append_rows, continue_file, unused
from lightning_entropy.training.layer_head_figure import layer_head_figure


def head(normalized: float, sink: float = 0.2, rest: float = 0.9) -> list[float]:
    return [normalized * math.log(8), normalized, sink, rest]


def layer(*heads: list[float]) -> Tensor:
    return torch.tensor(heads).T


HEALTHY, COLLAPSED, SINK, UNIFORM = head(0.6), head(0.01, 0.4), head(0.02, 0.99, 0.7), head(0.99)
COLLAPSED_ONTO_ONE_KEY = head(0.01, 0.99, 0.02)
UNREAD = [math.nan] * 4


def test_sinks_have_not_collapsed_unless_their_rest_has() -> None:
    report = AttentionEntropyReport(
        {"a": layer(HEALTHY, COLLAPSED, SINK), "b": layer(COLLAPSED_ONTO_ONE_KEY, UNIFORM), "c": layer(UNREAD)}
    )
    assert report.collapsed == [("a", 1), ("b", 0)]
    assert report.sinks == [("a", 2)]
    assert report.overloaded == [("b", 1)]
    values = report.scalars()
    assert values["collapsed_fraction"] == pytest.approx(2 / 5)  # of the heads that were read
    assert values["sink_fraction"] == values["overloaded_fraction"] == pytest.approx(1 / 5)
    assert values["min"] == pytest.approx(0.01)
    assert values["mean"] == pytest.approx((0.6 + 0.01 + 0.02 + 0.01 + 0.99) / 5)
    assert values["a"] == pytest.approx(0.21)
    assert "a/head_1" not in values
    assert report.scalars(log_heads=True, normalize=False)["a/head_0"] == pytest.approx(0.6 * math.log(8))
    assert AttentionEntropyReport(report.heads, limits=HeadLimits(overload=None)).overloaded == []


def test_prints_as_a_table_and_as_json() -> None:
    report = AttentionEntropyReport({"blocks.0.attn": layer(*[UNIFORM] * 3), "b": layer(UNREAD, SINK)}, step=7)
    assert str(report).splitlines() == [
        "layer          heads   mean    min    max  sinks       collapsed   overloaded",
        "blocks.0.attn      3  0.990  0.990  0.990  -           -           all",
        "b                  2  0.020  0.020  0.020  1           -           -",
        "layers: 2, heads: 5, collapsed: 0, sinks: 1, overloaded: 3",
    ]
    found = json.loads(report.to_json())
    assert found["step"] == 7
    assert found["sinks"] == [["b", 1]]
    assert found["heads"][3] == {
        "step": 7, "layer": "b", "head": 0, "entropy": None, "normalized": None, "sink": None, "rest": None
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"collapse": 1.0}, r"collapse must be a normalised entropy in \[0, 1\), got 1.0"),
        ({"overload": 0.01}, r"overload must be a normalised entropy in \(0.05, 1\], got 0.01"),
        ({"sink": 0.0}, r"sink must be a share of the attention in \(0, 1\), got 0.0"),
    ],
)
def test_limits_are_checked(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadLimits(**arguments)


def entry(module: str, entropy: Tensor, sink: Tensor | None = None) -> LayerEntropy:
    n = entropy.shape[-1]
    return LayerEntropy(module, "softmax", entropy, torch.tensor([float(n)]), n, n, sink, sink)


def test_calls_of_one_module_are_averaged_and_unlike_ones_kept_apart() -> None:
    a, b = torch.full((1, 2, 4), 0.5), torch.full((1, 2, 4), 1.0)
    heads = heads_of([entry("m", a, torch.tensor([0.2, 0.4])), entry("m", b), entry("", torch.ones(1, 3, 4))], "Root")
    assert list(heads) == ["m", "Root"]
    torch.testing.assert_close(heads["m"][0], torch.tensor([0.75, 0.75]))
    torch.testing.assert_close(heads["m"][1], torch.tensor([0.75, 0.75]) / math.log(4))
    torch.testing.assert_close(heads["m"][2], torch.tensor([0.2, 0.4]))
    assert heads["Root"][2].isnan().all()
    assert list(heads_of([entry("m", a), entry("m", torch.ones(1, 3, 4))])) == ["m (2 heads)", "m (3 heads)"]
    assert heads_of([]) == {}


def test_mean_of_readings_leaves_out_what_one_lacks() -> None:
    found = mean_of_readings([{"a": layer(head(0.2))}, {"a": layer(head(0.4)), "b": layer(UNREAD)}, {}])
    assert found["a"][1].item() == pytest.approx(0.3)
    assert found["b"].isnan().all()


def feed(alarm: EntropyAlarm, *heads: list[float]) -> list[str]:
    return [m for i, h in enumerate(heads) for m in alarm.update(AttentionEntropyReport({"a": layer(HEALTHY, h)}, i))]


def test_alarm_of_collapse_needs_patience_and_is_raised_once() -> None:
    assert feed(EntropyAlarm(3), COLLAPSED, COLLAPSED, HEALTHY, COLLAPSED, COLLAPSED) == []
    assert feed(EntropyAlarm(3), *[SINK] * 100) == []
    (message,) = feed(EntropyAlarm(3), *[COLLAPSED] * 9)
    assert "collapsed in 1 of 2 heads (a: 1)" in message
    assert "3 readings in a row (up to step 2)" in message
    assert "SigmaReparam()" in message
    assert 'AttentionEntropyRegularizer(objective="floor")' in message


def test_alarm_of_overload_waits_longer_for_heads_of_a_new_model() -> None:
    assert feed(EntropyAlarm(3), *[UNIFORM] * 29) == []
    (message,) = feed(EntropyAlarm(3), *[UNIFORM] * 30)
    assert 'objective="ceiling"' in message
    (message,) = feed(EntropyAlarm(3), HEALTHY, *[UNIFORM] * 3)
    assert "stays uniform in 1 of 2 heads (a: 1)" in message


def test_alarm_goes_on_counting() -> None:
    first, second = EntropyAlarm(4), EntropyAlarm(4)
    feed(first, HEALTHY, COLLAPSED, COLLAPSED)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert feed(second, COLLAPSED) == []
    assert len(feed(second, COLLAPSED)) == 1
    assert feed(second, COLLAPSED) == []
    second.rearm()
    assert len(feed(second, COLLAPSED)) == 1


def test_history_is_bounded_and_survives_a_checkpoint(tmp_path: Path) -> None:
    history = EntropyHistory(most=10)
    for step in range(0, 5000, 50):
        heads = {"a": layer(head(step / 5000), HEALTHY)} | ({"b": layer(SINK)} if step > 2000 else {})
        history.add(step, heads)
    assert 5 <= len(history) <= 10
    assert history.readings[0][0] == 0
    assert history.last == 4950
    torch.save(history.state_dict(), tmp_path / "state.pt")
    again = EntropyHistory()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.rows() == history.rows()
    assert {row["layer"] for row in again.rows()} == {"a", "b"}
    history.add(4950, {"a": layer(SINK)})
    assert history.rows()[-1]["sink"] == pytest.approx(0.99)


def test_csv_is_continued_where_the_checkpoint_was(tmp_path: Path) -> None:
    history, path = EntropyHistory(), tmp_path / "run" / "entropy.csv"
    for step in (0, 2, 4, 6):
        append_rows(path, AttentionEntropyReport({'odd,"name"': layer(HEALTHY, UNREAD)}, step).rows())
        if step < 6:
            history.add(step, {'odd,"name"': layer(HEALTHY, UNREAD)})
    whole = path.read_text()
    path.write_text(whole + "8,odd")  # killed while it wrote
    continue_file(path, path, history)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["head"]) for row in rows] == [(s, h) for s in "024" for h in "01"]
    assert {row["layer"] for row in rows} == {'odd,"name"'}
    assert math.isnan(float(rows[1]["entropy"]))
    assert float(rows[0]["normalized"]) == pytest.approx(0.6)
    continued = path.read_text()
    assert whole.startswith(continued)
    # the file is gone, or the run goes on in another folder
    for earlier in (tmp_path / "gone.csv", None):
        continue_file(tmp_path / "other.csv", earlier, history)
        assert (tmp_path / "other.csv").read_text() == continued
    assert unused(path) == path.with_name("entropy-1.csv")


def test_figure_has_a_few_steps_and_curves() -> None:
    readings = {s: {f"blocks.{i}.attn": [0.1 * i, math.nan, s / 900] for i in range(5)} for s in range(0, 1000, 100)}
    readings[900]["blocks.9.attn"] = [0.5]
    figure = layer_head_figure(readings, label="entropy", marks={"sink": {900: {"blocks.9.attn": [True]}}})
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["step 0", "step 300", "step 600", "step 900"]
    assert len(figure.axes) == 6  # with the colour bar and the curves
    grid = figure.axes[3].images[0].get_array()
    assert grid.shape == (6, 3)
    assert grid[4, 0] == pytest.approx(0.4)
    assert grid[4, 2] == pytest.approx(1.0)
    assert grid.mask[5].tolist() == [False, True, True] if hasattr(grid, "mask") else True
    (points,) = figure.axes[3].collections
    assert points.get_offsets().tolist() == [[0.0, 5.0]]
    curve = figure.axes[-1].lines[4].get_ydata()
    assert curve[-1] == pytest.approx((0.4 + 1.0) / 2)
    single = layer_head_figure({5: {"a": [0.1]}}, label="entropy")
    assert len(single.axes) == 2
    with pytest.raises(ValueError, match="no readings to draw"):
        layer_head_figure({}, label="entropy")
