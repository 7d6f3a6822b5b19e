"""How much the logits of each attention vary over the keys, measured in one forward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_entropy.functional.attention_operands import for_query_heads, masked_out
from lightning_entropy.observe.interception import SDPA, dot_product_logits
from lightning_entropy.surgery.attention_call import AttentionCall, ReplacedAttention, rewrite_attention


class _Measured(ReplacedAttention):
    method = "logit_variance"

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {}

    def describe(self) -> str:
        return "measured"

    def attend(
        self,
        call: AttentionCall,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        out = SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if call.kind == "cross":
            return out
        query, key = query.detach().float(), key.detach().float()
        if attn_mask is not None or is_causal:
            mask = None if attn_mask is None else attn_mask.detach()
            self.pass_map(call, dot_product_logits(query, key, value, mask, 0.0, is_causal, scale, enable_gqa))
            return out
        with torch.autocast(query.device.type, enabled=False):  # q' Cov(k) q, without the map
            q = query * (query.shape[-1] ** -0.5 if scale is None else scale)
            k = for_query_heads(key, q.shape[-3]) if enable_gqa else key
            centred = k - k.mean(-2, keepdim=True)
            covariance = centred.transpose(-2, -1) @ centred / k.shape[-2]
            self._note(call, ((q @ covariance) * q).sum(-1))
        return out

    def pass_map(self, call: AttentionCall, logits: Tensor) -> bool:
        """Measure a map that is there."""
        if call.kind != "cross":
            s = logits.detach().float()
            allowed = ~masked_out(s)
            count = allowed.sum(-1)
            s = torch.where(allowed, s, 0.0)
            several = count.clamp(min=1)
            centred = torch.where(allowed, s - s.sum(-1, keepdim=True) / several[..., None], 0.0)
            self._note(call, (centred.square().sum(-1) / several)[count > 1])
        return True

    def _note(self, call: AttentionCall, rows: Tensor) -> None:
        if rows.numel():
            self.found.setdefault(call.name, []).append(rows.mean().item())


def logit_variance(
    model: nn.Module, *inputs: Any, modules: str | Iterable[str] | None = None, **arguments: Any
) -> dict[str, float]:
    r"""Variance over the keys of each self-attention's logits, mean over rows, in one forward without gradient.

    .. math:: v = \mathrm{mean}_i \; \mathrm{Var}_j(s_{ij})

    The logits are those that enter the softmax: with their scale and bias. Masked keys, and rows with fewer than two
    keys, are left out.

    Args:
        model: any module, left as it was.
        *inputs: of its forward.
        modules: shell patterns over dotted names of attention modules or of modules that contain them.
        **arguments: of its forward.

    Returns:
        The variance by module name, for ``scale_attention(mode="absolute", variance=...)``.

    Raises:
        ValueError: if nothing is recognised as attention.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> list(logit_variance(layer, torch.randn(1, 5, 8)))
        ['self_attn']
    """
    measured = _Measured()
    report = rewrite_attention(model, measured, modules)
    try:
        with torch.no_grad():
            model(*inputs, **arguments)
    finally:
        report.undo()
    return {name: sum(values) / len(values) for name, values in measured.found.items()}


__all__ = ["logit_variance"]
