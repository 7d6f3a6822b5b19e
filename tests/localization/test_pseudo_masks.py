from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_entropy import functional
from lightning_entropy.localization import pseudo_masks, voc_palette, write_voc_mask


def slowly(maps: np.ndarray, present: np.ndarray, background: float | str, power: float) -> np.ndarray:
    out = np.zeros((maps.shape[0], *maps.shape[2:]), dtype=np.uint8)
    for b in range(maps.shape[0]):
        scores = {}
        for c in range(maps.shape[1]):
            if present[b, c]:
                positive = np.maximum(maps[b, c], 0)
                scores[c] = positive / (positive.max() + 1e-5)
        for y in range(maps.shape[2]):
            for x in range(maps.shape[3]):
                best, label = max(((s[y, x], -c) for c, s in scores.items()), default=(0.0, 0))
                level = (1 - best) ** power if background == "power" else background
                out[b, y, x] = 1 - label if best > level else 0
    return out


@pytest.mark.parametrize(("background", "power"), [(0.2, 4.0), (0.44, 4.0), ("power", 4.0), ("power", 1.5)])
def test_every_pixel_has_the_class_of_its_highest_map(background: float | str, power: float) -> None:
    torch.manual_seed(0)
    maps = torch.randn(6, 4, 5, 7)
    present = torch.rand(6, 4) > 0.5
    present[0] = False
    masks = pseudo_masks(maps, present, background=background, power=power)
    assert masks.dtype == torch.uint8
    expected = slowly(maps.double().numpy(), present.numpy(), background, power)
    assert np.array_equal(masks.numpy(), expected)
    assert not masks[0].any()
    for mask, row in zip(masks, present):
        assert set(mask.unique().tolist()) <= {0, *(row.nonzero().flatten() + 1).tolist()}
    assert torch.equal(pseudo_masks(maps * 7, present.float(), background=background, power=power), masks)


def test_scores_between_two_levels_are_unknown() -> None:
    maps = torch.tensor([[[[0.1, 0.2, 0.25, 0.35, 1.0]]]])
    masks = pseudo_masks(maps, torch.ones(1, 1), uncertain=(0.17, 0.30))
    assert masks.flatten().tolist() == [0, 255, 255, 1, 1]


def test_maps_are_resized_first_and_need_not_be_scaled() -> None:
    maps = torch.rand(2, 3, 4, 4)
    present = torch.ones(2, 3)
    assert pseudo_masks(maps, present, size=(9, 11)).shape == (2, 9, 11)
    low = 0.1 * maps
    assert not pseudo_masks(low, present, normalize=False).any()
    assert pseudo_masks(low, present).any()
    assert not pseudo_masks(torch.zeros(1, 2, 3, 3), torch.ones(1, 2)).any()


def test_maps_of_all_classes_of_a_generator_fit() -> None:
    maps = functional.normalize_score_maps(torch.rand(3, 4, 4))[None].float()
    assert pseudo_masks(maps, torch.tensor([[True, False, True]]), normalize=False).shape == (1, 4, 4)


def test_the_palette_is_that_of_voc() -> None:
    """From the list of colours that VOC's development kit prints."""
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 7: (128, 128, 128)}
    known |= {8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    palette = voc_palette()
    assert {i: tuple(palette[i].tolist()) for i in known} == known
    assert len({tuple(c) for c in palette.tolist()}) == 256


def test_a_mask_is_written_as_indices(tmp_path: Path) -> None:
    mask = torch.tensor([[0, 1, 20], [255, 15, 0]], dtype=torch.uint8)
    path = write_voc_mask(tmp_path / "masks" / "a.png", mask)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    with Image.open(path) as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), mask.numpy())
        assert np.asarray(image.convert("RGB"))[0, 1].tolist() == [128, 0, 0]


def test_what_they_refuse(tmp_path: Path) -> None:
    maps, present = torch.rand(1, 2, 3, 3), torch.ones(1, 2)
    for options, message in (
        ({"background": "low"}, "background must be a number in"),
        ({"background": 1.0}, r"background must be in \(0, 1\)"),
        ({"power": 0.0}, "power must be finite and positive"),
        ({"uncertain": (0.4, 0.3)}, "uncertain must be"),
    ):
        with pytest.raises(ValueError, match=message):
            pseudo_masks(maps, present, **options)
    with pytest.raises(ValueError, match=r"must be \(B, C, h, w\) and \(B, C\)"):
        pseudo_masks(maps, torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"maps must be in \[0, 1\] with normalize=False"):
        pseudo_masks(maps + 1, present, normalize=False)
    with pytest.raises(ValueError, match="at most 254 classes, got 255"):
        pseudo_masks(torch.rand(1, 255, 2, 2), torch.ones(1, 255))
    with pytest.raises(ValueError, match=r"a VOC mask is a PNG file, got a\.jpg"):
        write_voc_mask(tmp_path / "a.jpg", torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="mask must be integers"):
        write_voc_mask(tmp_path / "a.png", torch.zeros(2, 2))
    with pytest.raises(ValueError, match="classes must be 0 to 255, got 0 to 300"):
        write_voc_mask(tmp_path / "a.png", torch.tensor([[0, 300]]))
