"""LightningModules with their configurations, comparisons of them, and what is drawn from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_entropy.lazy import lazy_exports

if TYPE_CHECKING:
    from lightning_entropy.recipes.abmil import ABMIL
    from lightning_entropy.recipes.causal_lm import CausalLM
    from lightning_entropy.recipes.comparison import compare
    from lightning_entropy.recipes.comparison_result import Comparison, joint_table
    from lightning_entropy.recipes.layer_change import LayerChange
    from lightning_entropy.recipes.mil import MILClassifier
    from lightning_entropy.recipes.text_classifier import TextClassifier
    from lightning_entropy.recipes.transfer_classifier import TransferClassifier
    from lightning_entropy.recipes.vit import ViTClassifier
    from lightning_entropy.recipes.wsol import ImageLocalizer

_EXPORTS = {
    "ABMIL": "abmil",
    "CausalLM": "causal_lm",
    "Comparison": "comparison_result",
    "ImageLocalizer": "wsol",
    "LayerChange": "layer_change",
    "MILClassifier": "mil",
    "TextClassifier": "text_classifier",
    "TransferClassifier": "transfer_classifier",
    "ViTClassifier": "vit",
    "compare": "comparison",
    "joint_table": "comparison_result",
}

__all__ = [
    "ABMIL",
    "CausalLM",
    "Comparison",
    "ImageLocalizer",
    "LayerChange",
    "MILClassifier",
    "TextClassifier",
    "TransferClassifier",
    "ViTClassifier",
    "compare",
    "joint_table",
]

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
