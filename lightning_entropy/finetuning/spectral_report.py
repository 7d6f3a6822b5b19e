"""Spectra and choices of weights: where a fine-tuning begins. They read and choose; they change nothing.

Condition number, entropy deficit and their kin: *KappaTune*, arXiv 2506.16289. The functions are in the rooms below,
since other methods choose too; here they have the names by which a fine-tuning finds them.
"""

from __future__ import annotations

from lightning_entropy.observe.spectral_report import SpectralReport, spectral_report
from lightning_entropy.surgery.select_modules import select_modules
from lightning_entropy.surgery.selection import Selection

__all__ = ["Selection", "SpectralReport", "select_modules", "spectral_report"]
