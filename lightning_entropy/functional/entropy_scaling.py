"""The factor of attention logits that fits the entropy to another number of tokens (arXiv 2306.08645)."""

from __future__ import annotations

import math

MODES = ("paper", "log", "absolute")


def entropy_scaling_factor(
    tokens: float, base_tokens: float, *, mode: str = "paper", variance: float | None = None
) -> float:
    r"""The factor of the logits when a layer trained with T tokens runs with N.

    .. math:: c = \sqrt{\ln N / \ln T}, \qquad \ln N / \ln T, \qquad \sqrt{1 + 2 \ln(N / T) / v}

    Args:
        tokens: N, the keys now; at least 2 are counted.
        base_tokens: T, the keys in training; at least 2 are counted.
        mode: ``"paper"``, ``"log"`` or ``"absolute"``, in this order.
        variance: v, the variance of the unscaled logits over the keys; for ``"absolute"``.

    Returns:
        c; exactly 1 where N = T.

    Raises:
        ValueError: if the mode is unknown, or the absolute entropy cannot be reached with so few keys.

    Reference:
        arXiv 2306.08645 for ``"paper"``; the other two are derived from the entropy ln N - v / 2 of Gaussian logits.

    Example:
        >>> entropy_scaling_factor(256, 16)
        1.4142135623730951
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    n, t = max(float(tokens), 2.0), max(float(base_tokens), 2.0)
    if mode == "absolute" and not (variance is not None and variance > 0):
        raise ValueError(
            f'mode="absolute" needs variance=, the positive variance of the logits over the keys, got {variance}; '
            "logit_variance(model, *inputs) measures it"
        )
    if n == t:
        return 1.0
    if mode != "absolute":
        ratio = math.log(n) / math.log(t)
        return math.sqrt(ratio) if mode == "paper" else ratio
    assert variance is not None
    square = 1 + 2 * math.log(n / t) / variance
    if square < 0:
        raise ValueError(
            f"{n:g} keys cannot have the entropy of {t:g} with logits of variance {variance:g}: "
            f'{math.log(t) - variance / 2:.3f} nats, and at most {math.log(n):.3f}. Use mode="paper".'
        )
    return math.sqrt(square)


__all__ = ["MODES", "entropy_scaling_factor"]
