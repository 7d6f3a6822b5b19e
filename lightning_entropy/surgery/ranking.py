"""From scores to a choice: correction for the shape, order, head of the order, and whether shape alone explains it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from lightning_entropy.surgery.budget import BudgetRule
from lightning_entropy.surgery.candidates import Candidate
from lightning_entropy.surgery.module_scores import Score, shape_explains, type_of
from lightning_entropy.surgery.selection import ScoredWeight, Selection


def expectations(candidates: Iterable[Candidate], score: Score) -> list[float]:
    """The score of independent Gaussian numbers of each candidate's shape."""
    assert score.expected is not None
    known: dict[tuple[int, int], float] = {}
    found = []
    for candidate in candidates:
        # The gradient is of the whole tensor, the spectrum of one matrix.
        form = (candidate.rows, candidate.columns) if score.of_row is not None else (candidate.parameters, 1)
        if form not in known:
            known[form] = score.expected(*form)
        found.append(known[form])
    return found


def normalized(candidates: list[Candidate], score: Score, normalize: str | None) -> list[Candidate]:
    """Scores over those of their shapes, with ``normalize="shape"``; otherwise as they are."""
    if normalize != "shape":
        return candidates
    expected = expectations(candidates, score)
    return [replace(c, score=c.score / e) for c, e in zip(candidates, expected)]


def choose(
    candidates: list[Candidate],
    rule: BudgetRule,
    normalize: str | None,
    *,
    largest: bool,
    taken: list[str] | None = None,
) -> list[ScoredWeight]:
    """Rows of a selection, best first.

    Equal scores are ordered by name. With ``normalize="type"`` the order is that of the quantile within the type, so
    that each type gives its best before any gives its second; equal quantiles by the name of the type.

    Args:
        candidates: in any order.
        rule: how many are taken.
        normalize: None, ``"shape"`` (done already) or ``"type"``.
        largest: whether the largest scores are best.
        taken: names that were chosen already, with certainty; None applies the budget.
    """
    ordered = sorted(candidates, key=lambda c: c.name)
    ordered.sort(key=lambda c: _finite_first(c.score, largest))
    groups: dict[str, str] = {}
    if normalize == "type":
        members: dict[str, list[Candidate]] = {}
        for candidate in ordered:
            groups[candidate.name] = type_of(candidate.name)
            members.setdefault(groups[candidate.name], []).append(candidate)
        quantile = {
            c.name: ((i + 0.5) / len(group), kind) for kind, group in members.items() for i, c in enumerate(group)
        }
        ordered.sort(key=lambda c: (not math.isfinite(c.score), *quantile[c.name]))
    if taken is None:
        eligible = [c for c in ordered if math.isfinite(c.score)]
        sizes = [c.parameters for c in eligible]
        scores = [c.score for c in eligible]
        count = rule.take(scores, sizes, len(candidates), sum(c.parameters for c in candidates), largest=largest)
        taken = [c.name for c in eligible[:count]]
    chosen = set(taken)
    ordered.sort(key=lambda c: c.name not in chosen)
    return [_row(c, c.name in chosen, groups) for c in ordered]


def _finite_first(score: float, largest: bool) -> tuple[bool, float]:
    finite = math.isfinite(score)
    return (not finite, (-score if largest else score) if finite else 0.0)


def _row(c: Candidate, chosen: bool, groups: dict[str, str]) -> ScoredWeight:
    form = (c.shape, c.parameters, chosen, groups.get(c.name, ""))
    return ScoredWeight(c.name, c.module, c.score, c.error, c.exact, c.lower_bound, *form)


def shape_note(selection: Selection, candidates: list[Candidate], score: Score) -> str | None:
    """A warning where the shapes of the weights alone lead to this choice; None where they do not."""
    if score.expected is None:
        return None
    chosen = set(selection.names)
    usable = [c for c in candidates if math.isfinite(c.score)]
    expected = expectations(usable, score)
    found = shape_explains(expected, [c.name in chosen for c in usable], largest=selection.largest)
    if found is None:
        return None
    members, inside, outside, _ = found
    shapes = dict.fromkeys("x".join(map(str, c.shape)) for c in usable if c.name in chosen)
    end, than = ("high", "at most") if selection.largest else ("low", "at least")
    return (
        f"shape alone explains this choice by {selection.by}: all {len(chosen)} are among the {members} weights whose "
        f"shape gives random numbers as {end} a score ({', '.join(shapes)}: {inside:.3g}; other shapes: {than} "
        f"{outside:.3g}). normalize='shape' divides that out, normalize='type' compares like with like"
    )


__all__ = ["choose", "expectations", "normalized", "shape_note"]
