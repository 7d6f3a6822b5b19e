"""Reads any module as it runs: attention first; activations and gradients follow the same shape."""

from lightning_entropy.observe.reader import AttentionReader, read_attention
from lightning_entropy.observe.records import AttentionRecord

__all__ = ["AttentionReader", "AttentionRecord", "read_attention"]
