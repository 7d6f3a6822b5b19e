"""The attention that a bag model paid to each instance, read while it classifies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_entropy.data import Batch
from lightning_entropy.observe import AttentionReader, AttentionRecord
from lightning_entropy.recipes.abmil import ABMIL, MeanPooling
from lightning_entropy.recipes.bag_models import BagModel


def instance_attention(records: Sequence[AttentionRecord], *, bags: int, instances: int) -> Tensor | None:
    """The logarithm of the attention on each instance, from what was read in one forward.

    The mean over heads, branches and class rows is taken of the probabilities. Of several attentions over the
    instances the last counts, the one nearest to the bag's embedding.

    Args:
        records: what an ``AttentionReader`` has read.
        bags: number of bags B in the batch.
        instances: number of instances N, padding included.

    Returns:
        ``(B, N)``, ``-inf`` where masked; ``None`` if no record has an attention for every instance of every
        bag (DTFD-MIL shuffles the instances into groups).
    """
    for record in reversed(records):
        logits = record.logits.detach()
        if logits.shape[-1] != instances or logits.shape[0] != bags or logits.dim() > 4:
            continue
        rows = logits.float().reshape(bags, -1, instances)
        empty = (rows == -torch.inf).all(dim=-1, keepdim=True)
        log_weights = rows.masked_fill(empty, 0.0).log_softmax(dim=-1).masked_fill(empty, -torch.inf)
        return log_weights.logsumexp(dim=1) - math.log(rows.shape[1])
    return None


def uniform_attention(mask: Tensor) -> Tensor:
    """The logarithm of equal weights ``(B, N)`` for a boolean mask ``(B, N)``: what mean pooling attends
    to.
    """
    return (-mask.sum(dim=1, keepdim=True).clamp(min=1).float().log()).expand(mask.shape).masked_fill(~mask, -torch.inf)


class UnreadableAttention(ValueError):
    """The model classified the batch, and its attention on the instances cannot be read."""

    def __init__(self, reason: str, logits: Tensor) -> None:
        super().__init__(reason)
        self.logits = logits


def attend(model: BagModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Classify a batch and read the attention on the way.

    Args:
        model: a built model.
        batch: a batch of :class:`~lightning_entropy.data.SlideBags`.

    Returns:
        Logits ``(B, C)`` and the logarithm of the attention on each instance ``(B, N)``; mean pooling attends
        equally.

    Raises:
        UnreadableAttention: if the model has no attention over the instances; it carries the logits.
    """
    net, mask = model.net, batch["mask"]
    if isinstance(net, ABMIL) and isinstance(net.pool, MeanPooling):
        return model.logits(net, batch), uniform_attention(mask)
    reader = AttentionReader(net, owner="MILClassifier")
    reader.attach()
    try:
        reader.start({"features": batch["features"], "mask": mask})
        logits = model.logits(net, batch)
        reader.stop()
        try:
            records = reader.records
        except ValueError as error:
            raise UnreadableAttention(str(error), logits) from error
    finally:
        reader.detach()
    bags, instances = mask.shape
    if instances == 1:
        return logits, uniform_attention(mask)
    attention = instance_attention(records, bags=bags, instances=instances)
    if attention is None:
        raise UnreadableAttention(f"{type(net).__name__} has no attention over all instances of a bag at once", logits)
    return logits, attention


__all__ = ["UnreadableAttention", "attend", "instance_attention", "uniform_attention"]
