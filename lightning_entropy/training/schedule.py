"""How the weight of a loss term changes over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_entropy.training.lightning import Trainer

KINDS = ("constant", "linear", "cosine", "warmup")
UNITS = ("epoch", "step")


@dataclass(frozen=True)
class WeightSchedule:
    r"""The weight of a loss term as a function of training time.

    With progress :math:`u = t / T` in [0, 1], start weight :math:`w_0` and end weight :math:`w_1`:

    - ``constant``: :math:`w_0`
    - ``linear``: :math:`w_0 + (w_1 - w_0) u`
    - ``cosine``: :math:`w_1 + (w_0 - w_1) (1 + \cos \pi u) / 2`
    - ``warmup``: rises linearly from 0 to :math:`w_0` over the first tenth of the run (or over ``warmup``), then
      constant.

    Before ``begin`` it is 0, and time counts from there: a model trains without the term first.

    The value depends on the Trainer's counters alone, so a resumed run continues where it was.

    Args:
        kind: one of the above.
        unit: ``"epoch"`` (constant within an epoch) or ``"step"`` (changes with every optimizer step).
        length: T in units, from ``begin`` on; None takes what is left of the run from the Trainer.
        warmup: number of units over which the weight first rises linearly from 0, for every kind.
        begin: number of units over which the weight is 0 first.

    Raises:
        ValueError: if an argument is none of the above.

    Reference:
        Cosine weight annealing: arXiv 2406.15303, version 3, which prints no formula; the one above is the usual.
    """

    kind: str = "constant"
    unit: str = "epoch"
    length: int | None = None
    warmup: int = 0
    begin: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"schedule must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.unit not in UNITS:
            raise ValueError(f"schedule unit must be 'epoch' or 'step', got {self.unit!r}")
        if self.length is not None and self.length < 1:
            raise ValueError(f"schedule length must be at least 1, got {self.length}")
        for name, value in (("warmup", self.warmup), ("begin", self.begin)):
            if value < 0:
                raise ValueError(f"schedule {name} must be at least 0, got {value}")

    @property
    def needs_length(self) -> bool:
        """Whether the length of the run matters."""
        return self.kind in ("linear", "cosine") or (self.kind == "warmup" and not self.warmup)

    def value(self, time: int, length: int, start: float, end: float) -> float:
        """The weight after ``time`` units, if it changes over ``length`` units from ``begin`` on."""
        if time < self.begin:
            return 0.0
        time -= self.begin
        warmup = self.warmup
        if self.kind == "warmup" and not warmup:
            warmup = max(1, math.ceil(length / 10))
        rise = min(1.0, time / warmup) if warmup else 1.0
        progress = min(1.0, time / max(length, 1))
        if self.kind == "linear":
            return rise * (start + (end - start) * progress)
        if self.kind == "cosine":
            return rise * (end + (start - end) * (1 + math.cos(math.pi * progress)) / 2)
        return rise * start

    def run_length(self, trainer: Trainer) -> int:
        """The length of the run in units.

        Raises:
            ValueError: if it is needed and the Trainer runs without end.
        """
        if self.length is not None:
            return self.length
        if not self.needs_length:
            return 1
        length: float = -1
        if self.unit == "step":
            length = trainer.estimated_stepping_batches
        elif trainer.max_epochs is not None and trainer.max_epochs > 0:
            length = trainer.max_epochs
        if not 0 < length < float("inf"):
            raise ValueError(
                f"a {self.kind} schedule by {self.unit} needs the length of the run, and this Trainer has none: set "
                f"max_epochs, or pass schedule=WeightSchedule({self.kind!r}, unit={self.unit!r}, length=...)"
            )
        return max(1, int(length) - self.begin)

    def now(self, trainer: Trainer) -> int:
        """The Trainer's time in units."""
        return int(trainer.current_epoch if self.unit == "epoch" else trainer.global_step)

    def describe(self, start: float, end: float, length: int) -> str:
        """The schedule in the words of the line said at the start."""
        if self.begin:
            later = WeightSchedule(self.kind, self.unit, self.length, self.warmup)
            return f"weight 0 for {self.begin:,} {self.unit}s, then {later.describe(start, end, length)}"
        if self.kind == "constant":
            return f"weight {start:g}"
        target = start if self.kind == "warmup" else end
        origin = 0 if self.kind == "warmup" else start
        return f"weight {origin:g} -> {target:g} ({self.kind}, {length:,} {self.unit}s)"
