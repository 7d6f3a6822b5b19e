"""Methods that choose what of a pretrained model is trained."""

from __future__ import annotations

from lightning_entropy.finetuning.forgetting_monitor import ForgettingMonitor
from lightning_entropy.finetuning.inflection_lora import InflectionLoRA
from lightning_entropy.finetuning.kappatune import KappaTune
from lightning_entropy.finetuning.layer_diagnosis import InflectionRule, LayerDiagnosis, LayerRow, diagnose_layers
from lightning_entropy.finetuning.spectral_report import Selection, SpectralReport, select_modules, spectral_report

__all__ = [
    "ForgettingMonitor",
    "InflectionLoRA",
    "InflectionRule",
    "KappaTune",
    "LayerDiagnosis",
    "LayerRow",
    "Selection",
    "SpectralReport",
    "diagnose_layers",
    "select_modules",
    "spectral_report",
]
