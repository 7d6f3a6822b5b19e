"""What held-out batches add up to: perplexity, accuracy, retrieval, or a metric of the user's."""

from __future__ import annotations

import copy
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_entropy.functional.likelihood import label_nll
from lightning_entropy.functional.paired_retrieval import paired_retrieval
from lightning_entropy.training.held_out import HeldOutBatch, gathered_rows
from lightning_entropy.training.held_out_outputs import (
    batch_size_of,
    by_class,
    described,
    embedding_of,
    labels_of,
    logits_of,
    loss_of,
    token_likelihood,
)
from lightning_entropy.training.lightning import LightningModule, MisconfigurationException

MetricLike = str | Metric | MetricCollection | Callable[[Any, Any], Any]
NAMES = ("perplexity", "accuracy", "retrieval")


class HeldOutScore(ABC):
    """Adds up one evaluation. Every process has one; :meth:`compute` joins them, and the result is the same in each.

    What is kept are sums a batch, added exactly and in the order of the batches, so that the number of processes makes
    no difference.

    Args:
        owner: the name in messages.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner

    @abstractmethod
    def update(self, result: HeldOutBatch) -> None:
        """Take a batch in."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The values by name."""


class _Means(HeldOutScore):
    """Quotients of sums, each of its own count."""

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.rows: list[tuple[int, dict[str, tuple[float, float]]]] = []

    def add(self, number: int, **sums: tuple[Any, Any]) -> None:
        """Sums and counts of a batch."""
        self.rows.append((number, {name: (float(total), float(count)) for name, (total, count) in sums.items()}))

    def compute(self) -> dict[str, float]:
        """The means."""
        parts: dict[str, list[tuple[float, float]]] = {}
        for _, sums in gathered_rows(self.rows):
            for name, sum_and_count in sums.items():
                parts.setdefault(name, []).append(sum_and_count)
        return {name: _quotient(pairs) for name, pairs in parts.items()}


def _quotient(pairs: list[tuple[float, float]]) -> float:
    count = math.fsum(n for _, n in pairs)
    totals = [total for total, _ in pairs]
    if count == 0:
        return math.nan
    return (math.fsum(totals) if all(map(math.isfinite, totals)) else sum(totals)) / count


class Perplexity(_Means):
    """``loss``, nats a token over all tokens, and ``perplexity``, its exponential."""

    def update(self, result: HeldOutBatch) -> None:
        """Add the tokens of a batch."""
        score = token_likelihood(result.output, result.batch, self.owner)
        self.add(result.number, loss=(score.nll, score.counted))

    def compute(self) -> dict[str, float]:
        """Loss and perplexity."""
        loss = super().compute()["loss"]
        return {"loss": loss, "perplexity": float(torch.tensor(loss, dtype=torch.float64).exp())}


class Accuracy(_Means):
    """``loss``, cross-entropy a label over all labels, and ``accuracy``; labels of -100 do not count."""

    def update(self, result: HeldOutBatch) -> None:
        """Add the labels of a batch."""
        logits, labels = logits_of(result.output), labels_of(result.output, result.batch)
        scored = None if logits is None or labels is None else by_class(logits, labels)
        if scored is None:
            raise MisconfigurationException(
                f"{self.owner}: metric='accuracy' needs logits (..., classes) and integer labels (...). The step gave "
                f"{described(result.output)}, of the batch {described(result.batch)}. Pass "
                "step=function(module, batch) that returns {'logits': ..., 'labels': ...}."
            )
        logits, labels = scored
        nll, counts = label_nll(logits, labels)
        right = (logits.argmax(-1) == labels) & counts
        count = counts.sum()
        self.add(result.number, loss=(nll.double().sum(), count), accuracy=(right.sum(), count))


class Retrieval(HeldOutScore):
    """``loss``, contrastive nats a pair, and ``recall_at_1``, over all pairs of the loader."""

    def __init__(self, owner: str, temperature: float) -> None:
        super().__init__(owner)
        self.temperature = temperature
        self.rows: list[tuple[int, Tensor, Tensor]] = []

    def update(self, result: HeldOutBatch) -> None:
        """Keep the embeddings of a batch."""
        output = result.output
        pair = list(output) if isinstance(output, list | tuple) else []
        sides = [embedding_of(value, None) for value in pair]
        if len(sides) != 2 or sides[0] is None or sides[1] is None or sides[0].shape != sides[1].shape:
            raise MisconfigurationException(
                f"{self.owner}: metric='retrieval' needs a pair of embeddings (N, D), row by row. The step gave "
                f"{described(output)}."
            )
        first, second = (
            x.detach().to("cpu", torch.promote_types(x.dtype, torch.float32)) for x in sides if x is not None
        )
        self.rows.append((result.number, first, second))

    def compute(self) -> dict[str, float]:
        """Loss and recall."""
        rows = gathered_rows(self.rows)
        first, second = (torch.cat([row[side] for row in rows]) for side in (1, 2))
        scores = paired_retrieval(first, second, temperature=self.temperature)
        return {"loss": float(scores.nll), "recall_at_1": float(scores.recall_at_1)}


class TorchMetric(_Means):
    """What a torchmetrics metric computes of logits and labels, and the ``loss`` where there is one."""

    def __init__(self, owner: str, metric: Metric | MetricCollection, device: torch.device) -> None:
        super().__init__(owner)
        self.metric = copy.deepcopy(metric).to(device)
        self.metric.reset()

    def update(self, result: HeldOutBatch) -> None:
        """Update the metric."""
        predictions, labels = logits_of(result.output), labels_of(result.output, result.batch)
        if predictions is None or labels is None:
            raise MisconfigurationException(
                f"{self.owner}: {type(self.metric).__name__} needs predictions and labels. The step gave "
                f"{described(result.output)}, of the batch {described(result.batch)}. Pass "
                "step=function(module, batch) that returns {'logits': ..., 'labels': ...}."
            )
        self.metric.update(predictions, labels)
        self.add(result.number, **_loss_sums(result))

    def compute(self) -> dict[str, float]:
        """Synchronised by torchmetrics' own rules."""
        ran = gathered_rows([(0, len(self.rows))])
        if not all(count for _, count in ran):
            raise MisconfigurationException(
                f"{self.owner}: {type(self.metric).__name__} is joined over {len(ran)} processes, and some of them had "
                "no batch. Use smaller batches."
            )
        return {**super().compute(), **_floats(self.metric.compute(), type(self.metric).__name__.lower(), self.owner)}


class FunctionMean(_Means):
    """The mean of what a function of output and batch gives, and the ``loss`` where there is one."""

    def __init__(self, owner: str, function: Callable[[Any, Any], Any]) -> None:
        super().__init__(owner)
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__).strip("<>_") or "metric"

    def update(self, result: HeldOutBatch) -> None:
        """Each element of a tensor counts once, a number as often as the batch has items."""
        value = self.function(result.output, result.batch)
        size = batch_size_of(result.batch)
        sums: dict[str, tuple[Any, Any]] = {}
        for name, part in (value if isinstance(value, Mapping) else {self.name: value}).items():
            if isinstance(part, Tensor) and part.ndim:
                sums[name] = (part.double().sum(), part.numel())
            elif isinstance(part, Tensor | numbers.Real):
                sums[name] = (float(part) * size, size)
            else:
                raise MisconfigurationException(
                    f"{self.owner}: the metric must return a number, a tensor or a mapping of names to those, got "
                    f"{described(part)}."
                )
        self.add(result.number, **{**_loss_sums(result), **sums})


def _loss_sums(result: HeldOutBatch) -> dict[str, tuple[Any, Any]]:
    """The output's own loss by the size of the batch, else cross-entropy where logits and labels allow it."""
    logits, labels, loss = logits_of(result.output), labels_of(result.output, result.batch), loss_of(result.output)
    if loss is not None:
        size = batch_size_of(result.batch)
        return {"loss": (loss.double() * size, size)}
    scored = None if logits is None or labels is None or logits.ndim < 2 else by_class(logits, labels)
    if scored is None:
        return {}
    nll, counts = label_nll(*scored)
    return {"loss": (nll.double().sum(), counts.sum())}


def _floats(value: Any, name: str, owner: str) -> dict[str, float]:
    out: dict[str, float] = {}
    for key, part in (value if isinstance(value, Mapping) else {name: value}).items():
        if isinstance(part, Tensor) and part.numel() > 1:
            raise MisconfigurationException(
                f"{owner}: {key} has {part.numel()} values; give the metric average='macro', so that it has one."
            )
        out[str(key)] = float(part)
    return out


def check_metric(metric: Any, owner: str) -> None:
    """Refuse what is no metric.

    Raises:
        ValueError: if it is not one of the names, a torchmetrics metric, or a function.
    """
    known = metric in NAMES if isinstance(metric, str) else callable(metric) and not isinstance(metric, type)
    if not known:
        raise ValueError(
            f"{owner}: metric must be {', '.join(map(repr, NAMES))}, a torchmetrics metric (an instance) or a function "
            f"(output, batch), got {metric!r}"
        )


def make_score(metric: MetricLike, module: LightningModule, *, owner: str, temperature: float) -> HeldOutScore:
    """A new score for one evaluation."""
    if isinstance(metric, Metric | MetricCollection):  # first: their == gives another metric
        return TorchMetric(owner, metric, module.device)
    if not isinstance(metric, str):
        return FunctionMean(owner, metric)
    if metric == "retrieval":
        return Retrieval(owner, temperature)
    return Perplexity(owner) if metric == "perplexity" else Accuracy(owner)


def metric_name(metric: MetricLike) -> str:
    """What identifies a metric in messages and states."""
    if isinstance(metric, str):
        return metric
    if isinstance(metric, nn.Module):
        return type(metric).__name__
    return getattr(metric, "__name__", type(metric).__name__)


__all__ = ["HeldOutScore", "MetricLike", "check_metric", "make_score", "metric_name"]
