from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_entropy.functional import (
    best_iou_at_thresholds,
    boxes_at_thresholds,
    inclusive_box_iou,
    pixel_average_precision,
    pixel_precision_recall,
    score_histograms,
)
from tests.localization.official_evaluator import average_precision, boxes_at, iou, normalized

corner = st.integers(0, 30)
box = st.tuples(corner, corner, corner, corner).map(
    lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]))
)


@settings(max_examples=200, deadline=None)
@given(box, box)
def test_iou_is_that_of_sets_of_pixels(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    def pixels(c: tuple[int, ...]) -> set[tuple[int, int]]:
        return {(x, y) for x in range(c[0], c[2] + 1) for y in range(c[1], c[3] + 1)}

    expected = len(pixels(a) & pixels(b)) / len(pixels(a) | pixels(b))
    assert inclusive_box_iou(torch.tensor(a), torch.tensor(b)).item() == expected


def test_best_iou_is_that_of_the_slow_evaluator() -> None:
    rng = np.random.default_rng(0)
    grid = np.arange(0, 1, 0.1)
    maps = np.stack([np.floor(rng.random((11, 13)) * rng.choice([2, 5, 100])) for _ in range(24)])
    maps[3] = 0
    truth = []
    for _ in maps:
        first = rng.integers(0, 8, (rng.integers(1, 4), 2))
        truth.append(torch.from_numpy(np.concatenate((first, first + rng.integers(0, 9, first.shape)), axis=1)))
    for contours in ("all", "largest"):
        found = boxes_at_thresholds(torch.from_numpy(maps), grid, contours=contours)
        got = best_iou_at_thresholds(found, truth, num_thresholds=len(grid))
        for image, one in enumerate(maps):
            for place, threshold in enumerate(grid):
                boxes = boxes_at(normalized(one), threshold, contours=contours)
                expected = max(iou(a, b) for a in boxes for b in truth[image].tolist())
                assert got[image, place].item() == expected


@pytest.mark.parametrize("side", [1, 2, 4, 5, 6, 20])
def test_boxes_are_a_pixel_too_large_by_protocol(side: int) -> None:
    maps = torch.zeros(1, 30, 30)
    maps[0, 3 : 3 + side, 5 : 5 + side] = 1
    found = boxes_at_thresholds(maps, [0.5])
    inclusive = torch.tensor([[5, 3, 4 + side, 2 + side]])
    overlap = best_iou_at_thresholds(found, [inclusive], num_thresholds=1).item()
    assert overlap == side**2 / (side + 1) ** 2
    assert (overlap < 0.7) == (side <= 5)
    exclusive = inclusive + torch.tensor([0, 0, 1, 1])
    assert best_iou_at_thresholds(found, [exclusive], num_thresholds=1).item() == 1


def test_an_empty_map_has_a_box_of_one_pixel_in_the_corner() -> None:
    found = boxes_at_thresholds(torch.zeros(2, 9, 9), [0.5])
    truth = [torch.tensor([[0, 0, 1, 1]]), torch.tensor([[1, 1, 4, 4]])]
    assert best_iou_at_thresholds(found, truth, num_thresholds=1).flatten().tolist() == [0.25, 0]


def test_an_image_without_a_true_box_is_named() -> None:
    found = boxes_at_thresholds(torch.rand(2, 4, 4), [0.5])
    with pytest.raises(ValueError, match=r"truth\[1\] must hold boxes"):
        best_iou_at_thresholds(found, [torch.tensor([[0, 0, 1, 1]]), torch.zeros(0, 4)], num_thresholds=1)


@pytest.mark.parametrize("interval", [0.001, 0.01, 0.3])
def test_pixel_precision_is_that_of_the_slow_evaluator(interval: float) -> None:
    rng = np.random.default_rng(0)
    maps = rng.random((6, 7, 5))
    maps[0] = np.round(maps[0], 2)  # on the edges of bins
    maps[1], maps[2] = 0.5, np.nan
    masks = rng.choice([0, 1, 255], maps.shape)
    got = score_histograms(torch.from_numpy(maps), torch.from_numpy(masks), interval=interval)
    area, counts = average_precision([normalized(one) for one in maps], masks, interval)
    np.testing.assert_array_equal(got.numpy(), counts)
    assert pixel_average_precision(got).item() == pytest.approx(area, abs=1e-14)


def test_pixel_precision_in_limiting_cases() -> None:
    mask = torch.zeros(1, 6, 6, dtype=torch.uint8)
    mask[0, 1:3, 2:5] = 1
    assert pixel_average_precision(score_histograms(mask, mask)).item() == 1
    share = mask.float().mean().item()
    for constant in (torch.zeros(1, 6, 6), torch.full((1, 6, 6), 0.3)):
        assert pixel_average_precision(score_histograms(constant, mask)).item() == pytest.approx(share)
        same = score_histograms(constant, mask, normalize=False)
        assert pixel_average_precision(same).item() == pytest.approx(share)
    assert pixel_average_precision(score_histograms(1.0 - mask, mask)).item() == pytest.approx(share)
    precision, recall = pixel_precision_recall(score_histograms(mask, mask))
    assert precision[0] == 1
    assert recall[0] == 0  # nothing lies above 1
    with pytest.raises(ValueError, match="no pixel belongs to an object, of 36"):
        pixel_average_precision(score_histograms(mask, mask * 0))
    with pytest.raises(ValueError, match="shape of the maps"):
        score_histograms(mask, mask[:, :4])


def test_counts_do_not_round() -> None:
    histograms = torch.zeros(2, 4, dtype=torch.long)
    histograms[0, 2], histograms[1, 0] = 2**24 + 1, 2**24 + 1
    added = histograms + torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0]])
    assert added[0, 2] == 2**24 + 2
