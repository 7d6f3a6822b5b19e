"""Research on entropy in neural networks as parts for PyTorch Lightning.

Methods are exported here by name and imported when they are first used, so that ``import lightning_entropy``
loads neither Lightning nor any domain library.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from lightning_entropy.lazy import lazy_exports
from lightning_entropy.verbosity import set_verbosity

if TYPE_CHECKING:
    from lightning_entropy.activation import ActivationEntropyMonitor, ActivationSwap, CRReLU, swap_activations
    from lightning_entropy.attention import (
        AttentionEntropyMaximization,
        AttentionEntropyMonitor,
        AttentionEntropyRegularizer,
        AttentionEntropyScaling,
        EntropyGuidedSurgery,
        LearnableTemperature,
        SigmaReparam,
        SoftplusAttention,
        add_learnable_temperature,
        attention_entropy_report,
        register_softplus_attention,
        scale_attention,
        sigma_reparametrize,
        use_softplus_attention,
    )
    from lightning_entropy.data import ImageSet, LocalizationSet, SlideBags, TextSet, TextStream
    from lightning_entropy.finetuning import (
        ForgettingMonitor,
        InflectionLoRA,
        KappaTune,
        diagnose_layers,
        select_modules,
        spectral_report,
    )
    from lightning_entropy.localization import (
        BackgroundActivationSuppression,
        ForegroundGenerator,
        GTKnownLocalization,
        MaxBoxAccuracy,
        MaxBoxAccuracyV2,
        PixelAveragePrecision,
        TopKLocalization,
    )
    from lightning_entropy.recipes import CausalLM, ImageLocalizer, MILClassifier, TextClassifier, ViTClassifier

try:
    __version__ = version("lightning-entropy")
except PackageNotFoundError:  # a source tree that was put on the path without being installed
    __version__ = "0+unknown"

_EXPORTS = {
    "BackgroundActivationSuppression": "localization",
    "ForegroundGenerator": "localization",
    "GTKnownLocalization": "localization",
    "MaxBoxAccuracy": "localization",
    "MaxBoxAccuracyV2": "localization",
    "PixelAveragePrecision": "localization",
    "TopKLocalization": "localization",
    "ActivationEntropyMonitor": "activation",
    "ActivationSwap": "activation",
    "CRReLU": "activation",
    "swap_activations": "activation",
    "AttentionEntropyMaximization": "attention",
    "AttentionEntropyMonitor": "attention",
    "AttentionEntropyRegularizer": "attention",
    "AttentionEntropyScaling": "attention",
    "EntropyGuidedSurgery": "attention",
    "LearnableTemperature": "attention",
    "SigmaReparam": "attention",
    "SoftplusAttention": "attention",
    "add_learnable_temperature": "attention",
    "attention_entropy_report": "attention",
    "register_softplus_attention": "attention",
    "scale_attention": "attention",
    "sigma_reparametrize": "attention",
    "use_softplus_attention": "attention",
    "ForgettingMonitor": "finetuning",
    "InflectionLoRA": "finetuning",
    "KappaTune": "finetuning",
    "diagnose_layers": "finetuning",
    "select_modules": "finetuning",
    "spectral_report": "finetuning",
    "CausalLM": "recipes",
    "ImageLocalizer": "recipes",
    "ImageSet": "data",
    "LocalizationSet": "data",
    "MILClassifier": "recipes",
    "SlideBags": "data",
    "TextClassifier": "recipes",
    "TextSet": "data",
    "TextStream": "data",
    "ViTClassifier": "recipes",
    **{
        room: room
        for room in (
            "activation",
            "attention",
            "data",
            "finetuning",
            "functional",
            "localization",
            "observe",
            "recipes",
            "surgery",
            "training",
        )
    },
}

__all__ = [
    "ForegroundGenerator",
    "ActivationEntropyMonitor",
    "ActivationSwap",
    "AttentionEntropyMaximization",
    "AttentionEntropyMonitor",
    "AttentionEntropyRegularizer",
    "AttentionEntropyScaling",
    "BackgroundActivationSuppression",
    "CRReLU",
    "CausalLM",
    "ImageLocalizer",
    "ImageSet",
    "LocalizationSet",
    "EntropyGuidedSurgery",
    "ForgettingMonitor",
    "InflectionLoRA",
    "KappaTune",
    "GTKnownLocalization",
    "LearnableTemperature",
    "MILClassifier",
    "MaxBoxAccuracy",
    "MaxBoxAccuracyV2",
    "PixelAveragePrecision",
    "SigmaReparam",
    "SlideBags",
    "SoftplusAttention",
    "TextClassifier",
    "TextSet",
    "TextStream",
    "TopKLocalization",
    "ViTClassifier",
    "__version__",
    "add_learnable_temperature",
    "attention_entropy_report",
    "diagnose_layers",
    "register_softplus_attention",
    "scale_attention",
    "select_modules",
    "set_verbosity",
    "sigma_reparametrize",
    "spectral_report",
    "swap_activations",
    "use_softplus_attention",
]

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
