"""How well bags are classified, and where the attention lies.

torchmetrics' defaults mislead here: ``F1Score`` averages over samples (micro), which is the accuracy, and a
macro AUROC counts a class without bags as 0. Both are spelled out below.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn
from torchmetrics import AUROC, F1Score, MeanMetric, Metric, Recall

from lightning_entropy.data import Batch


class ClassCounts(Metric):
    """Number of bags of each class.

    Args:
        num_classes: number of classes.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, label: Tensor) -> None:
        """Add labels ``(B,)``."""
        self.counts += torch.bincount(label, minlength=len(self.counts))

    def compute(self) -> Tensor:
        """``(C,)``."""
        return self.counts


class BagMetrics(nn.Module):
    """Macro AUROC (one against the rest), macro F1, balanced accuracy and cross-entropy of classified bags.

    The values of ``AUROC(task="multiclass", average="macro")``, ``F1Score(task="multiclass",
    average="macro")`` and macro recall. Where a set lacks a class, the AUC is the mean over the classes for
    which it is defined: those that some bags have and others have not; it is NaN where there is none.

    Args:
        num_classes: number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.auc = AUROC(task="multiclass", num_classes=num_classes, average="none")
        self.f1 = F1Score(task="multiclass", num_classes=num_classes, average="macro")
        self.recall = Recall(task="multiclass", num_classes=num_classes, average="macro")
        self.loss = MeanMetric()
        self.counts = ClassCounts(num_classes)

    @property
    def parts(self) -> list[Metric]:
        """Every metric with a state."""
        return [self.auc, self.f1, self.recall, self.loss, self.counts]

    def update(self, logits: Tensor, label: Tensor) -> None:
        """Add a batch.

        Args:
            logits: ``(B, C)``.
            label: ``(B,)``.
        """
        logits = logits.detach().float()
        self.loss.update(nn.functional.cross_entropy(logits, label, reduction="none"))
        for metric in (self.auc, self.f1, self.recall):
            metric.update(logits.softmax(dim=-1), label)
        self.counts.update(label)

    def missing(self) -> list[int]:
        """Classes that no bag has; a collective where there are several processes."""
        return (self.counts.compute() == 0).nonzero().flatten().tolist()

    def compute(self) -> dict[str, Tensor]:
        """``auc``, ``f1``, ``balanced_accuracy`` and ``loss`` (cross-entropy, nats) as scalars."""
        counts = self.counts.compute()
        defined = (counts > 0) & (counts < counts.sum())
        auc = torch.full((), math.nan, device=counts.device)
        if bool(defined.any()):
            with warnings.catch_warnings():  # the caller says which classes are missing, in its own words
                warnings.filterwarnings("ignore", message="No (positive|negative) samples in targets")
                auc = self.auc.compute()[defined].mean()
        return {
            "auc": auc,
            "f1": self.f1.compute(),
            "balanced_accuracy": self.recall.compute(),
            "loss": self.loss.compute(),
        }

    def reset(self) -> None:
        """Forget what was added."""
        for metric in self.parts:
            metric.reset()


def ranking_auc(scores: Tensor, is_key: Tensor) -> Tensor:
    """Probability that a key instance scores above another one; ties count one half (Mann and Whitney, 1947).

    Args:
        scores: ``(N,)``.
        is_key: ``(N,)`` boolean, with both values present.
    """
    others = scores[~is_key].sort().values
    keys = scores[is_key].contiguous()
    below = torch.searchsorted(others, keys, right=False)
    up_to = torch.searchsorted(others, keys, right=True)
    return (below + up_to).float().mean() / (2 * len(others))


def key_coverage(scores: Tensor, is_key: Tensor) -> Tensor:
    """Share of the K key instances among the K that score highest; its expectation where scores tie.

    Args:
        scores: ``(N,)``.
        is_key: ``(N,)`` boolean, at least one true.
    """
    count = int(is_key.sum())
    threshold = scores.topk(count).values[-1]
    above, tied = scores > threshold, scores == threshold
    share = (count - above.sum()) / tied.sum()
    return ((above & is_key).sum() + share * (tied & is_key).sum()) / count


class AttentionMetrics(Metric):
    """Where the attention of bags lies; every quantity is a mean over bags.

    ``entropy`` (nats), ``normalized_entropy`` (divided by log N; 1 where N is 1) and ``effective_number``
    (exp entropy) are taken over the positive bags (class 1 and above where there are two classes, all bags
    where there are more). ``instance_auc``, ``coverage`` and ``key_mass`` need instance labels, and are taken
    over the bags that have both key and other instances: the AUC is that of each bag by itself, because
    attention logits are comparable within a bag only.

    Args:
        num_classes: number of classes of the bags.
    """

    full_state_update = False
    QUANTITIES = ("entropy", "normalized_entropy", "effective_number")
    INSTANCE_QUANTITIES = ("instance_auc", "coverage", "key_mass")
    sums: Tensor
    bags: Tensor
    instance_sums: Tensor
    labelled_bags: Tensor

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("sums", torch.zeros(len(self.QUANTITIES)), dist_reduce_fx="sum")
        self.add_state("bags", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("instance_sums", torch.zeros(len(self.INSTANCE_QUANTITIES)), dist_reduce_fx="sum")
        self.add_state("labelled_bags", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, log_attention: Tensor, mask: Tensor, label: Tensor, instance_labels: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            log_attention: ``(B, N)``, the logarithm of attention probabilities.
            mask: ``(B, N)`` boolean, true where an instance exists.
            label: ``(B,)`` classes of the bags.
            instance_labels: ``(B, N)``, 1 for key instances; ``None`` where they are not known.
        """
        for i in range(len(mask)):
            scores = log_attention[i, mask[i]].float()
            if len(scores) == 0:
                continue
            weights = scores.exp()
            if self.num_classes > 2 or int(label[i]) > 0:
                entropy = -torch.where(weights > 0, weights * scores, 0.0).sum()
                normalized = entropy / math.log(len(scores)) if len(scores) > 1 else torch.ones_like(entropy)
                self.sums += torch.stack((entropy, normalized, entropy.exp()))
                self.bags += 1
            if instance_labels is None:
                continue
            is_key = instance_labels[i, mask[i]] > 0.5
            if bool(is_key.any()) and not bool(is_key.all()):
                self.instance_sums += torch.stack(
                    (ranking_auc(scores, is_key), key_coverage(scores, is_key), weights[is_key].sum())
                )
                self.labelled_bags += 1

    def compute(self) -> dict[str, Tensor]:
        """The quantities by name; those without a single bag are left out."""
        values: dict[str, Tensor] = {}
        if self.bags > 0:
            values |= dict(zip(self.QUANTITIES, self.sums / self.bags))
        if self.labelled_bags > 0:
            values |= dict(zip(self.INSTANCE_QUANTITIES, self.instance_sums / self.labelled_bags))
        return values


class EvaluationMetrics(nn.Module):
    """Both of the above for one stage.

    Args:
        num_classes: number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.bags = BagMetrics(num_classes)
        self.attention = AttentionMetrics(num_classes)

    def update(self, logits: Tensor, log_attention: Tensor | None, *, batch: Batch) -> None:
        """Add a batch.

        Args:
            logits: ``(B, C)``.
            log_attention: ``(B, N)`` or ``None``.
            batch: the batch that was classified.
        """
        self.bags.update(logits, batch["label"])
        if log_attention is not None:
            self.attention.update(log_attention, batch["mask"], batch["label"], batch.get("instance_labels"))

    def compute(self) -> dict[str, Tensor]:
        """Every quantity that is defined, by name."""
        with warnings.catch_warnings():  # every process computes, also one that could read no attention
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            attention = self.attention.compute()
        return {**self.bags.compute(), **attention}

    def reset(self) -> None:
        """Forget what was added."""
        self.bags.reset()
        self.attention.reset()


__all__ = [
    "AttentionMetrics",
    "BagMetrics",
    "ClassCounts",
    "EvaluationMetrics",
    "key_coverage",
    "ranking_auc",
]
