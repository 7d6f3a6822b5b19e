"""The scores by which weights can be chosen, and what a shape alone makes of each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_entropy.functional.condition_number import expected_condition_number
from lightning_entropy.functional.random_spectrum import expected_entropy_deficit, expected_stable_rank
from lightning_entropy.observe.spectral_rows import SpectralRow
from lightning_entropy.surgery.gradient_scores import GRADIENT_SCORES

NORMALIZATIONS = ("shape", "type")
_INDEX = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")


@dataclass(frozen=True)
class Score:
    """A score of weights.

    Args:
        name: of it.
        largest: whether its largest values are chosen unless told otherwise.
        of_row: its value in a spectral row, where it is one of the spectrum.
        expected: its value for independent Gaussian numbers of a shape, where that is known.
    """

    name: str
    largest: bool
    of_row: Callable[[SpectralRow], float] | None = None
    expected: Callable[[int, int], float] | None = None


def _deficit(rows: int, columns: int) -> float:
    return expected_entropy_deficit(rows, columns) / min(rows, columns)


SCORES = {
    score.name: score
    for score in (
        Score("condition_number", False, lambda row: row.kappa, expected_condition_number),
        Score("entropy_deficit", False, lambda row: row.deficit_per_dimension, _deficit),
        Score("stable_rank", True, lambda row: row.stable_rank, expected_stable_rank),
        Score("spectrum_snr", True, lambda row: row.snr),
        # A gradient whose entries have one size has a norm that grows as the root of their number.
        Score("gradient_norm", True, expected=lambda rows, columns: math.sqrt(rows * columns)),
        Score("relative_gradient_norm", True),
        Score("fisher", True),
        Score("random", False),
        Score("depth", True),
    )
}


def score_of(by: Any, normalize: Any, owner: str) -> Score:
    """The score of a name, with a normalisation that it has.

    Raises:
        ValueError: if either is unknown, or the score has no such normalisation.
    """
    if by not in SCORES:
        raise ValueError(f"{owner}: by must be one of {', '.join(SCORES)}, got {by!r}")
    if normalize is not None and normalize not in NORMALIZATIONS:
        raise ValueError(f"{owner}: normalize must be None, 'shape' or 'type', got {normalize!r}")
    score = SCORES[by]
    if normalize == "shape" and score.expected is None:
        reason = (
            "does not depend on shape" if by in ("random", "depth", *GRADIENT_SCORES) else "has no known expectation"
        )
        raise ValueError(f"{owner}: normalize='shape' has no meaning for {by}, which {reason}; take None or 'type'")
    return score


def type_of(name: str) -> str:
    """The name of a parameter without the numbers of its layers: weights of equal type compete with one another.

    Example:
        >>> type_of("blocks.11.attn.qkv.weight")
        'blocks.*.attn.qkv.weight'
    """
    return _INDEX.sub("*", name)


def shape_explains(
    expected: Sequence[float], chosen: Sequence[bool], *, largest: bool
) -> tuple[int, float, float, float] | None:
    """Whether the shapes of weights, without their numbers, would have led to the same kind of choice.

    Shapes with one expected score are a class. The choice is explained if it exhausts the classes in the order of their
    expectation, which a choice of as many at random would do in fewer than one case of 20, and the classes that were
    taken from are a quarter apart from those that were not.

    Args:
        expected: the score of independent Gaussian numbers of the shape, one a weight.
        chosen: which were chosen.
        largest: whether the largest scores were chosen.

    Returns:
        How many weights the classes have that were taken from, the expectation nearest to the boundary among them, the
        nearest among the others, and the probability; None where shape does not explain it.
    """
    classes: dict[float, list[bool]] = {}
    for value, taken in zip(expected, chosen):
        classes.setdefault(float(f"{value:.3g}"), []).append(taken)
    ordered = sorted(classes, reverse=largest)
    inside = [value for value in ordered if any(classes[value])]
    outside = [value for value in ordered if not any(classes[value])]
    if not inside or not outside or ordered[: len(inside)] != inside:
        return None
    if not all(all(classes[value]) for value in inside[:-1]):
        return None
    ratio = outside[0] / inside[-1]
    if max(ratio, 1 / ratio) < 1.25:
        return None
    last = classes[inside[-1]]
    chance = math.comb(len(last), sum(last)) / math.comb(len(chosen), sum(chosen))
    if chance >= 0.05:
        return None
    return sum(len(classes[value]) for value in inside), inside[-1], outside[0], chance


__all__ = ["NORMALIZATIONS", "SCORES", "Score", "score_of", "shape_explains", "type_of"]
