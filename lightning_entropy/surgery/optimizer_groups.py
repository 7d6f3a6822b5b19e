"""Gives parameters that a surgery adds to an optimizer that exists already, without weight decay."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

import torch
from torch import nn


def optimizers_of(model: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimizers, alive anywhere in the process, that hold a parameter of the model."""
    mine = {id(p) for p in model.parameters()}
    found = _holding(mine)
    if found:  # an optimizer that nobody holds any more may wait for the collector
        found.clear()
        gc.collect()
        found = _holding(mine)
    return found


def _holding(mine: set[int]) -> list[torch.optim.Optimizer]:
    # type() and not isinstance: proxies of other libraries run code when they are asked for their class.
    alive = [o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer) and hasattr(o, "param_groups")]
    return [o for o in alive if any(id(p) in mine for group in o.param_groups for p in group["params"])]


def extend_optimizer(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
    """Have an optimizer train further parameters, without weight decay.

    They join a group that does not decay, or else get a group of their own with the options of the first.

    Args:
        optimizer: the optimizer.
        parameters: those that it holds already are left out.

    Returns:
        What takes them out again.

    Raises:
        RuntimeError: if a new group is needed and a learning rate scheduler counts the groups already.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    new = [p for p in parameters if id(p) not in held]
    if not new:
        return lambda: None
    group = next((g for g in optimizer.param_groups if not g.get("weight_decay", 0)), None)
    if group is None:
        if _is_scheduled(optimizer):
            raise RuntimeError(
                f"{type(optimizer).__name__} has no group without weight decay to take the new parameters, and a "
                "learning rate scheduler counts its groups already. Swap before the scheduler is made, or give the "
                "optimizer a group with weight_decay=0."
            )
        first = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "param_names")}
        optimizer.add_param_group({**first, "params": new, "weight_decay": 0.0})
        group = optimizer.param_groups[-1]
    else:
        if "param_names" in group:
            group["param_names"].extend(f"added.{i}" for i in range(len(new)))
        group["params"].extend(new)
    chosen = group

    def undo() -> None:
        gone = {id(p) for p in new}
        if "param_names" in chosen:
            kept = [n for n, p in zip(chosen["param_names"], chosen["params"], strict=True) if id(p) not in gone]
            chosen["param_names"][:] = kept
        chosen["params"][:] = [p for p in chosen["params"] if id(p) not in gone]
        for parameter in new:
            optimizer.state.pop(parameter, None)
        if not chosen["params"]:
            optimizer.param_groups[:] = [g for g in optimizer.param_groups if g is not chosen]

    return undo


def _is_scheduled(optimizer: torch.optim.Optimizer) -> bool:
    step = optimizer.step
    return hasattr(step, "_wrapped_by_lr_sched") or hasattr(step, "_with_counter")


__all__ = ["extend_optimizer", "optimizers_of"]
