"""peft's adapter of ``nn.MultiheadAttention``, computed without touching the frozen weights.

peft adds the adapter to the frozen weight before each forward and subtracts it afterwards: the weight drifts by
rounding, and is a new ``nn.Parameter`` each time, which optimizers and DDP then do not know; and the adapter of the
output projection is added twice (0.21). Here the sum is handed to the forward, and the frozen weight stays the object
that it was, to the bit. Names and shapes of the adapter are peft's.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_entropy.extras import require


class _FunctionalForward:
    """What differs from peft's class; its other methods stay."""

    def forward(self: Any, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self.disable_adapters or self.merged:
            result: tuple[Tensor, Tensor | None] = self.base_layer(query, *args, **kwargs)
            return result
        inner = self.base_layer.out_proj
        weight, out = self.base_layer.in_proj_weight, inner.base_layer.weight
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                weight = weight + _delta(self, adapter).to(weight.dtype)
                out = out + _delta(inner, adapter).to(out.dtype)
        changed = {"in_proj_weight": weight, "out_proj.base_layer.weight": out}
        result = functional_call(self.base_layer, changed, (query, *args), kwargs, tie_weights=False)
        return result

    def _restore_weights(self) -> None:
        """Nothing was taken away."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return (_restore, (), *object.__reduce_ex__(self, protocol)[2:])


def _delta(layer: Any, adapter: str) -> Tensor:
    product: Tensor = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
    return product * layer.scaling[adapter]


@functools.cache
def _adapted_class() -> type[nn.Module]:
    kind = require("peft.tuners.lora.layer", extra="finetuning").MultiheadAttention
    return type("MultiheadAttention", (_FunctionalForward, kind), {"__module__": __name__, "__doc__": __doc__})


def _restore() -> Any:
    kind = _adapted_class()
    return kind.__new__(kind)


def is_adapted_attention(module: nn.Module) -> bool:
    """Whether a module is an ``nn.MultiheadAttention`` with peft's adapter, told without importing peft."""
    return any(b.__name__ == "MultiheadAttention" and b.__module__.startswith("peft.") for b in type(module).__mro__)


def compute_functionally(module: nn.Module) -> None:
    """Have peft's adapter of an ``nn.MultiheadAttention`` computed without touching its frozen weights."""
    module.__class__ = _adapted_class()


def train_parts(module: Any, parts: set[str], adapter: str) -> list[nn.Parameter]:
    """The tensors of the adapter that are to be trained.

    peft adapts the projections of q, k and v and that of the output together. The adapter of one that was not chosen
    stays at zero.

    Args:
        module: of :func:`compute_functionally`.
        parts: what was chosen, of ``in_proj_weight`` and ``out_proj.weight``.
        adapter: its name in peft.
    """
    holders = [("in_proj_weight", module), ("out_proj.weight", module.base_layer.out_proj)]
    chosen = [holder for part, holder in holders if part in parts]
    return [matrix[adapter].weight for holder in chosen for matrix in (holder.lora_A, holder.lora_B)]


@torch.no_grad()
def merge_attention(module: Any, adapter: str) -> nn.MultiheadAttention:
    """The plain attention with the adapter added to its weights, in place."""
    base: nn.MultiheadAttention = module.base_layer
    inner: Any = base.out_proj
    assert base.in_proj_weight is not None
    base.in_proj_weight.add_(_delta(module, adapter).to(base.in_proj_weight.dtype))
    inner.base_layer.weight.add_(_delta(inner, adapter).to(inner.base_layer.weight.dtype))
    base.out_proj = inner.base_layer
    return base


__all__ = ["compute_functionally", "is_adapted_attention", "merge_attention", "train_parts"]
