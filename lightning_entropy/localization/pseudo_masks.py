"""Segmentation from image labels: class maps become masks on which a segmentation network can be trained."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from lightning_entropy.files import atomic_write
from lightning_entropy.localization.map_boxes import resize_maps

IGNORED = 255


def pseudo_masks(
    maps: Tensor,
    present: Tensor,
    *,
    background: float | str = 0.2,
    power: float = 4.0,
    uncertain: tuple[float, float] | None = None,
    size: tuple[int, int] | None = None,
    normalize: bool = True,
) -> Tensor:
    r"""The class of each pixel, from the maps of the classes that are in the image.

    Each map of a present class is divided by its maximum (no minimum is taken off), and a pixel has the class of its
    highest map where that exceeds the score of the background:

    .. math:: bg = t \qquad\text{or}\qquad bg = (1 - \max_c m_c)^{p}

    Args:
        maps: score maps, ``(B, C, h, w)``; negatives count as 0.
        present: which classes the image's labels name, ``(B, C)`` bool or 0 and 1.
        background: a constant t in (0, 1), or ``"power"``. BAS sweeps t from 0.20 to 0.44 in steps of 0.01 on training
            images with masks (``SegmentationIoU(background_thresholds=...)``).
        power: p. A larger one gives a larger foreground.
        uncertain: ``(low, high)``: pixels whose highest map lies from low up to high become 255, which losses and
            metrics leave out; it takes the place of ``background``. (0.17, 0.30) where masks are to be refined by
            affinities (IRN).
        size: height and width to which maps are resized first (bilinear); None leaves them.
        normalize: divide by the maximum; otherwise maps must be in [0, 1] already.

    Returns:
        ``(B, H, W)`` uint8: 0 background, class c as c + 1, 255 unknown.

    Raises:
        ValueError: if shapes do not fit or an argument is out of range.

    Reference:
        arXiv 2309.12943 (constant); Learning Pixel-level Semantic Affinity, arXiv 1803.10464 (power).

    Example:
        >>> maps = torch.tensor([[[[0.1, 0.9, 0.3]], [[0.0, 0.2, 0.8]]]])
        >>> pseudo_masks(maps, torch.tensor([[1, 1]]), background=0.3)
        tensor([[[0, 1, 2]]], dtype=torch.uint8)
    """
    if maps.dim() != 4 or maps.shape[:2] != present.shape:
        raise ValueError(f"maps {tuple(maps.shape)} and present {tuple(present.shape)} must be (B, C, h, w) and (B, C)")
    if maps.shape[1] >= IGNORED:
        raise ValueError(f"a mask of bytes holds at most {IGNORED - 1} classes, got {maps.shape[1]}")
    if isinstance(background, str):
        if background != "power":
            raise ValueError(f"background must be a number in (0, 1) or 'power', got {background!r}")
    elif not 0 < background < 1:
        raise ValueError(f"background must be in (0, 1) or 'power', got {background}")
    if not 0 < power < float("inf"):
        raise ValueError(f"power must be finite and positive, got {power}")
    if uncertain is not None and not 0 <= uncertain[0] <= uncertain[1] <= 1:
        raise ValueError(f"uncertain must be (low, high) with 0 <= low <= high <= 1, got {uncertain}")
    scores = (maps if size is None else resize_maps(maps, size)).detach().float().relu()
    if normalize:
        # 1e-5 as in BAS: a map that is zero all over stays so.
        scores = scores / (scores.amax((2, 3), keepdim=True) + 1e-5)
    elif scores.numel() and float(scores.max()) > 1:
        raise ValueError(f"maps must be in [0, 1] with normalize=False, got a maximum of {float(scores.max())}")
    scores = scores * present.to(scores)[:, :, None, None].bool()
    best, label = scores.max(1)
    label = label + 1
    if uncertain is not None:
        low, high = uncertain
        unsure = (best >= low) & (best < high)
        return torch.where(best < low, 0, torch.where(unsure, IGNORED, label)).to(torch.uint8)
    level = (1 - best) ** power if isinstance(background, str) else background
    return torch.where(best > level, label, 0).to(torch.uint8)


def voc_palette() -> Tensor:
    """The colours of PASCAL VOC's masks: three bits of an index at a time become high bits of red, green and blue.

    Returns:
        ``(256, 3)`` uint8.

    Example:
        >>> voc_palette()[[0, 1, 15, 255]].tolist()
        [[0, 0, 0], [128, 0, 0], [192, 128, 128], [224, 224, 192]]
    """
    index = torch.arange(256)
    palette = torch.zeros(256, 3, dtype=torch.long)
    for level in range(8):
        for channel in range(3):
            palette[:, channel] |= ((index >> (3 * level + channel)) & 1) << (7 - level)
    return palette.to(torch.uint8)


def write_voc_mask(path: str | os.PathLike[str], mask: Tensor) -> Path:
    """Write a mask as an indexed PNG in VOC's palette, whole or not at all.

    Args:
        path: a file that ends in ``.png``.
        mask: classes ``(H, W)``, 0 to 255, integers.

    Returns:
        The path that was written.

    Raises:
        ValueError: if the mask or the file's name is not as above.
    """
    from PIL import Image

    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"a VOC mask is a PNG file, got {target.name}")
    if mask.dim() != 2 or mask.is_floating_point():
        raise ValueError(f"mask must be integers (height, width), got {mask.dtype} {tuple(mask.shape)}")
    if mask.numel() and not 0 <= int(mask.min()) <= int(mask.max()) <= 255:
        raise ValueError(f"classes must be 0 to 255, got {int(mask.min())} to {int(mask.max())}")
    image = Image.fromarray(mask.cpu().to(torch.uint8).numpy())
    image.putpalette(voc_palette().flatten().tolist())
    with atomic_write(target) as temporary:
        image.save(temporary, format="PNG")
    return target


__all__ = ["IGNORED", "pseudo_masks", "voc_palette", "write_voc_mask"]
