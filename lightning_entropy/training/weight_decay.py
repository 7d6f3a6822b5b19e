"""Keeping weight decay off parameters that a method adds, in optimizers that the user builds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from torch import nn

from lightning_entropy.training.parameter_groups import own_groups


def without_weight_decay(parameters: Callable[[], Iterable[nn.Parameter]]) -> AbstractContextManager[None]:
    """Optimizers that are built inside get these parameters in groups of their own, whose ``weight_decay`` is 0.

    A group that holds some of them and decays is split in two as it is added, the exempt ones second, with every other
    option alike; schedulers built afterwards see both. Groups that do not decay are added as they are.

    Args:
        parameters: gives the parameters, asked for when a group is added.

    Example:
        >>> import torch
        >>> weight, gamma = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
        >>> with without_weight_decay(lambda: [gamma]):
        ...     optimizer = torch.optim.AdamW([weight, gamma], weight_decay=0.1)
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.1, 0.0]
    """
    return own_groups(parameters, lambda options: {"weight_decay": 0.0} if options.get("weight_decay", 0) else {})


__all__ = ["without_weight_decay"]
