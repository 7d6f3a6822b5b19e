"""The weights of a model that are matrices of linear maps, wherever a module keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from lightning_entropy.observe.selection import match_modules

# Modules with these names hold q, k and v in three equal parts, one after the other. Others interleave them by head.
FUSED_QKV = {"qkv", "to_qkv", "Wqkv", "c_attn", "in_proj"}
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads", "n_kv_heads")


@dataclass(frozen=True)
class MatrixWeight:
    """A weight: the module that holds it, the attribute, and in how many equal parts its outputs fall (q, k, v)."""

    name: str
    module: nn.Module
    tensor: str
    parts: int = 1

    @property
    def key(self) -> str:
        """The name of the parameter in the model."""
        return f"{self.name}.{self.tensor}" if self.name else self.tensor


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``: a linear layer whose weight is stored as (inputs, outputs)."""
    return any(
        base.__name__ == "Conv1D" and base.__module__.startswith("transformers.") for base in type(module).__mro__
    )


def matrix_weights(model: nn.Module, *, patterns: list[str] | None, split_qkv: bool, owner: str) -> list[MatrixWeight]:
    """Weights of linear layers, convolutions and ``nn.MultiheadAttention`` in the order of the modules.

    Args:
        model: any module.
        patterns: shell patterns over dotted names of modules, or of modules that contain them; None takes all.
        split_qkv: tell fused projections of q, k and v as three parts.
        owner: who asks, for messages.

    Returns:
        At least one weight.

    Raises:
        ValueError: if a pattern matches no module or no such weight, or the model has none.
    """
    found = [weight for name, module in model.named_modules() for weight in weights_of(model, name, module, split_qkv)]
    if not found:
        kinds = sorted(
            {type(m).__name__ for m in model.modules() if next(m.parameters(recurse=False), None) is not None}
        )
        raise ValueError(
            f"{owner} found no linear layer, convolution or nn.MultiheadAttention in {type(model).__name__}. "
            f"Modules with parameters of their own: {', '.join(kinds) or 'none'}."
        )
    if patterns is None:
        return found
    chosen: set[str] = set()
    for pattern, names in match_modules(model, patterns, owner).items():
        inside = {w.name for w in found if any(w.name == n or not n or w.name.startswith(n + ".") for n in names)}
        if not inside:
            raise ValueError(
                f"{owner}(modules={pattern!r}) matched {len(names)} modules in {type(model).__name__}, and none of "
                "them holds the weight of a linear layer, a convolution or nn.MultiheadAttention. Modules that do: "
                f"{', '.join(dict.fromkeys(w.name for w in found[:20]))}."
            )
        chosen |= inside
    return [weight for weight in found if weight.name in chosen]


def weights_of(model: nn.Module, name: str, module: nn.Module, split_qkv: bool) -> Iterator[MatrixWeight]:
    """The matrices that one module keeps: a linear layer, a convolution, the input projections of attention.

    Args:
        model: that contains it.
        name: dotted name of the module.
        module: any module; most have none.
        split_qkv: tell fused projections of q, k and v as three parts.

    Yields:
        One weight a tensor.
    """
    if isinstance(module, nn.MultiheadAttention):
        tensors = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
    elif isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or is_conv1d(module):
        tensors = ["weight"]
    else:
        return
    for tensor in tensors:
        if isinstance(getattr(module, tensor, None), Tensor):
            fused = tensor == "in_proj_weight" or (tensor == "weight" and _is_fused_qkv(model, name, module))
            yield MatrixWeight(name, module, tensor, 3 if split_qkv and fused else 1)


def _is_fused_qkv(model: nn.Module, name: str, module: nn.Module) -> bool:
    holder, _, own = name.rpartition(".")
    if own not in FUSED_QKV or isinstance(module, nn.modules.conv._ConvNd):
        return False
    weight = module.weight
    assert isinstance(weight, Tensor)
    outputs = getattr(module, "out_features", None)  # the tensor itself may be packed
    if outputs is None:
        outputs = weight.shape[1] if is_conv1d(module) else weight.shape[0]
    if outputs % 3:
        return False
    attention = model.get_submodule(holder)
    for source in (attention, getattr(attention, "config", None)):
        if any(isinstance(getattr(source, attribute, None), int) for attribute in _KEY_HEADS):
            return False  # grouped queries: the parts are unequal
    return True


def why_no_matrix(weight: MatrixWeight, shared: dict[int, list[str]]) -> str | None:
    """Why a weight cannot be treated as a plain matrix of numbers; None where it can.

    Args:
        weight: one of :func:`matrix_weights`.
        shared: names of the model's parameters by ``id``, from :func:`parameter_names`.
    """
    module = weight.module
    if is_parametrized(module, weight.tensor):
        kinds = [type(p).__name__ for p in module.parametrizations[weight.tensor]]  # type: ignore[index, union-attr]
        return f"{weight.tensor} is parametrised already, by {', '.join(kinds)}"
    value = module._parameters.get(weight.tensor)
    if value is None:
        return f"{weight.tensor} is no parameter of the module (an older weight_norm or spectral_norm computes it)"
    if isinstance(value, UninitializedParameter):
        return f"{weight.tensor} has no shape yet: run a batch through the model first"
    if type(value.data) is not Tensor:
        return f"{weight.tensor} is a {type(value.data).__name__}, which is sharded or quantized"
    if value.is_meta:
        return f"{weight.tensor} is on the meta device"
    if type(value) is not nn.Parameter or not value.is_floating_point():
        return f"{weight.tensor} is a {type(value).__name__} of {value.dtype}, not a matrix of floating-point numbers"
    others = [name for name in shared.get(id(value), []) if name != weight.key]
    if others:
        return f"{weight.tensor} is tied to {', '.join(others)}"
    if getattr(module, "groups", 1) != 1:
        return f"{weight.tensor} belongs to a convolution in {module.groups} groups, which is several matrices"
    finite = torch.isfinite(value.detach())
    if not bool(finite.all()):
        return f"{weight.tensor} has {int((~finite).sum())} values that are not finite"
    return None


def parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """Every name under which a parameter appears in a model, by ``id`` of the parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


__all__ = [
    "FUSED_QKV",
    "MatrixWeight",
    "is_conv1d",
    "matrix_weights",
    "parameter_names",
    "weights_of",
    "why_no_matrix",
]
