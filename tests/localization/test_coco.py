from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_entropy.localization import coco_results, localizations_to_coco
from lightning_entropy.localization.coco import run_lengths


def decoded(runs: dict) -> np.ndarray:
    """COCO's run lengths, written out: zeros first, down the columns."""
    flat, value = [], 0
    for count in runs["counts"]:
        flat += [value] * count
        value = 1 - value
    height, width = runs["size"]
    return np.array(flat, dtype=bool).reshape(width, height).T


def example(**options) -> dict:
    boxes = [torch.tensor([[2.0, 3, 10, 7]]), torch.zeros(0, 4), torch.tensor([[0.0, 0, 4, 4], [1, 1, 3, 2]])]
    given = {"sizes": torch.tensor([[20, 30], [8, 8], [16, 16]]), "scores": torch.tensor([0.5, 0.25, 0.75])}
    return localizations_to_coco(["a.jpg", "b.jpg", "c/d.jpg"], boxes, torch.tensor([1, 0, 1]), **{**given, **options})


def test_the_three_tables() -> None:
    coco = json.loads(json.dumps(example(classes=["cat", "dog"])))
    assert coco["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert [(i["id"], i["file_name"], i["height"], i["width"]) for i in coco["images"]] == [
        (1, "a.jpg", 20, 30),
        (2, "b.jpg", 8, 8),
        (3, "c/d.jpg", 16, 16),
    ]
    rows = [(a["id"], a["image_id"], a["category_id"], a["bbox"], a["area"], a["score"]) for a in coco["annotations"]]
    assert rows == [
        (1, 1, 2, [2, 3, 8, 4], 32, 0.5),
        (2, 3, 2, [0, 0, 4, 4], 16, 0.75),
        (3, 3, 2, [1, 1, 2, 1], 2, 0.75),
    ]
    assert coco_results(coco)[0] == {"image_id": 1, "category_id": 2, "bbox": [2, 3, 8, 4], "score": 0.5}


def test_boxes_of_the_models_pixels_are_brought_to_the_image() -> None:
    coco = example(from_size=(10, 10))
    assert coco["annotations"][0]["bbox"] == [6, 6, 24, 8]


def test_masks_are_run_lengths() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        mask = torch.rand(5, 7) > 0.5
        assert np.array_equal(decoded(run_lengths(mask)), mask.numpy())
    assert run_lengths(torch.zeros(2, 3, dtype=torch.bool)) == {"counts": [6], "size": [2, 3]}
    assert run_lengths(torch.ones(2, 3, dtype=torch.bool)) == {"counts": [0, 6], "size": [2, 3]}


def test_a_mask_goes_with_its_box() -> None:
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 1:3, 2:] = True
    box: Tensor = torch.tensor([[2, 1, 4, 3]])
    coco = localizations_to_coco(["a"], [box], [0], sizes=[(8, 12)], masks=mask, from_size=(4, 4))
    (one,) = coco["annotations"]
    found = decoded(one["segmentation"])
    assert found.shape == (8, 12)
    y, x = np.nonzero(found)
    assert one["bbox"] == [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()]
    assert one["area"] == found.sum() == 24
    assert "segmentation" in coco_results(coco)[0]


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="there are 3 names and 1 sizes"):
        example(sizes=[(3, 3)])
    with pytest.raises(ValueError, match="labels must be 0 to 0, got 0 to 1"):
        example(classes=["cat"])
    with pytest.raises(ValueError, match="a mask; masks go with one box an image"):
        example(masks=torch.zeros(3, 8, 8))
