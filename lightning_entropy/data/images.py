"""``ImageSet``: labelled images for a Trainer, from an embedded set or from folders."""

from __future__ import annotations

from typing import Any, TypedDict

from torch import Tensor

from lightning_entropy.arguments import check_types
from lightning_entropy.data.image_source import SPLITS, ImageSource, open_images
from lightning_entropy.data.open_source import check_arguments
from lightning_entropy.data.source_items import SourceItems
from lightning_entropy.data.split_data import SplitData
from lightning_entropy.data.split_items import check_split_arguments, split_items
from lightning_entropy.verbosity import announce


class ImageBatch(TypedDict):
    """A batch of labelled images.

    Keys:
        image: ``(B, C, H, W)`` float32 in [-1, 1].
        label: ``(B,)`` int64.
        name: names of the images.
    """

    image: Tensor
    label: Tensor
    name: list[str]


class ImageDataset(SourceItems[ImageSource]):
    """Some of the images of a source.

    Args:
        source: where they are read from.
        indices: which.
    """

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """Read one image; ``key`` is its position, or ``(epoch, position)`` as ``EpochSampler`` gives it."""
        index = self.indices[key[1] if isinstance(key, tuple) else key]
        return {"image": self.source.read(index), "label": self.source.labels[index], "name": self.source.names[index]}


class ImageSet(SplitData[ImageSource, ImageDataset]):
    """Labelled images, as they are: scaled to [-1, 1] and not augmented.

    Without arguments it holds scikit-learn's digits (1,797 scanned digits of 8 x 8 pixels, part of that package), so
    that everything can be tried before there are data.

    Args:
        images: ``"embedded:digits"``, or a folder that holds a folder of images for each class, or such folders in
            ``train``, ``val`` and ``test``, or torchvision's unpacked CIFAR-10 or CIFAR-100.
        image_size: height and width that images are brought to; None for 8 (digits), 32 (CIFAR) and 224 (folders).
        fold: the fold that tests, of ``folds`` folds made here.
        folds: number of folds.
        val_fraction: share of the images for validation, where no split says it.
        test_fraction: share of the images for testing, where neither fold nor split says it.
        seed: of splitting (stratified by class) and of the order of training.
        batch_size: images in a batch; a training epoch leaves out what is over when it has a whole batch.
        num_workers: processes that read images.
        pin_memory: passed to the loaders.

    After ``setup`` it has ``source``, ``in_channels``, ``image_size``, ``classes``, ``train``, ``val`` and ``test``.

    Raises:
        ValueError: for an argument out of its range, at once; for bad input, in ``setup``.

    Example:
        >>> images = ImageSet(batch_size=4)
        >>> images.setup()
        >>> next(iter(images.train_dataloader()))["image"].shape
        torch.Size([4, 1, 8, 8])
    """

    items = "images"

    def __init__(
        self,
        images: str = "embedded:digits",
        *,
        image_size: int | None = None,
        fold: int | None = None,
        folds: int | None = None,
        val_fraction: float = 0.15,
        test_fraction: float = 0.2,
        seed: int = 0,
        batch_size: int = 64,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        check_types(ImageSet, locals())
        super().__init__()
        check_arguments(
            least=(
                ("image_size", image_size, 1),
                ("fold", fold, 0),
                ("folds", folds, 2),
                ("seed", seed, 0),
                ("batch_size", batch_size, 1),
                ("num_workers", num_workers, 0),
            ),
            words=(),
        )
        check_split_arguments("images", fold=fold, folds=folds, val_fraction=val_fraction, test_fraction=test_fraction)
        self.images = str(images)
        self._wanted_size = image_size
        self.fold, self.folds = fold, folds
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.seed, self.batch_size = seed, batch_size
        self.num_workers, self.pin_memory = num_workers, pin_memory

    @property
    def in_channels(self) -> int:
        """Number of channels."""
        return self.source.channels

    @property
    def image_size(self) -> int:
        """Height and width of the images."""
        return self.source.size

    def setup(self, stage: str | None = None) -> None:
        """Open the images and split them; once, whatever the stages that follow.

        Args:
            stage: Lightning's ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            ValueError: if the images cannot be used, or no split of them can be made.
        """
        if self._splits:
            return
        self._source = source = open_images(self.images, image_size=self._wanted_size)
        part = split_items(
            source.labels,
            source.splits,
            items=self.items,
            about=self.images,
            fold=self.fold,
            folds=self.folds,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            seed=self.seed,
        )
        for name in SPLITS:
            self._splits[name] = ImageDataset(source, indices=[i for i, own in enumerate(part) if own == name])
        self._splits["predict"] = ImageDataset(source, indices=range(len(part)))
        counts = ", ".join(f"{len(self._splits[name]):,} {name}" for name in SPLITS)
        shape = f"{source.channels} x {source.size} x {source.size}"
        announce(f"ImageSet({self.images}): {counts} images of {shape}, {len(source.classes)} classes")


__all__ = ["ImageBatch", "ImageDataset", "ImageSet"]
