"""Blocks without what private inference cannot afford: normalisations, and activations (arXiv 2501.03489)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_entropy.observe.selection import as_patterns, match_modules
from lightning_entropy.surgery.feed_forward import (
    FeedForward,
    FusedFeedForward,
    chosen_feed_forwards,
    require_changes,
)
from lightning_entropy.surgery.report import Change, Refusal, SurgeryReport
from lightning_entropy.surgery.scaled_feed_forward import is_scaled

_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    holder, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(holder), attribute, new)


def fuse_linear_ffn(
    model: nn.Module, *, modules: str | Iterable[str] | None = None, drop_activation: bool = False
) -> SurgeryReport:
    """Merge the two linear layers of feed-forwards that have no activation into one, d x d.

    Args:
        model: any module; changed in place.
        modules: shell patterns over dotted names of feed-forwards, or of modules that contain them; None takes all.
        drop_activation: merge those with an activation too, as if they had none (this changes the function).

    Returns:
        The report; ``undo()`` puts back the modules with the weights that they had.

    Raises:
        ValueError: if there is no feed-forward, a pattern matches none, or all are refused: with another activation
            than the identity, more than two layers, dropout, or layers that are no module of their own.

    Reference:
        arXiv 2501.03489, ScFuFFN.

    Example:
        >>> ffn = nn.Sequential(nn.Linear(4, 16), nn.Identity(), nn.Linear(16, 4))
        >>> print(fuse_linear_ffn(nn.ModuleDict({"mlp": ffn})))
        FusedFFN: 1 of 1 feed-forward fused (mlp), -128 parameters; nothing refused
    """
    report = SurgeryReport("FusedFFN")
    repeated = False
    for found in chosen_feed_forwards(model, modules, report.method):
        old = found.module
        reason = _why_not_fused(model, found, drop_activation)
        if reason is not None:
            repeated = repeated or isinstance(old, FusedFeedForward)
            report.refused.append(Refusal(found.name, reason))
            continue
        fused = _fused(found)
        _replace(model, found.name, fused)
        report.on_undo(lambda name=found.name, old=old: _replace(model, name, old))  # type: ignore[misc]
        count = sum(p.numel() for p in fused.parameters()) - sum(p.numel() for p in old.parameters())
        report.added_parameters += count
        report.changes.append(Change(found.name, "feed-forward fused"))
    return require_changes(report, repeated)


def _why_not_fused(model: nn.Module, found: FeedForward, drop_activation: bool) -> str | None:
    if isinstance(found.module, FusedFeedForward):
        return "it is fused already"
    if is_scaled(found.module):
        return "its branch is scaled: fuse first, then scale"
    if found.module is model or len(found.layers) != 2 or len(list(found.module.parameters())) > 4:
        return "it holds more than two linear layers, or is the whole model"
    rates = [m.p for m in found.module.modules() if isinstance(m, nn.Dropout) and m.p]
    if rates:
        return f"it has dropout {max(rates)}, which one layer cannot have between: set it to 0"
    if drop_activation:
        return None
    like = next(found.last.parameters())
    x = torch.randn(8, found.width, generator=torch.Generator().manual_seed(0)).to(like)
    with torch.no_grad():
        try:
            out = found.module(x)
        except Exception as error:  # a stranger's forward may want anything
            return f"it did not run on tokens alone ({type(error).__name__})"
        if not torch.allclose(out, _fused(found)(x), rtol=1e-3, atol=1e-4 * float(out.abs().max())):
            return "its activation is not the identity (drop_activation=True drops it)"
    return None


@torch.no_grad()
def _fused(found: FeedForward) -> FusedFeedForward:
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for layer in found.layers:
        weight, bias = layer.weight, getattr(layer, "bias", None)
        assert isinstance(weight, Tensor)
        weights.append((weight if isinstance(layer, nn.Linear) else weight.T).double())
        biases.append(bias.double() if isinstance(bias, Tensor) else weights[-1].new_zeros(len(weights[-1])))
    like = next(found.last.parameters())
    fused = FusedFeedForward(found.width, found.width, device=like.device, dtype=like.dtype)
    fused.weight.copy_(weights[1] @ weights[0])
    fused.bias.copy_(weights[1] @ biases[0] + biases[1])
    return fused.train(found.module.training)


class RemovedNorm(nn.Identity):
    """In the place of a normalisation. Its ``eps`` is no number, so that torch's fused encoder layer is not taken."""

    eps = float("nan")


def remove_layer_norm(model: nn.Module, *, modules: str | Iterable[str] | None = None) -> SurgeryReport:
    """Put the identity in the place of layer and RMS normalisations.

    Args:
        model: any module; changed in place, and what it computes with it.
        modules: shell patterns over dotted names of normalisations, or of modules that contain them; None takes all,
            those of queries and keys too.

    Returns:
        The report; ``undo()`` puts them back.

    Raises:
        ValueError: if there is none, or a pattern matches none.

    Reference:
        arXiv 2501.03489.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16)
        >>> print(remove_layer_norm(layer))
        LayerNormFree: 2 of 2 LayerNorm removed (norm*), -32 parameters; nothing refused
    """
    report = SurgeryReport("LayerNormFree")
    norms = {name: m for name, m in model.named_modules() if name and _is_norm(m)}
    removed = {name for name, m in model.named_modules() if isinstance(m, RemovedNorm)}
    if not norms and not removed:
        raise ValueError(f"{report.method} found no layer or RMS normalisation in {type(model).__name__}.")
    patterns = as_patterns(modules)
    if patterns is not None:
        chosen: set[str] = set()
        for pattern, names in match_modules(model, patterns, report.method).items():
            inside = {k for k in {*norms, *removed} if any(k == n or not n or k.startswith(n + ".") for n in names)}
            if not inside:
                raise ValueError(
                    f"{report.method}(modules={pattern!r}) matched {len(names)} modules in {type(model).__name__}, and "
                    f"none of them is or holds a layer normalisation. Normalisations: {', '.join(list(norms)[:20])}."
                )
            chosen |= inside
        norms = {name: m for name, m in norms.items() if name in chosen}
    for name, old in norms.items():
        new = RemovedNorm().train(old.training)
        for hooks in _HOOKS:  # whoever listens to the normalisation's input goes on
            setattr(new, hooks, getattr(old, hooks))
        _replace(model, name, new)
        report.on_undo(lambda name=name, old=old: _replace(model, name, old))  # type: ignore[misc]
        report.added_parameters -= sum(p.numel() for p in old.parameters())
        report.changes.append(Change(name, f"{type(old).__name__} removed"))
    for encoder in [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor]:
        if any(isinstance(inner, RemovedNorm) for inner in encoder.modules()):
            encoder.use_nested_tensor = False  # nested tensors are for the fused layer only
            report.on_undo(lambda encoder=encoder: setattr(encoder, "use_nested_tensor", True))  # type: ignore[misc]
    return report


def _is_norm(module: nn.Module) -> bool:
    return any(base.__name__.endswith(("LayerNorm", "RMSNorm")) for base in type(module).__mro__)


__all__ = ["RemovedNorm", "fuse_linear_ffn", "remove_layer_norm"]
