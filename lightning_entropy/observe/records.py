"""What was read: one record for each attention distribution that a module computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_entropy.functional import entropy_from_logits
from lightning_entropy.functional.attention_operands import masked_out


@dataclass(frozen=True)
class AttentionRecord:
    """One attention over instances, as a module computed it in one call.

    Attributes:
        module: dotted name of the module that computed it; empty for the root itself.
        source: the operation that was read: ``"softmax"``, ``"scaled_dot_product_attention"``,
            ``"multi_head_attention"`` or ``"function"`` (supplied by the user).
        logits: attention logits with the instances on the last axis and every other axis a bag, head, branch or
            class row, in the dtype of the model; ``-inf`` where an instance is masked.
        axis: the axis of the instances in the module's own tensor.
        before_dropout: whether this is the distribution before attention dropout.
    """

    module: str
    source: str
    logits: Tensor
    axis: int = -1
    before_dropout: bool = True

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        dim: int = -1,
        mask: Tensor | None = None,
        *,
        module: str = "",
        source: str = "function",
    ) -> AttentionRecord:
        """Make a record from logits.

        Args:
            logits: attention logits, any shape.
            dim: the axis of the instances.
            mask: non-zero where an instance exists, broadcastable to ``logits``.
            module: the name to report.
            source: the operation to report.

        Raises:
            ValueError: if ``logits`` is not floating-point, or ``mask`` cannot be broadcast to it.
        """
        if not logits.is_floating_point():
            raise ValueError(f"attention logits must be floating-point, got {logits.dtype}")
        out = masked_out(logits.detach())
        if mask is not None:
            try:
                out = out | (mask == 0).expand_as(logits)
            except RuntimeError as error:
                raise ValueError(
                    f"mask of shape {tuple(mask.shape)} does not fit attention of shape {tuple(logits.shape)}"
                ) from error
        masked = logits.masked_fill(out, -torch.inf)
        return cls(module, source, masked.movedim(dim, -1), dim)

    @classmethod
    def from_probabilities(
        cls,
        probabilities: Tensor,
        dim: int = -1,
        mask: Tensor | None = None,
        *,
        module: str = "",
        tolerance: float = 1e-3,
    ) -> AttentionRecord:
        """Make a record from attention after its softmax, where its logits do not exist.

        Args:
            probabilities: non-negative, summing to 1 along ``dim``.
            dim: the axis of the instances.
            mask: non-zero where an instance exists, broadcastable to ``probabilities``.
            module: the name to report.
            tolerance: how far a row's sum may be from 1.

        Raises:
            ValueError: if an entry is negative or a row does not sum to 1: a product of attention matrices, a
                map after dropout, or a score is not a distribution over instances.
        """
        p = probabilities.float() if probabilities.dtype != torch.float64 else probabilities
        if mask is not None:
            p = p.masked_fill((mask == 0).expand_as(p), 0.0)
        lowest = p.detach().min().item()
        if lowest < 0:
            raise ValueError(
                f"attention {module or 'given'} of shape {tuple(p.shape)} has negative entries (lowest {lowest:.3g}): "
                "not a distribution over instances. Pass the logits before the softmax instead."
            )
        sums = p.detach().sum(dim)
        off = (sums - 1).abs().max().item()
        if off > tolerance:
            raise ValueError(
                f"attention {module or 'given'} of shape {tuple(p.shape)} sums to "
                f"{sums.min().item():.3g}..{sums.max().item():.3g} along axis {dim}, expected 1: "
                "not a distribution over instances. Pass the logits before the softmax, or another axis."
            )
        logits = torch.where(p > 0, torch.where(p > 0, p, 1.0).log(), -torch.inf)
        return cls(module, "function", logits.movedim(dim, -1), dim)

    @property
    def mask(self) -> Tensor:
        """True where an instance exists, the shape of ``logits``."""
        return self.logits.detach() != -torch.inf

    @property
    def instances(self) -> int:
        """The number of instances, padding included."""
        return self.logits.shape[-1]

    @property
    def rows(self) -> int:
        """The number of distributions: bags x heads x branches x class rows."""
        return self.logits.numel() // max(self.instances, 1)

    def weights(self) -> Tensor:
        """The attention itself: probabilities in float32 or wider; 0 where masked, and in wholly masked rows."""
        logits = self.logits if self.logits.dtype == torch.float64 else self.logits.float()
        return logits.softmax(-1).masked_fill(~self.mask, 0.0)

    def entropy(self, normalize: bool = False) -> Tensor:
        """Entropy of every row in nats (see :func:`lightning_entropy.functional.entropy_from_logits`)."""
        return entropy_from_logits(self.logits, normalize=normalize)
