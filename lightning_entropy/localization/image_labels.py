"""The images and their labels in a user's batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_NAMES = ("label", "labels", "target", "targets", "y")


def find_images(batch: Any) -> Tensor:
    """The images in a batch: the one floating point tensor ``(B, channels, height, width)``, or the first of several.

    Args:
        batch: a tensor, or tuples, lists and mappings that hold one.

    Raises:
        ValueError: if there is none, with what the batch holds.

    Example:
        >>> find_images({"image": torch.zeros(2, 3, 8, 8), "label": torch.tensor([1, 0])}).shape
        torch.Size([2, 3, 8, 8])
    """
    held = dict(_tensors(batch, ""))
    for tensor in held.values():
        if tensor.dim() == 4 and tensor.is_floating_point():
            return tensor
    raise ValueError(f"found no images (batch, channels, height, width). {_inventory(held)}")


def find_labels(
    batch: Any, count: int, classes: int, *, target: str | int | None = None, multilabel: bool = False
) -> Tensor:
    """The labels in a batch.

    Args:
        batch: what ``training_step`` was given.
        count: number of images.
        classes: number of classes.
        target: where they are: a key or an index, dotted to go deeper (``"1"``, ``"label"``, ``"1.labels"``); None: the
            one tensor of integers ``(count,)``, or with several labels an image the one ``(count, classes)``.
        multilabel: whether images have several labels.

    Returns:
        ``(count,)`` int64, or ``(count, classes)`` bool.

    Raises:
        ValueError: if there are none, or several candidates, with what the batch holds.

    Example:
        >>> find_labels((torch.zeros(2, 3, 8, 8), torch.tensor([1, 0])), 2, 2)
        tensor([1, 0])
    """
    held = dict(_tensors(batch, ""))
    expected = f"({count}, {classes}) of zeros and ones" if multilabel else f"({count},) of integers"
    if target is not None:
        found = held.get(str(target))
        if found is None or not _fits(found, count, classes, multilabel):
            what = "is not in the batch" if found is None else f"is {tuple(found.shape)} of {found.dtype}"
            hint = _soft(found, count, classes, multilabel)
            raise ValueError(f"target={target!r} {what}; labels {expected} are needed.{hint} {_inventory(held)}")
        return _as_labels(found, multilabel)
    fitting = {name: t for name, t in held.items() if _fits(t, count, classes, multilabel)}
    if len(fitting) > 1:
        named = {name: t for name, t in fitting.items() if name.rpartition(".")[2] in _NAMES}
        fitting = named if len(named) == 1 else fitting
    if len(fitting) != 1:
        several = f"{len(fitting)} candidates ({', '.join(fitting)})" if fitting else "none"
        hint = "" if fitting else "".join({_soft(t, count, classes, multilabel) for t in held.values()})
        raise ValueError(
            f"found {several} for the labels {expected} of {count} images.{hint} {_inventory(held)} Pass target= with "
            "the key or index of the labels."
        )
    return _as_labels(next(iter(fitting.values())), multilabel)


def check_range(labels: Tensor, classes: int) -> None:
    """Refuse labels that name no class.

    Raises:
        ValueError: if a label is negative or not below the number of classes.
    """
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must be 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}")


def draw_label(labels: Tensor, *, seed: tuple[int, ...]) -> Tensor:
    """One of the labels of each image, at random.

    Args:
        labels: which classes are present, ``(batch, classes)`` bool.
        seed: numbers that are others in each step; equal ones draw alike.

    Returns:
        ``(batch,)``; 0 for an image without a label.

    Example:
        >>> draw_label(torch.tensor([[False, True, False], [False, False, True]]), seed=(0, 3))
        tensor([1, 2])
    """
    generator = torch.Generator("cpu").manual_seed(hash(seed) % 2**63)  # of integers: the same in every process
    draws = torch.rand(labels.shape, generator=generator, device="cpu")
    return (1 + draws).to(labels.device).mul(labels).argmax(1)


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping) or (hasattr(value, "items") and hasattr(value, "keys")):
        for key, inner in value.items():
            yield from _tensors(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _tensors(inner, f"{path}.{i}" if path else str(i))


def _fits(tensor: Tensor, count: int, classes: int, multilabel: bool) -> bool:
    if multilabel:
        return tuple(tensor.shape) == (count, classes)
    whole = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
    return whole and tuple(tensor.shape) == (count,)


def _soft(tensor: Tensor | None, count: int, classes: int, multilabel: bool) -> str:
    if multilabel or tensor is None or tuple(tensor.shape) != (count, classes):
        return ""
    return (
        f" There is a ({count}, {classes}) tensor: pass multilabel=True for several labels an image; mixed labels "
        + ("(mixup, CutMix, label smoothing in the batch) have no foreground map.")
    )


def _as_labels(tensor: Tensor, multilabel: bool) -> Tensor:
    return tensor > 0.5 if multilabel else tensor.long()


def _inventory(held: dict[str, Tensor]) -> str:
    listed = ", ".join(
        f"{name or 'itself'} {tuple(t.shape)} {t.dtype}".replace("torch.", "") for name, t in held.items()
    )
    return f"The batch holds {listed or 'no tensor'}."


__all__ = ["check_range", "draw_label", "find_images", "find_labels"]
