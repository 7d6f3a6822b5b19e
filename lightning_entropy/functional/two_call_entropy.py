r"""Entropy of attention from one more attention call, in which the keys are the values.

.. math:: H = \ell - c\, q \cdot \sum_j p_j k_j

with ``pk = sdpa(q, k, k.detach())`` and everything else detached has the exact value and the exact gradient. The kernel
that computes ``pk`` has the log-sum-exp too; where it returns it, it is taken from there.

The operators for CUDA are those that ``scaled_dot_product_attention`` chooses among. No GPU was at hand when they were
written: their shapes are as torch's own meta functions give them, and are checked on every call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_entropy.functional.attention_operands import wide
from lightning_entropy.functional.blockwise_entropy import BlockwiseEntropy


def two_call_entropy(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float, *, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Entropy, and where asked the log-sum-exp (no gradient), for logits that are bilinear in query and key.

    Entropy does not change when all keys move by one vector, and keys with mean 0 keep log-sum-exp and mean logit
    small, so that their difference loses fewer digits.
    """
    if query.shape[:-2] != key.shape[:-2]:  # torch's operators read beyond the end of a key that would be broadcast
        shared = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        query, key = query.expand(*shared, -1, -1), key.expand(*shared, -1, -1)
    mean = key.detach().mean(-2, keepdim=True)
    pk, lse = _attention_with_lse(query, key - mean, mask, is_causal, scale)
    allowed = lse > -torch.inf
    constant = wide(query.detach())
    mean_logit = scale * (constant * torch.where(allowed[..., None], wide(pk), 0.0)).sum(-1)
    entropy = torch.where(allowed, (lse - mean_logit).clamp(min=0), 0.0)
    if not with_lse:
        return entropy, None
    return entropy, lse + scale * (constant @ wide(mean).transpose(-2, -1)).squeeze(-1)  # that of the keys as given


def _attention_with_lse(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention with the (constant) keys as values, and the log-sum-exp, from one call where a kernel gives both."""
    values = key.detach()
    if query.dim() == 4 and query.device.type == "cpu":
        float_mask = None
        if mask is not None:
            float_mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, -torch.inf)
        pk, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, values, 0.0, is_causal, attn_mask=float_mask, scale=scale
        )
        return pk, wide(lse)
    operator = cuda_operator(query, key, mask, is_causal)
    if operator == "flash":
        pk, lse = torch.ops.aten._scaled_dot_product_flash_attention(query, key, values, 0.0, is_causal, scale=scale)[
            :2
        ]
        return pk, _rows_of(lse, query)
    if operator == "efficient":
        pk, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, values, None, True, 0.0, is_causal, scale=scale
        )[:2]
        return pk, _rows_of(lse, query)
    with torch.no_grad():
        lse = BlockwiseEntropy.apply(query.detach(), values, mask, is_causal, scale, None)[1]
    pk = F.scaled_dot_product_attention(query, key, values, attn_mask=mask, is_causal=is_causal, scale=scale)
    return pk, lse


def cuda_operator(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> str | None:
    """Which of torch's CUDA operators can give attention and log-sum-exp: "flash", "efficient", or None.

    Called directly they lack what ``scaled_dot_product_attention`` does around them (padding of widths, alignment of
    masks), so that what would need it is left out.
    """
    if query.device.type != "cuda" or query.dim() != 4 or mask is not None or query.dtype != key.dtype:
        return None
    if torch.version.hip is not None or query.shape[:2] != key.shape[:2] or query.shape[-1] % 8:
        return None
    half = query.dtype in (torch.float16, torch.bfloat16)
    recent = not torch.cuda.is_available() or torch.cuda.get_device_capability(query.device) >= (8, 0)
    # flash aligns a causal mask at the lower right corner, scaled_dot_product_attention at the upper left
    square = not is_causal or query.shape[-2] == key.shape[-2]
    if half and recent and square and query.shape[-1] <= 256 and torch.backends.cuda.flash_sdp_enabled():
        return "flash"
    if (query.dtype == torch.float32 or (half and recent)) and torch.backends.cuda.mem_efficient_sdp_enabled():
        return "efficient"
    return None


def _rows_of(lse: Tensor, query: Tensor) -> Tensor:
    """The log-sum-exp of the query rows: efficient attention pads their number to a multiple of 32."""
    rows = query.shape[:-1]
    if lse.dim() != 3 or lse.shape[:2] != rows[:2] or lse.shape[2] < rows[2] or lse.dtype != torch.float32:
        raise RuntimeError(
            f"expected a log-sum-exp of {tuple(rows)} in float32 from torch's attention operator, got "
            f'{tuple(lse.shape)} in {lse.dtype}: use backend="blockwise", and report this with the version of torch'
        )
    return lse[..., : rows[2]]
