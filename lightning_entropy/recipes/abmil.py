"""Attention pooling over the instances of a bag.

Ilse et al. (2018), "Attention-based Deep Multiple Instance Learning", equations 8 (plain) and 9 (gated)::

    s_n = w^T tanh(V h_n)                               plain
    s_n = w^T (tanh(V h_n) * sigmoid(U h_n))            gated
    a   = softmax(s) over the instances,   z = sum_n a_n h_n

With K branches there are K rows of ``w``, hence K distributions and K bag embeddings; the classifier sees
their mean, so that the number of branches does not change its size. The softmax is computed by
``torch.softmax`` on ``(B, K, N)`` logits, where observers of attention can read it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Pooling = Literal["attention", "mean"]


class AttentionPooling(nn.Module):
    """Weighted means of instances, with weights that are a softmax of learned scores.

    Args:
        features: width of an instance.
        hidden: width of the attention's hidden layer.
        branches: number of attention distributions.
        gated: multiply the tanh layer by a sigmoid gate.

    Raises:
        ValueError: if a size is not positive.
    """

    def __init__(self, features: int, *, hidden: int = 128, branches: int = 1, gated: bool = True) -> None:
        super().__init__()
        for name, value in {"features": features, "hidden": hidden, "branches": branches}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.value = nn.Linear(features, hidden)
        self.gate = nn.Linear(features, hidden) if gated else None
        self.score = nn.Linear(hidden, branches)

    def logits(self, instances: Tensor) -> Tensor:
        """Attention logits ``(B, K, N)`` of instances ``(B, N, features)``, without regard to a mask."""
        hidden = torch.tanh(self.value(instances))
        if self.gate is not None:
            hidden = hidden * torch.sigmoid(self.gate(instances))
        return self.score(hidden).transpose(1, 2)

    def forward(self, instances: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool.

        Args:
            instances: ``(B, N, features)``.
            mask: ``(B, N)``, non-zero where an instance exists.

        Returns:
            ``(B, K, features)``; zeros for a bag without instances.
        """
        logits = self.logits(instances)
        if mask is None:
            return torch.softmax(logits, dim=-1) @ instances
        exists = (mask != 0).unsqueeze(1)
        empty = ~exists.any(dim=-1, keepdim=True)
        # A softmax over -inf alone is NaN, forwards and backwards: an empty bag gets constant logits and no
        # weight.
        attention = torch.softmax(logits.masked_fill(~exists, -torch.inf).masked_fill(empty, 0.0), dim=-1)
        return attention.masked_fill(empty, 0.0) @ instances


class MeanPooling(nn.Module):
    """The plain mean of the instances: the control without attention."""

    def forward(self, instances: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool ``(B, N, features)`` to ``(B, 1, features)``; zeros for a bag without instances."""
        if mask is None:
            return instances.mean(dim=1, keepdim=True)
        exists = (mask != 0).to(instances.dtype).unsqueeze(1)
        return (exists @ instances) / exists.sum(dim=-1, keepdim=True).clamp(min=1)


class ABMIL(nn.Module):
    """Attention-based multiple instance learning for bags of feature vectors.

    Args:
        in_features: width of an instance.
        num_classes: number of classes, two or more.
        hidden: width of a ReLU layer before the pooling; ``None`` pools the features themselves.
        attention_hidden: width of the attention's hidden layer.
        branches: number of attention distributions K; the classifier sees the mean of their bag embeddings.
        gated: use the gated attention.
        pooling: ``"attention"``, or ``"mean"`` for the control without attention (the attention arguments are
            then unused).
        dropout: probability of dropping an element of the ReLU layer and of the bag embedding.

    Raises:
        ValueError: if a size is not positive, there are fewer than two classes, or the pooling is unknown.

    Reference:
        Ilse, Tomczak and Welling (2018), arXiv:1802.04712.
    """

    def __init__(
        self,
        in_features: int,
        *,
        num_classes: int = 2,
        hidden: int | None = None,
        attention_hidden: int = 128,
        branches: int = 1,
        gated: bool = True,
        pooling: Pooling = "attention",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        width = in_features if hidden is None else hidden
        if in_features < 1 or width < 1:
            raise ValueError(f"in_features and hidden must be at least 1, got {in_features} and {hidden}")
        self.embedding: nn.Module = nn.Identity()
        if hidden is not None:
            self.embedding = nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU(), nn.Dropout(dropout))
        if pooling == "attention":
            self.pool: nn.Module = AttentionPooling(width, hidden=attention_hidden, branches=branches, gated=gated)
        elif pooling == "mean":
            self.pool = MeanPooling()
        else:
            raise ValueError(f"pooling must be 'attention' or 'mean', got {pooling!r}")
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Classify bags.

        Args:
            features: ``(B, N, in_features)``.
            mask: ``(B, N)``, boolean or integer, non-zero where an instance exists; ``None``: all exist.

        Returns:
            Logits ``(B, num_classes)``.
        """
        embedding = self.pool(self.embedding(features), mask).mean(dim=1)
        return self.classifier(self.dropout(embedding))


__all__ = ["ABMIL", "AttentionPooling", "MeanPooling"]
