"""What the classifiers of images and of texts share: loss, metrics, and AdamW with warm-up and decay."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from lightning_entropy.recipes.half_cosine import HalfCosine
from lightning_entropy.training.lightning import LightningModule, rank_zero_warn

Decay = Literal["constant", "cosine"]


class WarmUp:
    """Factor ``min(1, (t + 1) / W)`` of the learning rate at step t, and half a cosine to 0 where asked for.

    Args:
        warmup_steps: W; 0 for the whole rate from the first step on.
        cosine_steps: steps of the run, over which the cosine falls; None for a constant rate.
    """

    def __init__(self, warmup_steps: int, *, cosine_steps: int | None = None) -> None:
        self.warmup_steps = warmup_steps
        self.cosine_steps = cosine_steps  # numbers alone: a checkpoint holds them, and is loaded with weights_only

    def __call__(self, step: int) -> float:
        """The factor at a step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return rise if self.cosine_steps is None else rise * HalfCosine(self.cosine_steps)(step)


def check_training_arguments(
    *, lr: float, weight_decay: float, warmup_steps: int, decay: str, label_smoothing: float = 0.0
) -> None:
    """Refuse settings of AdamW and its learning rate that are out of their range.

    Raises:
        ValueError: for the first that is.
    """
    for name, value in {"lr": lr, "weight_decay": weight_decay, "warmup_steps": warmup_steps}.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and >= 0, got {value}")
    if decay not in ("constant", "cosine"):
        raise ValueError(f"decay must be 'constant' or 'cosine', got {decay!r}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")


class AdamWModule(LightningModule):
    """A LightningModule that trains with AdamW: warm-up, decay of the rate, weight decay on matrices alone.

    A loss that is not finite ends the run: the step that met it changes no weight, a warning names it, and validation
    and testing go on with the weights as they are.

    Args:
        lr: learning rate.
        weight_decay: of AdamW, on weight matrices.
        warmup_steps: steps over which the learning rate rises linearly; 0 for none.
        decay: ``"constant"``, or ``"cosine"`` for half a cosine to 0 over the steps of the run.
    """

    advice: ClassVar[str] = "A smaller lr or warmup_steps may help."

    def __init__(self, *, lr: float, weight_decay: float, warmup_steps: int, decay: Decay) -> None:
        super().__init__()
        check_training_arguments(lr=lr, weight_decay=weight_decay, warmup_steps=warmup_steps, decay=decay)
        self.lr, self.weight_decay, self.warmup_steps, self.decay = lr, weight_decay, int(warmup_steps), decay
        self.diverged_at: int | None = None

    def on_fit_start(self) -> None:
        """A run begins: it has not diverged yet."""
        self.diverged_at = None

    def stop_if_diverged(self, loss: Tensor) -> None:
        """End the run, on all processes, where the loss of one is not finite."""
        finite = self.trainer.strategy.reduce_boolean_decision(bool(loss.isfinite()), all=True)
        if finite or self.diverged_at is not None:
            return
        self.diverged_at = int(self.global_step)
        self.trainer.should_stop = True
        rank_zero_warn(
            f"{type(self).__name__}: the training loss is {float(loss):g} in step {self.diverged_at}: the run has "
            f"diverged and stops here. {self.advice}"
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave the weights alone when the loss was not finite."""
        if self.diverged_at is not None:
            optimizer.zero_grad(set_to_none=True)

    def without_decay(self) -> Iterable[str]:
        """Names of matrices that get no weight decay; none here."""
        return ()

    def rate_of(self, name: str) -> float:
        """Learning rate of a parameter; the same for all here."""
        return self.lr

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters by their rate, and whether they decay."""
        kept = set(self.without_decay())
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                spared = bool(self.weight_decay) and (parameter.ndim < 2 or name in kept)
                groups.setdefault((self.rate_of(name), spared), []).append(parameter)
        return [
            {"params": members, "lr": rate, **({"weight_decay": 0.0} if spared else {})}
            for (rate, spared), members in sorted(groups.items(), key=lambda group: group[0][1])
        ]

    def build_optimizer(self) -> torch.optim.Optimizer:
        """AdamW on the groups."""
        return torch.optim.AdamW(self._groups(), lr=self.lr, weight_decay=self.weight_decay)

    def configure_optimizers(self) -> Any:
        """The optimizer with the warm-up and decay that were asked for."""
        optimizer = self.build_optimizer()
        steps = self.trainer.estimated_stepping_batches if self.decay == "cosine" else math.inf
        factor = WarmUp(self.warmup_steps, cosine_steps=int(steps) if math.isfinite(steps) else None)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


class Classifier(AdamWModule):
    """One label for an item; a subclass says how a batch becomes logits, in :meth:`logits`.

    Batches have ``label`` and ``name``. Training minimises the cross-entropy; it logs ``train/loss`` by step
    (``train/loss_step``) and by epoch. Evaluation logs ``stage/loss`` and ``stage/accuracy`` for ``stage`` in ``val``
    and ``test``.

    Args:
        label_smoothing: share of the target, in training, that is spread over all classes.
        **training: of :class:`AdamWModule`.
    """

    def __init__(self, *, label_smoothing: float = 0.0, **training: Any) -> None:
        super().__init__(**training)
        check_training_arguments(**training, label_smoothing=label_smoothing)
        self.label_smoothing = label_smoothing
        # A loss that is not finite has to show in the mean.
        self.val_metrics, self.test_metrics = (
            nn.ModuleDict({name: MeanMetric(nan_strategy="disable") for name in ("accuracy", "loss")}) for _ in range(2)
        )

    @abstractmethod
    def logits(self, batch: Any) -> Tensor:
        """Logits ``(B, classes)`` of a batch."""

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """The loss of a batch; one that is not finite ends the run."""
        loss = F.cross_entropy(self.logits(batch), batch["label"], label_smoothing=self.label_smoothing)
        self.stop_if_diverged(loss.detach())
        shown: dict[str, Any] = {"prog_bar": True, "sync_dist": True, "batch_size": len(batch["label"])}
        self.log("train/loss", loss.detach(), on_step=True, on_epoch=True, **shown)
        return loss

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """Add a batch to the validation metrics."""
        self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: Any, batch_index: int) -> None:
        """Add a batch to the test metrics."""
        self._evaluate(batch, self.test_metrics)

    def _evaluate(self, batch: Any, metrics: Any) -> None:
        logits = self.logits(batch).float()
        right = (logits.argmax(dim=1) == batch["label"]) & logits.isfinite().all(dim=1)
        metrics["accuracy"].update(right.float())
        metrics["loss"].update(F.cross_entropy(logits, batch["label"], reduction="none"))

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._report("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._report("test", self.test_metrics)

    def _report(self, stage: str, metrics: Any) -> None:
        for name, metric in metrics.items():
            self.log(f"{stage}/{name}", metric.compute(), prog_bar=stage == "val")  # computed over all processes
            metric.reset()

    def predict_step(self, batch: Any, batch_index: int) -> dict[str, Any]:
        """Probabilities of a batch.

        Returns:
            ``name``: names of the items; ``probabilities``: ``(B, classes)``.
        """
        return {"name": batch["name"], "probabilities": self.logits(batch).float().softmax(dim=-1)}


__all__ = ["AdamWModule", "Classifier", "Decay", "WarmUp", "check_training_arguments"]
