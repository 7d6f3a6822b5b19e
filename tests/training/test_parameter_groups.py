from __future__ import annotations

import torch
from torch import nn

from lightning_entropy.training.parameter_groups import own_groups
from lightning_entropy.training.weight_decay import without_weight_decay


def tenfold(options: dict) -> dict:
    return {"lr": 10 * options["lr"]}


def test_a_group_is_split_and_every_other_option_kept() -> None:
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    with own_groups(lambda: [b], tenfold):
        optimizer = torch.optim.SGD([{"params": [a, b], "lr": 0.3}, {"params": [c]}], lr=0.1, momentum=0.9)
    assert [(g["lr"], g["momentum"], len(g["params"])) for g in optimizer.param_groups] == [
        (0.3, 0.9, 1),
        (3.0, 0.9, 1),
        (0.1, 0.9, 1),
    ]
    assert optimizer.param_groups[1]["params"][0] is b


def test_no_options_leave_a_group_and_two_splits_nest() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with own_groups(lambda: [b], lambda options: {}):
        assert len(torch.optim.SGD([a, b], lr=0.1).param_groups) == 1
    with without_weight_decay(lambda: [b]), own_groups(lambda: [b], tenfold):
        groups = torch.optim.AdamW([a, b], lr=0.1, weight_decay=0.2).param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.1, 0.2), (1.0, 0.0)]
