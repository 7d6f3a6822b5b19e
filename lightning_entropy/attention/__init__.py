"""Methods on attention."""

from lightning_entropy.attention.aem import AttentionEntropyMaximization
from lightning_entropy.attention.entropy_regularizer import AttentionEntropyRegularizer

__all__ = ["AttentionEntropyMaximization", "AttentionEntropyRegularizer"]
