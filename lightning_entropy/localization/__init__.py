"""Localization from image labels: methods, metrics, baselines."""

from lightning_entropy.localization.bas import BackgroundActivationSuppression
from lightning_entropy.localization.bas_step import bas_parts
from lightning_entropy.localization.foreground_generator import ForegroundGenerator
from lightning_entropy.localization.metrics import GTKnownLocalization, MaxBoxAccuracy, MaxBoxAccuracyV2
from lightning_entropy.localization.pixel_metrics import PixelAveragePrecision, SegmentationIoU
from lightning_entropy.localization.top_k_localization import TopKLocalization

__all__ = [
    "BackgroundActivationSuppression",
    "ForegroundGenerator",
    "GTKnownLocalization",
    "MaxBoxAccuracy",
    "MaxBoxAccuracyV2",
    "PixelAveragePrecision",
    "SegmentationIoU",
    "TopKLocalization",
    "bas_parts",
]
