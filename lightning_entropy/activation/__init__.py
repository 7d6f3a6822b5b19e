"""Activations and what replaces them."""

from lightning_entropy.activation.activation_entropy_monitor import ActivationEntropyMonitor
from lightning_entropy.activation.activation_swap import ActivationSwap
from lightning_entropy.activation.catalog import ACTIVATIONS, find_activation
from lightning_entropy.activation.crrelu import CRReLU
from lightning_entropy.activation.crrelu_calibration import CalibratedSite, Calibration, calibrate
from lightning_entropy.activation.eafo import EAFOActivation, EAFOReport, eafo
from lightning_entropy.activation.eafo_report import eafo_report
from lightning_entropy.activation.polynomial import PolyNorm, PolyReLU
from lightning_entropy.activation.swap import swap_activations
from lightning_entropy.activation.swap_rules import FunctionActivation
from lightning_entropy.activation.wafbc import WAFBC, wafbc
from lightning_entropy.surgery.swap_report import SwapReport
from lightning_entropy.surgery.transformers_config import register_activation

__all__ = [
    "ACTIVATIONS",
    "ActivationEntropyMonitor",
    "ActivationSwap",
    "CRReLU",
    "CalibratedSite",
    "Calibration",
    "EAFOActivation",
    "EAFOReport",
    "FunctionActivation",
    "PolyNorm",
    "PolyReLU",
    "SwapReport",
    "WAFBC",
    "calibrate",
    "eafo",
    "eafo_report",
    "find_activation",
    "register_activation",
    "swap_activations",
    "wafbc",
]
