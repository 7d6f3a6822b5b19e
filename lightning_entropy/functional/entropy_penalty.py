r"""What a regularizer of attention entropy adds to the loss of one layer.

With :math:`x` the entropy and :math:`m` its largest value (log of the allowed keys), both divided by *m* when
normalised, target :math:`\theta`, tolerance :math:`\tau` and :math:`\delta = x - \theta m`:

========= ==============================================================================
maximize  :math:`-x`
minimize  :math:`x`
floor     :math:`\max(0, -\delta)^2`
ceiling   :math:`\max(0, \delta)^2`
target    :math:`\delta^2`
band      :math:`\delta^2` where :math:`|\delta| > \tau m`, else 0 (Entropy-Guided Attention, arXiv 2501.03489); or
          :math:`\max(0, |\delta| - \tau m)^2` with ``gate="hinge"``, which has no jump
========= ==============================================================================
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

OBJECTIVES = ("maximize", "minimize", "floor", "ceiling", "band", "target")
REDUCTIONS = ("mean", "official_sum")
GATES = ("hard", "hinge")


def attention_entropy_penalty(
    entropy: Tensor,
    keys: Tensor | float,
    *,
    objective: str,
    target: float | Sequence[float] | Tensor | None = None,
    tolerance: float = 0.0,
    normalize: bool = True,
    gate: str = "hard",
    reduction: str = "mean",
    context: int | None = None,
) -> Tensor:
    r"""Penalty on the entropy of one layer's attention; see the table in this module's docstring.

    With ``reduction="mean"`` the entropy of a head is the mean over a sample's query rows with more than one allowed
    key; the penalty is taken per sample and head, then averaged, so that it does not depend on how a batch is split.

    Args:
        entropy: ``(..., heads, queries)`` in nats.
        keys: allowed keys of each row, broadcastable to ``entropy``: for causal attention row i has i, and its largest
            entropy is log i.
        objective: one of the table's rows.
        target: fraction of the largest entropy, one number or one a head ``(heads,)``; needed by all objectives but
            maximize and minimize.
        tolerance: half the width of the band, as a fraction of the largest entropy.
        normalize: measure in fractions of the largest entropy; False measures in nats, as the paper does.
        gate: ``"hard"`` or ``"hinge"``, of the band.
        reduction: ``"mean"``, or ``"official_sum"``: what the authors' public code computes. There the penalty is taken
            per query row, in nats, against the log of ``context`` for every row, summed over samples and rows and
            averaged over heads, so it grows with the batch and the length.
        context: the length that ``official_sum`` takes the log of; None takes the largest of ``keys``.

    Returns:
        A scalar; 0 with a zero gradient where no row has more than one allowed key.

    Raises:
        ValueError: if an argument is out of its range or does not go with the objective.

    Reference:
        Entropy-Guided Attention for Private LLMs, arXiv 2501.03489, Algorithm 1; the other objectives are ours.

    Example:
        >>> attention_entropy_penalty(torch.zeros(1, 2, 4), 4.0, objective="floor", target=0.5)
        tensor(0.2500)
    """
    check_objective(objective, target, tolerance, gate, reduction, normalize)
    counts = torch.as_tensor(keys, dtype=entropy.dtype, device=entropy.device).expand_as(entropy)
    theta: Tensor | None = None
    if target is not None:
        theta = torch.as_tensor(target, dtype=entropy.dtype, device=entropy.device)
        if theta.dim() and theta.shape != (entropy.shape[-2],):
            raise ValueError(f"target has {theta.shape[0]} values for {entropy.shape[-2]} heads")
    if reduction == "official_sum":
        length = counts.max() if context is None else entropy.new_tensor(float(context))
        limit = length.clamp(min=1).log()
        rows = _penalty(entropy, limit, None if theta is None else _column(theta), objective, tolerance, gate)
        return rows.sum() / entropy.shape[-2]
    several = counts > 1
    limit = counts.clamp(min=2).log()
    number = several.sum(-1)
    divisor = number.clamp(min=1)
    x = torch.where(several, entropy / limit if normalize else entropy, 0.0).sum(-1) / divisor
    most = torch.ones_like(x) if normalize else torch.where(several, limit, 0.0).sum(-1) / divisor
    heads = torch.where(number > 0, _penalty(x, most, theta, objective, tolerance, gate), 0.0)
    return heads.sum() / (number > 0).sum().clamp(min=1)


def _column(theta: Tensor) -> Tensor:
    return theta[:, None] if theta.dim() else theta


def _penalty(x: Tensor, most: Tensor, theta: Tensor | None, objective: str, tolerance: float, gate: str) -> Tensor:
    if theta is None:
        return -x if objective == "maximize" else x
    delta = x - theta * most
    if objective == "floor":
        return (-delta).clamp(min=0).square()
    if objective == "ceiling":
        return delta.clamp(min=0).square()
    if objective == "target":
        return delta.square()
    if gate == "hinge":
        return (delta.abs() - tolerance * most).clamp(min=0).square()
    return torch.where(delta.abs() > tolerance * most, delta.square(), 0.0)


def check_objective(
    objective: str,
    target: float | Sequence[float] | Tensor | None,
    tolerance: float,
    gate: str,
    reduction: str,
    normalize: bool,
) -> None:
    """Refuse arguments of :func:`attention_entropy_penalty` that make no sense together.

    Raises:
        ValueError: naming the argument.
    """
    for name, value, allowed in (
        ("objective", objective, OBJECTIVES),
        ("gate", gate, GATES),
        ("reduction", reduction, REDUCTIONS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if objective in ("maximize", "minimize"):
        if target is not None:
            raise ValueError(f"objective={objective!r} has no target, got {target}")
    elif target is None:
        raise ValueError(f"objective={objective!r} needs a target: a fraction of the largest entropy, for example 0.3")
    elif not isinstance(target, Tensor):
        for fraction in target if isinstance(target, Sequence) else [target]:
            if not 0 <= fraction <= 1:
                raise ValueError(f"target is a fraction of the largest entropy, between 0 and 1, got {fraction}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), got {tolerance}")
    if tolerance and objective != "band":
        raise ValueError(f"tolerance belongs to objective='band', got objective={objective!r}")
    if reduction == "official_sum" and normalize:
        raise ValueError("reduction='official_sum' measures in nats: pass normalize=False")


__all__ = ["GATES", "OBJECTIVES", "REDUCTIONS", "attention_entropy_penalty", "check_objective"]
