"""Rewrites attention where a module computes it, whatever its architecture.

A rewrite either multiplies the logits by a factor, which works for every way in which attention is computed, or puts
another function of query, key and value in the place of attention, for which the map of an eager module is not enough.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_entropy.observe.selection import as_patterns
from lightning_entropy.surgery.attention_modules import chosen_attention
from lightning_entropy.surgery.attention_rewrite import (
    AttentionCall,
    AttentionRewrite,
    ReplacedAttention,
    ScaledLogits,
)
from lightning_entropy.surgery.instance_forward import installed
from lightning_entropy.surgery.report import Change, Refusal, SurgeryReport
from lightning_entropy.surgery.rewritten_forward import RewrittenForward

_WAS_NESTED = "_used_nested_tensor_before_rewrite"


def rewrite_attention(
    model: nn.Module, rewrite: AttentionRewrite, modules: str | Iterable[str] | None = None
) -> SurgeryReport:
    """Give a rewrite to attention modules of a model.

    The modules keep their class, parameters and state dict; a deep copy of the model is rewritten like the original. A
    module that the same method rewrites already is listed as refused and left as it is.

    Args:
        model: any module.
        rewrite: a :class:`ScaledLogits` or :class:`ReplacedAttention`.
        modules: shell patterns over dotted names of attention modules or of modules that contain them; None takes
            every attention that is recognised.

    Returns:
        What was changed and refused; ``undo()`` restores every module.

    Raises:
        ValueError: if nothing is recognised as attention, a pattern matches nothing, or every module is refused for
            another reason than that it is rewritten already. Where a chosen module turns out to compute no attention
            that can be seen, the first forward says so.
    """
    changes: list[Change] = []
    refused: list[Refusal] = []
    sites: list[RewrittenForward] = []
    repeated = False
    before = sum(p.numel() for p in model.parameters())
    for name, module in chosen_attention(model, as_patterns(modules), rewrite.method).items():
        site = installed(module, RewrittenForward) or RewrittenForward(module, name)
        reason = _clash(site, rewrite)
        if reason is None:
            reason = rewrite.prepare(name, module)
        else:
            repeated = repeated or any(r.method == rewrite.method for r in site.rewrites)
        if reason is not None:
            refused.append(Refusal(name, reason))
            continue
        site.rewrites.append(rewrite)
        site.install()
        if isinstance(module, nn.MultiheadAttention) and _keep_whole not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_keep_whole)
        sites.append(site)
        changes.append(Change(name, rewrite.describe()))
    if not changes and not repeated:
        lines = "\n".join(f"  {r.module}: {r.reason}" for r in refused)
        raise ValueError(f"{rewrite.method} can change none of the {len(refused)} attention modules:\n{lines}")
    encoders = _without_nested_tensors(model)
    added = sum(p.numel() for p in model.parameters()) - before
    report = SurgeryReport(rewrite.method, changes, refused, added)

    def undo() -> None:
        for site in sites:
            _release(site, rewrite)
        sites.clear()
        _nested_tensors_again(encoders)

    report.on_undo(undo)
    return report


def _clash(site: RewrittenForward, rewrite: AttentionRewrite) -> str | None:
    for other in site.rewrites:
        if other.method == rewrite.method:
            return f"rewritten by {other.method} already ({other.describe()}); undo that first to change it"
        if isinstance(other, ReplacedAttention) or isinstance(rewrite, ReplacedAttention):
            return f"rewritten by {other.method}, which cannot be combined with {rewrite.method}"
    return None


def _release(site: RewrittenForward, rewrite: AttentionRewrite) -> None:
    if rewrite not in site.rewrites:
        return
    site.rewrites.remove(rewrite)
    rewrite.undo(site.module)
    if not site.rewrites:
        site.remove()
        hooks = site.module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _keep_whole]:
            del hooks[key]


def _keep_whole(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that does nothing: ``nn.TransformerEncoderLayer`` runs a hooked attention and does not fuse it away."""


def _rewritten_inside(encoder: nn.Module) -> bool:
    return any(installed(inner, RewrittenForward) is not None for inner in encoder.modules())


def _without_nested_tensors(model: nn.Module) -> list[nn.TransformerEncoder]:
    """Encoders that would pack padded batches for the fused layer that is off now; they keep them padded."""
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and _rewritten_inside(m)]
    for encoder in encoders:
        if encoder.use_nested_tensor:
            encoder.use_nested_tensor = False
            encoder.__dict__[_WAS_NESTED] = True
    return encoders


def _nested_tensors_again(encoders: Iterable[nn.Module]) -> None:
    for encoder in encoders:
        if _WAS_NESTED in encoder.__dict__ and not _rewritten_inside(encoder):
            del encoder.__dict__[_WAS_NESTED]
            setattr(encoder, "use_nested_tensor", True)  # noqa: B010 (typed as a submodule)


def restore_attention(model: nn.Module, method: str | None = None) -> list[str]:
    """Take the rewrites off a model whose report is not at hand, a deep copy for example.

    Args:
        model: any module.
        method: take off this method's only.

    Returns:
        The names of the modules that were changed.
    """
    restored = []
    for name, module in model.named_modules():
        site = installed(module, RewrittenForward)
        for rewrite in [r for r in site.rewrites if method in (None, r.method)] if site is not None else []:
            assert site is not None
            _release(site, rewrite)
            restored.append(name)
    _nested_tensors_again([m for m in model.modules() if isinstance(m, nn.TransformerEncoder)])
    return list(dict.fromkeys(restored))


__all__ = [
    "AttentionCall",
    "AttentionRewrite",
    "ReplacedAttention",
    "RewrittenForward",
    "ScaledLogits",
    "restore_attention",
    "rewrite_attention",
]
