r"""AEM: attention entropy maximization for multiple-instance learning (arXiv 2406.15303, MICCAI 2025).

A bag's attention :math:`a = \mathrm{softmax}(s)` tends to collapse on a handful of instances. AEM adds its negative
entropy to the loss:

    L = L_task + w_t * mean over heads, branches and class rows of  sum_n a_n log a_n

in nats, from logits, not divided by log N, mean over bags; w_t falls from ``weight`` to ``end_weight`` along a cosine
in version 3 of the paper and is constant in the authors' public code. Ours are the masking, ``target``, the
diagnostics, and that it reads the attention of a module nobody edited.

The gradient on a logit is a_k (log a_k + H): zero where attention is uniform and where it has collapsed. AEM prevents
collapse and cannot undo it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_entropy.arguments import check_types
from lightning_entropy.functional import aem_loss, entropy_from_logits
from lightning_entropy.observe import AttentionRecord
from lightning_entropy.observe.reader import AttentionFunction
from lightning_entropy.training.lightning import rank_zero_warn
from lightning_entropy.training.reader_term import AttentionLossTerm
from lightning_entropy.training.schedule import WeightSchedule

_COLLAPSED = 1.05  # effective number of instances under which AEM's gradient is as good as gone
_PATIENCE = 5  # logged steps in a row before that is said


class AttentionEntropyMaximization(AttentionLossTerm):
    r"""Adds the negative entropy of a model's bag attention to its loss.

    Add it to any Trainer. The attention is found in the first training step (or where ``modules`` says) and read
    where it is computed; the LightningModule is not edited. See :func:`lightning_entropy.functional.aem_loss` for
    the formula. It logs, every ``log_every_n_steps`` steps and in the last step of an epoch, ``aem/loss``,
    ``aem/entropy`` (nats), ``aem/normalized_entropy``,
    ``aem/effective_number``, ``aem/top1_mass``, ``aem/top10_mass`` and ``aem/collapsed_fraction`` (share of
    distributions whose effective number is below 1.05), and ``aem/weight`` when it is scheduled.

    Args:
        weight: factor of the negative entropy; with a schedule the weight at the start. The paper uses 0.001 to 0.2:
            high where evidence is abundant in a bag and bags are few, low or 0 where the witness rate is about 1 %.
        schedule: ``"constant"``, ``"linear"``, ``"cosine"``, ``"warmup"`` (by epoch), or a
            :class:`lightning_entropy.training.WeightSchedule`.
        end_weight: the weight at the end of a linear or cosine schedule.
        top_k: the entropy of the ``top_k`` largest logits only; bounds the term by log k.
        normalize: divide by the log of the number of instances.
        target: stop pushing a distribution whose normalised entropy has reached this value.
        reduction: ``"mean"`` over all distributions of a step, or ``"sum"``.
        modules: shell patterns over dotted module names, or a function ``(outputs, batch)`` that returns logits; None
            finds the attention over instances itself.

    Raises:
        ValueError: if an argument is out of range (here), or if nothing in the model is attention over instances (in
            the first training step), with an inventory of what the model computes.

    Reference:
        Attention Entropy Maximization for Multiple Instance Learning based Whole Slide Image Classification,
        arXiv 2406.15303.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[AttentionEntropyMaximization(weight=0.1, schedule="cosine")])
    """

    log_name = "aem"

    def __init__(
        self,
        weight: float = 0.1,
        *,
        schedule: str | WeightSchedule = "constant",
        end_weight: float = 0.0,
        top_k: int | None = None,
        normalize: bool = False,
        target: float | None = None,
        reduction: str = "mean",
        modules: str | list[str] | AttentionFunction | None = None,
    ) -> None:
        check_types(AttentionEntropyMaximization, locals())
        super().__init__(weight, schedule=schedule, end_weight=end_weight, modules=modules)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        aem_loss(torch.zeros(1, 2), top_k=top_k, target=target)  # the function knows the ranges
        self.top_k = top_k
        self.normalize = normalize
        self.target = target
        self.reduction = reduction
        self._collapsed_readings = 0

    def attention_term(self, records: list[AttentionRecord]) -> Tensor:
        """AEM's loss over the records of one step; every module that was read counts equally."""
        rows: dict[str, list[Tensor]] = {}
        counts: dict[str, list[Tensor]] = {}
        for record in records:
            loss = aem_loss(
                record.logits,
                top_k=self.top_k,
                normalize=self.normalize,
                target=self.target,
                reduction="none",
            )
            rows.setdefault(record.module, []).append(loss.flatten())
            counts.setdefault(record.module, []).append(record.mask.any(-1).flatten())
        per_module = []
        for module, losses in rows.items():
            total = torch.cat(losses).sum()
            if self.reduction == "mean":
                total = total / torch.cat(counts[module]).sum().clamp(min=1)
            per_module.append(total)
        return torch.stack(per_module).mean()

    def attention_quantities(self, records: list[AttentionRecord]) -> dict[str, Tensor | float]:
        """Entropy, effective number and concentration, each the mean over the step's distributions."""
        collected: dict[str, list[Tensor]] = {}
        for record in records:
            exists = record.mask.any(-1)
            h = entropy_from_logits(record.logits)[exists]
            weights = record.weights()[exists]
            top = weights.topk(min(10, record.instances), -1).values
            for name, value in (
                ("entropy", h),
                ("normalized_entropy", entropy_from_logits(record.logits, normalize=True)[exists]),
                ("effective_number", h.exp()),
                ("top1_mass", top[..., 0]),
                ("top10_mass", top.sum(-1)),
            ):
                collected.setdefault(name, []).append(value.flatten())
        out: dict[str, Tensor | float] = {name: torch.cat(values).mean() for name, values in collected.items()}
        several = torch.cat([(r.mask.sum(-1) > 1)[r.mask.any(-1)].flatten() for r in records])
        collapsed = (torch.cat(collected["effective_number"]) < _COLLAPSED) & several
        out["collapsed_fraction"] = collapsed.float().mean()
        self._watch(bool(collapsed[several].all()) and bool(several.any()))
        return out

    def _watch(self, collapsed: bool) -> None:
        """Warn once when every attention has been collapsed for a while."""
        self._collapsed_readings = self._collapsed_readings + 1 if collapsed else 0
        if self._collapsed_readings == _PATIENCE:
            rank_zero_warn(
                f"{self.name}: the effective number of attended instances has been below {_COLLAPSED} in {_PATIENCE} "
                "logged steps in a row. The gradient of the entropy vanishes there: AEM cannot undo a collapse. "
                "Regularise from the first step, with a larger weight, or lower the learning rate."
            )
