"""What every form of attention does to its query, key and mask first."""

from __future__ import annotations

import torch
from torch import Tensor

# Libraries mask with -inf, with the smallest number of the dtype, or with a constant such as -1e9. All of these give
# a probability of exactly 0; no trained score is near them.
_MASKED_BELOW = -1e8


def wide(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x if x.dtype == torch.float64 else x.float()


def masked_out(logits: Tensor) -> Tensor:
    """Where a logit is one of the values that libraries write into masked positions."""
    return logits <= max(torch.finfo(logits.dtype).min / 2, _MASKED_BELOW)


def for_query_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values ``(..., key heads, keys, width)``, each for all of the query heads that share it.

    Raises:
        ValueError: if the query heads are no multiple of the key heads.
    """
    if heads % x.shape[-3]:
        raise ValueError(f"{heads} query heads cannot share {x.shape[-3]} key heads")
    return x.repeat_interleave(heads // x.shape[-3], dim=-3)


__all__ = ["for_query_heads", "masked_out", "wide"]
