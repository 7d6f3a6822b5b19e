"""Where labelled images are read from: scikit-learn's digits, folders of classes, or CIFAR as torchvision keeps it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_entropy.extras import require

EMBEDDED_IMAGES = ("digits",)
SPLITS = ("train", "val", "test")
_EMBEDDED = "embedded:"
_FOLDER_SIZE = 224
# The folder that torchvision's class reads, in the folder that it is given.
_CIFAR = {"cifar-10-batches-py": "CIFAR10", "cifar-100-python": "CIFAR100"}


@dataclass(frozen=True)
class ImageSource:
    """Labelled images in memory or on disk.

    Attributes:
        names: a name for each image, all different.
        labels: index of the class of each image.
        classes: names of the classes.
        splits: ``"train"``, ``"val"`` or ``"test"`` for each image; None where the images come without splits.
        channels: number of channels C.
        size: height and width of every image.
        read: reads the image of a position: ``(C, size, size)`` float32 in [-1, 1].
    """

    names: Sequence[str]
    labels: Sequence[int]
    classes: Sequence[str]
    splits: Sequence[str] | None
    channels: int
    size: int
    read: Callable[[int], Tensor]


def open_images(images: str, *, image_size: int | None = None) -> ImageSource:
    """Open an embedded set or a folder.

    Args:
        images: ``"embedded:digits"``, or a folder that holds a folder of images for each class, or such folders in
            ``train``, ``val`` and ``test``, or the unpacked CIFAR-10 or CIFAR-100 of torchvision
            (``cifar-10-batches-py``, ``cifar-100-python``), which is never downloaded.
        image_size: height and width that images are brought to; None for those of the embedded set and of CIFAR, and
            for 224 (shorter side, then the middle) for other folders.

    Raises:
        ValueError: if there is no such set or folder, or it holds no classes.
        ImportError: if scikit-learn (extra ``demo``) or torchvision (extra ``vision``) is needed and absent.
    """
    if images.startswith(_EMBEDDED):
        name = images[len(_EMBEDDED) :]
        if name not in EMBEDDED_IMAGES:
            raise ValueError(f"embedded images {name!r} do not exist; there are {', '.join(EMBEDDED_IMAGES)}")
        return _digits(image_size)
    root = Path(images)
    cifar = [folder for folder in _CIFAR if (root / folder).is_dir()]
    if len(cifar) > 1:
        raise ValueError(f"{root} holds {' and '.join(cifar)}: put each into a folder of its own")
    if cifar:
        return _cifar(root, cifar[0], image_size)
    return _folder(root, _FOLDER_SIZE if image_size is None else image_size)


def _digits(image_size: int | None) -> ImageSource:
    found = require("sklearn.datasets", extra="demo").load_digits()
    pixels = torch.as_tensor(found.images, dtype=torch.float32).div(8).sub(1)[:, None]  # 0 to 16 -> -1 to 1
    if image_size is not None and image_size != pixels.shape[-1]:
        pixels = F.interpolate(pixels, size=(image_size, image_size), mode="bilinear", align_corners=False)
    return ImageSource(
        names=[f"digits/{i:04d}" for i in range(len(pixels))],
        labels=[int(label) for label in found.target],
        classes=[str(name) for name in found.target_names],
        splits=None,
        channels=1,
        size=int(pixels.shape[-1]),
        read=pixels.__getitem__,
    )


def _cifar(root: Path, folder: str, image_size: int | None) -> ImageSource:
    kind = getattr(require("torchvision.datasets", extra="vision"), _CIFAR[folder])
    try:
        parts = {"train": kind(str(root), train=True), "test": kind(str(root), train=False)}
    except RuntimeError as error:  # a file is missing or is not the published one
        raise ValueError(f"{root / folder} is not {_CIFAR[folder]} as it was published: {error}") from error
    places = [(name, i) for name, part in parts.items() for i in range(len(part))]
    size = int(parts["train"].data.shape[1]) if image_size is None else image_size
    transform = _transform(size)

    def read(index: int) -> Tensor:
        name, place = places[index]
        image: Tensor = transform(parts[name][place][0])
        return image

    return ImageSource(
        names=[f"{name}/{i:05d}" for name, i in places],
        labels=[int(label) for part in parts.values() for label in part.targets],
        classes=[str(name) for name in parts["train"].classes],
        splits=[name for name, _ in places],
        channels=3,
        size=size,
        read=read,
    )


def _folder(root: Path, size: int) -> ImageSource:
    if not root.is_dir():
        raise ValueError(f"images={str(root)!r} is no folder; embedded sets are written embedded:NAME")
    datasets = require("torchvision.datasets", extra="vision")
    parts = [name for name in SPLITS if (root / name).is_dir()]
    opened = {name: _class_folders(datasets, root / name) for name in parts} or {"": _class_folders(datasets, root)}
    classes = next(iter(opened.values())).classes
    for name, part in opened.items():
        if part.classes != classes:
            raise ValueError(
                f"{root}: {parts[0]} has the classes {classes}, {name} has {part.classes}: every split needs the same "
                "class folders"
            )
    if parts and "train" not in parts:
        raise ValueError(f"{root} holds {' and '.join(parts)} and no train")
    samples = [(name, path, label) for name, part in opened.items() for path, label in part.samples]
    transform, load = _transform(size), datasets.folder.default_loader

    def read(index: int) -> Tensor:
        path = samples[index][1]
        try:
            image: Tensor = transform(load(path))
        except OSError as error:  # PIL's answer to a damaged file does not name it
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        return image

    return ImageSource(
        names=[str(Path(path).relative_to(root)) for _, path, _ in samples],
        labels=[label for _, _, label in samples],
        classes=classes,
        splits=[name for name, _, _ in samples] if parts else None,
        channels=3,
        size=size,
        read=read,
    )


def _class_folders(datasets: Any, root: Path) -> Any:
    try:
        return datasets.ImageFolder(str(root))
    except FileNotFoundError as error:  # no class folders, or one without images
        raise ValueError(f"{root} must hold a folder of images for each class: {error}") from error


def _transform(size: int) -> Callable[[Any], Tensor]:
    transforms = require("torchvision.transforms", extra="vision")
    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    transform: Callable[[Any], Tensor] = transforms.Compose([*steps, transforms.Normalize([0.5] * 3, [0.5] * 3)])
    return transform


__all__ = ["EMBEDDED_IMAGES", "SPLITS", "ImageSource", "open_images"]
