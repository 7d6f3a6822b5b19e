"""The entropy of one attention, from the operation that computed it.

Fused attention is read from the query and key that enter it, ``nn.MultiheadAttention`` from its projections, eager
attention from the logits that enter its softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_entropy.functional import attention_entropy, attention_sink, entropy_from_logits
from lightning_entropy.functional.attention_operands import for_query_heads, masked_out, wide
from lightning_entropy.functional.blockwise_entropy import logits_block
from lightning_entropy.observe.interception import (
    is_square,
    multi_head_arguments,
    sdpa_arguments,
    softmax_arguments,
)

DOT_PRODUCT, MULTI_HEAD, SOFTMAX = "scaled_dot_product_attention", "multi_head_attention", "softmax"
PROJECTED = "multi_head_attention, projected"
_SINK_ROWS = 64  # query rows from which a sink is told: their part of the map, and no more, is formed


@dataclass(frozen=True)
class LayerEntropy:
    """The entropy of one attention in one call.

    Attributes:
        module: dotted name of the innermost module that computed it.
        source: ``"scaled_dot_product_attention"``, ``"multi_head_attention"`` or ``"softmax"``.
        entropy: ``(..., heads, queries)`` in nats, float32 or wider, before dropout; with its graph where gradients
            are enabled.
        keys: how many keys each query may attend to, broadcastable to ``entropy``.
        rows: how many query rows the attention has; more than ``entropy`` holds where rows were sampled.
        columns: how many keys there are, allowed or not.
        sink: ``(heads,)``, the largest share of a head's attention that goes to one key; None unless sinks are read.
        rest: ``(heads,)``, normalised entropy of the attention beside that key (see
            :func:`lightning_entropy.functional.attention_sink`); None unless sinks are read.
    """

    module: str
    source: str
    entropy: Tensor
    keys: Tensor
    rows: int
    columns: int
    sink: Tensor | None = None
    rest: Tensor | None = None

    def normalized(self) -> Tensor:
        """Entropy divided by the log of the row's allowed keys; NaN for rows with fewer than two."""
        return torch.where(self.keys > 1, self.entropy / self.keys.clamp(min=2).log(), torch.nan)

    def per_head(self, normalize: bool = True) -> Tensor:
        """Mean over everything but the heads, rows with fewer than two allowed keys left out: ``(heads,)``."""
        values = self.normalized() if normalize else torch.where(self.keys > 1, self.entropy, torch.nan)
        return values.movedim(-2, 0).flatten(1).nanmean(1)


class AttentionRead:
    """Turns noted calls into entropies; one object a forward, so that what layers share is looked at once.

    Args:
        queries: sample this many query rows of each attention (see
            :func:`lightning_entropy.functional.attention_entropy`); None reads all.
        sinks: tell attention sinks too, from up to 64 query rows.
    """

    def __init__(self, queries: int | None = None, sinks: bool = False) -> None:
        self.queries = queries
        self.sinks = sinks
        self._masks: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, kind: str, site: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerEntropy | None:
        """The entropy of one call; None for one that is no attention between tokens."""
        if kind == DOT_PRODUCT:
            return self._of_dot_product(site, args, kwargs)
        if kind == MULTI_HEAD:
            return self._of_multi_head(site, args, kwargs)
        if kind == PROJECTED:
            query, key, mask = args
            return self._entry(site, MULTI_HEAD, query, key, mask, False)
        return self._of_softmax(site, args, kwargs)

    def _as_bool(self, mask: Tensor) -> Tensor:
        """A boolean mask where one was spelled as 0 and a very negative number; a true bias stays.

        Layers share their mask, so the look at its values, which waits for a GPU, is taken once.
        """
        if mask.dtype == torch.bool or mask.requires_grad:
            return mask
        known = self._masks.get(id(mask))
        if known is None or known[0] is not mask:
            out = masked_out(mask)
            plain = ~out if bool((out | (mask == 0)).all()) else mask
            known = self._masks[id(mask)] = (mask, plain)
        return known[1]

    def _entry(
        self, site: str, source: str, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, **options: Any
    ) -> LayerEntropy:
        rows = query.shape[-2]
        if mask is not None:
            mask = self._as_bool(mask)
        query, mask, is_causal = _some_rows(self.queries, query, key, mask, is_causal)
        h = attention_entropy(query, key, mask, is_causal, **options)
        assert isinstance(h, Tensor)
        keys = _keys(query, key, mask, is_causal)
        sink, rest = self._sink_of_dot_product(query, key, mask, is_causal, **options) if self.sinks else (None, None)
        return LayerEntropy(site, source, h, keys, rows, key.shape[-2], sink, rest)

    @torch.no_grad()
    def _sink_of_dot_product(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> tuple[Tensor, Tensor]:
        query, mask, is_causal = _some_rows(_SINK_ROWS, query, key, mask, is_causal)
        with torch.autocast(query.device.type, enabled=False):
            if enable_gqa:
                key = for_query_heads(key, query.shape[-3])
            c = query.shape[-1] ** -0.5 if scale is None else scale
            s = logits_block(wide(query), wide(key), mask, is_causal, c, None, 0, key.shape[-2])[0]
            return _sink_per_head(s)

    def _of_dot_product(self, site: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerEntropy:
        given = sdpa_arguments(args, kwargs)
        return self._entry(
            site,
            DOT_PRODUCT,
            given["query"],
            given["key"],
            given.get("attn_mask"),
            given.get("is_causal", False),
            scale=given.get("scale"),
            enable_gqa=given.get("enable_gqa", False),
        )

    def _of_softmax(self, site: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerEntropy | None:
        logits, dim = softmax_arguments(args, kwargs)
        if dim != logits.dim() - 1 or not (is_square(tuple(logits.shape), dim) or logits.dim() >= 4):
            return None  # a pooling or a classifier's softmax
        rows = logits.shape[-2]
        chosen = _drawn(rows, self.queries, logits.device)
        if chosen is not None:
            logits = logits.index_select(-2, chosen)
        out = masked_out(logits.detach())
        h = entropy_from_logits(logits.masked_fill(out, -torch.inf))
        sink = rest = None
        if self.sinks:
            some = _drawn(logits.shape[-2], _SINK_ROWS, logits.device)
            sink, rest = _sink_per_head(logits if some is None else logits.index_select(-2, some))
        return LayerEntropy(site, SOFTMAX, h, (~out).sum(-1).float(), rows, logits.shape[-1], sink, rest)

    def _of_multi_head(self, site: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerEntropy | None:
        projected = project_multi_head(args, kwargs)
        return None if projected is None else self._entry(site, MULTI_HEAD, *projected, False)


def _drawn(rows: int, count: int | None, device: torch.device) -> Tensor | None:
    """Which rows are read: the same in every call; None for all."""
    if count is None or count >= rows:
        return None
    return torch.randperm(rows, generator=torch.Generator().manual_seed(0))[:count].to(device)


def _some_rows(
    count: int | None, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor | None, bool]:
    """The drawn query rows with their part of the mask."""
    chosen = _drawn(query.shape[-2], count, query.device)
    if chosen is None:
        return query, mask, is_causal
    if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
        mask = mask.index_select(-2, chosen)
    if is_causal:
        mask, is_causal = torch.arange(key.shape[-2], device=query.device) <= chosen[:, None], False
    return query.index_select(-2, chosen), mask, is_causal


@torch.no_grad()
def _sink_per_head(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mass and rest of the most attended key of each sample, mean over the samples."""
    logits = logits.detach()
    found = attention_sink(logits.masked_fill(masked_out(logits), -torch.inf))
    mass, rest = (x.reshape(-1, x.shape[-1]) for x in (found.mass, found.rest))
    return mass.nanmean(0), rest.nanmean(0)


def project_multi_head(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Query, key and mask inside ``multi_head_attention_forward``; None where it adds keys that are no tokens."""
    given = multi_head_arguments(args, kwargs)
    if given.get("bias_k") is not None or given.get("add_zero_attn") or given.get("static_k") is not None:
        return None
    query, key, heads = given["query"], given["key"], given["num_heads"]
    padding, mask = given.get("key_padding_mask"), given.get("attn_mask")
    if query.dim() == 2:
        query, key = query.unsqueeze(1), key.unsqueeze(1)
        padding = None if padding is None else padding.unsqueeze(0)
    width, batch = query.shape[-1], query.shape[1]
    if given.get("use_separate_proj_weight"):
        w_q, w_k = given["q_proj_weight"], given["k_proj_weight"]
    else:
        w_q, w_k = given["in_proj_weight"][:width], given["in_proj_weight"][width : 2 * width]
    bias = given.get("in_proj_bias")
    b_q, b_k = (None, None) if bias is None else (bias[:width], bias[width : 2 * width])

    def split(x: Tensor, weight: Tensor, b: Tensor | None) -> Tensor:
        to = torch.promote_types(x.dtype, weight.dtype)
        y = F.linear(x.to(to), weight.to(to), None if b is None else b.to(to))
        return y.view(x.shape[0], batch, heads, width // heads).permute(1, 2, 0, 3)

    with torch.autocast(query.device.type, enabled=False):
        q, k = split(query, w_q, b_q), split(key, w_k, b_k)
    if mask is not None and mask.dim() == 3:
        mask = mask.view(batch, heads, *mask.shape[-2:])
    return q, k, _joint_mask(mask, padding, q)


def _keys(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    count = key.shape[-2]
    if is_causal:
        return torch.arange(1, query.shape[-2] + 1, device=query.device).clamp(max=count).float()
    if mask is None:
        return torch.full((1,), float(count), device=query.device)
    allowed = mask if mask.dtype == torch.bool else ~masked_out(mask.detach())
    return allowed.expand(*allowed.shape[:-1], count).sum(-1).float()


def _joint_mask(mask: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
    """``nn.MultiheadAttention``'s two masks, in which True is left out, as one in which True takes part."""
    parts = [m for m in (mask, None if padding is None else padding[:, None, None, :]) if m is not None]
    if not parts:
        return None
    if all(m.dtype == torch.bool for m in parts):
        joint = ~parts[0]
        return joint if len(parts) == 1 else joint & ~parts[1]
    added = [
        torch.zeros_like(m, dtype=like.dtype).masked_fill(m, -torch.inf) if m.dtype == torch.bool else m for m in parts
    ]
    return added[0] if len(added) == 1 else added[0] + added[1]


__all__ = ["DOT_PRODUCT", "MULTI_HEAD", "PROJECTED", "SOFTMAX", "AttentionRead", "LayerEntropy", "project_multi_head"]
