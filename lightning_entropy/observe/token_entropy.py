"""Attention entropy as a mean over the tokens that exist: padded queries are left out, over many batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_entropy.functional.attention_operands import masked_out
from lightning_entropy.observe.attention_entropy import DOT_PRODUCT, MULTI_HEAD, SOFTMAX, _drawn
from lightning_entropy.observe.entropy_reader import AttentionEntropyReader
from lightning_entropy.observe.interception import multi_head_arguments, sdpa_arguments, softmax_arguments


class TokenEntropyReader(AttentionEntropyReader):
    """An :class:`AttentionEntropyReader` that knows which tokens exist, and keeps sums over batches.

    Which tokens exist is what :meth:`expect` was told, else what the first attention over so many tokens masks: a key
    that no query may attend to is padding, and so is the query at its place.

    Call :meth:`start`, run a batch, :meth:`stop`, :meth:`add`; then :meth:`means`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.valid: dict[tuple[int, int], Tensor | None] = {}
        self.sums: dict[str, Tensor] = {}  # site -> (4, heads): normalised entropy, its rows, entropy, its rows

    def start(self, batch: Any = None) -> None:
        """Read the next batch; sums of earlier ones stay."""
        super().start(batch)
        self.valid = {}

    def expect(self, valid: Tensor | None) -> None:
        """Say which tokens exist: ``(batch, tokens)`` bool."""
        if valid is not None:
            self.valid[(valid.shape[0], valid.shape[1])] = valid

    def _note(self, kind: str, site: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._wanted(site) and torch._C._current_graph_task_id() == -1:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                self._look_at_mask(kind, args, kwargs)
        super()._note(kind, site, args, kwargs)

    def _look_at_mask(self, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kind == DOT_PRODUCT:
            given = sdpa_arguments(args, kwargs)
            query, key, mask = given["query"], given["key"], given.get("attn_mask")
            sizes = (query.shape[0], key.shape[-2])
            if query.dim() != 4 or query.shape[-2] != key.shape[-2] or sizes in self.valid:
                return
            self.valid[sizes] = None
            if mask is not None and mask.dim() == 4 and mask.shape[0] == sizes[0]:
                allowed = mask if mask.dtype == torch.bool else ~masked_out(mask.detach())
                self.valid[sizes] = allowed.any(1).any(1).expand(sizes)
        elif kind == SOFTMAX:
            logits, dim = softmax_arguments(args, kwargs)
            sizes = (logits.shape[0], logits.shape[-1])
            if logits.dim() != 4 or dim != 3 or logits.shape[-2] != logits.shape[-1] or sizes in self.valid:
                return
            self.valid[sizes] = (~masked_out(logits.detach())).any(1).any(1)
        elif kind == MULTI_HEAD:
            given = multi_head_arguments(args, kwargs)
            query, key, padding = given["query"], given["key"], given.get("key_padding_mask")
            if query.dim() != 3 or query.shape[0] != key.shape[0]:
                return
            sizes = (query.shape[1], query.shape[0])
            if sizes not in self.valid:
                out = padding if padding is None or padding.dtype == torch.bool else masked_out(padding)
                self.valid[sizes] = None if out is None else ~out

    @torch.no_grad()
    def add(self) -> None:
        """Add what was read since :meth:`start` to the sums."""
        for layer in self.layers:
            h = layer.entropy.detach()
            keys = layer.keys.expand_as(h) if layer.keys.dim() == h.dim() else layer.keys.expand(h.shape)
            exists = keys > 0
            valid = self.valid.get((h.shape[0], layer.rows)) if h.dim() == 3 else None
            if valid is not None:
                drawn = _drawn(layer.rows, self.queries, valid.device)
                valid = valid if drawn is None else valid.index_select(1, drawn)
                exists = exists & valid[:, None, :].to(exists.device)
            several = exists & (keys > 1)
            rows = [
                torch.where(several, h / keys.clamp(min=2).log(), 0.0),
                several,
                torch.where(exists, h, 0.0),
                exists,
            ]
            wide = torch.float32 if h.device.type == "mps" else torch.float64
            found = torch.stack([r.movedim(-2, 0).flatten(1).sum(1, dtype=wide) for r in rows])
            known = self.sums.get(layer.module)
            if known is not None and known.shape != found.shape:  # two attentions of unlike heads: their means
                known, found = (x.mean(1, keepdim=True) for x in (known, found))
            self.sums[layer.module] = found if known is None else known + found

    def means(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Site -> normalised entropy and entropy in nats of each head; NaN where no row counts."""
        return {site: means_of(sums) for site, sums in self.sums.items()}


def means_of(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised entropy and entropy of each head, from sums as :class:`TokenEntropyReader` keeps them."""
    normalized, several, raw, exists = sums.cpu()
    return normalized / several, raw / exists


__all__ = ["TokenEntropyReader", "means_of"]
