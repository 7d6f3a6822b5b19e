"""Sums of a diagnosis over batches and processes, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lightning_entropy.observe.token_entropy import means_of


def entropies_of(sums: list[Tensor]) -> dict[str, float]:
    """Means over the attentions of a layer."""
    if not sums:
        return {}
    normalized, raw = zip(*(means_of(s) for s in sums))
    heads = torch.cat(normalized)
    known = heads[heads.isfinite()]
    return {
        "entropy": float(torch.stack([h.nanmean() for h in normalized]).nanmean()),
        "entropy_nats": float(torch.stack([h.nanmean() for h in raw]).nanmean()),
        "lowest_head": float(known.min()) if len(known) else math.nan,
    }


_ALONE: ContextVar[bool] = ContextVar("diagnosing_alone", default=False)


@contextmanager
def in_one_process() -> Iterator[None]:
    """Diagnoses inside are of this process alone, which the others do not take part in."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def distributed() -> bool:
    """Whether there are several processes that diagnose together."""
    d = torch.distributed
    return not _ALONE.get() and d.is_available() and d.is_initialized() and d.get_world_size() > 1


def merged(mine: dict[str, Any]) -> dict[str, Any]:
    """What all processes have seen: sums added, rows one after the other."""
    if not distributed():
        return mine
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    out = {key: sum(part[key] for part in parts) for key in ("counts", "unseen")}
    out["layers"] = next((part["layers"] for part in parts if part["layers"]), [])
    for key in ("flow", "entropy"):
        names = dict.fromkeys(name for part in parts for name in part[key])
        out[key] = {name: sum(part[key][name] for part in parts if name in part[key]) for name in names}
    for key in ("rows", "other"):
        names = dict.fromkeys(name for part in parts for name in part[key])
        out[key] = {name: torch.cat([part[key][name] for part in parts if name in part[key]]) for name in names}
    return out


def parameter_gradients(module: nn.Module, layers: Iterable[str], weight: float, samples: float) -> dict[str, float]:
    """Norm of the gradient of the mean loss over all data in the trainable parameters of each layer.

    Args:
        module: whose gradients are sums over this process's batches.
        layers: dotted names.
        weight: what those sums are to be multiplied by, to be sums over samples.
        samples: how many samples there were in all processes.
    """
    trained = {n: p for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    scale = weight / samples
    if distributed():
        scale = 1 / samples
        for p in dict.fromkeys(trained.values()):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad.mul_(weight)
            torch.distributed.all_reduce(p.grad)
    squares: dict[str, Tensor] = {}
    for name, p in trained.items():
        if p.grad is not None:
            grad = p.grad.coalesce().values() if p.grad.is_sparse else p.grad
            dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
            squares[name] = torch.linalg.vector_norm(grad, dtype=dtype).square()
    out = {}
    for layer in layers:
        own = [v for n, v in squares.items() if n.startswith(f"{layer}.")]
        out[layer] = float(torch.stack(own).sum().sqrt()) * scale if own else 0.0
    return out


__all__ = ["distributed", "entropies_of", "in_one_process", "merged", "parameter_gradients"]
