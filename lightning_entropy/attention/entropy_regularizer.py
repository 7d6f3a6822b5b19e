r"""Regularizers of attention entropy, among them Entropy-Guided Attention (arXiv 2501.03489).

With E the entropy of a head (mean over its query rows, divided by the log of the row's allowed keys):

    L = L_task + w_t * mean over layers and heads of  penalty(E)

``maximize`` adds -E, ``minimize`` E, ``floor`` max(0, target - E)^2, ``ceiling`` max(0, E - target)^2, ``target``
(E - target)^2, and ``band`` the paper's (E - target)^2 where |E - target| > tolerance. The paper measures in nats
(``normalize=False``), learns a threshold for every head (``learnable=True``) and uses a tolerance of 0.2. Ours are the
other objectives, the maximum of each row's own keys, and that it reads the attention of a module nobody edited.

A threshold that is learned has a gradient from this term alone, so it follows its head's entropy until the head is
inside its band, and the term vanishes: the pressure is transient, unless the thresholds learn slowly or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from lightning_entropy.arguments import check_types
from lightning_entropy.functional.entropy_penalty import attention_entropy_penalty, check_objective
from lightning_entropy.observe import LayerEntropy
from lightning_entropy.training.entropy_term import AttentionEntropyTerm
from lightning_entropy.training.learned_thresholds import LearnedThresholds
from lightning_entropy.training.lightning import LightningModule, MisconfigurationException, Trainer
from lightning_entropy.training.schedule import WeightSchedule

Target = float | list[float] | dict[str, float | list[float]]


class AttentionEntropyRegularizer(AttentionEntropyTerm):
    r"""Keeps the entropy of a transformer's attention where it should be.

    Add it to any Trainer: the attention of any module is read where it is computed, fused or not, and the module is not
    edited. See :func:`lightning_entropy.functional.attention_entropy_penalty` for the formulas. It logs, every
    ``log_every_n_steps`` steps, ``entropy_regularizer/loss``, ``/entropy`` (normalised, mean over layers and heads),
    ``/lowest_head``, ``/highest_head``, ``/outside`` (share of heads that the penalty pushes), ``/threshold`` (mean of
    those that are learned) and ``/weight`` when it is scheduled.

    Args:
        weight: factor of the penalty; with a schedule the weight at the start.
        objective: ``"maximize"``, ``"minimize"``, ``"floor"``, ``"ceiling"``, ``"band"`` or ``"target"``.
        target: fraction of the largest entropy: a number, one a head, or a dictionary from module patterns to either
            (the first pattern that matches counts; each must match an attention). Default 0.3 for a floor, 0.9 for a
            ceiling, 0.5 for band and target.
        tolerance: half the width of the band; default 0.2, the paper's.
        normalize: measure in fractions of the largest entropy; False measures in nats, as the paper does.
        gate: ``"hard"``, the paper's penalty with a jump at the edge of the band, or ``"hinge"``.
        learnable: learn a threshold for each layer and head, from ``target``; for band and target. They have an AdamW
            of their own without weight decay, and travel in the callback's checkpoint state.
        threshold_lr: its learning rate; None takes that of the Trainer's first parameter group.
        reduction: ``"mean"``, or ``"official_sum"`` for parity with the authors' public code (needs
            ``normalize=False``; sums over samples and query rows, so the weight is multiplied by their number).
        queries: read this many query rows of each attention only; None reads all.
        schedule: ``"constant"``, ``"linear"``, ``"cosine"``, ``"warmup"`` (by epoch), or a
            :class:`lightning_entropy.training.WeightSchedule`.
        end_weight: the weight at the end of a linear or cosine schedule.
        modules: shell patterns over dotted names of the modules whose attention is read, with all that they contain;
            None reads all.

    Raises:
        ValueError: if an argument is out of range (here), or if no attention runs (in the first training step).

    Reference:
        Entropy-Guided Attention for Private LLMs, arXiv 2501.03489; it uses a weight of 1e-5 to 5e-5 in nats.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[AttentionEntropyRegularizer(objective="floor", target=0.2)])
    """

    log_name = "entropy_regularizer"

    def __init__(
        self,
        weight: float = 0.1,
        *,
        objective: str = "floor",
        target: Target | None = None,
        tolerance: float | None = None,
        normalize: bool = True,
        gate: str = "hard",
        learnable: bool = False,
        threshold_lr: float | None = None,
        reduction: str = "mean",
        queries: int | None = None,
        schedule: str | WeightSchedule = "constant",
        end_weight: float = 0.0,
        modules: str | list[str] | None = None,
    ) -> None:
        check_types(AttentionEntropyRegularizer, locals())
        super().__init__(weight, schedule=schedule, end_weight=end_weight, modules=modules, queries=queries)
        self.target = _DEFAULT_TARGETS.get(objective) if target is None else target
        self.tolerance = (0.2 if objective == "band" else 0.0) if tolerance is None else tolerance
        for value in self.target.values() if isinstance(self.target, dict) else [self.target]:
            check_objective(objective, value, self.tolerance, gate, reduction, normalize)
        if learnable and objective not in ("band", "target"):
            raise ValueError(
                f"learnable thresholds belong to objective='band' or 'target', got {objective!r}: a learned floor "
                "would fall until it costs nothing"
            )
        if threshold_lr is not None and not (learnable and threshold_lr > 0):
            raise ValueError(f"threshold_lr must be positive and needs learnable=True, got {threshold_lr}")
        self.objective = objective
        self.normalize = normalize
        self.gate = gate
        self.learnable = learnable
        self.threshold_lr = threshold_lr
        self.reduction = reduction
        self.thresholds = LearnedThresholds(threshold_lr) if learnable else None
        self._checked = False

    @property
    def state_key(self) -> str:
        """Distinct for instances with another objective or other modules."""
        return self._generate_state_key(modules=self.modules, objective=self.objective)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach; thresholds start anew, or where the checkpoint left them."""
        super().on_fit_start(trainer, pl_module)
        self._checked = False
        if self.thresholds is not None:
            self.thresholds.begin()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Read this step."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._share = self.current_weight(trainer) / trainer.accumulate_grad_batches

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """The thresholds take their step with the optimizer."""
        if self.thresholds is not None:
            self.thresholds.step(trainer, optimizer)

    def entropy_term(self, layers: dict[str, list[LayerEntropy]]) -> Tensor:
        """Penalty, mean over layers; the calls of one layer count equally."""
        if not self._checked:
            self._check_patterns(list(layers))
        penalties = []
        for name, calls in layers.items():
            target = self._target(name, calls[0].entropy)
            penalties.append(torch.stack([self._penalty(c, target) for c in calls]).mean())
            if self.thresholds is not None and self._share:
                theta = self.thresholds.leaf(name)
                value = torch.stack([self._penalty(c, theta, detach=True) for c in calls]).mean()
                self.thresholds.add_gradient(name, value * self._share / len(layers))
        return torch.stack(penalties).mean()

    def entropy_quantities(self, layers: dict[str, list[LayerEntropy]]) -> dict[str, Tensor | float]:
        """Entropy of the heads, and how many the penalty pushes."""
        heads, pushed = [], []
        for name, calls in layers.items():
            e = torch.stack([c.per_head() for c in calls]).nanmean(0)
            heads.append(e)
            target = self._target(name, calls[0].entropy)
            if target is not None:
                delta = e - target.to(e)
                pushed.append(
                    {"floor": delta < 0, "ceiling": delta > 0}.get(self.objective, delta.abs() > self.tolerance)
                )
        values = torch.cat(heads)
        values = values[values.isfinite()]
        out: dict[str, Tensor | float] = {}
        if len(values):
            out = {"entropy": values.mean(), "lowest_head": values.min(), "highest_head": values.max()}
        if pushed:
            out["outside"] = torch.cat(pushed).float().mean()
        if self.thresholds is not None:
            out["threshold"] = torch.cat([theta.flatten() for theta in self.thresholds.values.values()]).mean()
        return out

    def _penalty(self, layer: LayerEntropy, target: Tensor | None, *, detach: bool = False) -> Tensor:
        return attention_entropy_penalty(
            layer.entropy.detach() if detach else layer.entropy,
            layer.keys,
            objective=self.objective,
            target=target,
            tolerance=self.tolerance,
            normalize=self.normalize,
            gate=self.gate,
            reduction=self.reduction,
            context=layer.columns,
        )

    def _target(self, name: str, entropy: Tensor) -> Tensor | None:
        """The target of a layer: as given, or as learned so far."""
        value: float | Sequence[float] | None
        if isinstance(self.target, dict):
            value = next((v for p, v in self.target.items() if fnmatchcase(name, p)), None)
            if value is None:
                raise MisconfigurationException(
                    f"{self.name}: no pattern of target {list(self.target)} matches the attention {name!r}. Add one "
                    '("*" matches the rest), or leave it out with modules=.'
                )
        else:
            value = self.target
        if value is None:
            return None
        heads = entropy.shape[-2]
        if isinstance(value, Sequence) and len(value) != heads:
            raise MisconfigurationException(f"{self.name}: target has {len(value)} values for {heads} heads of {name}")
        start = torch.as_tensor(value, dtype=entropy.dtype, device=entropy.device)
        if self.thresholds is None:
            return start
        return self.thresholds.get(name, start.expand(heads))

    def _check_patterns(self, names: list[str]) -> None:
        self._checked = True
        for pattern in self.target if isinstance(self.target, dict) else []:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise MisconfigurationException(
                    f"{self.name}: the target's pattern {pattern!r} matches none of the attentions {', '.join(names)}"
                )

    def state_dict(self) -> dict[str, Any]:
        """The arguments, and the learned thresholds with their optimizer."""
        extra = {} if self.thresholds is None else {"thresholds": self.thresholds.state_dict()}
        return {**super().state_dict(), **extra}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the thresholds."""
        super().load_state_dict(state_dict)
        if self.thresholds is not None and "thresholds" in state_dict:
            self.thresholds.load_state_dict(state_dict["thresholds"])


_DEFAULT_TARGETS = {"floor": 0.3, "ceiling": 0.9, "band": 0.5, "target": 0.5}


__all__ = ["AttentionEntropyRegularizer"]
