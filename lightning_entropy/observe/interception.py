"""Seeing attention where it is computed: a torch function mode and the hooks that name the running module.

The mode sees ``softmax`` in its three spellings, ``scaled_dot_product_attention`` and
``multi_head_attention_forward`` in eager and in compiled code. Its results are passed on untouched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_entropy.functional.attention_operands import for_query_heads, wide

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)
SDPA = F.scaled_dot_product_attention
MHA = F.multi_head_attention_forward


class Call(NamedTuple):
    """One intercepted operation.

    ``logits`` is None where only the shape is kept: self-attention maps of N x N are never held.
    """

    site: str
    ordinal: int
    source: str
    shape: tuple[int, ...]
    dim: int
    logits: Tensor | None


class Interceptor(TorchFunctionMode):
    """Records the attention operations that run while it is entered.

    Args:
        calls: the list that receives them.
        site: the name of the module that runs, or None to ask ``stack``.
        stack: names of the modules that run, innermost last; empty outside every module.
    """

    def __init__(self, calls: list[Call], site: str | None = None, stack: list[str] | None = None) -> None:
        super().__init__()
        self.calls = calls
        self.site = site
        self.stack = stack if stack is not None else []
        self.ordinals: dict[str, int] = {}

    def restart(self) -> None:
        """Count calls from 0 again: a new forward of the site, or a new step."""
        self.ordinals.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and note it if it computes attention."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in SOFTMAX:
            logits, dim = softmax_arguments(args, kwargs)
            self._note("softmax", tuple(logits.shape), dim, logits)
        elif func is SDPA:
            given = sdpa_arguments(args, kwargs)
            q, k = given["query"], given["key"]
            map_logits = dot_product_logits(**given) if q.shape[-2] < k.shape[-2] else None
            shape = (*q.shape[:-1], k.shape[-2])
            self._note("scaled_dot_product_attention", shape, len(shape) - 1, map_logits)
        elif func is MHA:
            given = multi_head_arguments(args, kwargs)
            q, k = given["query"], given["key"]
            map_logits = _multi_head_logits(**given) if q.shape[0] < k.shape[0] else None
            batch = q.shape[1] if q.dim() == 3 else 1
            self._note("multi_head_attention", (batch, given["num_heads"], q.shape[0], k.shape[0]), 3, map_logits)
        return out

    def _note(self, source: str, shape: tuple[int, ...], dim: int, logits: Tensor | None) -> None:
        site = self.site if self.site is not None else (self.stack[-1] if self.stack else "")
        ordinal = self.ordinals.get(site, 0)
        self.ordinals[site] = ordinal + 1
        held = None if is_square(shape, dim) else logits
        self.calls.append(Call(site, ordinal, source, shape, dim, held))


def softmax_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, int]:
    """The logits of a softmax call and its dimension, counted from the front."""
    logits = args[0] if args else kwargs["input"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if dim is None:  # F.softmax still accepts this, with a rule of its own
        dim = 0 if logits.dim() in (0, 1, 3) else 1
    return logits, dim % max(logits.dim(), 1)


_SDPA_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_MHA_NAMES = tuple(inspect.signature(MHA).parameters)


def sdpa_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``scaled_dot_product_attention`` by name."""
    return {**dict(zip(_SDPA_NAMES, args)), **kwargs}


def multi_head_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``multi_head_attention_forward`` by name."""
    return {**dict(zip(_MHA_NAMES, args)), **kwargs}


def is_square(shape: tuple[int, ...], dim: int) -> bool:
    """Whether an attention is between equals: its last two axes, queries and keys, are as long."""
    return len(shape) > 2 and dim >= len(shape) - 2 and shape[-1] == shape[-2] > 1


def dot_product_logits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The map of ``scaled_dot_product_attention`` before its softmax: (..., queries, keys), float32 or wider."""
    with torch.autocast(query.device.type, enabled=False):
        q = wide(query)
        k = key.to(q.dtype)
        if enable_gqa:
            k = for_query_heads(k, q.shape[-3])
        logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            allowed = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
            logits = logits.masked_fill(~allowed, -torch.inf)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                logits = logits.masked_fill(~attn_mask, -torch.inf)
            else:
                logits = logits + attn_mask
    return logits


def _multi_head_logits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Tensor | None:
    """Logits of ``nn.MultiheadAttention`` used as pooling: (bags, heads, queries, keys), float32 or wider.

    The keys are not projected a second time: each query is carried into the space of the keys by the transposed key
    projection, q (W_k x) = (W_k^T q) x, which costs queries x heads instead of embedding size for every instance. The
    key bias adds a constant to a row and drops out of the softmax.
    """
    if bias_k is not None or add_zero_attn or static_k is not None:
        return None  # an extra key that is no instance
    if query.dim() == 2:
        query, key = query.unsqueeze(1), key.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    width = query.shape[-1]
    if use_separate_proj_weight:
        w_q, w_k = q_proj_weight, k_proj_weight
    else:
        assert in_proj_weight is not None
        w_q, w_k = in_proj_weight[:width], in_proj_weight[width : 2 * width]
    assert w_q is not None
    assert w_k is not None
    with torch.autocast(query.device.type, enabled=False):
        double = query.dtype == torch.float64
        to = torch.float64 if double else torch.float32
        q = F.linear(query.to(to), w_q.to(to), None if in_proj_bias is None else in_proj_bias[:width].to(to))
        queries, bags, size = q.shape[0], q.shape[1], width // num_heads
        q = q.view(queries, bags, num_heads, size) * size**-0.5
        carried = torch.einsum("qbhd,hde->bhqe", q, w_k.to(to).view(num_heads, size, -1))
        logits = torch.einsum("bhqe,nbe->bhqn", carried, key.to(to))
        if attn_mask is not None:
            added = attn_mask
            if attn_mask.dtype == torch.bool:
                added = torch.zeros_like(attn_mask, dtype=to).masked_fill(attn_mask, -torch.inf)
            logits = logits + (added.view(bags, num_heads, *added.shape[-2:]) if added.dim() == 3 else added)
        if key_padding_mask is not None:
            padding = key_padding_mask[:, None, None, :]
            if padding.dtype == torch.bool:
                logits = logits.masked_fill(padding, -torch.inf)
            else:
                logits = logits + padding
    return logits


class InertHook:
    """What is left of a hook in a deep copy or a pickle of the module: nothing."""

    def __call__(self, *args: Any) -> None:
        """Do nothing."""


class LiveHook:
    """A hook that belongs to one module object; copies of the module (EMA, weight averaging) get an inert one."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        """Pass the call on."""
        self.function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> InertHook:
        """An inert hook."""
        return InertHook()

    def __reduce__(self) -> tuple[type[InertHook], tuple[()]]:
        """An inert hook."""
        return (InertHook, ())


class Handles:
    """Hook handles that are removed together, any number of times."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def before(self, module: nn.Module, function: Callable[..., None]) -> None:
        """Call ``function(module, args, kwargs)`` before the module's forward."""
        self._handles.append(module.register_forward_pre_hook(LiveHook(function), with_kwargs=True))

    def after(self, module: nn.Module, function: Callable[..., None]) -> None:
        """Call ``function(module, args, output)`` after the module's forward, also when it raises.

        Prepended, so that what one pre-hook opened last is closed first.
        """
        handle = module.register_forward_hook(LiveHook(function), prepend=True, always_call=True)
        self._handles.append(handle)

    def remove(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def keep_padded(handles: Handles, root: nn.Module, recording: Callable[[], bool]) -> None:
    """Have ``nn.TransformerEncoder`` keep padded batches padded while something is recorded.

    In evaluation it packs them into nested tensors for a fused layer, which a torch function mode switches off; what is
    left of the layer cannot take them. Only outputs at padded positions differ (the packed form gives zeros there).
    """
    for encoder in [m for m in root.modules() if isinstance(m, nn.TransformerEncoder)]:
        packed: list[bool] = []

        def enter(module: Any, args: Any, kwargs: Any, packed: list[bool] = packed) -> None:
            if recording() and module.use_nested_tensor:
                packed.append(True)
                module.use_nested_tensor = False

        def leave(module: Any, args: Any, output: Any, packed: list[bool] = packed) -> None:
            if packed:
                module.use_nested_tensor = packed.pop()

        handles.before(encoder, enter)
        handles.after(encoder, leave)
