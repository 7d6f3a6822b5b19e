"""``multi_head_attention_forward`` around an attention of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_entropy.observe.attention_entropy import project_multi_head

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None", float], Tensor]


def multi_head_attention(attend: Attend, given: dict[str, Any], owner: str) -> tuple[Tensor, Tensor | None]:
    """What ``multi_head_attention_forward`` returns, with ``attend`` in the place of its attention.

    Args:
        attend: ``(query, key, value, mask, dropout)``, each ``(batch, heads, tokens, width)`` and a mask in which True
            takes part; linear in ``value``, so that its weights are its output for the unit matrix.
        given: the arguments by name.
        owner: the name that messages carry.

    Returns:
        The output, ``(queries, batch, embedding)``, and the weights before dropout where ``need_weights`` asks for
        them.

    Raises:
        ValueError: if the call adds keys that are no tokens (``bias_k``, ``add_zero_attn``, ``static_k``).
    """
    projected = project_multi_head((), given)
    if projected is None:
        raise ValueError(
            f"{owner}: nn.MultiheadAttention with add_bias_kv, add_zero_attn or static keys adds keys that are no "
            "tokens, which is not supported. Leave this module out with modules=."
        )
    query, key, mask = projected
    batched = given["query"].dim() == 3
    source = given["value"] if batched else given["value"].unsqueeze(1)
    batch, heads, queries, width = query.shape
    embedding = heads * width
    if given.get("use_separate_proj_weight"):
        weight = given["v_proj_weight"]
    else:
        weight = given["in_proj_weight"][2 * embedding :]
    bias = given.get("in_proj_bias")
    value = F.linear(source, weight, None if bias is None else bias[2 * embedding :])
    value = value.view(source.shape[0], batch, heads, width).permute(1, 2, 0, 3)
    dropout = given.get("dropout_p", 0.0) if given.get("training", True) else 0.0
    out = attend(query, key, value, mask, dropout)
    out = out.permute(2, 0, 1, 3).reshape(queries, batch, embedding)
    out = F.linear(out, given["out_proj_weight"], given["out_proj_bias"])
    weights: Tensor | None = None
    if given.get("need_weights", True):
        eye = torch.eye(key.shape[-2], dtype=value.dtype, device=value.device)
        weights = attend(query, key, eye.expand(batch, heads, -1, -1), mask, 0.0)
        if given.get("average_attn_weights", True):
            weights = weights.mean(1)
    if not batched:
        out = out.squeeze(1)
        weights = None if weights is None else weights.squeeze(0)
    return out, weights


__all__ = ["multi_head_attention"]
