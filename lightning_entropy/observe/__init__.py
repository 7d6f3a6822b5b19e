"""Reads any module as it runs: attention first; activations and gradients follow the same shape."""

from lightning_entropy.observe.activation_modules import activation_sites, is_activation
from lightning_entropy.observe.activation_report import ActivationReport
from lightning_entropy.observe.activations import ActivationReader, ActivationSample
from lightning_entropy.observe.attention_entropy import LayerEntropy
from lightning_entropy.observe.entropy_reader import AttentionEntropyReader
from lightning_entropy.observe.gradient_flow import GradientFlow, OutputError
from lightning_entropy.observe.model_weights import model_weights
from lightning_entropy.observe.reader import AttentionReader, read_attention
from lightning_entropy.observe.records import AttentionRecord
from lightning_entropy.observe.spectral_report import SpectralReport, spectral_report
from lightning_entropy.observe.spectral_rows import SpectralRow
from lightning_entropy.observe.stored_weights import StoredWeight, weights_fingerprint
from lightning_entropy.observe.weight_files import file_weights

__all__ = [
    "ActivationReader",
    "ActivationReport",
    "ActivationSample",
    "AttentionEntropyReader",
    "AttentionReader",
    "AttentionRecord",
    "GradientFlow",
    "LayerEntropy",
    "OutputError",
    "SpectralReport",
    "SpectralRow",
    "StoredWeight",
    "activation_sites",
    "file_weights",
    "is_activation",
    "model_weights",
    "read_attention",
    "spectral_report",
    "weights_fingerprint",
]
