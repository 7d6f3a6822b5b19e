"""Reads any module as it runs: attention first; activations and gradients follow the same shape."""

from lightning_entropy.observe.activation_modules import activation_sites, is_activation
from lightning_entropy.observe.activation_report import ActivationReport
from lightning_entropy.observe.activations import ActivationReader, ActivationSample
from lightning_entropy.observe.attention_entropy import LayerEntropy
from lightning_entropy.observe.entropy_reader import AttentionEntropyReader
from lightning_entropy.observe.reader import AttentionReader, read_attention
from lightning_entropy.observe.records import AttentionRecord

__all__ = [
    "ActivationReader",
    "ActivationReport",
    "ActivationSample",
    "AttentionEntropyReader",
    "AttentionReader",
    "AttentionRecord",
    "LayerEntropy",
    "activation_sites",
    "is_activation",
    "read_attention",
]
