"""Choosing the weights of a model that a fine-tuning trains."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_entropy.observe.progress import Progress
from lightning_entropy.observe.selection import as_patterns
from lightning_entropy.observe.spectral_report import PARTS, SpectralReport, weights_of_source
from lightning_entropy.observe.stored_weights import StoredWeight, fingerprint_of, narrow, weight_digest
from lightning_entropy.surgery.budget import BudgetRule
from lightning_entropy.surgery.candidates import Candidate, measured, of_report
from lightning_entropy.surgery.certified_candidates import certified
from lightning_entropy.surgery.gradient_scores import GRADIENT_SCORES, Loss
from lightning_entropy.surgery.module_scores import Score, score_of
from lightning_entropy.surgery.ranking import choose, normalized, shape_note
from lightning_entropy.surgery.selection import Budget, Selection

_OWNER = "select_modules"


def select_modules(
    model: nn.Module | SpectralReport | str | os.PathLike[str],
    *,
    by: str = "condition_number",
    normalize: str | None = None,
    budget: Budget = 0.2,
    largest: bool | None = None,
    modules: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    parts: str = "whole",
    experts: str = "max",
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    max_batches: int | None = None,
    seed: int = 0,
    rtol: float = 1e-6,
    device: torch.device | str | None = None,
    progress: Progress = None,
    certify: bool = True,
) -> Selection:
    r"""Choose weights by a score, under a budget.

    Candidates are the weights of :func:`~lightning_entropy.observe.spectral_report`. By condition number from a model
    or files, lower bounds rule weights out and exact values are computed only where they decide; the choice is that of
    computing every value. Equal scores are ordered by name. Weights that are zero or rank-deficient at their precision
    have an infinite condition number and are never chosen, whatever the score of the spectrum.

    A condition number depends on the shape first: independent Gaussian numbers have about
    :math:`(1 + \sqrt y) / (1 - \sqrt y)` with *y* the ratio of the sides, and 3.67 *n* in a square matrix. Where
    the shapes alone explain the choice, a warning says so.

    Args:
        model: any module; a report, which has the spectra already; or safetensors files.
        by: ``"condition_number"`` (lowest chosen), ``"entropy_deficit"`` a dimension (lowest), ``"stable_rank"``
            (highest), ``"spectrum_snr"`` (highest), ``"gradient_norm"``, ``"relative_gradient_norm"``, ``"fisher"``
            (highest; on ``data``), ``"random"``, ``"depth"`` (position in the model; last chosen).
        normalize: ``"shape"`` divides by the score of independent Gaussian numbers of the shape; ``"type"`` ranks
            weights among those whose names differ in numbers only, and takes from all types alike.
        budget: a count of tensors (int), a fraction of them (float: at least one, ``int(n * p)``), or a mapping:
            ``{"parameters": count or fraction}`` (the longest head of the ranking within it, at least one weight),
            ``{"threshold": score}``, ``{"tensors": count or fraction}``. Fractions are of the candidates.
        largest: choose the largest scores (True) or the smallest (False) instead of the score's own end.
        modules: shell patterns over names of parameters, of modules, or of modules that contain them.
        exclude: patterns of what is no candidate. A new head (a few rows) is always among the lowest condition numbers:
            exclude it, and train it anyway.
        parts: ``"blocks"`` takes fused q, k and v as three matrices and scores the weight by its worst.
        experts: a stack of experts has the condition number of its worst matrix (``"max"``) or the ``"mean"``.
        data: batches, for scores from gradients.
        loss: ``loss(model, batch)``, a scalar tensor, for scores from gradients.
        max_batches: of the data.
        seed: of ``"random"``.
        rtol: see :func:`~lightning_entropy.observe.spectral_report`.
        device: where spectra are computed; None: where the weights are.
        progress: True, False, None (a bar on a terminal) or ``function(done, total, name)``.
        certify: False computes every condition number exactly, for a table without bounds.

    Returns:
        The selection: names, scores, bounds, what was skipped and why, and a fingerprint of the candidates.

    Raises:
        ValueError: if an argument is not one of these, a pattern names nothing, data is missing, or nothing can be
            chosen.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.eye(2, 8)), model[1].weight.copy_(torch.diag(torch.tensor([5.0, 1.0])))
        >>> print(select_modules(model, budget=1))
        1 of 2 weights by lowest condition_number (0.weight), 16 of 20 parameters
    """
    score = score_of(by, normalize, _OWNER)
    rule = BudgetRule.of(budget, _OWNER)
    _check(model, score, normalize, rule, parts, experts)
    from_top = score.largest if largest is None else largest
    taken: list[str] | None = None
    if isinstance(model, SpectralReport):
        names = _named(model, modules, exclude)
        candidates, skipped = of_report(model, names, score, experts=experts, seed=seed)
        candidates = normalized(candidates, score, normalize)
    else:
        weights = _narrowed(weights_of_source(model, modules, _OWNER), exclude)
        options: dict[str, Any] = {"parts": parts, "rtol": rtol, "device": device, "progress": progress}
        if certify and by == "condition_number" and experts == "max" and not from_top and normalize != "type":
            candidates, skipped, taken = certified(weights, rule, normalize, **options)
        else:
            candidates, skipped = measured(
                model, weights, score, experts=experts, data=data, loss=loss, max_batches=max_batches, seed=seed,
                owner=_OWNER, **options,
            )  # fmt: skip
            candidates = normalized(candidates, score, normalize)
        candidates = _with_digests(candidates, weights)
    rows = choose(candidates, rule, normalize, largest=from_top, taken=taken)
    fingerprint = fingerprint_of({candidate.name: candidate.digest for candidate in candidates})
    selection = Selection(by, rows, normalize, budget, from_top, skipped, fingerprint)
    _require(selection)
    note = None if normalize is not None else shape_note(selection, candidates, score)
    if note is not None:
        selection.notes.append(note)
        warnings.warn(f"{_OWNER}: {note}", stacklevel=2)
    return selection


def _check(model: Any, score: Score, normalize: str | None, rule: BudgetRule, parts: str, experts: str) -> None:
    if parts not in PARTS:
        raise ValueError(f"{_OWNER}: parts must be 'whole' or 'blocks', got {parts!r}")
    if experts not in ("max", "mean"):
        raise ValueError(f"{_OWNER}: experts must be 'max' or 'mean', got {experts!r}")
    if normalize == "type" and rule.kind == "threshold":
        raise ValueError(f"{_OWNER}: a threshold and normalize='type', which ranks, do not go together")
    if isinstance(model, SpectralReport):
        if score.name in GRADIENT_SCORES:
            raise ValueError(f"{_OWNER}: by={score.name!r} runs the model, and got a SpectralReport; pass the model")
        if parts != "whole" and model.parts != parts:
            raise ValueError(f"{_OWNER}: the report was made with parts={model.parts!r}, not {parts!r}; make it anew")


def _narrowed(weights: list[StoredWeight], exclude: str | Iterable[str] | None) -> list[StoredWeight]:
    patterns = as_patterns(exclude)
    if patterns is None:
        return weights
    out = {weight.name for weight in narrow(weights, patterns, _OWNER, argument="exclude")}
    kept = [weight for weight in weights if weight.name not in out]
    if all(weight.refusal is not None for weight in kept):
        raise ValueError(f"{_OWNER}(exclude={exclude!r}) leaves none of the {len(weights)} weights to choose from")
    return kept


def _named(
    report: SpectralReport, modules: str | Iterable[str] | None, exclude: str | Iterable[str] | None
) -> set[str]:
    rows = [
        StoredWeight(row.name, row.module, row.shape, row.layout, torch.float32, lambda: torch.empty(0))
        for row in report.rows
    ]
    patterns = as_patterns(modules)
    return {weight.name for weight in _narrowed(rows if patterns is None else narrow(rows, patterns, _OWNER), exclude)}


def _with_digests(candidates: list[Candidate], weights: list[StoredWeight]) -> list[Candidate]:
    """Digests of those whose numbers were let go since, or never read."""
    read = {weight.name: weight.read for weight in weights}
    return [c if c.digest else replace(c, digest=weight_digest(read[c.name]())) for c in candidates]


def _require(selection: Selection) -> None:
    if selection.chosen:
        return
    finite = [row for row in selection.rows if math.isfinite(row.score)]
    if not finite:
        reasons = "; ".join(f"{refusal.module}: {refusal.reason}" for refusal in selection.skipped[:5])
        raise ValueError(f"{_OWNER} can choose none of the {len(selection.rows)} weights ({reasons})")
    end = "highest" if selection.largest else "lowest"
    raise ValueError(
        f"{_OWNER}: no {selection.by} is within the budget {selection.budget}; the {end} is "
        f"{'at least ' if not finite[0].exact else ''}{finite[0].score:.6g} ({finite[0].name})"
    )


__all__ = ["select_modules"]
