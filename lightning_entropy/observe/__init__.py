"""Reads any module as it runs: attention first; activations and gradients follow the same shape."""

from lightning_entropy.observe.attention_entropy import AttentionEntropyReader, LayerEntropy
from lightning_entropy.observe.reader import AttentionReader, read_attention
from lightning_entropy.observe.records import AttentionRecord

__all__ = ["AttentionEntropyReader", "AttentionReader", "AttentionRecord", "LayerEntropy", "read_attention"]
