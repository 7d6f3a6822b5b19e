"""Bags of slide features, images and texts for a Trainer: files, embedded sets, splitting, sampling, padding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_entropy.lazy import lazy_exports

if TYPE_CHECKING:
    from lightning_entropy.data.bag_dataset import BagDataset, collate_bags
    from lightning_entropy.data.convert import convert_bags
    from lightning_entropy.data.embedded import embedded_bags
    from lightning_entropy.data.epoch_sampler import EpochSampler, ResumableLoader
    from lightning_entropy.data.images import ImageBatch, ImageDataset, ImageSet
    from lightning_entropy.data.localization_set import LocalizationSet
    from lightning_entropy.data.pretrained import load_tokenizer, pretrained_source
    from lightning_entropy.data.region_bags import SlideRegion, slide_region
    from lightning_entropy.data.slide_bags import SlideBags
    from lightning_entropy.data.source import ArrayBags, Bag, BagSource, Batch
    from lightning_entropy.data.splits import stratified_folds, stratified_split
    from lightning_entropy.data.text_source import TextSource, open_texts
    from lightning_entropy.data.text_windows import TextStream
    from lightning_entropy.data.texts import TextSet
    from lightning_entropy.data.token_batches import TextBatch, TextPairs, Tokens

_EXPORTS = {
    "ArrayBags": "source",
    "Bag": "source",
    "BagDataset": "bag_dataset",
    "BagSource": "source",
    "Batch": "source",
    "EpochSampler": "epoch_sampler",
    "ImageBatch": "images",
    "ImageDataset": "images",
    "ImageSet": "images",
    "LocalizationSet": "localization_set",
    "ResumableLoader": "epoch_sampler",
    "SlideBags": "slide_bags",
    "SlideRegion": "region_bags",
    "TextBatch": "token_batches",
    "TextPairs": "token_batches",
    "TextSet": "texts",
    "TextSource": "text_source",
    "TextStream": "text_windows",
    "Tokens": "token_batches",
    "collate_bags": "bag_dataset",
    "convert_bags": "convert",
    "embedded_bags": "embedded",
    "load_tokenizer": "pretrained",
    "open_texts": "text_source",
    "pretrained_source": "pretrained",
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
    "ImageBatch",
    "ImageDataset",
    "ImageSet",
    "LocalizationSet",
    "ResumableLoader",
    "SlideBags",
    "SlideRegion",
    "TextBatch",
    "TextPairs",
    "TextSet",
    "TextSource",
    "TextStream",
    "Tokens",
    "collate_bags",
    "convert_bags",
    "embedded_bags",
    "load_tokenizer",
    "open_texts",
    "pretrained_source",
    "slide_region",
    "stratified_folds",
    "stratified_split",
]

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
