"""Keeping weight decay off parameters that a method adds, in optimizers that the user builds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def without_weight_decay(parameters: Callable[[], Iterable[nn.Parameter]]) -> Iterator[None]:
    """Optimizers that are built inside get these parameters in groups of their own, whose ``weight_decay`` is 0.

    A group that holds some of them and decays is split in two as it is added, the exempt ones second, with every other
    option alike; schedulers built afterwards see both. Groups that do not decay are added as they are.

    Args:
        parameters: gives the parameters, asked for when a group is added.

    Example:
        >>> weight, gamma = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
        >>> with without_weight_decay(lambda: [gamma]):
        ...     optimizer = torch.optim.AdamW([weight, gamma], weight_decay=0.1)
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.1, 0.0]
    """
    plain = torch.optim.Optimizer.add_param_group

    def add_param_group(self: torch.optim.Optimizer, param_group: dict[str, Any]) -> None:
        for group in _split(self, param_group, {id(p) for p in parameters()}):
            plain(self, group)

    torch.optim.Optimizer.add_param_group = add_param_group  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.optim.Optimizer.add_param_group = plain  # type: ignore[method-assign]


def _split(optimizer: torch.optim.Optimizer, group: dict[str, Any], exempt: set[int]) -> list[dict[str, Any]]:
    decay = group.get("weight_decay", optimizer.defaults.get("weight_decay", 0)) if isinstance(group, dict) else 0
    if not decay or isinstance(group["params"], set):  # a set has no order: torch refuses it
        return [group]
    given = group["params"]
    members = [given] if isinstance(given, torch.Tensor) else list(given)
    # torch also takes pairs of name and parameter
    apart = [m for m in members if id(m[1] if isinstance(m, tuple) else m) in exempt]
    if not apart:
        return [{**group, "params": members}]
    rest = [m for m in members if not any(m is other for other in apart)]
    split = [{**group, "params": rest}] if rest else []
    return [*split, {**group, "params": apart, "weight_decay": 0.0}]


__all__ = ["without_weight_decay"]
