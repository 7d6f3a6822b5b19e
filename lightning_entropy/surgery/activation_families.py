"""What counts as an activation, and under which name: modules, functions, tensor methods and the operations they run.

A *family* is one function with its variants: ``"gelu"`` is ``nn.GELU``, ``F.gelu``, its tanh and sigmoid
approximations and the classes that timm and transformers have for them. ``sigmoid``, ``hardsigmoid`` and ``tanh`` are
*gates*: they mostly scale another branch, so they are only taken when they are named.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

GATES = frozenset({"sigmoid", "hardsigmoid", "tanh", "glu", "logsigmoid"})

ALIASES = {"swish": "silu", "hard_swish": "hardswish", "hard_sigmoid": "hardsigmoid", "gelu_new": "gelu",
           "gelu_tanh": "gelu", "quick_gelu": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu",
           "leakyrelu": "leaky_relu", "squared_relu": "relu2", "relu_squared": "relu2"}  # fmt: skip

# Class names by the library that defines them; a user's subclass belongs to the family of its base.
_CLASSES: dict[str, dict[str, str]] = {
    "torch": {
        "ReLU": "relu", "ReLU6": "relu6", "Hardtanh": "hardtanh", "LeakyReLU": "leaky_relu", "PReLU": "prelu",
        "RReLU": "rrelu", "ELU": "elu", "CELU": "celu", "SELU": "selu", "GELU": "gelu", "SiLU": "silu",
        "Mish": "mish", "Hardswish": "hardswish", "Softplus": "softplus", "Softsign": "softsign",
        "Tanhshrink": "tanhshrink", "Hardshrink": "hardshrink", "Softshrink": "softshrink",
        "Threshold": "threshold", "Sigmoid": "sigmoid", "Hardsigmoid": "hardsigmoid", "Tanh": "tanh",
        "LogSigmoid": "logsigmoid", "GLU": "glu",
    },
    "timm": {
        "Swish": "silu", "SwishMe": "silu", "Mish": "mish", "MishMe": "mish", "Sigmoid": "sigmoid", "Tanh": "tanh",
        "HardSwish": "hardswish", "HardSwishMe": "hardswish", "HardSigmoid": "hardsigmoid",
        "HardSigmoidMe": "hardsigmoid", "HardMish": "hard_mish", "HardMishMe": "hard_mish", "GELU": "gelu",
        "GELUTanh": "gelu", "QuickGELU": "gelu", "SiLU": "silu", "Hardswish": "hardswish",
    },
    "transformers": {
        "GELUActivation": "gelu", "NewGELUActivation": "gelu", "FastGELUActivation": "gelu",
        "QuickGELUActivation": "gelu", "GELUTanh": "gelu", "PytorchGELUTanh": "gelu",
        "ClippedGELUActivation": "gelu", "AccurateGELUActivation": "gelu", "BloomGelu": "gelu",
        "SiLUActivation": "silu", "MishActivation": "mish", "ReLUSquaredActivation": "relu2",
        "XIELUActivation": "xielu", "LaplaceActivation": "laplace", "SqrtSoftplusActivation": "sqrtsoftplus",
    },
}  # fmt: skip

_FUNCTIONS: dict[str, str] = {
    "relu": "relu", "relu_": "relu", "relu6": "relu6", "hardtanh": "hardtanh", "hardtanh_": "hardtanh",
    "leaky_relu": "leaky_relu", "leaky_relu_": "leaky_relu", "prelu": "prelu", "rrelu": "rrelu", "rrelu_": "rrelu",
    "elu": "elu", "elu_": "elu", "celu": "celu", "celu_": "celu", "selu": "selu", "selu_": "selu", "gelu": "gelu",
    "silu": "silu", "mish": "mish", "hardswish": "hardswish", "softplus": "softplus", "softsign": "softsign",
    "tanhshrink": "tanhshrink", "hardshrink": "hardshrink", "softshrink": "softshrink", "threshold": "threshold",
    "threshold_": "threshold", "sigmoid": "sigmoid", "hardsigmoid": "hardsigmoid", "tanh": "tanh",
    "logsigmoid": "logsigmoid", "glu": "glu", "sigmoid_": "sigmoid", "tanh_": "tanh",
}  # fmt: skip
_TIMM_FUNCTIONS = {"swish": "silu", "swish_me": "silu", "mish": "mish", "mish_me": "mish", "sigmoid": "sigmoid",
                   "tanh": "tanh", "hard_swish": "hardswish", "hard_swish_me": "hardswish",
                   "hard_sigmoid": "hardsigmoid", "hard_sigmoid_me": "hardsigmoid", "hard_mish": "hard_mish",
                   "hard_mish_me": "hard_mish", "gelu": "gelu", "gelu_tanh": "gelu",
                   "quick_gelu": "gelu"}  # fmt: skip

# Methods of a tensor that take no argument.
METHODS = {
    "relu": "relu",
    "relu_": "relu",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
    "tanh": "tanh",
    "tanh_": "tanh",
}

# What the dispatcher runs for them.
OPERATIONS = {
    "relu": "relu", "hardtanh": "hardtanh", "leaky_relu": "leaky_relu", "_prelu_kernel": "prelu",
    "rrelu_with_noise": "rrelu", "elu": "elu", "celu": "celu", "gelu": "gelu", "silu": "silu", "mish": "mish",
    "hardswish": "hardswish", "softplus": "softplus", "hardshrink": "hardshrink", "softshrink": "softshrink",
    "threshold": "threshold", "sigmoid": "sigmoid", "hardsigmoid": "hardsigmoid", "tanh": "tanh",
    "log_sigmoid_forward": "logsigmoid", "glu": "glu", "relu6": "relu6", "selu": "selu",
    "_transformer_encoder_layer_fwd": "fused encoder layer",
}  # fmt: skip


def family_of_class(kind: type) -> str | None:
    """The family of a module class, from the first of its bases that a library defines as an activation."""
    for base in kind.__mro__:
        families = _CLASSES.get(base.__module__.split(".")[0])
        if families is not None and base.__name__ in families:
            return families[base.__name__]
    return None


def is_gate(family: str) -> bool:
    """Whether a family mostly scales another branch, so that it is only taken when it is named."""
    return family in GATES


@functools.cache
def _functions() -> dict[int, str]:
    # By identity, since some builtins do not compare. torch keeps them alive.
    found = {}
    for holder in (F, torch, torch._C._nn):
        for name, family in _FUNCTIONS.items():
            function = getattr(holder, name, None)
            if callable(function):
                found[id(function)] = family
    for name, family in _FUNCTIONS.items():
        method = getattr(torch.Tensor, name, None)
        if callable(method):
            found[id(method)] = family
    return found


def family_of_callable(function: Any) -> str | None:
    """The family of a plain function, a partial of one, or an activation module; None for anything else."""
    if isinstance(function, nn.Module):
        return family_of_class(type(function))
    while isinstance(function, functools.partial):
        function = function.func
    if not callable(function):
        return None
    family = _functions().get(id(function))
    if family is None and getattr(function, "__module__", None) in (
        "timm.layers.activations",
        "timm.layers.activations_me",
    ):
        family = _TIMM_FUNCTIONS.get(getattr(function, "__name__", ""))
    return family


def out_of_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function without its effect on the input, where torch has one: ``F.relu_`` is ``F.relu`` then."""
    name = getattr(function, "__name__", "")
    if isinstance(function, functools.partial) or not name.endswith("_"):
        return function
    for holder in (F, torch):
        if getattr(holder, name, None) is function and hasattr(holder, name[:-1]):
            return getattr(holder, name[:-1])
    return function


def known_families() -> list[str]:
    """Every family, sorted."""
    return sorted({family for families in _CLASSES.values() for family in families.values()})


__all__ = [
    "ALIASES",
    "GATES",
    "METHODS",
    "OPERATIONS",
    "family_of_callable",
    "family_of_class",
    "is_gate",
    "known_families",
    "out_of_place",
]
