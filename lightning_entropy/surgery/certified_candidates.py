"""Condition numbers of stored weights, exact only where the choice depends on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_entropy.functional.condition_number import expected_condition_number
from lightning_entropy.observe.progress import Progress, progress_of
from lightning_entropy.observe.spectral_rows import on_device
from lightning_entropy.observe.stored_weights import StoredWeight, weight_digest
from lightning_entropy.surgery.budget import BudgetRule
from lightning_entropy.surgery.candidates import Candidate, of_weight
from lightning_entropy.surgery.certified_selection import lowest_condition_numbers
from lightning_entropy.surgery.report import Refusal


def certified(
    weights: list[StoredWeight],
    rule: BudgetRule,
    normalize: str | None,
    *,
    parts: str,
    rtol: float,
    device: torch.device | str | None,
    progress: Progress,
) -> tuple[list[Candidate], list[Refusal], list[str]]:
    """Candidates by condition number of which those within the budget are exact, and ties among them ordered by name.

    Args:
        weights: from which is chosen.
        rule: the budget, which says how far down the exact values must go.
        normalize: None or ``"shape"``.
        parts: ``"whole"`` or ``"blocks"``.
        rtol: relative error of the fast decomposition.
        device: where to compute.
        progress: see :func:`~lightning_entropy.observe.progress.progress_of`.

    Returns:
        The candidates, the weights that are none or can never be chosen, and the names that are chosen.
    """
    refused = [Refusal(weight.name, weight.refusal) for weight in weights if weight.refusal is not None]
    usable: list[StoredWeight] = []
    digests: dict[str, str] = {}
    for weight in sorted((w for w in weights if w.refusal is None), key=lambda w: w.name):  # ties go by position
        value = weight.read()
        unusual = int((~torch.isfinite(value)).sum())
        if unusual:
            refused.append(Refusal(weight.name, f"{unusual} of its numbers are not finite"))
        else:
            usable.append(weight)
            digests[weight.name] = weight_digest(value)
    sizes = [weight.parameters for weight in usable]
    blocks = parts == "blocks"
    shapes = [weight.matrix_shape(blocks=blocks) for weight in usable]
    scale = [expected_condition_number(*shape) if normalize == "shape" else 1.0 for shape in shapes]
    with progress_of(progress, "condition numbers", len(usable)) as tell:
        options: dict[str, Any] = {
            "scale": scale,
            "shapes": shapes,
            "stored": [weight.bits or weight.dtype for weight in usable],
            "rtol": rtol,
            "progress": lambda done, total: tell(done, ""),
        }
        matrices = [_matrices(weight, blocks, device) for weight in usable]
        if rule.kind == "threshold":
            found = lowest_condition_numbers(matrices, threshold=rule.value, **options)
        elif rule.kind == "parameters":
            found = lowest_condition_numbers(matrices, sizes=sizes, limit=rule.size(sum(sizes)), **options)
        if rule.kind == "tensors" or (rule.kind == "parameters" and not found.chosen):
            count = rule.tensors(len(usable)) if rule.kind == "tensors" else 1  # at least one, whatever its size
            found = lowest_condition_numbers(matrices, count, **options)
    candidates = []
    for i, weight in enumerate(usable):
        kappa, digest = found.values[i], digests[weight.name]
        if kappa is None and math.isinf(found.lower_bounds[i]):
            kappa = math.inf
        if kappa is None:
            candidates.append(of_weight(weight, found.lower_bounds[i], blocks=blocks, exact=False, digest=digest))
            continue
        if math.isinf(kappa):
            reason = f"its rank is deficient at the precision that it is stored in ({weight.precision})"
            refused.append(Refusal(weight.name, f"{reason}: kappa is infinite"))
        candidates.append(of_weight(weight, kappa, blocks=blocks, error=found.errors[i] or 0.0, digest=digest))
    return candidates, refused, [usable[i].name for i in found.chosen]


def _matrices(weight: StoredWeight, blocks: bool, device: torch.device | str | None) -> Callable[[], Tensor]:
    def read() -> Tensor:
        stack = on_device(weight.matrices(blocks=blocks), device)
        return stack[0] if len(stack) == 1 else stack

    return read


__all__ = ["certified"]
