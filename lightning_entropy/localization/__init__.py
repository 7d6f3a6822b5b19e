"""Localization from image labels: methods, metrics, baselines."""

from lightning_entropy.functional.hide_and_seek import hide_and_seek
from lightning_entropy.functional.prior_maps import centre_gaussian, whole_image
from lightning_entropy.localization.bas import BackgroundActivationSuppression
from lightning_entropy.localization.bas_step import bas_parts
from lightning_entropy.localization.class_maps import class_maps
from lightning_entropy.localization.coco import coco_results, localizations_to_coco
from lightning_entropy.localization.evidence import EvidenceCurve
from lightning_entropy.localization.evidence_curve import evidence_curve
from lightning_entropy.localization.foreground_generator import ForegroundGenerator
from lightning_entropy.localization.localization_figure import draw_localization
from lightning_entropy.localization.map_boxes import map_boxes, map_masks, resize_maps
from lightning_entropy.localization.metrics import GTKnownLocalization, MaxBoxAccuracy, MaxBoxAccuracyV2
from lightning_entropy.localization.pixel_metrics import PixelAveragePrecision, SegmentationIoU
from lightning_entropy.localization.pseudo_masks import pseudo_masks, voc_palette, write_voc_mask
from lightning_entropy.localization.top_k_localization import TopKLocalization

__all__ = [
    "BackgroundActivationSuppression",
    "EvidenceCurve",
    "ForegroundGenerator",
    "GTKnownLocalization",
    "MaxBoxAccuracy",
    "MaxBoxAccuracyV2",
    "PixelAveragePrecision",
    "SegmentationIoU",
    "TopKLocalization",
    "bas_parts",
    "centre_gaussian",
    "class_maps",
    "coco_results",
    "draw_localization",
    "evidence_curve",
    "hide_and_seek",
    "localizations_to_coco",
    "map_boxes",
    "map_masks",
    "pseudo_masks",
    "resize_maps",
    "voc_palette",
    "whole_image",
    "write_voc_mask",
]
