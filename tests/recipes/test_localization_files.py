from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_entropy.localization import coco_results, localizations_to_coco
from lightning_entropy.recipes.localization_files import write_coco, write_masks, write_overlays


def test_boxes_as_json(tmp_path: Path) -> None:
    coco = localizations_to_coco(["a.jpg"], [torch.tensor([[0, 0, 4, 4]])], [0], sizes=[(8, 8)])
    assert json.loads(write_coco(coco, tmp_path / "out" / "coco.json").read_text()) == coco
    results = coco_results(coco)
    assert json.loads(write_coco(results, tmp_path / "results.json").read_text()) == results
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_coco({"score": float("nan")}, tmp_path / "out" / "coco.json")
    assert json.loads((tmp_path / "out" / "coco.json").read_text()) == coco
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["coco.json"]


def test_a_picture_and_a_mask_an_image(tmp_path: Path) -> None:
    names, images, maps = ["x/a.jpg", "x/b.jpg"], torch.rand(2, 3, 8, 8), torch.rand(2, 1, 2, 2)
    boxes = [torch.tensor([[0, 0, 4, 4]]), torch.zeros(0, 4)]
    pictures = write_overlays(tmp_path / "pictures", names, images, maps, boxes, boxes, masks=torch.ones(2, 8, 8))
    assert [p.name for p in pictures] == ["a.png", "b.png"]
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.size[0] > 100
    masks = torch.randint(0, 21, (2, 8, 8), dtype=torch.uint8)
    for mask, path in zip(masks, write_masks(tmp_path / "masks", names, masks)):
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), mask.numpy())
    with pytest.raises(ValueError, match=r"several images would be written to a\.png"):
        write_overlays(tmp_path, ["x/a.jpg", "y/a.jpg"], images, maps)
