"""A classifier of images for a Trainer: any vision transformer of timm."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from lightning_entropy.activation.swap import swap_activations
from lightning_entropy.activation.swap_rules import named_activation
from lightning_entropy.data.images import ImageBatch
from lightning_entropy.extras import require
from lightning_entropy.recipes.half_cosine import HalfCosine
from lightning_entropy.training.lightning import LightningModule, rank_zero_warn
from lightning_entropy.verbosity import announce

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


class ViTClassifier(LightningModule):
    r"""One label for an image, from a vision transformer.

    Batches are those of :class:`~lightning_entropy.data.ImageSet`. Training minimises the cross-entropy with AdamW; it
    logs ``train/loss`` by step (``train/loss_step``) and by epoch. Evaluation logs ``stage/loss`` and
    ``stage/accuracy`` for ``stage`` in ``val`` and ``test``.

    A loss that is not finite ends the run: the step that met it changes no weight, a warning names it, and validation
    and testing go on with the weights as they are.

    Args:
        model: a name of ``timm.create_model``, or a module from ``(B, C, H, W)`` to logits ``(B, classes)``.
        image_size: height and width of the images; None takes it from the Trainer's datamodule.
        in_channels: number of channels; None takes it from the Trainer's datamodule.
        num_classes: number of classes; None takes it from the Trainer's datamodule.
        qk_norm: normalise queries and keys (``qk_norm`` of timm's transformers: a LayerNorm of each head).
        activation: what stands in the place of every GELU, by a name that
            :func:`~lightning_entropy.swap_activations` takes (``"crrelu"``, ``"relu"``); None keeps the model's own.
        lr: learning rate.
        weight_decay: of AdamW, on weight matrices; biases, the weights of norms, the parameters of activations, and
            what timm's model names in ``no_weight_decay`` (embeddings of positions and classes) get none.
        warmup_steps: steps over which the learning rate rises linearly; 0 for none.
        decay: ``"constant"``, or ``"cosine"`` for half a cosine to 0 over the steps of the run.
        label_smoothing: share of the target, in training, that is spread over all classes.
        model_kwargs: more arguments of ``timm.create_model``, for example ``{"patch_size": 2, "depth": 4}`` or
            ``{"pretrained": True}``.

    Raises:
        ValueError: if an argument is out of its range or does not go with the model; from ``configure_model``, if the
            sizes are not known or timm refuses the model.
        ImportError: if timm (extra ``vision``) is needed and not installed.

    Example:
        >>> small = {"patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4}
        >>> classifier = ViTClassifier(image_size=8, in_channels=1, num_classes=10, model_kwargs=small)
        >>> classifier(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 10])
    """

    def __init__(
        self,
        model: str | nn.Module = "vit_tiny_patch16_224",
        *,
        image_size: int | None = None,
        in_channels: int | None = None,
        num_classes: int | None = None,
        qk_norm: bool = False,
        activation: str | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        decay: Decay = "constant",
        label_smoothing: float = 0.0,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"lr": lr, "weight_decay": weight_decay, "warmup_steps": warmup_steps}.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        if decay not in ("constant", "cosine"):
            raise ValueError(f"decay must be 'constant' or 'cosine', got {decay!r}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        if not isinstance(model, str) and (qk_norm or model_kwargs or activation):
            raise ValueError(
                "qk_norm, activation and model_kwargs are for a model that timm makes; this one exists already "
                "(swap_activations changes its activations)"
            )
        if activation is not None:
            named_activation(activation)  # an unknown name is an error here, not when the data have been read
        self.save_hyperparameters(ignore=[] if isinstance(model, str) else ["model"])
        self.lr, self.weight_decay, self.warmup_steps, self.decay = lr, weight_decay, int(warmup_steps), decay
        self.image_size, self.in_channels, self.num_classes = image_size, in_channels, num_classes
        self.diverged_at: int | None = None
        self._name = None if isinstance(model, nn.Module) else model
        self._qk_norm, self._activation, self._model_kwargs = qk_norm, activation, dict(model_kwargs or {})
        self.label_smoothing = label_smoothing
        self.net: nn.Module | None = model if isinstance(model, nn.Module) else None
        # A loss that is not finite has to show in the mean.
        self.val_metrics, self.test_metrics = (
            nn.ModuleDict({name: MeanMetric(nan_strategy="disable") for name in ("accuracy", "loss")}) for _ in range(2)
        )
        if None not in (image_size, in_channels, num_classes):
            self.configure_model()

    def configure_model(self) -> None:
        """Build the model, once; Lightning calls it when the datamodule is ready."""
        if self.net is not None:
            return
        datamodule = self._datamodule()
        for name in ("image_size", "in_channels", "num_classes"):
            if getattr(self, name) is None:
                value = getattr(datamodule, name, None)
                if value is None:
                    where = "the Trainer has no datamodule" if datamodule is None else f"its datamodule has no {name}"
                    raise ValueError(f"ViTClassifier needs {name}: {where}. Pass {name}=, or fit with ImageSet.")
                setattr(self, name, int(value))
                self.hparams[name] = int(value)  # so that a checkpoint can be loaded without the data
        self.net = self._made_by_timm()

    def _made_by_timm(self) -> nn.Module:
        timm = require("timm", extra="vision")
        given = {"img_size": self.image_size, "in_chans": self.in_channels, "num_classes": self.num_classes}
        chosen = {**given, **({"qk_norm": True} if self._qk_norm else {}), **self._model_kwargs}
        try:
            made: nn.Module = timm.create_model(self._name, **chosen)
        except (RuntimeError, TypeError, AssertionError) as error:  # unknown names, unknown arguments, wrong sizes
            raise ValueError(f"ViTClassifier: timm cannot make {self._name!r} with {chosen}: {error}") from error
        if self._activation is not None:
            image = torch.zeros(1, int(self.in_channels or 1), *2 * (int(self.image_size or 1),))
            announce(str(swap_activations(made, old="gelu", new=self._activation, example=image, optimizer=())))
        return made

    def _datamodule(self) -> Any:
        try:
            return getattr(self.trainer, "datamodule", None)
        except RuntimeError:  # Lightning's answer outside a Trainer
            return None

    def forward(self, image: Tensor) -> Tensor:
        """Classify images.

        Args:
            image: ``(B, C, H, W)``.

        Returns:
            Logits ``(B, classes)``.

        Raises:
            RuntimeError: if the model is not built yet.
        """
        if self.net is None:
            raise RuntimeError(
                "the model is built by a Trainer, or at once if image_size, in_channels and num_classes are given"
            )
        logits: Tensor = self.net(image)
        return logits

    def on_fit_start(self) -> None:
        """A run begins: it has not diverged yet."""
        self.diverged_at = None

    def training_step(self, batch: ImageBatch, batch_index: int) -> Tensor:
        """The loss of a batch; one that is not finite ends the run."""
        loss = F.cross_entropy(self(batch["image"]), batch["label"], label_smoothing=self.label_smoothing)
        self._stop_if_diverged(loss.detach())
        shown: dict[str, Any] = {"prog_bar": True, "sync_dist": True, "batch_size": len(batch["label"])}
        self.log("train/loss", loss.detach(), on_step=True, on_epoch=True, **shown)
        return loss

    def _stop_if_diverged(self, loss: Tensor) -> None:
        finite = self.trainer.strategy.reduce_boolean_decision(bool(loss.isfinite()), all=True)
        if finite or self.diverged_at is not None:
            return
        self.diverged_at = int(self.global_step)
        self.trainer.should_stop = True
        rank_zero_warn(
            f"ViTClassifier: the training loss is {float(loss):g} in step {self.diverged_at}: the run has diverged and "
            "stops here. A smaller lr, warmup_steps or qk_norm=True may help."
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave the weights alone when the loss was not finite."""
        if self.diverged_at is not None:
            optimizer.zero_grad(set_to_none=True)

    def validation_step(self, batch: ImageBatch, batch_index: int) -> None:
        """Add a batch to the validation metrics."""
        self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: ImageBatch, batch_index: int) -> None:
        """Add a batch to the test metrics."""
        self._evaluate(batch, self.test_metrics)

    def _evaluate(self, batch: ImageBatch, metrics: Any) -> None:
        logits = self(batch["image"]).float()
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

    def predict_step(self, batch: ImageBatch, batch_index: int) -> dict[str, Any]:
        """Probabilities of a batch.

        Returns:
            ``name``: names of the images; ``probabilities``: ``(B, classes)``.
        """
        return {"name": batch["name"], "probabilities": self(batch["image"]).float().softmax(dim=-1)}

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters that decay, and those that do not."""
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        if not self.weight_decay:
            return [{"params": [p for _, p in trained]}]
        kept = {f"net.{name}" for name in getattr(self.net, "no_weight_decay", set)()}
        decays = [p.ndim > 1 and name not in kept for name, p in trained]
        return [
            {"params": [p for (_, p), d in zip(trained, decays) if d]},
            {"params": [p for (_, p), d in zip(trained, decays) if not d], "weight_decay": 0.0},
        ]

    def configure_optimizers(self) -> Any:
        """AdamW with the warm-up and decay that were asked for."""
        optimizer = torch.optim.AdamW(self._groups(), lr=self.lr, weight_decay=self.weight_decay)
        steps = self.trainer.estimated_stepping_batches if self.decay == "cosine" else math.inf
        factor = WarmUp(self.warmup_steps, cosine_steps=int(steps) if math.isfinite(steps) else None)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


__all__ = ["ViTClassifier", "WarmUp"]
