"""What a call of an activation computes, as a function of its input alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_entropy.surgery.activation_families import out_of_place
from lightning_entropy.surgery.call_sites import CallSite, inner_function


def setting_values(site: CallSite, module: nn.Module) -> tuple[list[Any], dict[str, Any]]:
    """The further arguments of a call, as they are now on an instance.

    Raises:
        NameError: or what else comes of evaluating an expression over local variables of the method.
    """
    function = inner_function(getattr(type(module), site.position.method))
    assert function is not None
    scope: dict[str, Any] = {**function.__globals__, function.__code__.co_varnames[0]: module}
    values = [(k, eval(text, scope)) for k, text in site.settings]
    return [v for k, v in values if k is None], {k: v for k, v in values if k is not None}


def original_function(site: CallSite, module: nn.Module) -> Callable[..., Any]:
    """What a call computes, as a function of its input alone, without overwriting it."""
    if site.form == "method":
        return getattr(torch, site.label[2:-2].rstrip("_"))
    args, kwargs = setting_values(site, module)
    if any(isinstance(value, torch.Tensor) for value in [*args, *kwargs.values()]):
        raise ValueError("it has a tensor among its settings")
    function = out_of_place(site.function)
    if not args and not kwargs:
        return function
    if args and site.family in ("relu", "relu6", "silu", "mish", "hardswish", "selu", "hardsigmoid"):
        raise ValueError("its settings cannot be read")
    return functools.partial(_call_with, function, tuple(args), kwargs)


def _call_with(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], x: Any) -> Any:
    return function(x, *args, **kwargs)


__all__ = ["original_function", "setting_values"]
