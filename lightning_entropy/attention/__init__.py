"""Methods on attention."""

from lightning_entropy.attention.aem import AttentionEntropyMaximization

__all__ = ["AttentionEntropyMaximization"]
