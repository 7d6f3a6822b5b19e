"""Running a module with weights that take no gradient and buffers that keep their values, without copying it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_entropy.observe.interception import LiveHook

BATCH_NORM_MODES = ("batch", "eval")


def frozen_call(module: nn.Module, *args: Any, batch_norm: str = "batch") -> Any:
    """Call a module so that a gradient reaches its inputs and nothing of the module itself.

    The weights are detached and share their memory; buffers are cloned, so that running statistics and counters move
    in the clones. Hooks of this package's readers do not see the call, and others do.

    Args:
        module: any module; unchanged afterwards.
        args: its inputs.
        batch_norm: ``"batch"`` leaves batch normalisation in the mode in which it is, so that in training the inputs
            are normalised by their own statistics; ``"eval"`` uses the running ones.

    Returns:
        What the module returns.

    Raises:
        ValueError: if ``batch_norm`` is neither.

    Example:
        >>> layer, x = nn.BatchNorm1d(3), torch.randn(4, 3, requires_grad=True)
        >>> frozen_call(layer, x).square().sum().backward()
        >>> layer.weight.grad is None, int(layer.num_batches_tracked), x.grad is None
        (True, 0, False)
    """
    if batch_norm not in BATCH_NORM_MODES:
        raise ValueError(f"batch_norm must be 'batch' or 'eval', got {batch_norm!r}")
    tensors = {name: p.detach() for name, p in module.named_parameters()}
    tensors.update({name: b.clone() for name, b in module.named_buffers()})
    with _unobserved(module), _normalizing(module, batch_norm):
        return torch.func.functional_call(module, tensors, args)


@contextmanager
def _normalizing(module: nn.Module, batch_norm: str) -> Iterator[None]:
    switched = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training] if batch_norm == "eval" else []
    try:
        for norm in switched:
            norm.training = False
        yield
    finally:
        for norm in switched:
            norm.training = True


@contextmanager
def _unobserved(module: nn.Module) -> Iterator[None]:
    """Take the readers' hooks off, and no others: old weight norm computes its weight in one."""
    covered: list[tuple[dict[int, Any], dict[int, Any]]] = []
    try:
        for part in module.modules():
            for hooks in (part._forward_pre_hooks, part._forward_hooks):
                if any(isinstance(hook, LiveHook) for hook in hooks.values()):
                    covered.append((hooks, OrderedDict(hooks)))
                    for key in [k for k, hook in hooks.items() if isinstance(hook, LiveHook)]:
                        del hooks[key]
        yield
    finally:
        for hooks, before in covered:
            hooks.clear()
            hooks.update(before)


__all__ = ["BATCH_NORM_MODES", "frozen_call"]
