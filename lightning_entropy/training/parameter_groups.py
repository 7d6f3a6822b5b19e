"""Options of their own for some parameters, in optimizers that the user builds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Options = Callable[[dict[str, Any]], dict[str, Any]]


@contextmanager
def own_groups(parameters: Callable[[], Iterable[nn.Parameter]], options: Options) -> Iterator[None]:
    """Optimizers that are built inside get these parameters in groups of their own, with other options.

    A group that holds some of them is split in two as it is added, theirs second, with every other option alike;
    schedulers built afterwards see both.

    Args:
        parameters: gives the parameters, asked for when a group is added.
        options: given the options of the group, defaults included, returns those that differ; none: it is not split.

    Example:
        >>> weight, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
        >>> with own_groups(lambda: [other], lambda options: {"lr": 10 * options["lr"]}):
        ...     optimizer = torch.optim.SGD([weight, other], lr=0.1)
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.1, 1.0]
    """
    plain = torch.optim.Optimizer.add_param_group

    def add_param_group(self: torch.optim.Optimizer, param_group: dict[str, Any]) -> None:
        for group in _split(self, param_group, {id(p) for p in parameters()}, options):
            plain(self, group)

    torch.optim.Optimizer.add_param_group = add_param_group  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.optim.Optimizer.add_param_group = plain  # type: ignore[method-assign]


def _split(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], theirs: set[int], options: Options
) -> list[dict[str, Any]]:
    if not isinstance(group, dict) or isinstance(group["params"], set):  # a set has no order: torch refuses it
        return [group]
    other = options({**optimizer.defaults, **{k: v for k, v in group.items() if k != "params"}})
    if not other:
        return [group]
    given = group["params"]
    members = [given] if isinstance(given, torch.Tensor) else list(given)
    # torch also takes pairs of name and parameter
    apart = [m for m in members if id(m[1] if isinstance(m, tuple) else m) in theirs]
    if not apart:
        return [{**group, "params": members}]
    rest = [m for m in members if not any(m is one for one in apart)]
    split = [{**group, "params": rest}] if rest else []
    return [*split, {**group, "params": apart, **other}]


__all__ = ["own_groups"]
