"""Bags of slide features for a Trainer: files on disk, embedded sets, splitting, sampling, padding."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_entropy.data.bag_dataset import BagDataset, collate_bags
    from lightning_entropy.data.convert import convert_bags
    from lightning_entropy.data.embedded import embedded_bags
    from lightning_entropy.data.epoch_sampler import EpochSampler, ResumableLoader
    from lightning_entropy.data.region_bags import SlideRegion, slide_region
    from lightning_entropy.data.slide_bags import SlideBags
    from lightning_entropy.data.source import ArrayBags, Bag, BagSource, Batch
    from lightning_entropy.data.splits import stratified_folds, stratified_split

_EXPORTS = {
    "ArrayBags": "source",
    "Bag": "source",
    "BagDataset": "bag_dataset",
    "BagSource": "source",
    "Batch": "source",
    "EpochSampler": "epoch_sampler",
    "ResumableLoader": "epoch_sampler",
    "SlideBags": "slide_bags",
    "SlideRegion": "region_bags",
    "collate_bags": "bag_dataset",
    "convert_bags": "convert",
    "embedded_bags": "embedded",
    "slide_region": "region_bags",
    "stratified_folds": "splits",
    "stratified_split": "splits",
}

__all__ = [
    "ArrayBags",
    "Bag",
    "BagDataset",
    "BagSource",
    "Batch",
    "EpochSampler",
    "ResumableLoader",
    "SlideBags",
    "SlideRegion",
    "collate_bags",
    "convert_bags",
    "embedded_bags",
    "slide_region",
    "stratified_folds",
    "stratified_split",
]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
