"""Activations by name: torch's, timm's, transformers' and ours. A library is imported when one of its is made."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from lightning_entropy.activation.crrelu import CRReLU
from lightning_entropy.activation.polynomial import PolyNorm, PolyReLU
from lightning_entropy.extras import require


def star_relu() -> nn.Module:
    """StarReLU, :math:`s max(0, x)^2 + b` with learnable s and b (Yu et al., arXiv 2210.13452), from timm."""
    module: nn.Module = require("timm.models.metaformer", extra="vision").StarReLU()
    return module


def squared_relu() -> nn.Module:
    """Squared ReLU, :math:`max(0, x)^2` (So et al., arXiv 2109.08668), from timm."""
    module: nn.Module = require("timm.models.metaformer", extra="vision").SquaredReLU()
    return module


def quick_gelu() -> nn.Module:
    """:math:`x sigmoid(1.702 x)`, from timm."""
    module: nn.Module = require("timm.layers", extra="vision").QuickGELU()
    return module


def xielu() -> nn.Module:
    """The activation xIELU with learnable slopes (Huang, Schlag, arXiv 2411.13010), from transformers; in float32."""
    module: nn.Module = require("transformers.activations", extra="finetuning").XIELUActivation(dtype=torch.float32)
    return module


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "celu": nn.CELU,
    "crrelu": CRReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "hardswish": nn.Hardswish,
    "identity": nn.Identity,
    "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish,
    "poly_norm": PolyNorm,
    "poly_relu": PolyReLU,
    "prelu": nn.PReLU,
    "quick_gelu": quick_gelu,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "squared_relu": squared_relu,
    "star_relu": star_relu,
    "tanh": nn.Tanh,
    "xielu": xielu,
}
"""Name -> what makes a new module of it."""

_ALIASES = {"swish": "silu", "relu2": "squared_relu", "relu_squared": "squared_relu", "gelu_pytorch_tanh": "gelu_tanh"}


def find_activation(name: str) -> Callable[[], nn.Module]:
    """What makes the activation of a name; case, underscores and hyphens do not matter.

    Args:
        name: a key of :data:`ACTIVATIONS`, or the name of its class, such as ``"StarReLU"``.

    Raises:
        ValueError: if the name is not known; the message has the nearest names.

    Example:
        >>> find_activation("LeakyReLU")()
        LeakyReLU(negative_slope=0.01)
    """
    plain = _plain(name)
    known = {_plain(key): key for key in ACTIVATIONS} | {_plain(alias): key for alias, key in _ALIASES.items()}
    if plain in known:
        return ACTIVATIONS[known[plain]]
    close = [known[match] for match in difflib.get_close_matches(plain, known, n=3, cutoff=0.5)]
    hint = f"Closest: {', '.join(dict.fromkeys(close))}. " if close else ""
    raise ValueError(f"{name!r} is no activation that is known by name. {hint}Known: {', '.join(sorted(ACTIVATIONS))}.")


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
