"""Weights with their scores, before any is chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_entropy.observe.progress import Progress
from lightning_entropy.observe.spectral_report import SpectralReport
from lightning_entropy.observe.spectral_rows import SpectralRow, is_deficient, spectral_rows
from lightning_entropy.observe.stored_weights import StoredWeight
from lightning_entropy.surgery.gradient_scores import GRADIENT_SCORES, Loss, gradient_scores
from lightning_entropy.surgery.module_scores import Score
from lightning_entropy.surgery.report import Refusal


@dataclass(frozen=True)
class Candidate:
    """One weight that could be chosen, with the score by which it competes.

    Args:
        name: of the parameter.
        module: that holds it.
        shape: as it is stored.
        rows: of one of its matrices.
        columns: of one of its matrices.
        parameters: how many numbers.
        score: what it competes by, corrected for the shape where that was asked for; inf or NaN: never chosen.
        error: bound on the relative error.
        exact: whether it was computed; otherwise it is a lower bound.
        digest: of its numbers, empty where they were not read.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    rows: int
    columns: int
    parameters: int
    score: float
    error: float = 0.0
    exact: bool = True
    digest: str = ""

    @property
    def lower_bound(self) -> float:
        """A number that the score is certainly not below."""
        if not self.exact or not math.isfinite(self.score):
            return self.score
        return self.score * max(0.0, 1 - self.error) if self.score > 0 else self.score


def of_weight(weight: StoredWeight, score: float, *, blocks: bool = False, **known: Any) -> Candidate:
    """A candidate for a stored weight."""
    rows, columns = weight.matrix_shape(blocks=blocks)
    return Candidate(weight.name, weight.module, weight.shape, rows, columns, weight.parameters, score, **known)


def of_rows(
    rows: Iterable[SpectralRow], score: Score, *, experts: str = "max"
) -> tuple[list[Candidate], list[Refusal]]:
    """Candidates from spectra, and those that may not be chosen: zero and rank-deficient weights.

    Args:
        rows: of a report.
        score: of the spectrum.
        experts: ``"max"`` or ``"mean"`` over the matrices of a weight, for the condition number.
    """
    assert score.of_row is not None
    found, refused = [], []
    for row in rows:
        kappa = score.name == "condition_number"
        value = row.kappa_mean if kappa and experts == "mean" else score.of_row(row)
        reason = is_deficient(row)
        if reason is not None:
            refused.append(Refusal(row.name, reason))
            value = math.inf if kappa else math.nan
        elif not math.isfinite(value):
            refused.append(Refusal(row.name, f"its {score.name} is {value}"))
            value = math.nan
        error = row.kappa_error if kappa else 0.0
        form = (row.name, row.module, row.shape, row.rows, row.columns, row.parameters)
        found.append(Candidate(*form, value, error=error, digest=row.digest))
    return found, refused


def measured(
    model: Any,
    weights: list[StoredWeight],
    score: Score,
    *,
    parts: str,
    experts: str,
    data: Iterable[Any] | None,
    loss: Loss | None,
    max_batches: int | None,
    seed: int,
    rtol: float,
    device: torch.device | str | None,
    progress: Progress,
    owner: str,
) -> tuple[list[Candidate], list[Refusal]]:
    """Every score computed: spectra, gradients, chance or position. See :func:`select_modules` for the arguments."""
    refused = [Refusal(weight.name, weight.refusal) for weight in weights if weight.refusal is not None]
    readable = [weight for weight in weights if weight.refusal is None]
    if score.of_row is not None:
        rows: dict[str, SpectralRow] = {}
        for found in spectral_rows(readable, blocks=parts == "blocks", rtol=rtol, device=device, progress=progress):
            if isinstance(found, SpectralRow):
                rows[found.name] = found
            else:
                refused.append(Refusal(found[0].name, found[1]))
        candidates, deficient = of_rows([rows[w.name] for w in readable if w.name in rows], score, experts=experts)
        return candidates, refused + deficient
    if score.name in GRADIENT_SCORES:
        values = _gradients(model, readable, score, data, loss, max_batches, owner)
        for weight in readable:
            if weight.name not in values:
                why = (
                    "it is quantised"
                    if weight.bits is not None
                    else "no gradient of the loss reached it, or it is zero"
                )
                refused.append(Refusal(weight.name, f"it has no {score.name}: {why}"))
        return [of_weight(w, values[w.name]) for w in readable if w.name in values], refused
    return by_place([of_weight(weight, 0.0) for weight in readable], score, seed), refused


def of_report(
    report: SpectralReport, names: set[str], score: Score, *, experts: str, seed: int
) -> tuple[list[Candidate], list[Refusal]]:
    """Candidates from the rows of a report that have these names."""
    rows = [row for row in report.rows if row.name in names]
    skipped = [Refusal(name, reason) for name, reason in report.skipped.items()]
    if score.of_row is not None:
        candidates, deficient = of_rows(rows, score, experts=experts)
        return candidates, skipped + deficient
    forms = [Candidate(r.name, r.module, r.shape, r.rows, r.columns, r.parameters, 0.0, digest=r.digest) for r in rows]
    return by_place(forms, score, seed), skipped


def by_place(candidates: list[Candidate], score: Score, seed: int) -> list[Candidate]:
    """Candidates that are ranked by chance or by their position in the model.

    Args:
        candidates: in the model's order.
        score: ``random`` or ``depth``.
        seed: of the chance; the same names get the same numbers whatever their order.
    """
    if score.name == "depth":
        return [replace(candidate, score=float(i)) for i, candidate in enumerate(candidates)]
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(len(candidates), generator=generator, dtype=torch.float64).tolist()
    drawn = dict(zip(sorted(candidate.name for candidate in candidates), numbers))
    return [replace(candidate, score=drawn[candidate.name]) for candidate in candidates]


def _gradients(
    model: Any,
    weights: list[StoredWeight],
    score: Score,
    data: Iterable[Any] | None,
    loss: Loss | None,
    max_batches: int | None,
    owner: str,
) -> dict[str, float]:
    if not isinstance(model, nn.Module):
        what = "a SpectralReport" if isinstance(model, SpectralReport) else "files"
        raise ValueError(f"{owner}: by={score.name!r} runs the model, and got {what}; pass the model")
    if data is None or loss is None:
        absent = " and ".join(name for name, value in (("data", data), ("loss", loss)) if value is None)
        raise ValueError(
            f"{owner}: by={score.name!r} is measured on data and needs {absent}: data=batches (an iterable), "
            "loss=function(model, batch) that returns a scalar tensor"
        )
    return gradient_scores(model, weights, data, loss, by=score.name, max_batches=max_batches, owner=owner)


__all__ = ["Candidate", "by_place", "measured", "of_report", "of_rows", "of_weight"]
