from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_entropy.surgery.report import Refusal
from lightning_entropy.surgery.select_modules import select_modules
from lightning_entropy.surgery.selection import ScoredWeight, Selection


def rows() -> list[ScoredWeight]:
    return [
        ScoredWeight("a.0.weight", "a.0", 3.0, 1e-9, True, 3.0 * (1 - 1e-9), (4, 2), 8, True),
        ScoredWeight("a.1.weight", "a.1", 5.0, 1e-9, True, 5.0, (4, 2), 8, True),
        ScoredWeight("b.weight", "b", 40.0, 0.0, False, 40.0, (4, 4), 16, False),
        ScoredWeight("c.weight", "c", math.inf, 0.0, True, math.inf, (4, 4), 16, False),
    ]


def a_selection() -> Selection:
    skipped = [Refusal("c.weight", "all its numbers are zero")]
    return Selection("condition_number", rows(), "shape", {"tensors": 2}, False, skipped, "00ff", ["look twice"])


def test_a_selection_in_words() -> None:
    selection = a_selection()
    assert str(selection) == (
        "2 of 4 weights by lowest condition_number normalised by shape (a.*.weight), 16 of 48 parameters; 1 skipped"
    )
    assert selection.names == ["a.0.weight", "a.1.weight"]
    assert selection.modules == ["a.0", "a.1"]
    assert (len(selection), selection.parameters) == (2, 16)
    table = selection.table().splitlines()
    assert table[1].startswith("*  a.0.weight")
    assert ">= 40" in table[3]
    assert "inf" in table[4]
    assert table[-2:] == ["skipped c.weight: all its numbers are zero", "note: look twice"]


def test_json_holds_it_whole(tmp_path: Path) -> None:
    selection = a_selection()
    path = selection.save(tmp_path / "deep" / "selection.json")
    assert Selection.load(path) == selection
    assert Selection.from_record(json.loads(selection.to_json())) == selection
    assert math.isinf(Selection.load(path).rows[-1].score)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"by": 1, "rows": [{}]}', "\xff"])
def test_what_is_no_selection_says_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"x\.json.*Selection\.save writes"):
        Selection.load(tmp_path / "x.json")


def test_a_selection_knows_its_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    selection = select_modules(model, budget=1)
    assert selection.matches(model)
    assert not selection.matches(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)))
    assert not selection.matches(nn.Linear(3, 4))
    assert not a_selection().matches(model)


def test_other_weights_can_be_chosen_by_hand() -> None:
    assert a_selection().choose(["b.weight"]).names == ["b.weight"]
    with pytest.raises(ValueError, match=r"d\.weight is not among the 4 weights"):
        a_selection().choose(["d.weight"])


def test_apply_checks_before_it_operates() -> None:
    with pytest.raises(ValueError, match="mode must be one of full, lora, got 'half'"):
        a_selection().apply(nn.Linear(2, 2), mode="half")
    with pytest.raises(ValueError, match="nothing is chosen"):
        a_selection().choose([]).apply(nn.Linear(2, 2))


def test_apply_full_trains_what_was_chosen_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    selection = select_modules(model, budget=1)
    report = selection.apply(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(selection.names)
    report.undo()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_figure_draws_every_finite_score(tmp_path: Path) -> None:
    figure = a_selection().plot()
    figure.savefig(tmp_path / "selection.png")
    axis = figure.axes[0]
    assert sum(len(line.get_xdata()) for line in axis.lines) == 3
    assert axis.get_yscale() == "linear"
    assert "shape" in axis.get_ylabel()
