"""Reads the entropy of every attention of an unmodified transformer, without its maps where the model forms none.

Fused attention is read from the query and key that enter it, ``nn.MultiheadAttention`` from its projections, eager
attention from the logits that enter its softmax. One mechanism for every architecture; the output is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_entropy.functional import attention_entropy, entropy_from_logits
from lightning_entropy.observe.interception import (
    MHA,
    SDPA,
    SOFTMAX,
    Handles,
    is_square,
    multi_head_arguments,
    sdpa_arguments,
    softmax_arguments,
)
from lightning_entropy.observe.records import masked_out
from lightning_entropy.observe.selection import as_patterns, match_modules


@dataclass(frozen=True)
class LayerEntropy:
    """The entropy of one attention in one call.

    Attributes:
        module: dotted name of the innermost module that computed it.
        source: ``"scaled_dot_product_attention"``, ``"multi_head_attention"`` or ``"softmax"``.
        entropy: ``(..., heads, queries)`` in nats, float32 or wider, before dropout; with its graph where gradients
            are enabled.
        keys: how many keys each query may attend to, broadcastable to ``entropy``.
    """

    module: str
    source: str
    entropy: Tensor
    keys: Tensor

    def normalized(self) -> Tensor:
        """Entropy divided by the log of the row's allowed keys; NaN for rows with fewer than two."""
        return torch.where(self.keys > 1, self.entropy / self.keys.clamp(min=2).log(), torch.nan)

    def per_head(self, normalize: bool = True) -> Tensor:
        """Mean over everything but the heads, rows with fewer than two allowed keys left out: ``(heads,)``."""
        values = self.normalized() if normalize else torch.where(self.keys > 1, self.entropy, torch.nan)
        return values.movedim(-2, 0).flatten(1).nanmean(1)


class _EntropyMode(TorchFunctionMode):
    def __init__(self, found: list[LayerEntropy], stack: list[str], wanted: Callable[[str], bool]) -> None:
        super().__init__()
        self.found, self.stack, self.wanted = found, stack, wanted

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is SDPA or func is MHA or func in SOFTMAX:
            site = self.stack[-1] if self.stack else ""
            if self.wanted(site):
                read = _of_sdpa if func is SDPA else _of_multi_head if func is MHA else _of_softmax
                entry = read(site, args, kwargs)
                if entry is not None:
                    self.found.append(entry)
        return out


def _keys(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    count = key.shape[-2]
    if is_causal:
        return torch.arange(1, query.shape[-2] + 1, device=query.device).clamp(max=count).float()
    if mask is None:
        return torch.full((1,), float(count), device=query.device)
    allowed = mask if mask.dtype == torch.bool else ~masked_out(mask.detach())
    return allowed.expand(*allowed.shape[:-1], count).sum(-1).float()


def _entry(
    site: str, source: str, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, **options: Any
) -> LayerEntropy:
    if mask is not None and mask.dtype != torch.bool and not mask.requires_grad:
        # Libraries spell boolean masks as 0 and a very negative number; a true bias needs the blockwise form.
        out = masked_out(mask)
        if bool((out | (mask == 0)).all()):
            mask = ~out
    h = attention_entropy(query, key, mask, is_causal, **options)
    assert isinstance(h, Tensor)
    return LayerEntropy(site, source, h, _keys(query, key, mask, is_causal))


def _of_sdpa(site: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerEntropy:
    given = sdpa_arguments(args, kwargs)
    return _entry(
        site,
        "scaled_dot_product_attention",
        given["query"],
        given["key"],
        given.get("attn_mask"),
        given.get("is_causal", False),
        scale=given.get("scale"),
        enable_gqa=given.get("enable_gqa", False),
    )


def _of_softmax(site: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerEntropy | None:
    logits, dim = softmax_arguments(args, kwargs)
    if dim != logits.dim() - 1 or not (is_square(tuple(logits.shape), dim) or logits.dim() == 4):
        return None  # a pooling or a classifier's softmax
    out = masked_out(logits.detach())
    h = entropy_from_logits(logits.masked_fill(out, -torch.inf))
    return LayerEntropy(site, "softmax", h, (~out).sum(-1).float())


def _of_multi_head(site: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerEntropy | None:
    given = multi_head_arguments(args, kwargs)
    if given.get("bias_k") is not None or given.get("add_zero_attn") or given.get("static_k") is not None:
        return None  # keys that are no tokens
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
        return F.linear(x, weight, b).view(x.shape[0], batch, heads, width // heads).permute(1, 2, 0, 3)

    q, k = split(query, w_q, b_q), split(key, w_k, b_k)
    if mask is not None and mask.dim() == 3:
        mask = mask.view(batch, heads, *mask.shape[-2:])
    return _entry(site, "multi_head_attention", q, k, _joint_mask(mask, padding, q), False)


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


class AttentionEntropyReader:
    """Reads the entropy of every attention that a module computes while the context is open.

    Args:
        module: any module; it gets hooks for the time of the context.
        modules: shell patterns over dotted names of the modules whose attention is read, with all that they contain;
            None reads all.

    Raises:
        ValueError: if a pattern matches no module; on leaving the context, if no attention ran.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> with AttentionEntropyReader(layer) as reader:
        ...     _ = layer(torch.zeros(1, 5, 8))
        >>> reader.layers[0].per_head()
        tensor([1.0000, 1.0000], grad_fn=<NanmeanBackward0>)
    """

    def __init__(self, module: nn.Module, modules: str | Iterable[str] | None = None) -> None:
        self.module = module
        self.patterns = as_patterns(modules)
        self.layers: list[LayerEntropy] = []
        self._stack: list[str] = []
        self._handles = Handles()
        names: list[str] | None = None
        if self.patterns is not None:
            found = match_modules(module, self.patterns, type(self).__name__)
            names = [name for matched in found.values() for name in matched]

        def wanted(site: str) -> bool:
            return names is None or any(site == n or not n or site.startswith(f"{n}.") for n in names)

        self._mode = _EntropyMode(self.layers, self._stack, wanted)

    def __enter__(self) -> AttentionEntropyReader:
        self.layers.clear()
        for name, module in self.module.named_modules():

            def enter(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                self._stack.append(name)

            def leave(_: nn.Module, args: Any, output: Any) -> None:
                self._stack.pop()

            self._handles.before(module, enter)
            self._handles.after(module, leave)
        self._mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mode.__exit__(kind, error, trace)
        self._handles.remove()
        self._stack.clear()
        if kind is None and not self.layers:
            where = "" if self.patterns is None else f" in the modules that {self.patterns} match"
            raise ValueError(
                f"AttentionEntropyReader: no attention between tokens ran in {type(self.module).__name__}{where}. "
                "It reads scaled_dot_product_attention, multi_head_attention_forward, and softmax over logits."
            )


__all__ = ["AttentionEntropyReader", "LayerEntropy"]
