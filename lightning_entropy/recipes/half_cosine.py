"""The learning rate of the recipes: half a cosine, step by step, to 0."""

from __future__ import annotations

import math


class HalfCosine:
    """Factor ``(1 + cos(pi t / T)) / 2`` of the learning rate at step t of T; 0 from T on.

    Args:
        steps: T, at least 1.
    """

    def __init__(self, steps: int) -> None:
        self.steps = max(1, steps)

    def __call__(self, step: int) -> float:
        """The factor at a step, counted from 0."""
        return 0.5 * (1 + math.cos(math.pi * min(step, self.steps) / self.steps))


__all__ = ["HalfCosine"]
