from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_entropy.surgery.peft_selection import peft_selection

helpers: Any = pytest.importorskip("peft.helpers")


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 12, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 6))


class Net(nn.Module):
    """Layers of many shapes, as peft's selector sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6 * (i % 3 + 1)) for i in range(9)])
        self.mha = nn.MultiheadAttention(6, 2)
        self.conv = nn.Conv1d(6, 6, 3)
        self.experts = nn.ModuleList([Experts() for _ in range(3)])


def theirs(model: nn.Module, **named: Any) -> dict[str, Any]:
    found: dict[str, Any] = helpers.find_kappa_target_modules(model, show_progress=False, **named)
    return found


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 1.0])
def test_the_choice_is_that_of_peft(fraction: float) -> None:
    torch.manual_seed(0)
    model = Net()
    found, selection = theirs(model, top_p=fraction), peft_selection(model, budget=fraction)
    stacks = [name for name in selection.names if ".experts." in f".{name}"]
    assert [row.module for row in selection.chosen if row.name not in stacks] == found["target_modules"]
    assert stacks == found["target_parameters"]


def test_the_scores_are_those_of_peft() -> None:
    torch.manual_seed(0)
    model = Net()
    selector = helpers.KappaTuneSelector(model, show_progress=False)
    selector._compute_kappas()
    known = {f"{name}.weight": value for name, value in selector._condition_numbers.items()}
    known |= selector._parameter_condition_numbers
    scores = {row.name: row.score for row in peft_selection(model).rows}
    assert scores == pytest.approx(known, rel=1e-3)  # theirs is of float32 and adds 1e-8 to the smallest value


def test_a_count_and_a_threshold_are_those_of_peft() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(8)))
    selector = helpers.KappaTuneSelector(model, show_progress=False)
    assert peft_selection(model, budget=3).modules == selector.get_best_targets(num_modules=3)
    threshold = sorted(row.score for row in peft_selection(model).rows)[3] * 1.001
    assert peft_selection(model, budget={"threshold": threshold}).modules == selector.get_best_targets(
        threshold=threshold
    )


def test_a_zero_weight_is_first_with_peft_and_never_chosen_here() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    nn.init.zeros_(model[3].weight)
    assert theirs(model, top_p=0.2)["target_modules"] == ["3"]
    selection = peft_selection(model, budget=1.0)
    assert "3" not in selection.modules
    assert [refusal.module for refusal in selection.skipped] == ["3.weight"]


def test_the_scale_of_a_weight_changes_the_choice_of_peft_only() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    before = peft_selection(model).modules
    worst = peft_selection(model).rows[-1].module
    with torch.no_grad():
        model.get_submodule(worst).weight.mul_(1e-9)
    assert peft_selection(model).modules == before != [worst]
    assert theirs(model, top_p=0.2)["target_modules"] == [worst]


def test_adapters_are_never_candidates() -> None:
    peft: Any = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    before = peft_selection(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["1", "2"], r=2))
    assert any("lora_" in name for name in theirs(adapted, top_p=1.0)["target_modules"])
    after = peft_selection(adapted)
    assert after.names == before.names
    assert after.fingerprint == before.fingerprint


def test_what_peft_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="no budget of parameters"):
        peft_selection(nn.Linear(2, 2), budget={"parameters": 0.5})
    with pytest.raises(ValueError, match=r"found no nn\.Linear and no stack of experts"):
        peft_selection(nn.Conv2d(2, 2, 3))
