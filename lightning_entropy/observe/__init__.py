"""Reads any module as it runs: attention first; activations and gradients follow the same shape."""

from lightning_entropy.observe.attention_entropy import LayerEntropy
from lightning_entropy.observe.entropy_reader import AttentionEntropyReader
from lightning_entropy.observe.reader import AttentionReader, read_attention
from lightning_entropy.observe.records import AttentionRecord

__all__ = ["AttentionEntropyReader", "AttentionReader", "AttentionRecord", "LayerEntropy", "read_attention"]
