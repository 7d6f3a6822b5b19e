"""``LocalizationSet``: images with classes for training, and with boxes and masks for evaluation only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_entropy.arguments import check_types
from lightning_entropy.data.image_source import SPLITS
from lightning_entropy.data.localization_picture import LocalizationSource, View
from lightning_entropy.data.localization_source import open_localization
from lightning_entropy.data.open_source import check_arguments
from lightning_entropy.data.source_items import SourceItems
from lightning_entropy.data.split_data import SplitData
from lightning_entropy.verbosity import announce

Evaluation = Literal["whole", "centre_crop"]
_EVALUATIONS = ("whole", "centre_crop")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which pretrained classifiers expect
_RESIZE, _CROP = 256, 224  # the paper's sides before and after cropping, kept as a ratio for other sizes


class LocalizationDataset(SourceItems[LocalizationSource]):
    """Some of the images of a source, as a model sees them.

    Args:
        source: where they are read from.
        indices: which.
        size: height and width.
        multilabel: whether labels are ``(classes,)`` instead of one index.
        truth: whether boxes, masks and sizes are given too.
        crop: None for the whole image, ``"centre"``, or ``"random"`` (mirrored at random too where classes allow it).
        seed: of cropping and mirroring.
    """

    def __init__(
        self,
        source: LocalizationSource,
        *,
        indices: Sequence[int],
        size: int,
        multilabel: bool,
        truth: bool,
        crop: Literal["centre", "random"] | None,
        seed: int,
    ) -> None:
        super().__init__(source, indices=indices)
        self.size = size
        self.multilabel, self.truth, self.crop, self.seed = multilabel, truth, crop, seed

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """Read one image; ``key`` is its position, or ``(epoch, position)`` as ``EpochSampler`` gives it."""
        epoch, position = key if isinstance(key, tuple) else (0, key)
        index = self.indices[position]
        picture, view = self.source.read(index), self._view(epoch, index)
        image = (view.pixels(picture) - _channels(MEAN)) / _channels(STD)
        item = {"image": image, "label": self._label(index), "name": self.source.names[index]}
        if self.truth:
            item |= {"boxes": view.boxes(picture), "size": torch.tensor(picture.size)}
            if self.source.has_masks:
                item["mask"] = view.mask(picture)
        return item

    def _view(self, epoch: int, index: int) -> View:
        if self.crop is None:
            return View(self.size, 0, 0, self.size)
        resize = round(self.size * _RESIZE / _CROP)
        spare = resize - self.size
        if self.crop == "centre":
            return View(resize, spare // 2, spare // 2, self.size)
        # Of its own numbers: the same image is cut alike whatever process reads it, and a resumed run goes on alike.
        rng = np.random.default_rng([self.seed, epoch, index])
        left, top = (int(place) for place in rng.integers(0, spare + 1, 2))
        return View(resize, left, top, self.size, flip=bool(rng.random() < 0.5) and self.source.mirrored)

    def _label(self, index: int) -> Tensor:
        labels = self.source.labels[index]
        if not self.multilabel:
            return torch.tensor(labels[0])
        present = torch.zeros(len(self.source.classes))
        present[list(labels)] = 1
        return present


def collate_localization(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put images together; ``name`` and ``boxes``, of which an image has any number, stay lists."""
    return {
        key: [item[key] for item in items] if key in ("name", "boxes") else torch.stack([item[key] for item in items])
        for key in items[0]
    }


class LocalizationSet(SplitData[LocalizationSource, LocalizationDataset]):
    """Images with class labels, and boxes and masks to evaluate maps with.

    Without arguments it holds generated objects with exact boxes and masks (see
    :func:`~lightning_entropy.data.localization_objects.generated_objects`), which need no download.

    A batch is a dictionary: ``image`` ``(B, 3, H, W)`` float32 normalised by ImageNet's mean and deviation, ``label``
    ``(B,)`` int64 or, where images have several, ``(B, C)`` float32 of zeros and ones, and ``name``. Batches that are
    not of training have also ``boxes``, a list of ``(n, 4)`` float32 ``x0, y0, x1, y1`` with exclusive right and bottom
    edges in pixels of ``image``; ``size`` ``(B, 2)``, height and width of the original; and, where there are masks,
    ``mask`` ``(B, H, W)`` uint8: 0 background, 1 object (VOC: 1 + class), 255 not to be counted.

    Args:
        images: ``"embedded:objects"``; a folder with ``train``, ``val`` and ``test``, each with ``image_ids.txt``,
            ``class_labels.txt``, ``image_sizes.txt`` and ``localization.txt`` as in clovaai/wsolevaluation;
            ``"cub:ROOT"``, ``"ilsvrc:ROOT"`` or ``"openimages:ROOT"``, the same with wsolevaluation's metadata in
            ``ROOT/metadata/NAME``, or in the folder after a comma (``"cub:ROOT,METADATA"``); ``"voc:ROOT"``, a
            ``VOC2012`` folder.
        image_root: the folder that images (and OpenImages' masks) are named from, where it is not found by itself.
        image_size: height and width that images are brought to, without keeping their aspect; None for 64 (embedded)
            and 224.
        multilabel: whether labels are ``(B, C)``; None for what the images come with.
        strength: of ``embedded:objects``: contrast of the stripes, the weaker evidence of the class.
        background_correlation: of ``embedded:objects``: share of images whose background tells the class.
        train_count: number of training images; None for 1,500 (embedded) or all. Of files that many are drawn.
        val_count: likewise for validation (150, or all; VOC: a tenth of its training images).
        test_count: likewise for testing (250, or all).
        augment: bring training images to 8/7 of the size (256 for 224), cut the size out at random, and mirror at
            random (not the embedded set, where that changes the class).
        evaluation: ``"whole"`` image brought to the size, as wsolevaluation does, or the ``"centre_crop"`` out of 8/7
            of it, as BAS does; figures of the two cannot be compared.
        seed: of what is drawn: images, order of training, crops.
        batch_size: images in a batch; a training epoch leaves out what is over when it has a whole batch.
        num_workers: processes that read images.
        pin_memory: passed to the loaders.

    After ``setup`` it has ``source``, ``classes``, ``image_size``, ``multilabel``, ``has_masks``, ``train``, ``val``
    and ``test``.

    Raises:
        ValueError: for an argument out of its range, at once; for bad input, in ``setup``.

    Example:
        >>> images = LocalizationSet(batch_size=4, train_count=8)
        >>> images.setup()
        >>> next(iter(images.train_dataloader()))["image"].shape
        torch.Size([4, 3, 64, 64])
    """

    items = "images"
    in_channels = 3
    mean, std = MEAN, STD

    def __init__(
        self,
        images: str = "embedded:objects",
        *,
        image_root: str | None = None,
        image_size: int | None = None,
        multilabel: bool | None = None,
        strength: float = 0.6,
        background_correlation: float = 0.0,
        train_count: int | None = None,
        val_count: int | None = None,
        test_count: int | None = None,
        augment: bool = False,
        evaluation: Evaluation = "whole",
        seed: int = 0,
        batch_size: int = 32,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        check_types(LocalizationSet, locals())
        super().__init__()
        check_arguments(
            least=(
                ("image_size", image_size, 1),
                ("train_count", train_count, 1),
                ("val_count", val_count, 0),
                ("test_count", test_count, 0),
                ("seed", seed, 0),
                ("batch_size", batch_size, 1),
                ("num_workers", num_workers, 0),
            ),
            words=(("evaluation", evaluation, _EVALUATIONS),),
        )
        self.images, self.image_root = str(images), image_root
        self._wanted_size, self._wanted_multilabel = image_size, multilabel
        self.strength, self.background_correlation = strength, background_correlation
        self.counts = {"train": train_count, "val": val_count, "test": test_count}
        self.augment, self.evaluation = augment, evaluation
        self.seed, self.batch_size = seed, batch_size
        self.num_workers, self.pin_memory = num_workers, pin_memory

    @property
    def image_size(self) -> int:
        """Height and width of the images."""
        return self.source.image_size if self._wanted_size is None else self._wanted_size

    @property
    def multilabel(self) -> bool:
        """Whether labels are ``(B, C)``."""
        return self.source.multilabel if self._wanted_multilabel is None else self._wanted_multilabel

    @property
    def has_masks(self) -> bool:
        """Whether batches that are not of training have masks."""
        return self.source.has_masks

    def denormalize(self, images: Tensor) -> Tensor:
        """Images of a batch as they are looked at.

        Args:
            images: ``(..., 3, H, W)``, normalised.

        Returns:
            The same shape, in [0, 1].
        """
        mean, std = _channels(MEAN).to(images), _channels(STD).to(images)
        return (images * std + mean).clamp(0, 1)

    def setup(self, stage: str | None = None) -> None:
        """Open the images; once, whatever the stages that follow.

        Args:
            stage: Lightning's ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            ValueError: if the images cannot be used, with file and line of all that is wrong.
        """
        if self._splits:
            return
        source = open_localization(
            self.images,
            image_root=self.image_root,
            multilabel=self._wanted_multilabel,
            strength=self.strength,
            background_correlation=self.background_correlation,
            counts=self.counts,
            seed=self.seed,
        )
        self._source = source
        indices = {name: [i for i, own in enumerate(source.splits) if own == name] for name in SPLITS}
        for name in SPLITS:
            self._splits[name] = self._part(indices[name], training=name == "train")
        self._splits["predict"] = self._part(range(len(source.names)), training=False)
        counts = ", ".join(f"{len(indices[name]):,} {name}" for name in SPLITS)
        what = "boxes and masks" if source.has_masks else "boxes"
        shape = f"3 x {self.image_size} x {self.image_size}"
        announce(
            f"LocalizationSet({self.images}): {counts} images of {shape}, {len(source.classes)} classes, with {what}"
        )

    def _part(self, indices: Sequence[int], *, training: bool) -> LocalizationDataset:
        evaluated: Literal["centre"] | None = "centre" if self.evaluation == "centre_crop" else None
        return LocalizationDataset(
            self.source,
            indices=indices,
            size=self.image_size,
            multilabel=self.multilabel,
            truth=not training,
            crop=evaluated if not training else "random" if self.augment else None,
            seed=self.seed,
        )

    def _loader_options(self) -> dict[str, Any]:
        return {**super()._loader_options(), "collate_fn": collate_localization}


def _channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(values)[:, None, None]


__all__ = ["LocalizationDataset", "LocalizationSet", "collate_localization"]
