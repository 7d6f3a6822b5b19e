"""LSSA and LSSAR: softplus attention, length-scaled and re-weighted (arXiv 2501.13428).

    S_j = log(d) log(N) cos(q, k_j),  A = softplus(S) / sum,  B = relu(N A - O)^p / sum

in the place of softmax(q k / sqrt(d)); see :mod:`lightning_entropy.functional.softplus_attention` for the stable form.
The model keeps its weights. A model that was trained with softmax attention is another model afterwards: the paper
trains with LSSAR from the start. Ours are the stable form, the count of keys under masks and caches, and that any
module is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_entropy.arguments import check_types
from lightning_entropy.extras import require
from lightning_entropy.functional.softplus_attention import lssa_attention, lssar_attention
from lightning_entropy.surgery.attention_call import AttentionCall, ReplacedAttention, rewrite_attention
from lightning_entropy.surgery.report import SurgeryReport
from lightning_entropy.training.surgery import SurgeryCallback

VARIANTS = ("lssa", "lssar")


def _attention(variant: str, power: float, offset_rows: int) -> Callable[..., Tensor]:
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    one = torch.ones(1, 1, 1, 1)
    lssar_attention(one, one, one, power=power, offset_rows=offset_rows)  # the function knows the ranges
    return lssa_attention if variant == "lssa" else partial(lssar_attention, power=power, offset_rows=offset_rows)


class _Softplus(ReplacedAttention):
    method = "SoftplusAttention"

    def __init__(self, variant: str, power: float, offset_rows: int) -> None:
        self.attention = _attention(variant, power, offset_rows)
        self.text = f"attentions changed to {'LSSA' if variant == 'lssa' else f'LSSAR, power {power:g}'}"

    def describe(self) -> str:
        return self.text

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
        # The module's own scale belongs to the dot product; the cosine has its own.
        return self.attention(query, key, value, attn_mask, dropout_p, is_causal, None, enable_gqa)


def use_softplus_attention(
    model: nn.Module,
    *,
    variant: str = "lssar",
    power: float = 15.0,
    offset_rows: int = 3,
    modules: str | Iterable[str] | None = None,
) -> SurgeryReport:
    """Put LSSA or LSSAR in the place of a model's fused attention.

    Reached are ``scaled_dot_product_attention`` (timm, transformers, diffusers, your own) and
    ``nn.MultiheadAttention``. Masks, causality and grouped keys are followed; the module's own scale is not, since the
    logits are cosines.

    Args:
        model: any module; changed in place.
        variant: ``"lssar"``, or ``"lssa"`` without the re-weighting.
        power: exponent of the re-weighting; 15 in the paper, 3 at the training length.
        offset_rows: queries with at most this many keys keep all of them.
        modules: shell patterns over dotted names of attention modules or of modules that contain them; None takes
            every attention.

    Returns:
        The report; ``undo()`` restores the model bit for bit.

    Raises:
        ValueError: if an argument is out of range, or nothing is recognised as attention. The first forward raises
            where a module forms its map itself (eager attention): query and key are needed.

    Reference:
        arXiv 2501.13428.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> report = use_softplus_attention(layer, variant="lssa")
        >>> len(report.changes)
        1
    """
    return rewrite_attention(model, _Softplus(variant, power, offset_rows), modules)


class SoftplusAttention(SurgeryCallback):
    """Trains, and evaluates, a model with LSSA or LSSAR in the place of its softmax attention.

    The attention is replaced once, before weights are restored and optimizers are built; the state dict keeps its
    keys, so that checkpoints load with and without the callback.

    Args:
        variant: see :func:`use_softplus_attention`, and so for the others.
        power: see there.
        offset_rows: see there.
        modules: see there.

    Raises:
        ValueError: as there, when the model exists.

    Reference:
        arXiv 2501.13428.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SoftplusAttention(power=3)])
    """

    def __init__(
        self,
        variant: str = "lssar",
        *,
        power: float = 15.0,
        offset_rows: int = 3,
        modules: str | list[str] | None = None,
    ) -> None:
        check_types(SoftplusAttention, locals())
        super().__init__()
        _attention(variant, power, offset_rows)
        self.variant = variant
        self.power = power
        self.offset_rows = offset_rows
        self.modules = modules

    def operate(self, module: nn.Module) -> SurgeryReport:
        """Replace the attention of the module."""
        return use_softplus_attention(
            module,
            variant=self.variant,
            power=self.power,
            offset_rows=self.offset_rows,
            modules=self.modules,
        )


class _Interface:
    """The signature of transformers' attention functions around one of ours."""

    def __init__(self, name: str, attention: Callable[..., Tensor]) -> None:
        self.name, self.attention = name, attention

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        for unknown in ("softcap", "s_aux", "cache"):
            if kwargs.get(unknown) is not None:
                raise ValueError(
                    f'attn_implementation="{self.name}": {type(module).__name__} passes {unknown}, which softplus '
                    "attention has no place for. Use another model or another implementation."
                )
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = bool(causal) and attention_mask is None and query.shape[-2] > 1
        if causal and key.shape[-2] > query.shape[-2]:  # a static cache that is empty but for these tokens
            key, value = key[..., : query.shape[-2], :], value[..., : query.shape[-2], :]
        if position_bias is not None:
            attention_mask = _with_bias(position_bias[..., : key.shape[-2]], attention_mask, causal)
            causal = False
        grouped = query.shape[-3] != key.shape[-3]
        out = self.attention(query, key, value, attention_mask, dropout, causal, None, grouped)
        return out.transpose(1, 2).contiguous(), None


def _with_bias(bias: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if causal:
        mask = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -torch.inf)
    return bias + mask


def register_softplus_attention(*, power: float = 15.0, offset_rows: int = 3) -> tuple[str, ...]:
    """Teach transformers the attention implementations ``"lssa"`` and ``"lssar"``.

    Args:
        power: exponent of the re-weighting of ``"lssar"``.
        offset_rows: queries with at most this many keys keep all of them.

    Returns:
        The two names, for ``model.set_attn_implementation(name)`` or ``from_config(..., attn_implementation=name)``.
        Registered again, they take the new arguments, also in models that use them already.

    Raises:
        ValueError: if an argument is out of range.
        ImportError: if transformers is absent, or older than its attention interface (4.53).

    Reference:
        arXiv 2501.13428.

    Example:
        >>> register_softplus_attention(power=3)
        ('lssa', 'lssar')
    """
    functions = {name: _Interface(name, _attention(name, power, offset_rows)) for name in VARIANTS}
    transformers = require("transformers", extra="finetuning")
    if not hasattr(transformers, "AttentionMaskInterface"):
        raise ImportError(
            f"register_softplus_attention needs transformers 4.53 or later, found {transformers.__version__}: "
            "pip install -U transformers. use_softplus_attention(model) works with older versions."
        )
    masking = require("transformers.masking_utils", extra="finetuning")
    for name, function in functions.items():
        transformers.AttentionInterface.register(name, function)
        transformers.AttentionMaskInterface.register(name, masking.sdpa_mask)
    return VARIANTS


__all__ = ["VARIANTS", "SoftplusAttention", "register_softplus_attention", "use_softplus_attention"]
