from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from lightning_entropy.localization import draw_localization
from lightning_entropy.training.figures import figure_array


def rectangles(axis) -> list[tuple]:
    """Boxes in colour; each lies on a black one."""
    found = [(to_hex(p.get_edgecolor()), *p.get_bbox().extents) for p in axis.patches]
    assert [p[1:] for p in found[::2]] == [p[1:] for p in found[1::2]]
    return found[1::2]


def test_one_image_beside_its_map() -> None:
    image = torch.rand(3, 12, 16)
    figure = draw_localization(image, torch.rand(3, 4), torch.tensor([[1, 2, 5, 6]]), torch.tensor([[0, 0, 16, 12]]))
    plain, mapped = figure.axes
    for axis in (plain, mapped):
        assert rectangles(axis) == [("#ffffff", 0, 0, 16, 12), ("#ff5722", 1, 2, 5, 6)]
        assert axis.get_xlim() == (0, 16)
        assert axis.get_ylim() == (12, 0)
    assert np.allclose(plain.images[0].get_array(), image.permute(1, 2, 0))
    assert [i.get_array().shape[:2] for i in mapped.images] == [(12, 16), (12, 16)]


def test_several_images_with_any_number_of_boxes() -> None:
    boxes = [torch.zeros(0, 4), torch.tensor([[1.0, 1, 3, 3]]), torch.tensor([[0.0, 0, 2, 2], [4, 4, 6, 6]])]
    masks = torch.zeros(3, 8, 8, dtype=torch.uint8)
    masks[1, 2:5, 2:5] = 1
    figure = draw_localization(
        torch.rand(3, 3, 8, 8), torch.rand(3, 1, 2, 2), boxes, masks=masks, titles=["a", "b", "c"], columns=2
    )
    assert [len(rectangles(axis)) for axis in figure.axes] == [0, 0, 1, 1, 2, 2]
    assert [axis.get_title(loc="left") for axis in figure.axes[::2]] == ["a", "b", "c"]
    assert [len(axis.collections) for axis in figure.axes] == [0, 0, 1, 1, 0, 0]
    assert figure_array(figure).ndim == 3


def test_one_box_an_image_and_grey_images() -> None:
    figure = draw_localization(torch.rand(2, 1, 8, 8), torch.rand(2, 8, 8), torch.tensor([[0, 0, 2, 2], [1, 1, 4, 4]]))
    assert [rectangles(axis)[0][1:] for axis in figure.axes[::2]] == [(0, 0, 2, 2), (1, 1, 4, 4)]


def test_what_it_refuses() -> None:
    images, maps = torch.rand(2, 3, 8, 8), torch.rand(2, 1, 4, 4)
    with pytest.raises(ValueError, match="images must be"):
        draw_localization(torch.rand(2, 5, 8, 8), maps)
    with pytest.raises(ValueError, match="maps must be one an image"):
        draw_localization(images, maps[:1])
    with pytest.raises(ValueError, match="boxes must be one tensor"):
        draw_localization(images, maps, [torch.zeros(0, 4)])
