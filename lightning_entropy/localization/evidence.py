"""What a growing mask showed of a classifier's evidence, in numbers, in words and as a figure."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_entropy.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KIND = "evidence_curve"
_GROWN = {
    "masks": "mask grown through the true mask",
    "boxes": "mask grown through the true box",
    "cam": "mask grown by the class map",
    "centre": "mask grown from the middle",
}


@dataclass(frozen=True)
class EvidenceCurve:
    """Activation and cross-entropy while a mask grows; made by :func:`evidence_curve`.

    Args:
        masks: by what the mask grew: ``"masks"``, ``"boxes"``, ``"cam"`` or ``"centre"``.
        growth: with known objects 0 is nothing, 1 the object, 2 everything; otherwise the share of the positions.
        areas: share of the positions in the mask, mean over images.
        foreground: activation of the label with the mask alone, over that of the whole.
        background: activation without the mask, over that of the whole.
        cross_entropy: with the mask alone.
        background_cross_entropy: without the mask.
        background_accuracy: share of the images that are classified right without the mask.
        object_area: share of the positions on the object; None where it is not known.
        images: how many.
        left_out: how many were not taken, by reason.
    """

    masks: str
    growth: list[float]
    areas: list[float]
    foreground: list[float]
    background: list[float]
    cross_entropy: list[float]
    background_cross_entropy: list[float]
    background_accuracy: list[float]
    object_area: float | None
    images: int
    left_out: dict[str, int]

    @property
    def edge(self) -> int | None:
        """The index at which the mask is the object; None where the object is not known."""
        return None if self.object_area is None else self.growth.index(1.0)

    @property
    def lies_on_object(self) -> bool | None:
        """True if taking the object away takes away at least half of the activation, and more than its area.

        None where the object is not known.
        """
        if self.edge is None or self.object_area is None:
            return None
        removed = 1 - self.background[self.edge]
        return removed >= 0.5 and removed > self.object_area

    @property
    def verdict(self) -> str:
        """What the curve says of the classifier, in words."""
        if self.edge is None or self.object_area is None:
            half = next((a for a, b in zip(self.areas, self.background) if b <= 0.5), None)
            grown = "by its class map" if self.masks == "cam" else "from the middle of the image"
            what = "no mask but the whole image" if half is None or half > 0.99 else f"{half:.0%} of the positions"
            return (
                f"A mask that grows {grown} takes half of the activation away with {what} ({self.images} images). "
                "Whether that is the object only true masks or boxes can tell."
            )
        at, area = self.edge, self.object_area
        fore, back, right = self.foreground[at], self.background[at], self.background_accuracy[at]
        removed = 1 - back
        wrong = self.left_out.get("classified wrongly", 0)
        seen = (
            f"The object, {area:.0%} of the positions, has {fore:.0%} of the activation when it is left alone; without "
            f"it {back:.0%} is left and {right:.0%} of the images are classified as before ({self.images} images). "
        )
        if wrong > self.images:
            seen += (
                f"Most images ({wrong} of {wrong + self.images}) are classified wrongly: train the classifier first. "
            )
        if self.foreground[0] > 0.5:
            return seen + (
                f"{self.foreground[0]:.0%} is left even of nothing: the activation hardly depends on the features, so "
                "suppressing them shows little. Train the classifier longer, or split it elsewhere."
            )
        if self.lies_on_object:
            return seen + "The classifier's evidence lies on the object." + self._observations()
        if removed <= area:
            return seen + (
                "That is no more than its share of the area: the classifier's evidence does not lie on the object, and "
                "a map that follows it will find something else (a shortcut through the background)."
            )
        return seen + (
            "The classifier uses the object and its surroundings: a map that follows its evidence will cover both."
        )

    def _observations(self) -> str:
        """Where the cross-entropy and the activation have come to rest: the two observations of the paper."""
        ce, activation = (_reaches(v, self.growth) for v in (self.cross_entropy, self.foreground))
        return (
            f" Cross-entropy comes within 5 % of its end at growth {ce:.2f}, activation at {activation:.2f} (1 is the "
            "edge of the object)."
        )

    def plot(self) -> Figure:
        """Activations and cross-entropies over the growth of the mask; pyplot does not know the figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.4, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(self.growth, self.foreground, color="C0", label="mask alone")
        left.plot(self.growth, self.background, color="C1", label="without the mask")
        left.plot(self.growth, [1 - a for a in self.areas], color="0.7", linestyle=":", label="1 - area")
        left.set_ylabel("activation / that of the whole")
        right.plot(self.growth, self.cross_entropy, color="C0", label="mask alone")
        right.plot(self.growth, self.background_cross_entropy, color="C1", label="without the mask")
        right.set_ylabel("cross-entropy")
        known = self.object_area is not None
        for axis in (left, right):
            if known:
                axis.axvline(1.0, color="0.5", linewidth=0.8)
            axis.set_xlabel("growth of the mask (1: the object, 2: the image)" if known else "share of the positions")
            axis.legend(fontsize="small")
        figure.suptitle(f"{self.images} images, {_GROWN[self.masks]}", fontsize="medium")
        return figure

    def to_json(self) -> str:
        """The curve and its verdict as JSON."""
        record = {"kind": _KIND, **asdict(self), "lies_on_object": self.lies_on_object, "verdict": self.verdict}
        return json.dumps(record, indent=2)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as JSON, whole or not at all."""
        with atomic_write(path) as temporary:
            temporary.write_text(self.to_json() + "\n", encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EvidenceCurve:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file holds something else.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            if record["kind"] != _KIND:
                raise ValueError(f"its kind is {record['kind']!r}")
            return cls(**{f.name: record[f.name] for f in fields(cls)})
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no evidence curve: {error}") from error


def _reaches(values: list[float], growth: list[float], share: float = 0.95) -> float:
    """The growth from which on a curve stays within the last part of its whole change."""
    change = values[-1] - values[0]
    near = [abs(v - values[-1]) <= (1 - share) * abs(change) + 1e-12 for v in values]
    first = len(near)
    while first and near[first - 1]:
        first -= 1
    return growth[first]


__all__ = ["EvidenceCurve"]
