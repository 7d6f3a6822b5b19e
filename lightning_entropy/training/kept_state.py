"""What a look at a model beside its training puts back: states of metrics, generators of loaders, logging."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_entropy.training.lightning import LightningModule

_COUNTERS = ("_update_count", "_computed", "_forward_cache", "_is_synced", "_cache")


@contextmanager
def metrics_kept(module: nn.Module) -> Iterator[None]:
    """States of torchmetrics, which live in attributes and change in place, are afterwards as before."""
    metrics = [m for m in module.modules() if isinstance(m, Metric)]
    states = [
        {name: _copied(value) for name, value in vars(m).items() if name in m._defaults or name in _COUNTERS}
        for m in metrics
    ]
    try:
        yield
    finally:
        for m, state in zip(metrics, states):
            vars(m).update(state)


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return list(value)
    return value.detach().clone() if isinstance(value, Tensor) else value


@contextmanager
def generators_kept(*loaders: Any) -> Iterator[None]:
    """Generators that loaders and their samplers draw from get their states back: training may draw from them too."""
    found: dict[int, torch.Generator] = {}
    for loader in loaders:
        batch_sampler = getattr(loader, "batch_sampler", None)
        holders = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
        generators = (getattr(holder, "generator", None) for holder in holders)
        found.update({id(g): g for g in generators if isinstance(g, torch.Generator)})
    states = [(generator, generator.get_state()) for generator in found.values()]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


@contextmanager
def silent(module: nn.Module) -> Iterator[None]:
    """A LightningModule's ``log`` and ``log_dict`` do nothing: outside a step they are an error."""
    if not isinstance(module, LightningModule):
        yield
        return
    own = vars(module)
    names: tuple[str, ...] = ("log", "log_dict")
    before = {name: own[name] for name in names if name in own}
    try:
        for name in names:
            own[name] = lambda *args, **kwargs: None
        yield
    finally:
        for name in names:
            own.pop(name, None)
        own.update(before)


__all__ = ["generators_kept", "metrics_kept", "silent"]
