from __future__ import annotations

import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lightning_entropy.functional import boxes_at_thresholds, normalize_score_maps, protocol_thresholds, scale_boxes
from lightning_entropy.functional.level_boxes import largest_at_each
from lightning_entropy.functional.level_components import fill_holes
from lightning_entropy.functional.localization_boxes import CONTOURS
from lightning_entropy.functional.opencv_contours import opencv_boxes
from tests.localization.official_evaluator import FOUR, boxes_at, components, normalized

needs_opencv = pytest.mark.skipif(find_spec("cv2") is None, reason="needs OpenCV")
BACKENDS = ["numpy", pytest.param("opencv", marks=needs_opencv)]


def score_map(kind: int, rng: np.random.Generator) -> np.ndarray:
    """Ties, constants, empties, holes, borders, single rows: what evaluators trip over."""
    height, width = rng.integers(1, 15, 2)
    noise = rng.random((height, width))
    if kind == 0:
        return noise
    if kind == 1:
        return np.floor(noise * 4) / 4  # few levels
    if kind == 2:
        return (noise < rng.uniform(0.2, 0.9)).astype(float)  # binary, with many ties and holes
    if kind == 3:
        return np.full((height, width), rng.choice([0.0, 0.7, np.nan]))
    if kind == 4:
        rows, columns = np.mgrid[:height, :width]
        distance = np.hypot(rows - rng.uniform(0, height), columns - rng.uniform(0, width))
        return np.cos(distance * rng.uniform(0.3, 3))  # rings in rings, cut by the border
    if kind == 5:
        return np.where(noise < 0.1, 1.0, 0.0) + np.where(noise > 0.97, 0.5, 0.0)  # single pixels, equally large
    smooth = np.pad(noise, 1)
    return sum(smooth[r : r + height, c : c + width] for r in range(3) for c in range(3)) / 9


def boxes(found, image: int, place: int) -> set[tuple[int, ...]]:
    return {tuple(box) for box in found.at(image, place).tolist()}


@pytest.mark.parametrize("contours", CONTOURS)
def test_a_thousand_maps_have_the_boxes_of_the_slow_evaluator(contours: str) -> None:
    rng = np.random.default_rng(0)
    backends = ["numpy", "opencv"] if find_spec("cv2") else ["numpy"]
    for n in range(1000):
        one = score_map(n % 7, rng)
        scaled = normalized(one)
        grid = np.sort(rng.choice(protocol_thresholds(), 12, replace=False))
        found = [
            boxes_at_thresholds(torch.from_numpy(one)[None], grid, contours=contours, backend=backend)
            for backend in backends
        ]
        for place in (0, 5, 9):
            expected = set(boxes_at(scaled, grid[place], contours=contours))
            assert all(boxes(one_way, 0, place) == expected for one_way in found), (n, place, one)


@needs_opencv
@pytest.mark.parametrize("contours", CONTOURS)
def test_both_backends_agree_at_every_threshold(contours: str) -> None:
    small = torch.rand(9, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    maps = torch.nn.functional.interpolate(small, size=(56, 40), mode="bicubic")
    maps[0] = 0
    maps[1] = maps[1].round(decimals=1)
    ways = [boxes_at_thresholds(maps, contours=contours, backend=backend) for backend in ("numpy", "opencv")]
    for image in range(len(maps)):
        for place in range(0, 1000, 7):
            assert boxes(ways[0], image, place) == boxes(ways[1], image, place)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.floats(0, 1)))
def test_any_map_has_the_boxes_of_the_slow_evaluator(one: np.ndarray) -> None:
    grid = [0.0, 0.29, 0.5, 0.999]
    for contours in CONTOURS:
        found = boxes_at_thresholds(torch.from_numpy(one)[None], grid, contours=contours, backend="numpy")
        for place, threshold in enumerate(grid):
            assert boxes(found, 0, place) == set(boxes_at(normalized(one), threshold, contours=contours))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_map_whose_maximum_is_below_one_is_cut_relative_to_it(backend: str) -> None:
    one = torch.zeros(1, 6, 6)
    one[0, 1:3, 1:3], one[0, 3, 3] = 0.4, 0.2
    found = boxes_at_thresholds(one, [0.4, 0.6], contours="largest", normalize=False, backend=backend)
    assert boxes(found, 0, 0) == {(1, 1, 4, 4)}
    assert boxes(found, 0, 1) == {(1, 1, 3, 3)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_corner_cases(backend: str) -> None:
    def at(one: torch.Tensor, contours: str = "all", threshold: float = 0.5) -> set[tuple[int, ...]]:
        return boxes(boxes_at_thresholds(one[None], [threshold], contours=contours, backend=backend), 0, 0)

    zeros = torch.zeros(8, 8)
    assert at(zeros) == at(zeros + 3) == at(zeros * torch.nan) == {(0, 0, 0, 0)}
    full = torch.ones(8, 8)
    full[0, 0] = 0.9
    assert at(full, threshold=0.0) == {(0, 0, 7, 7), (0, 0, 7, 7)}  # clipped on the right and below
    ring = zeros.clone()
    ring[1:6, 1:6] = 1
    ring[2:5, 2:5] = 0
    assert at(ring) == {(1, 1, 6, 6)}  # the hole's contour runs on the ring itself
    ring[3, 3] = 1
    assert at(ring) == {(1, 1, 6, 6), (3, 3, 4, 4)}
    assert at(ring, "largest") == at(ring, "largest_component") == {(1, 1, 6, 6)}
    comb = zeros.clone()  # a thick square, and a longer line of less area but more pixels
    comb[0:2, 0:2] = 1
    comb[4, :] = 1
    assert at(comb, "largest") == {(0, 0, 2, 2)}
    assert at(comb, "largest_component") == {(0, 4, 7, 5)}
    twins = zeros.clone()
    twins[1:3, 1:3] = twins[5:7, 4:6] = twins[5:7, 1:3] = 1
    assert at(twins, "largest") == {(4, 5, 6, 7)}  # the last in raster order
    assert at(torch.arange(5.0)[None]) == {(3, 0, 4, 0)}
    assert at(torch.arange(5.0)[:, None], "largest") == {(0, 3, 0, 4)}


def test_levels_are_float64_and_thresholds_truncated() -> None:
    assert int(0.29 * 100) == 28  # what rounding would not give
    one = torch.tensor([[[28.0, 29.0, 100.0]]], dtype=torch.float64) / 255
    found = boxes_at_thresholds(one, [0.29], normalize=False, backend="numpy")
    assert boxes(found, 0, 0) == {(1, 0, 2, 0)}


def test_batches_empty_and_many_maps() -> None:
    assert len(boxes_at_thresholds(torch.zeros(0, 4, 4)).boxes) == 0
    maps = torch.rand(12, 9, 9)
    whole = boxes_at_thresholds(maps, contours="all", backend="numpy")
    for image, one in enumerate(maps):
        alone = boxes_at_thresholds(one[None], contours="all", backend="numpy")
        for place in range(0, 1000, 111):
            assert boxes(whole, image, place) == boxes(alone, 0, place)


def test_maps_are_swept_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = torch.rand(5, 6, 6)
    whole = boxes_at_thresholds(maps, backend="numpy")
    monkeypatch.setattr("lightning_entropy.functional.localization_boxes.CHUNK_PIXELS", 80)
    parts = boxes_at_thresholds(maps, backend="numpy")
    assert all(boxes(whole, i, t) == boxes(parts, i, t) for i in range(5) for t in range(0, 1000, 91))


def test_normalization_is_the_published_one() -> None:
    maps = torch.rand(6, 5, 4, dtype=torch.float32)
    maps[1], maps[2, 0, 0] = 2.0, torch.nan
    expected = np.stack([normalized(one.numpy()) for one in maps])
    np.testing.assert_array_equal(normalize_score_maps(maps[:, None]).numpy(), expected)
    half = normalize_score_maps(maps.bfloat16())
    assert half.dtype == torch.float64


def test_scaled_boxes_are_truncated() -> None:
    box = torch.tensor([[3, 5, 333, 499]])
    assert scale_boxes(box, image_size=(500, 375)).tolist() == [[1, 2, 149, 298]]
    assert scale_boxes(box[0], image_size=(500, 500), map_size=(28, 14)).tolist() == [0, 0, 18, 13]


def test_largest_among_intervals() -> None:
    rng = np.random.default_rng(0)
    begin = rng.integers(0, 37, 80)
    end = begin + 1 + rng.integers(0, 37 - begin)
    image, values = rng.integers(0, 3, 80), rng.normal(size=80)
    expected = np.full((3, 37), -9.0)
    for n in range(80):
        part = expected[image[n], begin[n] : end[n]]
        np.maximum(part, values[n], out=part)
    got = largest_at_each(values, image, begin, end, images=3, steps=37, floor=-9)
    np.testing.assert_array_equal(got, expected)


def test_what_is_wrong_is_said() -> None:
    maps = torch.rand(1, 4, 4)
    with pytest.raises(ValueError, match=r"shape \(B, H, W\)"):
        boxes_at_thresholds(maps[0])
    with pytest.raises(ValueError, match="infinite"):
        boxes_at_thresholds(maps / 0)
    with pytest.raises(ValueError, match="pass normalize=True"):
        boxes_at_thresholds(maps + 1, normalize=False)
    with pytest.raises(ValueError, match="pass normalize=True"):
        boxes_at_thresholds(maps * torch.nan, normalize=False)
    with pytest.raises(ValueError, match="ascending"):
        boxes_at_thresholds(maps, [0.5, 0.2])
    with pytest.raises(ValueError, match="thresholds must be"):
        boxes_at_thresholds(maps, [])
    with pytest.raises(ValueError, match="contours must be one of"):
        boxes_at_thresholds(maps, contours="any")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend must be one of"):
        boxes_at_thresholds(maps, backend="scipy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="interval"):
        protocol_thresholds(0)


def test_without_opencv_the_boxes_are_found_and_asking_for_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = torch.rand(1, 5, 5)
    before = boxes_at_thresholds(maps, [0.3], backend="numpy")
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setattr("lightning_entropy.functional.localization_boxes.find_spec", lambda name: None)
    assert boxes(boxes_at_thresholds(maps, [0.3]), 0, 0) == boxes(before, 0, 0)
    with pytest.raises(ImportError, match=r"lightning-entropy\[localization\]"):
        boxes_at_thresholds(maps, [0.3], backend="opencv")


def test_holes_are_filled_at_every_level() -> None:
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 5, (30, 9, 8)).astype(np.int16)
    maps[0] = [[min(r, c, 8 - r, 7 - c) % 2 for c in range(8)] for r in range(9)]  # rings in rings
    filled = fill_holes(maps)
    for one, got in zip(maps, filled):
        for level in range(5):
            framed = np.pad(one <= level, 1, constant_values=True).tolist()
            outside = np.zeros((11, 10), dtype=bool)
            outside[tuple(zip(*next(components(framed, FOUR))))] = True
            np.testing.assert_array_equal(got > level, ~outside[1:-1, 1:-1])
    assert fill_holes(maps[:0]).shape == (0, 9, 8)


@needs_opencv
def test_long_and_short_contours_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.zeros(40, 40)
    plain[5:20, 9:30], plain[8:12, 12:20] = 0.4, 1
    maps = torch.stack((torch.rand(40, 40), plain, torch.rand(40, 40), plain.T))
    taken: list[int] = []
    monkeypatch.setattr(
        "lightning_entropy.functional.localization_boxes.opencv_boxes",
        lambda visible, **kwargs: (taken.append(len(visible)), opencv_boxes(visible, **kwargs))[1],
    )
    mixed = boxes_at_thresholds(maps)
    assert taken == [2]
    swept = boxes_at_thresholds(maps, backend="numpy")
    for image in range(4):
        for place in range(0, 1000, 37):
            assert boxes(mixed, image, place) == boxes(swept, image, place)
    boxes_at_thresholds(maps, [0.2])
    assert taken == [2, 4]  # one level is quickly searched, however long its contours
