"""Grids and arguments of the kernels of attention with entropy."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_entropy.extras import require
from lightning_entropy.functional.triton.blocks import Blocks, candidates

_LOG2E = math.log2(math.e)


def interpreted() -> bool:
    """Whether triton runs its kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _launch(kernel: Any, blocks: list[Blocks], programs: Callable[[Blocks], int], **arguments: Any) -> None:
    """Start a kernel, on the device that is current, with the first block sizes that fit it."""
    out_of_resources = require("triton.runtime.errors", extra="triton").OutOfResources
    for i, chosen in enumerate(blocks):
        sizes = {"BLOCK_Q": chosen.queries, "BLOCK_K": chosen.keys}
        if not chosen.keys:
            del sizes["BLOCK_K"]
        try:
            kernel[(programs(chosen),)](**arguments, **sizes, num_warps=chosen.warps, num_stages=chosen.stages)
            return
        except out_of_resources:
            if i == len(blocks) - 1:
                raise


def _strides(name: str, x: Tensor, *, axes: str = "bhn") -> dict[str, int]:
    return {f"stride_{name}{axis}": step for axis, step in zip(axes, x.stride())}


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _unit_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _shared_arguments(
    query: Tensor, key: Tensor, value: Tensor | None, mask: Tensor | None, scale: float, softcap: float
) -> dict[str, Any]:
    """What every kernel takes. ``softcap`` 0 means none; absent tensors are stood in for by ``query``, unread."""
    width, value_width = query.shape[-1], query.shape[-1] if value is None else value.shape[-1]
    kind = 0
    if mask is None:
        arguments: dict[str, Any] = {"mask": query, "stride_mb": 0, "stride_mh": 0, "stride_mq": 0, "stride_mk": 0}
    else:
        kind = 1 if mask.stride(-2) == 0 or mask.shape[-2] == 1 else 2
        arguments = {"mask": mask.view(torch.uint8), **_strides("m", mask, axes="bhqk")}
    value = query if value is None else value
    return {
        "query": query,
        "key": key,
        "value": value,
        **arguments,
        **_strides("q", query),
        **_strides("k", key),
        **_strides("v", value),
        "groups": query.shape[1] // key.shape[1],
        "n_queries": query.shape[2],
        "n_keys": key.shape[2],
        "width": width,
        "value_width": value_width,
        "to_base2": (softcap if softcap else scale) * _LOG2E,
        "to_tanh": scale / softcap if softcap else 0.0,
        "MASK": kind,
        "SOFTCAP": bool(softcap),
        "PAD": _padded(width) != width,
        "PAD_VALUE": _padded(value_width) != value_width,
        "PRECISION": "emulated" if interpreted() else "exact",
        "WIDTH": _padded(width),
        "VALUE_WIDTH": _padded(value_width),
    }


def empty_outputs(query: Tensor, value: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Output (of no elements without a value), entropy and log-sum-exp, not filled in."""
    rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if value is None:
        output = query.new_empty(0)
    else:
        # laid out as (batch, rows, heads, width), as the fused kernels of torch do: what follows merges the heads
        batch, heads, n, _ = query.shape
        output = query.new_empty(batch, n, heads, value.shape[-1]).transpose(1, 2)
    return output, rows, torch.empty_like(rows)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward kernel: output (empty without a value), entropy, log-sum-exp."""
    require("triton", extra="triton")
    from lightning_entropy.functional.triton.forward import forward_kernel

    query, key = _unit_last(query), _unit_last(key)
    value = None if value is None else _unit_last(value)
    output, entropy, lse = empty_outputs(query, value)
    if not entropy.numel():
        return output, entropy, lse
    shared = _shared_arguments(query, key, value, mask, scale, softcap)
    pairs = query.shape[0] * query.shape[1]
    with torch.cuda.device_of(query):
        _launch(
            forward_kernel,
            candidates("forward", max(shared["WIDTH"], shared["VALUE_WIDTH"]), query.element_size()),
            lambda b: pairs * -(-query.shape[2] // b.queries),
            **shared,
            output=entropy if value is None else output,
            entropy=entropy,
            lse=lse,
            **_strides("o", query if value is None else output),
            heads=query.shape[1],
            CAUSAL=is_causal,
            VALUE=value is not None,
        )
    return output, entropy, lse


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    output: Tensor,
    entropy: Tensor,
    lse: Tensor,
    d_output: Tensor | None,
    d_entropy: Tensor | None,
    d_lse: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
    for_query: bool,
    for_key: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernels: gradients of query, key and value; those not asked for have no elements."""
    require("triton", extra="triton")
    from lightning_entropy.functional.triton import backward as kernels

    query, key = _unit_last(query), _unit_last(key)
    value = None if value is None or d_output is None else _unit_last(value)
    d_output = None if d_output is None else _unit_last(d_output)
    d_entropy = None if d_entropy is None else d_entropy.contiguous()
    d_lse = None if d_lse is None else d_lse.contiguous()
    d_query, d_key, d_value = empty_gradients(query, key, value, for_query, for_key)
    if not entropy.numel():
        return d_query.zero_(), d_key.zero_(), d_value.zero_()
    with torch.cuda.device_of(query):
        _launch_backward(
            kernels,
            _shared_arguments(query, key, value, mask, scale, softcap),
            {"output": output, "entropy": entropy, "lse": lse, "scale": scale, "CAUSAL": is_causal},
            (d_output, d_entropy, d_lse),
            (d_query, d_key, d_value),
        )
    return d_query, d_key, d_value


def _launch_backward(
    kernels: Any,
    shared: dict[str, Any],
    saved: dict[str, Any],
    incoming: tuple[Tensor | None, Tensor | None, Tensor | None],
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Delta, then dQ, then dK and dV into ``gradients``, as far as those have elements."""
    query, key, entropy = shared["query"], shared["key"], saved["entropy"]
    d_output, d_entropy, d_lse = incoming
    d_query, d_key, d_value = gradients
    (batch, heads, n_queries, _), (key_heads, n_keys) = query.shape, key.shape[1:3]
    given = {
        "d_output": query if d_output is None else d_output,
        "d_entropy": entropy if d_entropy is None else d_entropy,
    }
    has = {"OUTPUT": d_output is not None, "ENTROPY": d_entropy is not None}
    delta = torch.empty_like(entropy)
    output = query if d_output is None else saved["output"]
    _launch(
        kernels.delta_kernel,
        [Blocks(64, 0, 4, 1)],
        lambda b: batch * heads * -(-n_queries // b.queries),
        output=output,
        entropy=entropy,
        d_lse=entropy if d_lse is None else d_lse,
        delta=delta,
        **given,
        **_strides("o", output),
        **_strides("d", given["d_output"]),
        heads=heads,
        n_queries=n_queries,
        LSE=d_lse is not None,
        **has,
        **{name: shared[name] for name in ("value_width", "PAD_VALUE", "VALUE_WIDTH")},
    )
    shared = {
        **shared,
        **given,
        **has,
        **{name: saved[name] for name in ("lse", "scale", "CAUSAL")},
        **_strides("o", given["d_output"]),
        "delta": delta,
    }
    widest = max(shared["WIDTH"], shared["VALUE_WIDTH"])
    if d_query.numel():
        _launch(
            kernels.query_gradient_kernel,
            candidates("query_gradient", widest, query.element_size()),
            lambda b: batch * heads * -(-n_queries // b.queries),
            **shared,
            d_query=d_query,
            heads=heads,
            **_strides("g", d_query),
        )
    if d_key.numel():
        d_value = d_value if d_value.numel() else d_key  # not written without dO
        _launch(
            kernels.key_gradient_kernel,
            candidates("key_gradient", widest, query.element_size()),
            lambda b: batch * key_heads * -(-n_keys // b.keys),
            **shared,
            d_key=d_key,
            d_value=d_value,
            key_heads=key_heads,
            **_strides("g", d_key),
            **_strides("w", d_value),
        )


def empty_gradients(
    query: Tensor, key: Tensor, value: Tensor | None, for_query: bool, for_key: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, not filled in, in layouts that hold each number once."""

    def like(x: Tensor | None, wanted: bool) -> Tensor:
        return query.new_empty(0) if x is None or not wanted else torch.empty_like(x)

    return like(query, for_query), like(key, for_key), like(value, for_key)
