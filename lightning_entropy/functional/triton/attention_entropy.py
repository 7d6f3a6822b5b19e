r"""Attention, its entropy and its log-sum-exp from one fused kernel, forward and backward.

The online softmax of flash attention carries one accumulator more per row, from which the entropy follows without the
cancellation of two large numbers (see :mod:`.forward`). The backward computes the logits again and takes the gradients
of all three results at once (see :mod:`.backward`). No N x N map is formed, keys shared by several query heads are not
repeated, and nothing is added atomically.

The kernels need an NVIDIA GPU of compute capability 8.0 or higher, or ``TRITON_INTERPRET=1`` set before triton is
imported, which runs them on the CPU, slowly, for tests.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_entropy.functional.triton import launch

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WIDEST = 256


class AttentionWithEntropy(NamedTuple):
    """Attention, the entropy of each query's distribution in nats, and the log-sum-exp of its logits."""

    output: Tensor
    entropy: Tensor
    lse: Tensor


def refusal(query: Tensor, key: Tensor, value: Tensor | None = None, *, attn_mask: Tensor | None = None) -> str | None:
    """Why the kernel cannot compute this, or None where it can.

    Args:
        query: as in :func:`attention_with_entropy`.
        key: as there.
        value: as there; None where only the entropy is wanted.
        attn_mask: as there.

    Returns:
        A clause that names the obstacle and what to use instead, or None.

    Example:
        >>> q = torch.zeros(1, 1, 4, 8, dtype=torch.float64)
        >>> refusal(q, q)
        'float64 is not computed by the kernel (float32, float16, bfloat16 are): use backend="blockwise"'
    """
    tensors = [query, key] if value is None else [query, key, value]
    if query.dtype not in _DTYPES:
        names = ", ".join(str(dtype)[6:] for dtype in _DTYPES)
        return f'{str(query.dtype)[6:]} is not computed by the kernel ({names} are): use backend="blockwise"'
    if any(x.dtype != query.dtype for x in tensors):
        found = ", ".join(str(x.dtype)[6:] for x in tensors)
        return f"query, key and value must have one dtype, got {found}: convert them"
    if any(x.device != query.device for x in tensors):
        return "query, key and value must be on one device"
    if any(x.shape[-1] > _WIDEST for x in tensors):
        return f'heads wider than {_WIDEST} do not fit a tile: use backend="two_call" or "blockwise"'
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        return 'an additive mask is not computed by the kernel: pass a bool mask, or use backend="blockwise"'
    if query.device.type != "cuda":
        if query.device.type == "cpu" and launch.interpreted():
            return None
        return f'the kernel runs on CUDA, and the tensors are on {query.device.type}: use backend="auto"'
    if torch.version.hip is not None:
        return 'the kernel has not been tried on ROCm: use backend="two_call" or "blockwise"'
    if torch.cuda.is_available() and torch.cuda.get_device_capability(query.device) < (8, 0):
        return 'the kernel needs compute capability 8.0 (A100) or higher: use backend="two_call" or "blockwise"'
    return None


def available() -> bool:
    """Whether triton is installed (it comes with the CUDA wheels of torch)."""
    return find_spec("triton") is not None


def attention_with_entropy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    logit_softcap: float | None = None,
) -> AttentionWithEntropy:
    r"""Attention as ``scaled_dot_product_attention`` computes it, with entropy and log-sum-exp, in one pass.

    .. math:: O_i = \sum_j p_{ij} v_j, \qquad H_i = -\sum_j p_{ij} \log p_{ij}, \qquad
        \ell_i = \log \sum_j e^{s_{ij}}, \qquad p_i = \mathrm{softmax}_j(c\, q_i \cdot k_j)

    All three carry their gradient, and the backward takes them together. It is not differentiable twice.

    Args:
        query: ``(..., heads, queries, width)`` in float32, float16 or bfloat16; width at most 256.
        key: ``(..., heads, keys, width)``; fewer heads with ``enable_gqa``.
        value: ``(..., heads, keys, value width)``.
        attn_mask: bool, True takes part, broadcastable to ``(..., heads, queries, keys)``.
        is_causal: query i sees keys 0 to i.
        scale: c; default ``1 / sqrt(width)``.
        enable_gqa: each key head serves several query heads.
        logit_softcap: t, for logits ``t * tanh(c q.k / t)``.

    Returns:
        Output in the dtype of ``query``; entropy in nats and log-sum-exp, ``(..., heads, queries)`` in float32. A
        query without any allowed key has output 0, entropy 0 and log-sum-exp ``-inf``, and no gradient.

    Raises:
        ValueError: if shapes do not fit, or the kernel cannot compute this (the message says what to use).
        ImportError: if triton is not installed.

    Reference:
        Dao et al. (2022), FlashAttention, for the online softmax; the entropy's accumulator and gradient are derived in
        :mod:`.forward` and :mod:`.backward`.
    """
    output, entropy, lse = _run(query, key, value, attn_mask, is_causal, scale, enable_gqa, logit_softcap)
    return AttentionWithEntropy(output, entropy, lse)


def entropy_and_lse(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    logit_softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Entropy and log-sum-exp alone: no value is read and no output computed, forward and backward.

    Args:
        query: as in :func:`attention_with_entropy`.
        key: as there.
        attn_mask: as there.
        is_causal: as there.
        scale: as there.
        enable_gqa: as there.
        logit_softcap: as there.

    Returns:
        Entropy in nats and log-sum-exp, each ``(..., heads, queries)`` in float32, with gradients.

    Raises:
        ValueError: if shapes do not fit, or the kernel cannot compute this (the message says what to use).
        ImportError: if triton is not installed.
    """
    _, entropy, lse = _run(query, key, None, attn_mask, is_causal, scale, enable_gqa, logit_softcap)
    return entropy, lse


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    reason = refusal(query, key, value, attn_mask=mask)
    if reason is not None:
        raise ValueError(f"attention_with_entropy: {reason}")
    _check_shapes(query, key, value, mask, is_causal, enable_gqa, softcap)
    batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3])
    n = math.prod(batch)
    four = [x if x is None else x.expand(*batch, *x.shape[-3:]).reshape(n, *x.shape[-3:]) for x in (query, key, value)]
    if mask is not None:
        full = (*batch, query.shape[-3], query.shape[-2], key.shape[-2])
        mask = mask.expand(full) if len(batch) == 1 else mask.expand(full).reshape(n, *full[-3:])
    c = query.shape[-1] ** -0.5 if scale is None else scale
    output, entropy, lse = torch.ops.lightning_entropy.attention_with_entropy(*four, mask, is_causal, c, softcap or 0.0)
    rows = (*batch, *query.shape[-3:-1])
    if value is not None:
        output = output.reshape(*rows, value.shape[-1])
    return output, entropy.reshape(rows), lse.reshape(rows)


def _check_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
    softcap: float | None,
) -> None:
    if query.dim() < 3 or key.dim() < 3:
        raise ValueError(
            f"expected (..., heads, rows, width), got a query of {tuple(query.shape)} and a key of {tuple(key.shape)}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must have the same width, got {query.shape[-1]} and {key.shape[-1]}")
    if key.shape[-2] == 0:
        raise ValueError("attention needs at least one key, got none")
    if value is not None and value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"value must have the shape of key but for its width, got {tuple(value.shape)} beside {tuple(key.shape)}"
        )
    if query.shape[-3] != key.shape[-3] and not enable_gqa:
        raise ValueError(
            f"{query.shape[-3]} query heads and {key.shape[-3]} key heads: pass enable_gqa=True to share key heads"
        )
    if query.shape[-3] % key.shape[-3]:
        raise ValueError(f"{query.shape[-3]} query heads cannot share {key.shape[-3]} key heads")
    if is_causal and mask is not None:
        raise ValueError("is_causal and attn_mask exclude each other, as in scaled_dot_product_attention")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"logit_softcap must be positive, got {softcap}")


# A custom operator, so that torch.compile takes it as one piece and autograd's graph has one node.
_ARGUMENTS = "Tensor query, Tensor key, Tensor? value, Tensor? mask"
_OPTIONS = "bool is_causal, float scale, float softcap"
_forward_op = torch.library.custom_op(
    "lightning_entropy::attention_with_entropy",
    launch.forward,
    mutates_args=(),
    schema=f"({_ARGUMENTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "lightning_entropy::attention_with_entropy_backward",
    launch.backward,
    mutates_args=(),
    schema=f"({_ARGUMENTS}, Tensor output, Tensor entropy, Tensor lse, Tensor? d_output, Tensor? d_entropy, "
    f"Tensor? d_lse, {_OPTIONS}, bool for_query, bool for_key) -> (Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return launch.empty_outputs(query, value)


@_backward_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    output: Tensor,
    entropy: Tensor,
    lse: Tensor,
    d_output: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return launch.empty_gradients(query, key, None if d_output is None else value, *rest[-2:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, mask, *options = inputs
    ctx.save_for_backward(query, key, value, mask, *output)
    ctx.options = options
    ctx.set_materialize_grads(False)  # what has no gradient costs nothing in backward


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, mask, output, entropy, lse = ctx.saved_tensors
    wants = ctx.needs_input_grad
    for_query, for_key = wants[0], wants[1] or wants[2]
    d_output = grads[0] if value is not None else None
    d_query, d_key, d_value = torch.ops.lightning_entropy.attention_with_entropy_backward(
        query, key, value, mask, output, entropy, lse, d_output, *grads[1:], *ctx.options, for_query, for_key
    )
    return (
        d_query if wants[0] else None,
        d_key if wants[1] else None,
        d_value if wants[2] and d_output is not None else None,
        *[None] * 4,
    )


_forward_op.register_autograd(_differentiate, setup_context=_save)
