"""The forward of a module whose attention is rewritten: a torch function mode that sees what the forward calls.

Three operations are attention: ``scaled_dot_product_attention``, ``multi_head_attention_forward``
(``nn.MultiheadAttention``, whose inner calls no mode sees, so its projections are done here) and the softmax of a map
that the module forms itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_entropy.functional.attention_operands import masked_out
from lightning_entropy.observe.interception import (
    MHA,
    SDPA,
    SOFTMAX,
    multi_head_arguments,
    sdpa_arguments,
    softmax_arguments,
)
from lightning_entropy.surgery.attention_modules import attention_heads
from lightning_entropy.surgery.attention_rewrite import (
    AttentionCall,
    AttentionRewrite,
    ReplacedAttention,
    ScaledLogits,
)
from lightning_entropy.surgery.instance_forward import InstanceForward
from lightning_entropy.surgery.multi_head import multi_head_attention

# Arguments by which libraries hand the other sequence of a cross-attention to it.
_CONTEXT = ("encoder_hidden_states", "key_value_states", "encoder_states", "context", "memory", "kv")


class _Mode(TorchFunctionMode):
    def __init__(self, site: RewrittenForward, kind: str) -> None:
        super().__init__()
        self.site, self.kind = site, kind

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            return self.site.dot_product(self.kind, sdpa_arguments(args, kwargs))
        if func is MHA:
            return self.site.multi_head(self.kind, args, kwargs)
        if func in SOFTMAX:
            return self.site.softmax(self.kind, func, args, kwargs)
        return func(*args, **kwargs)


class RewrittenForward(InstanceForward):
    """The forward of a module whose attention is rewritten, by one or several methods."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        self.rewrites: list[AttentionRewrite] = []
        self.seen = False
        parameters = list(inspect.signature(module.forward).parameters)
        self.context = [(n, parameters.index(n)) for n in _CONTEXT if n in parameters]
        self.heads = attention_heads(module)

    def around(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        """The mode that sees the module's attention."""
        return _Mode(self, self._kind(args, kwargs))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward; an error if no attention was seen in the first one."""
        out = super().__call__(*args, **kwargs)
        if self.active and not self.seen:
            raise ValueError(
                f"{self._methods()} changes the attention of {self._label()}, and none ran in its forward that could "
                "be seen: no scaled_dot_product_attention, multi_head_attention_forward or softmax over keys. Flash, "
                "flex and xformers calls are not seen; choose the fused implementation of torch (transformers: "
                'attn_implementation="sdpa"), or leave this module out with modules=.'
            )
        return out

    def _label(self) -> str:
        kind = type(self.module).__name__
        return f"{self.name} ({kind})" if self.name else kind

    def _methods(self) -> str:
        return ", ".join(dict.fromkeys(rewrite.method for rewrite in self.rewrites))

    def _kind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        module = self.module
        if isinstance(module, nn.MultiheadAttention):
            query = args[0] if args else kwargs["query"]
            key = args[1] if len(args) > 1 else kwargs["key"]
            return "self" if query is key else "cross"
        first = args[0] if args else None
        for name, position in self.context:
            other = kwargs.get(name, args[position] if position < len(args) else None)
            if other is not None and other is not first:
                # diffusers: text and image in one softmax, as in MMDiT
                joint = getattr(module, "add_k_proj", None) is not None
                return "joint" if joint else "cross"
        return "self"

    def _call(self, kind: str, queries: int, keys: int) -> AttentionCall:
        return AttentionCall(self.module, self.name, kind, queries, keys)

    def _factor(self, call: AttentionCall) -> float | Tensor:
        factor: float | Tensor = 1.0
        for rewrite in self.rewrites:
            if isinstance(rewrite, ScaledLogits):
                mine = rewrite.factor(call)
                if isinstance(mine, Tensor) or mine != 1.0:
                    factor = factor * mine
        return factor

    def _replaced(self) -> ReplacedAttention | None:
        return next((r for r in self.rewrites if isinstance(r, ReplacedAttention)), None)

    def dot_product(self, kind: str, given: dict[str, Any]) -> Tensor:
        """One fused attention, rewritten."""
        self._note()
        packed = _packs_heads(given["query"], self.heads)
        call = self._call(kind, 1 if packed else given["query"].shape[-2], given["key"].shape[-2])
        return self._attend(call, self._factor(call), packed, given)

    def _attend(self, call: AttentionCall, factor: float | Tensor, packed: bool, given: dict[str, Any]) -> Tensor:
        replaced = self._replaced()
        if replaced is not None:
            return replaced.attend(call, **given)
        query, mask = given["query"], given.get("attn_mask")
        if isinstance(factor, Tensor):
            rows = self._per_row(factor, query, packed)
            given = {**given, "query": (query * rows).to(query.dtype), "attn_mask": _scaled_bias(mask, rows)}
        elif factor != 1.0:
            scale = given.get("scale")
            scale = (query.shape[-1] ** -0.5 if scale is None else scale) * factor
            given = {**given, "scale": scale, "attn_mask": _scaled_bias(mask, factor)}
        return SDPA(**given)

    def multi_head(self, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One ``multi_head_attention_forward``, rewritten."""
        self._note()
        given = multi_head_arguments(args, kwargs)
        call = self._call(kind, given["query"].shape[0], given["key"].shape[0])
        factor = self._factor(call)
        if self._replaced() is None and not isinstance(factor, Tensor) and factor == 1.0:
            return MHA(*args, **kwargs)

        def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float) -> Tensor:
            inner = {"query": query, "key": key, "value": value, "attn_mask": attn_mask, "dropout_p": dropout_p}
            return self._attend(call, factor, False, inner)

        return multi_head_attention(attend, given, owner=f"{self._methods()}, {self._label()}")

    def softmax(self, kind: str, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The softmax of a map that the module formed, rewritten."""
        logits, dim = softmax_arguments(args, kwargs)
        if dim != logits.dim() - 1 or logits.dim() < 3:
            return func(*args, **kwargs)
        self._note()
        call = self._call(kind, logits.shape[-2], logits.shape[-1])
        replaced = self._replaced()
        if replaced is not None:
            if replaced.pass_map(call, logits):
                return func(*args, **kwargs)
            raise ValueError(
                f"{self._methods()} needs query and key, and {self._label()} forms its own map and takes a softmax of "
                'it. Choose fused attention: timm module.fused_attn = True, transformers attn_implementation="sdpa", '
                "diffusers set_attn_processor(AttnProcessor2_0()); or leave this module out with modules=."
            )
        factor = self._factor(call)
        if not isinstance(factor, Tensor) and factor == 1.0:
            return func(*args, **kwargs)
        scaled = self._scaled_map(logits, factor)
        if args:
            return func(scaled, *args[1:], **kwargs)
        return func(**{**kwargs, "input": scaled})

    def _note(self) -> None:
        if not self.seen:  # assigned once, since compiled code guards on it
            self.seen = True

    def _per_row(self, factor: Tensor, query: Tensor, packed: bool) -> Tensor:
        heads = factor.shape[0]
        if packed:  # transformers: one query each of several heads that share a key head
            return factor[:, -1].view(query.shape[-3], query.shape[-2], 1)
        if query.shape[-3] != heads:
            raise ValueError(
                f"{self._methods()} has a factor for each of {heads} heads, and {self._label()} computes attention "
                f"with {query.shape[-3]}"
            )
        return factor[..., None]

    def _scaled_map(self, logits: Tensor, factor: float | Tensor) -> Tensor:
        if not isinstance(factor, Tensor):
            return _scaled_bias(logits, factor)
        heads = factor.shape[0]
        if logits.dim() == 3:  # batch and heads in one axis, as in diffusers' AttnProcessor
            if logits.shape[0] % heads:
                raise ValueError(f"{self._label()}: {logits.shape[0]} maps are not a multiple of {heads} heads")
            return _scaled_bias(logits.unflatten(0, (-1, heads)), factor[..., None]).flatten(0, 1)
        return _scaled_bias(logits, self._per_row(factor, logits, False))


def _packs_heads(query: Tensor, heads: int | None) -> bool:
    own = query.shape[-3] if query.dim() > 2 else 1
    return heads is not None and own < heads and own * query.shape[-2] == heads


def _scaled_bias(bias: Any, factor: float | Tensor) -> Any:
    """What is added to logits, or the logits, times the factor; what stands for a masked entry stays."""
    if bias is None or bias.dtype == torch.bool:
        return bias
    out = masked_out(bias.detach())
    kept = torch.where(out, 0.0, bias)  # -inf times the factor has no gradient
    return torch.where(out, bias, (kept * factor).to(bias.dtype))


__all__ = ["RewrittenForward"]
