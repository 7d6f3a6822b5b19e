"""A classifier of bags for a Trainer: slides, images or molecules as sets of feature vectors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_entropy.arguments import check_types
from lightning_entropy.data import Batch
from lightning_entropy.recipes.abmil import Pooling
from lightning_entropy.recipes.bag_attention import UnreadableAttention, attend
from lightning_entropy.recipes.bag_models import BagModel, build_bag_model
from lightning_entropy.recipes.class_weights import bag_loss, resolve_weights
from lightning_entropy.recipes.from_data import datamodule_of, take_from_data
from lightning_entropy.recipes.half_cosine import HalfCosine
from lightning_entropy.recipes.mil_metrics import EvaluationMetrics
from lightning_entropy.training.lightning import LightningModule
from lightning_entropy.verbosity import announce


class MILClassifier(LightningModule):
    r"""Multiple instance learning: one label for a bag of instances.

    Batches are those of :class:`~lightning_entropy.data.SlideBags`. Training minimises the cross-entropy, or
    what a model of torchmil prescribes, with AdamW and a learning rate that falls to 0 as half a cosine over
    the steps of the run. Evaluation logs, for ``stage`` in ``val`` and ``test``: ``stage/auc`` and
    ``stage/f1`` (macro), ``stage/balanced_accuracy``, ``stage/loss`` (unweighted cross-entropy, nats),
    ``val/f1_plus_auc`` (the quantity that selects the epoch), and, read from the model's attention,
    ``stage/entropy``, ``stage/normalized_entropy``, ``stage/effective_number`` over positive bags and
    ``stage/instance_auc``, ``stage/coverage``, ``stage/key_mass`` where instance labels are known (see
    :class:`~lightning_entropy.recipes.mil_metrics.AttentionMetrics`).

    Args:
        model: ``"abmil"`` (:class:`~lightning_entropy.recipes.abmil.ABMIL`), ``"torchmil:NAME"`` for any
            model of torchmil (binary), the dotted path of an ``nn.Module`` class, or a module.
        in_features: width of an instance; ``None`` takes it from the Trainer's datamodule.
        num_classes: number of classes; ``None`` takes it from the Trainer's datamodule.
        hidden: width of a ReLU layer before the attention; ``None`` for none. Of ``abmil`` and torchmil's
            models.
        attention_hidden: width of the attention's hidden layer, of ``abmil`` only, as are the four that
            follow.
        branches: number of attention distributions.
        gated: gated attention.
        pooling: ``"attention"``, or ``"mean"`` for the control without attention.
        dropout: probability of dropping an element of the hidden layer and of the bag embedding.
        class_weights: weights of the classes in the training loss, ``"balanced"`` for B / (C B_c) from the
            labels of the training bags, or ``None``. The loss is the mean of weight times cross-entropy over
            bags. (PyTorch's ``weight=`` divides by the sum of the weights, so that in batches of one bag it
            would do nothing.)
        lr: learning rate of the first step.
        weight_decay: of AdamW.
        model_kwargs: arguments for the constructor of a model given by name.
        adapter: ``(module, batch) -> logits`` ``(B, C)``, ``(B, 1)`` or ``(B,)``, or its dotted path, for a
            module or a class path. The default calls ``module(features, mask)`` if the forward takes a mask,
            else ``module(features)``, and takes the first of several outputs.

    Raises:
        ValueError: if an argument is out of its range or does not apply to the model; from
            ``configure_model``, if the sizes are not known or a torchmil model meets more than two classes.

    Reference:
        The training is that of the authors of AEM (https://github.com/dazhangyu123/AEM).

    Example:
        >>> classifier = MILClassifier(in_features=384, num_classes=2)
        >>> classifier(torch.randn(1, 100, 384)).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        model: str | nn.Module = "abmil",
        *,
        in_features: int | None = None,
        num_classes: int | None = None,
        hidden: int | None = None,
        attention_hidden: int = 128,
        branches: int = 1,
        gated: bool = True,
        pooling: Pooling = "attention",
        dropout: float = 0.0,
        class_weights: list[float] | Literal["balanced"] | None = None,
        lr: float = 2e-4,
        weight_decay: float = 1e-5,
        model_kwargs: dict[str, Any] | None = None,
        adapter: str | Callable[[nn.Module, Batch], Tensor] | None = None,
    ) -> None:
        check_types(MILClassifier, locals())
        super().__init__()
        for name, value in {"lr": lr, "weight_decay": weight_decay}.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        if model != "abmil" and (branches != 1 or pooling != "attention" or dropout != 0):
            raise ValueError(
                "branches, pooling and dropout are arguments of model='abmil'; use model_kwargs for others"
            )
        if class_weights is not None and isinstance(model, str) and model.startswith("torchmil:"):
            raise ValueError(
                f"class_weights do not reach the losses inside {model!r}: leave them out, or give the model a "
                "weighted criterion in Python (model_kwargs={'criterion': BCEWithLogitsLoss(pos_weight=...)})"
            )
        live = [name for name, value in {"model": model, "adapter": adapter}.items() if not _is_plain(value)]
        self.save_hyperparameters(ignore=live)
        self.lr, self.weight_decay = lr, weight_decay
        self._model, self._adapter = model, adapter
        self._abmil = {
            "attention_hidden": attention_hidden,
            "branches": branches,
            "gated": gated,
            "pooling": pooling,
            "dropout": dropout,
        }
        self._hidden, self._model_kwargs = hidden, model_kwargs
        self._class_weights = class_weights
        self._said: set[str] = set()
        self._built: BagModel | None = None
        self.net: nn.Module | None = None
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", None, persistent=False)
        self.in_features, self.num_classes = in_features, num_classes
        if in_features is not None and num_classes is not None and class_weights != "balanced":
            self.configure_model()

    def configure_model(self) -> None:
        """Build the model, once; Lightning calls it when the datamodule is ready."""
        if self._built is not None:
            return
        take_from_data(self, "in_features", "num_classes", fit_with="SlideBags")
        assert self.in_features is not None
        assert self.num_classes is not None
        self._built = build_bag_model(
            self._model,
            in_features=self.in_features,
            num_classes=self.num_classes,
            hidden=self._hidden,
            abmil=self._abmil,
            model_kwargs=self._model_kwargs,
            adapter=self._adapter,
        )
        self.net = self._built.net
        self.val_metrics, self.test_metrics = (EvaluationMetrics(self.num_classes) for _ in range(2))
        if self._class_weights is not None:
            labels = getattr(getattr(datamodule_of(self), "train", None), "labels", None)
            weights = resolve_weights(self._class_weights, labels=labels, num_classes=self.num_classes)
            self.hparams["class_weights"] = weights
            self.class_weight = torch.tensor(weights, dtype=torch.float32, device=self.device)

    @property
    def built(self) -> BagModel:
        """The model and how it is called.

        Raises:
            RuntimeError: if it is not built yet.
        """
        if self._built is None:
            raise RuntimeError("the model is built by a Trainer, or at once if in_features and num_classes are given")
        return self._built

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Classify bags.

        Args:
            features: ``(B, N, D)``.
            mask: ``(B, N)``, non-zero where an instance exists; ``None``: all exist.

        Returns:
            Logits ``(B, C)``.
        """
        exists = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device) if mask is None else mask != 0
        label = torch.zeros(len(features), dtype=torch.long, device=features.device)
        batch = Batch(features=features, mask=exists, label=label, slide=[""] * len(features))
        return self.built.logits(self.built.net, batch)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The loss of a batch."""
        built, bags = self.built, len(batch["label"])
        if built.loss is not None:
            terms = built.loss(built.net, batch)
            for name, term in terms.items():
                if len(terms) > 1:
                    self._log_loss(f"train/{name}", term, bags)
            loss = torch.stack([term.reshape(()) for term in terms.values()]).sum()
        else:
            loss = bag_loss(built.logits(built.net, batch), batch["label"], self.class_weight)
        self._log_loss("train/loss", loss, bags)
        return loss

    def _log_loss(self, name: str, loss: Tensor, bags: int) -> None:
        shown = name == "train/loss"
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True, "batch_size": bags}
        self.log(name, loss.detach(), prog_bar=shown, **options)

    def attend(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Classify a batch and read its attention on the way.

        Args:
            batch: a batch of :class:`~lightning_entropy.data.SlideBags`.

        Returns:
            Logits ``(B, C)``, and the logarithm of the attention on each instance ``(B, N)``, or ``None``
            where the model has none that can be read (said once).
        """
        try:
            return attend(self.built, batch)
        except UnreadableAttention as unreadable:
            text = f"MILClassifier: no attention metrics. {unreadable}"
            if "attention" not in self._said:
                self._said.add("attention")
                announce(text)
            return unreadable.logits, None

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Add a batch to the validation metrics."""
        self.val_metrics.update(*self.attend(batch), batch=batch)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Add a batch to the test metrics."""
        self.test_metrics.update(*self.attend(batch), batch=batch)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        values = self._report("val", self.val_metrics)
        auc = torch.nan_to_num(values["auc"], nan=0.5)  # one class alone: chance, so that the F1 still selects
        self.log("val/f1_plus_auc", values["f1"] + auc, sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._report("test", self.test_metrics)

    def _report(self, stage: str, metrics: EvaluationMetrics) -> dict[str, Tensor]:
        missing = metrics.bags.missing()
        if missing and not self.trainer.sanity_checking and stage not in self._said:
            self._said.add(stage)
            names = getattr(datamodule_of(self), "classes", None)
            which = ", ".join(str(names[c]) if names else str(c) for c in missing)
            warnings.warn(
                f"the {stage} bags have none of class {which}: {stage}/auc is the mean over the classes for "
                "which it is defined, NaN where there is none",
                stacklevel=2,
            )
        values = metrics.compute()
        for name, value in values.items():
            shown = stage == "val" and name in ("auc", "f1")
            self.log(f"{stage}/{name}", value, prog_bar=shown, sync_dist=True)
        metrics.reset()
        return values

    def predict_step(self, batch: Batch, batch_index: int) -> dict[str, Any]:
        """Probabilities and attention of a batch.

        Returns:
            ``slide``: names; ``probabilities``: ``(B, C)``; ``attention``: a list of ``(N_i,)``, the mean
            over branches without padding, or ``None`` for a model whose attention cannot be read.
        """
        logits, attention = self.attend(batch)
        parts = None if attention is None else [a[m].exp() for a, m in zip(attention, batch["mask"])]
        return {"slide": batch["slide"], "probabilities": logits.float().softmax(dim=-1), "attention": parts}

    def configure_optimizers(self) -> Any:
        """AdamW with half a cosine over the steps of the run; a constant rate if the run has no end."""
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=self.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, HalfCosine(int(steps))), "interval": "step"},
        }


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str)


__all__ = ["MILClassifier"]
