"""The choice of peft's KappaTune selector, where that is right."""

from __future__ import annotations

import torch
from torch import nn

from lightning_entropy.observe.model_weights import model_weights
from lightning_entropy.observe.progress import Progress
from lightning_entropy.observe.stored_weights import StoredWeight, fingerprint_of
from lightning_entropy.surgery.budget import BudgetRule
from lightning_entropy.surgery.candidates import measured
from lightning_entropy.surgery.module_scores import SCORES
from lightning_entropy.surgery.ranking import choose
from lightning_entropy.surgery.report import Refusal
from lightning_entropy.surgery.selection import Budget, ScoredWeight, Selection

_OWNER = "peft_selection"
_STACKS = {"gate_up_proj", "down_proj", "gate_proj", "up_proj"}
_LONGEST = 16384


def peft_selection(
    model: nn.Module,
    *,
    budget: Budget = 0.2,
    device: torch.device | str | None = None,
    progress: Progress = None,
) -> Selection:
    """What ``peft.helpers.find_kappa_target_modules`` chooses, by exact condition numbers.

    Candidates are ``nn.Linear`` modules and, apart from them with a budget of their own, stacks of experts under four
    names, scored by the mean over experts; tensors with a side above 16,384 are left out. It differs where peft's
    selector is wrong: a zero or rank-deficient weight is never chosen (peft ranks a zero one first), of a model with
    adapters the base layers are read and never the adapters, a tied weight counts once, and a weight in bfloat16 or
    float16 has its condition number at that precision.

    Args:
        model: any module.
        budget: a count or a fraction of tensors, or ``{"threshold": kappa}``, for each of the two kinds.
        device: where to compute; None: where the weights are.
        progress: see :func:`~lightning_entropy.surgery.select_modules`.

    Returns:
        The selection. ``.modules`` of its linear layers are peft's ``target_modules``.

    Raises:
        ValueError: if there is no candidate, or the budget is one of parameters.

    Example:
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> len(peft_selection(nn.Sequential(*(nn.Linear(8, 4) for _ in range(10)))))
        2
    """
    rule = BudgetRule.of(budget, _OWNER)
    if rule.kind == "parameters":
        raise ValueError(f"{_OWNER}: peft has no budget of parameters; select_modules has")
    refused: list[Refusal] = []
    rows: list[ScoredWeight] = []
    digests: dict[str, str] = {}
    for weights in _kinds(model):
        kept = [weight for weight in weights if max(weight.shape[-2:], default=0) <= _LONGEST]
        refused += [Refusal(w.name, f"a side is longer than {_LONGEST:,}") for w in weights if w not in kept]
        candidates, skipped = measured(
            model, kept, SCORES["condition_number"], parts="whole", experts="mean", data=None, loss=None,
            max_batches=None, seed=0, rtol=1e-6, device=device, progress=progress, owner=_OWNER,
        )  # fmt: skip
        refused += skipped
        rows += choose(candidates, rule, None, largest=False)
        digests |= {candidate.name: candidate.digest for candidate in candidates}
    if not any(row.chosen for row in rows):
        raise ValueError(f"{_OWNER} found no nn.Linear and no stack of experts to choose in {type(model).__name__}")
    return Selection("condition_number", rows, None, budget, False, refused, fingerprint_of(digests))


def _kinds(model: nn.Module) -> tuple[list[StoredWeight], list[StoredWeight]]:
    weights = model_weights(model)
    linear = [weight for weight in weights if isinstance(weight.holder, nn.Linear)]
    stacks = [weight for weight in weights if weight.layout == "experts" and weight.tensor in _STACKS]
    return linear, stacks


__all__ = ["peft_selection"]
