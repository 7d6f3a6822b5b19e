"""A classifier of images for a Trainer: any vision transformer of timm."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from lightning_entropy.activation.swap import swap_activations
from lightning_entropy.activation.swap_rules import named_activation
from lightning_entropy.arguments import check_types
from lightning_entropy.extras import require
from lightning_entropy.recipes.classifier import Decay, WarmUp
from lightning_entropy.recipes.from_data import take_from_data
from lightning_entropy.recipes.image_classifier import ImageClassifier
from lightning_entropy.verbosity import announce


class ViTClassifier(ImageClassifier):
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

    advice: ClassVar[str] = "A smaller lr, warmup_steps or qk_norm=True may help."

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
        check_types(ViTClassifier, locals())
        training: dict[str, Any] = {"warmup_steps": warmup_steps, "decay": decay, "label_smoothing": label_smoothing}
        super().__init__(lr=lr, weight_decay=weight_decay, **training)
        if not isinstance(model, str) and (qk_norm or model_kwargs or activation):
            raise ValueError(
                "qk_norm, activation and model_kwargs are for a model that timm makes; this one exists already "
                "(swap_activations changes its activations)"
            )
        if activation is not None:
            named_activation(activation)  # an unknown name is an error here, not when the data have been read
        self.save_hyperparameters(ignore=[] if isinstance(model, str) else ["model"])
        self.image_size, self.in_channels, self.num_classes = image_size, in_channels, num_classes
        self._name = None if isinstance(model, nn.Module) else model
        self._qk_norm, self._activation, self._model_kwargs = qk_norm, activation, dict(model_kwargs or {})
        self.net: nn.Module | None = model if isinstance(model, nn.Module) else None
        if None not in (image_size, in_channels, num_classes):
            self.configure_model()

    def configure_model(self) -> None:
        """Build the model, once; Lightning calls it when the datamodule is ready."""
        if self.net is not None:
            return
        take_from_data(self, "image_size", "in_channels", "num_classes", fit_with="ImageSet")
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

    def without_decay(self) -> list[str]:
        """What timm's model names in ``no_weight_decay``."""
        return [f"net.{name}" for name in getattr(self.net, "no_weight_decay", set)()]


__all__ = ["ViTClassifier", "WarmUp"]
