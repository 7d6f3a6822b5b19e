"""What can be done to an attention: multiply its logits, or put another function in its place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn


class AttentionCall(NamedTuple):
    """One attention that is about to be computed.

    Attributes:
        module: the module that computes it.
        name: its dotted name when it was chosen.
        kind: ``"self"``, ``"cross"`` (the keys come from another sequence) or ``"joint"`` (keys of both together).
        queries: the number of query rows.
        keys: the number of keys, masked ones included.
    """

    module: nn.Module
    name: str
    kind: str
    queries: int
    keys: int


class AttentionRewrite(ABC):
    """What is done to the attention of the modules it is given to; deep copies and pickles travel with them.

    Attributes:
        method: who rewrites; one method rewrites a module once.
    """

    method: str = "attention"

    def prepare(self, name: str, module: nn.Module) -> str | None:
        """Make ready one module (register parameters, for example), or give the reason for which it is refused."""
        return None

    def undo(self, module: nn.Module) -> None:  # noqa: B027 (most rewrites leave nothing on the module)
        """Take from the module what :meth:`prepare` put there."""

    @abstractmethod
    def describe(self) -> str:
        """What is changed, a few words for the report."""


class ScaledLogits(AttentionRewrite):
    """Multiplies the logits by a factor; a bias that is added to them included, masked entries left out."""

    @abstractmethod
    def factor(self, call: AttentionCall) -> float | Tensor:
        """A number, where exactly 1 leaves the call as it is, or a tensor of ``(heads, 1)`` or ``(heads, queries)``."""


class ReplacedAttention(AttentionRewrite):
    """Puts another function in the place of ``scaled_dot_product_attention``."""

    @abstractmethod
    def attend(
        self,
        call: AttentionCall,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The output of attention; linear in ``value``."""

    def pass_map(self, call: AttentionCall, logits: Tensor) -> bool:
        """Whether a map that the module forms itself may go on as it is; otherwise that is an error."""
        return False


__all__ = ["AttentionCall", "AttentionRewrite", "ReplacedAttention", "ScaledLogits"]
