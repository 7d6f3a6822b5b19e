from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_entropy import functional
from lightning_entropy.functional import boxes_at_thresholds, connected_components, largest_component
from lightning_entropy.localization import map_boxes, map_masks, resize_maps


def random_maps(count: int, seed: int) -> Tensor:
    """Smooth, rough, few-level and constant maps of one size."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (int(n) for n in torch.randint(1, 24, (2,), generator=generator))
    maps = torch.rand(count, 1, height, width, generator=generator, dtype=torch.float64)
    maps[::3] = F.avg_pool2d(maps[::3], 3, 1, 1)
    maps[1::3] = (3 * maps[1::3]).floor()
    maps[-1] = 0.3
    return maps[:, 0]


def flood(mask: Tensor) -> list[set]:
    """Components by flooding from one pixel after the other, in raster order."""
    left = {tuple(p) for p in mask.nonzero().tolist()}
    found = []
    while left:
        pending, component = [min(left)], set()
        left.discard(pending[0])
        while pending:
            y, x = pending.pop()
            component.add((y, x))
            near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            pending.extend(near)
        found.append(component)
    return found


def test_components_are_those_of_a_flood() -> None:
    for seed in range(30):
        masks = random_maps(6, seed) > 0.5
        labels = connected_components(masks)
        best = largest_component(masks)
        for mask, label, one in zip(masks, labels, best):
            expected = torch.zeros_like(label)
            components = flood(mask)
            for component in components:
                y, x = min(component)
                for place in component:
                    expected[place] = 1 + y * mask.shape[1] + x
            assert torch.equal(label, expected)
            if not components:
                assert not one.any()
                continue
            largest = max(components, key=lambda c: (len(c), min(c)))
            assert {tuple(p) for p in one.nonzero().tolist()} == largest


def test_a_path_that_winds_through_the_whole_map_is_one_component() -> None:
    mask = torch.zeros(101, 101, dtype=torch.bool)
    mask[::2] = True
    mask[1::4, -1] = True
    mask[3::4, 0] = True
    labels = connected_components(mask[None])[0]
    assert labels[mask].unique().tolist() == [1]
    mask[3, 0] = False
    assert connected_components(mask[None])[0][mask].unique().tolist() == [1, 4 * 101 + 1]


def test_no_masks_and_empty_masks() -> None:
    assert connected_components(torch.zeros(0, 3, 3, dtype=torch.bool)).shape == (0, 3, 3)
    assert largest_component(torch.zeros(0, 3, 3, dtype=torch.bool)).shape == (0, 3, 3)
    assert not largest_component(torch.zeros(2, 3, 3, dtype=torch.bool)).any()
    assert connected_components(torch.ones(1, 2, 2, dtype=torch.bool)).unique().tolist() == [1]
    with pytest.raises(ValueError, match="masks must be bool"):
        connected_components(torch.zeros(3, 3, dtype=torch.bool))


@pytest.mark.parametrize("contours", ["largest_component", "largest", "all"])
@pytest.mark.parametrize("threshold", [0.0, 0.29, 0.5, 0.9])
def test_boxes_are_those_of_the_metrics_but_for_the_clipped_edge(contours: str, threshold: float) -> None:
    for seed in range(20):
        maps = random_maps(7, seed)
        found = boxes_at_thresholds(maps, [threshold], contours=contours)
        boxes = map_boxes(maps, threshold=threshold, contours=contours)
        height, width = maps.shape[1:]
        for index, one in enumerate(boxes):
            assert one.dtype == torch.float32
            expected = found.at(index, 0)
            if not len(one):
                assert expected.tolist() == [[0, 0, 0, 0]]
                continue
            clipped = torch.minimum(one, torch.tensor([width, height, width - 1, height - 1]))
            assert torch.equal(torch.unique(clipped.long(), dim=0), expected)


def test_the_box_of_the_largest_component_bounds_its_mask() -> None:
    for seed in range(20):
        maps = random_maps(7, seed)
        masks = map_masks(maps, threshold=0.4, contours="largest_component")
        boxes = map_boxes(maps, threshold=0.4)
        for mask, box in zip(masks, boxes):
            if not len(box):
                assert not mask.any()
                continue
            y, x = mask.nonzero().unbind(1)
            assert box.tolist() == [[x.min(), y.min(), x.max() + 1, y.max() + 1]]
        assert (masks <= map_masks(maps, threshold=0.4)).all()


def test_maps_are_resized_before_they_are_scaled() -> None:
    torch.manual_seed(0)
    maps = torch.rand(3, 1, 5, 7)
    big = resize_maps(maps, (40, 56))
    assert torch.equal(resize_maps(maps[:, 0], (40, 56)), big[:, 0])
    for a, b in zip(map_boxes(maps, threshold=0.6, size=(40, 56)), map_boxes(big, threshold=0.6)):
        assert torch.equal(a, b)
    assert torch.equal(map_masks(maps, threshold=0.6, size=(40, 56)), map_masks(big, threshold=0.6))


def test_an_object_at_the_border_has_its_own_box() -> None:
    maps = torch.zeros(1, 6, 9)
    maps[0, 3:, 5:] = 2
    assert map_boxes(maps, threshold=0.2)[0].tolist() == [[5, 3, 9, 6]]
    assert map_boxes(torch.full((1, 1, 4, 4), 0.7), threshold=0.2)[0].shape == (0, 4)
    assert map_boxes(torch.full((1, 1, 4, 4), 0.7), threshold=0.2, normalize=False)[0].tolist() == [[0, 0, 4, 4]]
    assert map_boxes(torch.zeros(0, 4, 4), threshold=0.2) == []


def test_a_threshold_is_cut_to_a_level_as_in_the_metrics() -> None:
    """0.29 of 100 is 28.999...: the level is 28, so that 29 is above it."""
    maps = torch.tensor([[[0.0, 28.5, 29.5, 100.4]]], dtype=torch.float64) / 255
    masks = map_masks(maps, threshold=0.29, normalize=False)
    assert masks[0, 0].tolist() == [False, False, True, True]
    assert map_boxes(maps, threshold=0.29, normalize=False)[0].tolist() == [[2, 0, 4, 1]]


@pytest.mark.parametrize("function", [map_boxes, map_masks])
def test_what_they_refuse(function) -> None:
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\), got 1.0"):
        function(torch.rand(1, 3, 3), threshold=1.0)
    with pytest.raises(ValueError, match="score maps must have the shape"):
        function(torch.rand(1, 2, 3, 3), threshold=0.5)
    with pytest.raises(ValueError, match="contours"):
        function(torch.rand(1, 3, 3), threshold=0.5, contours="biggest")


def test_maps_that_look_at_no_image() -> None:
    gaussian = functional.centre_gaussian(6, 8)
    assert gaussian.shape == (6, 8)
    assert torch.equal(gaussian, gaussian.flip(0))
    assert torch.equal(gaussian, gaussian.flip(1))
    assert functional.centre_gaussian(5, 7)[2, 3] == 1
    y, x = torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij")
    expected = torch.exp(-0.5 * (((x - 3.5) / (0.3 * 8)) ** 2 + ((y - 2.5) / (0.3 * 6)) ** 2))
    torch.testing.assert_close(functional.centre_gaussian(6, 8, sigma=0.3), expected)
    whole = functional.whole_image(6, 8)[None]
    for threshold in (0.0, 0.5, 0.99):
        for contours in ("all", "largest", "largest_component"):
            assert map_boxes(whole, threshold=threshold, contours=contours)[0].tolist() == [[0, 0, 8, 6]]
    with pytest.raises(ValueError, match="sigma must be finite and positive, got 0"):
        functional.centre_gaussian(3, 3, sigma=0)
    with pytest.raises(ValueError, match="width must be at least 2, got 1"):
        functional.whole_image(3, 1)
