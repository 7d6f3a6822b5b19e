from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_entropy.training.weight_decay import without_weight_decay


def decays(groups: Any, exempt: list[nn.Parameter], **options: Any) -> list[tuple[int, float]]:
    with without_weight_decay(lambda: exempt):
        optimizer = torch.optim.AdamW(groups, **options)
    return [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups]


@pytest.fixture
def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)) for _ in range(4)]


def test_a_group_that_decays_is_split(parameters: list[nn.Parameter]) -> None:
    assert decays(parameters, parameters[2:], weight_decay=0.1) == [(2, 0.1), (2, 0.0)]
    assert decays(iter(parameters), parameters[:1], weight_decay=0.1) == [(3, 0.1), (1, 0.0)]
    assert decays([{"params": parameters[0]}, {"params": parameters[1:]}], parameters[:2], weight_decay=0.1) == [
        (1, 0.0),
        (2, 0.1),
        (1, 0.0),
    ]


def test_a_group_that_does_not_decay_is_left(parameters: list[nn.Parameter]) -> None:
    assert decays(parameters, parameters[2:], weight_decay=0.0) == [(4, 0.0)]
    assert decays([{"params": parameters, "weight_decay": 0}], parameters, weight_decay=0.1) == [(4, 0)]
    assert decays(parameters, [], weight_decay=0.1) == [(4, 0.1)]


def test_other_options_are_kept_and_names_too(parameters: list[nn.Parameter]) -> None:
    named = [(f"p{i}", p) for i, p in enumerate(parameters)]
    with without_weight_decay(lambda: parameters[1:2]):
        optimizer = torch.optim.SGD([{"params": named, "lr": 0.7}], lr=0.1, weight_decay=0.2, momentum=0.9)
    first, second = optimizer.param_groups
    assert [first["lr"], second["lr"]] == [0.7, 0.7]
    assert [first["momentum"], second["momentum"]] == [0.9, 0.9]
    assert second["params"][0] is parameters[1]
    assert second["param_names"] == ["p1"]


def test_torch_is_restored_and_its_errors_are_its_own(parameters: list[nn.Parameter]) -> None:
    plain = torch.optim.Optimizer.add_param_group
    with pytest.raises(TypeError, match="optimizer parameters need to be"), without_weight_decay(lambda: parameters):
        torch.optim.AdamW([{"params": set(parameters)}], weight_decay=0.1)
    assert torch.optim.Optimizer.add_param_group is plain
