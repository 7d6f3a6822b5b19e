"""Rescaling the weights of a model to learned spectral norms (arXiv 2303.06296), following them, folding them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from uuid import uuid4

import torch
from torch import nn

from lightning_entropy.observe.selection import as_patterns
from lightning_entropy.observe.weight_matrices import (
    MatrixWeight,
    is_conv1d,
    matrix_weights,
    parameter_names,
    why_no_matrix,
)
from lightning_entropy.surgery.follow_checkpoint import FollowCheckpoint, stored_weights
from lightning_entropy.surgery.report import Change, Refusal, SurgeryReport
from lightning_entropy.surgery.spectral_weight import (
    SpectralWeight,
    in_parts,
    is_rescaled,
    original,
    rescale,
    spectral_weights,
    unscale,
)

_METHOD = "SigmaReparam"
GAMMA_INITS = ("sigma", "one")


def sigma_reparametrize(
    model: nn.Module,
    *,
    modules: str | Iterable[str] | None = None,
    gamma_init: str = "sigma",
    split_qkv: bool = True,
) -> SurgeryReport:
    r"""Give weights a learned spectral norm: :math:`\hat W = (\gamma / \sigma(W)) W`.

    Linear layers (also ``Conv1D`` of transformers), convolutions (as the matrix of outputs by everything else) and the
    projections of ``nn.MultiheadAttention`` are taken. Call :func:`update_sigma` after each optimizer step; the
    callback :class:`SigmaReparam` does. Loading a state dict of a model in which other weights are rescaled changes
    this one accordingly; the weights of a plain one are rescaled as they are loaded.

    Args:
        model: any module; changed in place.
        modules: shell patterns over dotted names of modules, or of modules that contain them; None takes all.
        gamma_init: ``"sigma"``: the model computes what it computed, to the bit on the device where it is now;
            ``"one"``: all spectral norms become 1.
        split_qkv: one sigma and gamma each for q, k and v where one weight holds all three (``in_proj_weight``, ``qkv``,
            ``c_attn``), instead of one for the whole. Grouped-query projections, whose parts are unequal, have one.

    Returns:
        The report. ``undo()`` leaves plain weights with their current effective values. Refused, with the reason, are
        weights that are all zeros (sigma is 0), tied to another module, sharded, quantized, not finite, of grouped
        convolutions, or parametrised otherwise.

    Raises:
        ValueError: if ``gamma_init`` is unknown, a pattern or the model has no such weight, or all are refused.

    Reference:
        arXiv 2303.06296.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16)
        >>> print(sigma_reparametrize(layer, modules="self_attn*"))
        SigmaReparam: 1 of 2 in_proj_weight rescaled for q, k and v (self_attn), 1 of 2 weight rescaled (self_attn.out_proj), +4 parameters; nothing refused
    """  # noqa: E501
    if gamma_init not in GAMMA_INITS:
        raise ValueError(f"gamma_init must be 'sigma' or 'one', got {gamma_init!r}")
    chosen = matrix_weights(model, patterns=as_patterns(modules), split_qkv=split_qkv, owner=_METHOD)
    shared = parameter_names(model)
    report = SurgeryReport(_METHOD)
    owner = uuid4().hex
    repeated = False
    for weight in chosen:
        reason = f"{weight.tensor} is rescaled already" if is_rescaled(weight.module, weight.tensor) else None
        repeated = repeated or reason is not None
        reason = reason or why_no_matrix(weight, shared) or _why_zero(weight)
        if reason is not None:
            report.refused.append(Refusal(weight.name, reason))
            continue
        spectral = rescale(weight, gamma_init=gamma_init, owner=owner, parts=weight.parts)
        report.added_parameters += spectral.gamma.numel()
        apart = " for q, k and v" if weight.parts > 1 else ""
        report.changes.append(Change(weight.name, f"{weight.tensor} rescaled{apart}"))
    if not report.changes and not repeated:
        lines = "\n".join(f"  {refusal.module}: {refusal.reason}" for refusal in report.refused)
        raise ValueError(f"{_METHOD} can rescale none of the {len(chosen)} weights:\n{lines}")
    if report.changes:
        hook = model._register_load_state_dict_pre_hook(  # its public name is newer than torch 2.4
            FollowCheckpoint(report, owner, gamma_init), with_module=True
        )

        def undo() -> None:
            hook.remove()
            for _, module, tensor, _ in list(spectral_weights(model, owner)):
                unscale(module, tensor)

        report.on_undo(undo)
    return report


def _why_zero(weight: MatrixWeight) -> str | None:
    value = weight.module._parameters[weight.tensor]
    assert value is not None
    parts = in_parts(value.detach(), weight.parts, is_conv1d(weight.module))
    zero = (parts == 0).flatten(1).all(1).tolist()
    if not any(zero):
        return None
    which = "is" if all(zero) else f"has parts (of q, k, v: {', '.join(n for n, z in zip('qkv', zero) if z)}) that are"
    return f"{weight.tensor} {which} all zeros: sigma is 0 and W / sigma is not defined"


@torch.no_grad()
def update_sigma(model: nn.Module, *, iterations: int = 1) -> None:
    """Follow the weights with the singular vectors, after an optimizer step and never between forward and backward.

    Frozen weights do not move and are skipped.

    Args:
        model: a model of :func:`sigma_reparametrize`.
        iterations: power iterations; one is enough after one optimizer step.

    Example:
        >>> layer = nn.Linear(3, 3)
        >>> _ = sigma_reparametrize(layer)
        >>> update_sigma(layer)
    """
    for _, module, tensor, spectral in spectral_weights(model):
        weight = original(module, tensor)
        for _ in range(iterations if weight.requires_grad else 0):
            spectral.step(weight)


def fold_sigma(model: nn.Module) -> list[str]:
    """Turn every rescaled weight into a plain one with the effective values: same output, no trace of the method.

    Args:
        model: a model of :func:`sigma_reparametrize`, or a deep copy of one.

    Returns:
        The names of the parameters that were folded.

    Example:
        >>> layer = nn.Linear(3, 3)
        >>> _ = sigma_reparametrize(layer)
        >>> fold_sigma(layer)
        ['weight']
    """
    folded = []
    for name, module, tensor, _ in list(spectral_weights(model)):
        unscale(module, tensor)
        folded.append(f"{name}.{tensor}" if name else tensor)
    for module in model.modules():
        hooks = module._load_state_dict_pre_hooks
        for key in [k for k, h in hooks.items() if isinstance(getattr(h, "hook", h), FollowCheckpoint)]:
            del hooks[key]
    return folded


def folded_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict of the plain model, from that of a rescaled one (of a checkpoint, for example).

    Args:
        state_dict: left as it is.

    Returns:
        A new one in which each rescaled weight is its effective value under its plain name.

    Example:
        >>> layer = nn.Linear(3, 3)
        >>> _ = sigma_reparametrize(layer)
        >>> sorted(folded_state_dict(layer.state_dict()))
        ['bias', 'weight']
    """
    found = stored_weights(state_dict)
    plain = {}
    for key, value in state_dict.items():
        owner, _, rest = f".{key}".rpartition(".parametrizations.")
        tensor, _, part = rest.partition(".")
        if (owner[1:], tensor) not in found:
            plain[key] = value
        elif part == "original":
            stem = key.removesuffix("original")
            stored = [state_dict[f"{stem}0.{name}"] for name in ("gamma", "u", "v")]
            plain[f"{owner}.{tensor}"[1:]] = SpectralWeight.stored(value, *stored)
    return plain


__all__ = ["GAMMA_INITS", "fold_sigma", "folded_state_dict", "sigma_reparametrize", "update_sigma"]
