"""Functions of this room as fused GPU kernels. Importing this package imports no triton; calling a function does."""

from lightning_entropy.functional.triton.attention_entropy import (
    AttentionWithEntropy,
    attention_with_entropy,
    available,
    entropy_and_lse,
    refusal,
)

__all__ = ["AttentionWithEntropy", "attention_with_entropy", "available", "entropy_and_lse", "refusal"]
