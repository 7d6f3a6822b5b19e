"""The numbers of a quantised weight, by the library that packed it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized


@dataclass(frozen=True)
class Numbers:
    """How the numbers of a weight are had.

    Args:
        shape: of them.
        dtype: of them.
        read: gives them.
        bits: for each, where it is quantised.
        precision: how they are stored, in a word.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    bits: int | None
    precision: str


def numbers_of(module: nn.Module, tensor: str) -> Numbers | str:
    """How to read the numbers of a parameter, or why they cannot be read.

    Plain floating point as it is; weights of bitsandbytes (4 and 8 bits) and tensors that know how to ``dequantize``
    themselves (torchao) by the code of those libraries. Nothing is computed before ``read`` is called.

    Args:
        module: that holds it.
        tensor: the name of the parameter in it.
    """
    if is_parametrized(module, tensor):
        kinds = [type(p).__name__ for p in module.parametrizations[tensor]]  # type: ignore[index, union-attr]
        return f"it is parametrised by {', '.join(kinds)}: what is stored is not the weight"
    value = module._parameters.get(tensor)
    if value is None:
        return "it is no parameter of its module (an older weight_norm or spectral_norm computes it)"
    if isinstance(value, UninitializedParameter):
        return "it has no shape yet: run a batch through the model first"
    if value.is_meta:
        return "it is on the meta device and has no numbers"
    data = value.data
    if hasattr(data, "device_mesh"):
        return "it is sharded over devices: read it before the model is wrapped"
    bnb = _bitsandbytes(module, value)
    if bnb is not None:
        return bnb
    if type(data) is not Tensor and callable(getattr(data, "dequantize", None)) and not _plain_float(data):
        # torchao: the tensor shows the type that it stands for, not the one that it is packed in.
        return Numbers(tuple(data.shape), data.dtype, lambda: value.data.dequantize(), *_packed(data))
    if not _plain_float(data):
        return f"it is a {type(data).__name__} of {str(data.dtype).removeprefix('torch.')}, which nothing here unpacks"
    if data.element_size() == 1 and any("scale" in name for name, _ in module.named_buffers(recurse=False)):
        return "it is float8 with scales of its own, which are applied by its module only"
    if any(isinstance(p, Tensor) and "scale" in n for n, p in module._parameters.items()) and data.element_size() == 1:
        return "it is float8 with scales of its own, which are applied by its module only"
    if data.numel() == 0:
        return "it is empty"
    bits = 8 if data.element_size() == 1 else None
    return Numbers(tuple(data.shape), data.dtype, lambda: value.data, bits, _word(data.dtype))


def _plain_float(data: Tensor) -> bool:
    return type(data) is Tensor and data.is_floating_point()


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _packed(data: Any) -> tuple[int, str]:
    """Bits for a number and a word, of a tensor subclass of torchao."""
    name = type(data).__name__
    inner = getattr(data, "qdata", None)
    if inner is None:
        inner = getattr(getattr(data, "tensor_impl", None), "int_data", None)
    limit = getattr(data, "quant_max", None)
    target = re.search(r"\d+$", str(getattr(data, "target_dtype", "")))  # of 4 bits that lie in a byte each
    if target is not None:
        bits = int(target.group())
    elif isinstance(limit, int):
        bits = max(1, limit.bit_length() + (0 if getattr(data, "quant_min", -1) == 0 else 1))
    elif "4" in name:
        bits = 4
    else:
        bits = 8 * (inner.element_size() if isinstance(inner, Tensor) else 1)
    return bits, f"{name}, {bits} bits"


def _bitsandbytes(module: nn.Module, value: Any) -> Numbers | str | None:
    library = sys.modules.get("bitsandbytes")
    kind = type(value).__name__
    if kind not in ("Params4bit", "Int8Params"):
        return None
    if library is None:
        return f"it is a {kind} and bitsandbytes, which unpacks it, is not imported"
    if kind == "Params4bit":
        state = getattr(value, "quant_state", None)
        if state is None:
            return "it is a Params4bit that was not quantised yet: move the model to its device first"
        return Numbers(
            tuple(state.shape),
            state.dtype,
            lambda: library.functional.dequantize_4bit(value.data, value.quant_state),
            4,
            str(getattr(state, "quant_type", "4 bits")),
        )
    state = getattr(module, "state", None)

    def part(name: str) -> Any:
        own = getattr(value, name, None)
        return own if own is not None else getattr(state, name, None)

    if part("CB") is None or part("SCB") is None:
        return "it is an Int8Params that was not quantised yet: move the model to its device first"

    def read() -> Tensor:
        return part("CB").float() * (part("SCB").float() / 127.0).unsqueeze(1)

    return Numbers(tuple(part("CB").shape), torch.float32, read, 8, "int8")


__all__ = ["Numbers", "numbers_of"]
