"""The weights of a model in safetensors files, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lightning_entropy.observe.stored_weights import EXPERT_TENSORS, StoredWeight
from lightning_entropy.observe.weight_matrices import FUSED_QKV

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# A file does not say which module holds a tensor. These words in a name say that it is a table that is looked up.
_TABLES = re.compile(
    r"(embed|(^|\.)wte|(^|\.)wpe|relative_attention_bias|position_bias|pos_table|tok_embeddings)", re.I
)
_ADAPTER = re.compile(r"\.lora_|\.ia3_|\.vera_")
_NUMBER = re.compile(r"(\d+)")


def weight_files(path: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files of a model.

    Args:
        path: one such file, an index (``model.safetensors.index.json``), or a folder with either.

    Returns:
        The files in the order of their names.

    Raises:
        ValueError: if there are none, or a file that the index names is absent.
    """
    target = Path(path)
    if target.is_dir():
        indices = sorted(target.glob("*.safetensors.index.json"))
        files = sorted(target.glob("*.safetensors"))
        if len(indices) == 1:
            return weight_files(indices[0])
        if not files:
            have = ", ".join(sorted(p.name for p in target.iterdir())[:10]) or "nothing"
            raise ValueError(f"{target} has no safetensors file (it has {have}); pass a file or a folder with one")
        if len(files) > 1:
            names = ", ".join(p.name for p in files[:6])
            raise ValueError(
                f"{target} has {len(files)} safetensors files and not one index ({names}): pass one of them"
            )
        return files
    if not target.is_file():
        raise ValueError(f"{target} does not exist; pass a safetensors file, its index or the folder of a model")
    if target.name.endswith(".json"):
        try:
            named = sorted(set(json.loads(target.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{target} is no index of safetensors files: it lacks a weight_map") from error
        absent = [name for name in named if not (target.parent / name).is_file()]
        if absent:
            raise ValueError(f"{target} names {', '.join(absent)}, which is not beside it")
        return [target.parent / name for name in named]
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} is no safetensors file; other formats are not read (they may run code when opened)")
    return [target]


def file_weights(path: str | os.PathLike[str]) -> list[StoredWeight]:
    """Weights of linear maps in safetensors files, by their names and shapes; no numbers are read yet.

    A file does not say which module holds a tensor: two dimensions with a name that ends in ``weight`` are taken for
    a linear layer unless the name is that of an embedding, four and five for a convolution, three for a stack of
    experts where the name says so and for a convolution otherwise. Groups of a convolution cannot be known.

    Args:
        path: a file, an index or a folder; see :func:`weight_files`.

    Returns:
        The weights in the natural order of their names (layer 2 before layer 10).

    Raises:
        ValueError: if there is no such file, or one is damaged.
    """
    found = [weight for file in weight_files(path) for weight in _in_file(file)]
    return sorted(found, key=lambda weight: _natural(weight.name))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in _NUMBER.split(name)]


def _in_file(file: Path) -> Iterator[StoredWeight]:
    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            slices = {key: opened.get_slice(key) for key in names}
            tensors = {key: (part.get_shape(), part.get_dtype()) for key, part in slices.items()}
    except Exception as error:  # safetensors raises its own class, which older versions do not export
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from error
    for key, (shape, kind) in tensors.items():
        if len(shape) < 2 or _ADAPTER.search(key):
            continue
        weight = _weight(file, key, tuple(shape), kind, set(tensors))
        if weight is not None:
            yield weight


def _weight(file: Path, key: str, shape: tuple[int, ...], kind: str, keys: set[str]) -> StoredWeight | None:
    plain = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
    module, _, tensor = plain.rpartition(".")
    layout, refusal = _layout(plain, tensor, shape)
    dtype = _DTYPES.get(kind)
    stem = key.removesuffix(tensor)
    if dtype is None:
        if layout is None and tensor != "qweight":
            return None
        refusal = f"it is stored as {kind}, packed by a library for quantisation: read the loaded model instead"
    elif kind.startswith("F8") and any(f"{stem}{tensor}_{end}" in keys for end in ("scale", "scale_inv")):
        refusal = "it is float8 with scales of its own: read the loaded model instead"
    elif layout is None:
        refusal = refusal or "by its name it is no weight of a linear map"
    fused = tensor == "in_proj_weight" or (tensor == "weight" and module.rpartition(".")[2] in FUSED_QKV)
    # Grouped queries make the parts unequal, which only the model's configuration tells: equal ones have this shape.
    transposed = fused and len(shape) == 2 and shape[1] == 3 * shape[0]
    equal = fused and len(shape) == 2 and (transposed or shape[0] == 3 * shape[1])

    def read() -> Tensor:
        with safe_open(file, framework="pt") as opened:
            value: Any = opened.get_tensor(key)
        return value

    return StoredWeight(
        name=plain,
        module=module,
        shape=shape,
        layout=layout or "linear",
        dtype=dtype or torch.float32,
        read=read,
        bits=8 if kind.startswith("F8") else None,
        precision=str(dtype).removeprefix("torch.") if dtype else kind,
        parts=3 if equal else 1,
        transposed=transposed,
        tensor=tensor,
        refusal=refusal,
    )


def _layout(name: str, tensor: str, shape: tuple[int, ...]) -> tuple[str | None, str | None]:
    if _TABLES.search(name):
        return None, "by its name it is a table of embeddings, which is looked up"
    experts = tensor in EXPERT_TENSORS or "expert" in name.lower()
    if len(shape) == 3 and experts:
        return "experts", None
    if not (tensor == "weight" or tensor.endswith("proj_weight")):
        return None, None
    return ("linear" if len(shape) == 2 else "conv"), None


__all__ = ["file_weights", "weight_files"]
