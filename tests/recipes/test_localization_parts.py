"""The parts of the wsol recipes: scores of maps, predictions, report."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_entropy.data.localization_picture import Picture, View
from lightning_entropy.functional import multi_label_cross_entropy
from lightning_entropy.localization import MaxBoxAccuracyV2, SegmentationIoU, TopKLocalization
from lightning_entropy.recipes import Comparison
from lightning_entropy.recipes.localization_maps import map_kind
from lightning_entropy.recipes.localization_models import SmallCNN, make_classifier
from lightning_entropy.recipes.localization_predictions import in_original, write_localizations
from lightning_entropy.recipes.localization_report import chosen_map, draw, numbers, summarize
from lightning_entropy.recipes.localization_scores import MapScores
from lightning_entropy.recipes.localization_training import classification_loss, make_augmentation
from lightning_entropy.recipes.segmentation_scores import SegmentationScores, present_maps


def test_names_of_maps() -> None:
    assert map_kind("cam") == ("cam", None, None)
    assert map_kind("layer_cam_mean") == ("layer_cam", 0, None)
    assert map_kind("bas_top12") == ("bas", 12, None)
    assert map_kind("whole_image") == ("whole_image", None, None)
    assert map_kind("layer_cam@stages.1") == ("layer_cam", None, "stages.1")
    for wrong in ("cam_", "bas_top", "bas_top0", "centre_gaussian_mean", "CAM"):
        with pytest.raises(ValueError, match="there is no map"):
            map_kind(wrong)


def test_scores_are_those_of_the_metrics_at_the_fitted_thresholds() -> None:
    generator = torch.Generator().manual_seed(1)

    def batch(count: int) -> tuple[Any, ...]:
        maps = torch.nn.functional.interpolate(torch.rand(count, 1, 6, 6, generator=generator), 24, mode="bilinear")
        corners = torch.randint(0, 12, (count, 2), generator=generator)
        sides = torch.randint(4, 12, (count, 2), generator=generator)
        boxes = [
            torch.cat([c, c + s])[None] if i % 5 else torch.zeros(0, 4) for i, (c, s) in enumerate(zip(corners, sides))
        ]
        return (
            maps,
            boxes,
            torch.randn(count, 3, generator=generator),
            torch.randint(0, 3, (count,), generator=generator),
        )

    val, test = batch(25), batch(25)
    fitted, tested = MapScores(["cam"], interval=0.02), MapScores(["cam"], interval=0.02)
    for part in (slice(0, 10), slice(10, 25)):
        fitted.update({"cam": val[0][part]}, val[1][part], val[2][part], val[3][part])
    tested.update({"cam": test[0]}, *test[1:])
    assert tested.use(fitted.fit()) == []
    options: dict[str, Any] = {"interval": 0.02, "without_box": "skip"}
    known, v2 = TopKLocalization(k=1, contours="largest_component", **options), MaxBoxAccuracyV2(**options)
    known.update(*val)
    v2.update(*val[:2])
    threshold, several = known.fit_threshold()[0], v2.fit_threshold()
    known.reset()
    v2.reset()
    known.update(*test)
    v2.update(*test[:2])
    known.threshold, v2.threshold = threshold, several
    values = tested.compute()
    assert values["cam/gt_known"] == pytest.approx(known.compute()["gt_known"].item())
    assert values["cam/top1_loc"] == pytest.approx(known.compute()["top1"].item())
    assert values["cam/max_box_v2"] == pytest.approx(v2.compute()["box_accuracy_v2"].item())
    assert "cam/pxap" not in values


def test_nothing_seen() -> None:
    scores = MapScores(["cam"])
    assert scores.compute() == {}
    assert scores.fit() == {}
    assert scores.use({}) == ["cam"]
    empty: tuple[Any, Any, Any] = ([torch.zeros(0, 4)], torch.zeros(1, 2), torch.tensor([0]))
    scores.update({"cam": torch.rand(1, 8, 8)}, *empty, torch.zeros(1, 8, 8))
    assert scores.compute() == {}
    mask = torch.zeros(1, 8, 8)
    mask[0, :2] = 1
    scores.update({"cam": mask}, *empty, mask)  # a mask without a box, as OpenImages has them
    assert scores.compute() == {"cam/pxap": 1.0}


def test_segmentation_at_one_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(6, 3, 9, 9, generator=generator)
    present = (torch.rand(6, 3, generator=generator) < 0.6).float()
    masks = torch.randint(0, 4, (6, 9, 9), generator=generator)
    masks[0, :3] = 255
    scaled = present_maps(maps, present)
    expected = maps.clamp(min=0) / maps.clamp(min=0).amax((2, 3), keepdim=True)
    torch.testing.assert_close(scaled, expected * present[:, :, None, None])
    scores = SegmentationScores(["cam"], classes=3)
    scores.update({"cam": maps}, present, masks)
    everything = SegmentationIoU(4, background_thresholds=[round(0.05 * i, 2) for i in range(1, 20)])
    everything.update(scaled, masks)
    assert scores.compute()["cam/miou"] == everything.compute()["miou"].item()
    assert scores.fit()["cam"] == pytest.approx(everything.compute()["threshold"].item())
    for threshold in (0.05, 0.6, 0.95):
        fixed = SegmentationScores(["cam"], classes=3)
        fixed.update({"cam": maps}, present, masks)
        assert fixed.use({"cam": threshold}) == []
        one = SegmentationIoU(4, background_thresholds=[threshold])
        one.update(scaled, masks)
        assert fixed.compute()["cam/miou"] == pytest.approx(one.compute()["miou"].item())
    assert SegmentationScores(["cam"], classes=3).compute() == {}


def test_losses_of_both_kinds_of_labels() -> None:
    logits = torch.randn(4, 3)
    labels = torch.tensor([0, 2, 1, 1])
    plain = torch.nn.functional.cross_entropy(logits, labels)
    assert classification_loss(logits, labels) == plain
    one_hot = torch.eye(3)[labels]
    torch.testing.assert_close(classification_loss(logits, one_hot), plain)  # one label among several possible
    mixed = 0.25 * one_hot + 0.75 * one_hot.flip(0)
    expected = -(mixed * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(classification_loss(logits, mixed), expected)
    several = torch.tensor([[1.0, 1, 0]] * 4)
    assert classification_loss(logits, several) == multi_label_cross_entropy(logits, several)


def test_cutmix_mixes_labels_by_area() -> None:
    torch.manual_seed(0)
    pictures = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16).clone()
    mixed, target = make_augmentation("cutmix")(pictures, torch.arange(4), 4)
    assert target.shape == (4, 4)
    for image, shares in zip(mixed, target):
        counted = torch.stack([(image[0] == k).float().mean() for k in range(4)])
        torch.testing.assert_close(shares, counted, atol=1e-3, rtol=0)


def test_classifiers_by_name() -> None:
    small = SmallCNN(3, 5, widths=[4, 6, 8, 10])
    assert small.split == "stages.3"
    assert small.stages[:3](torch.zeros(1, 3, 64, 64)).shape == (1, 6 + 2, 8, 8)
    assert small.stages(torch.zeros(1, 3, 64, 64)).shape == (1, 10, 8, 8)  # the last stage keeps the resolution
    by_torchvision = make_classifier("torchvision:resnet18", in_channels=3, classes=7)
    assert by_torchvision(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    by_timm = make_classifier("timm:resnet10t", in_channels=1, classes=7)
    assert by_timm(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    with pytest.raises(ValueError, match="take 3 channels"):
        make_classifier("torchvision:resnet18", in_channels=1, classes=7)


@pytest.mark.parametrize("crop", [False, True])
def test_boxes_return_to_the_original(crop: bool) -> None:
    boxes = torch.tensor([[60.0, 40.0, 130.0, 90.0]], dtype=torch.float64)
    picture = Picture(np.zeros((120, 200, 3), dtype=np.uint8), size=(120, 200), boxes=boxes, mask=None)
    view = View(256, 16, 16, 224) if crop else View(224, 0, 0, 224)
    seen = view.boxes(picture)
    found = in_original(seen, shown=(224, 224), size=(120, 200), centre_crop=crop)
    torch.testing.assert_close(found, boxes.float(), rtol=1e-4, atol=1e-3)


def test_predictions_are_written(tmp_path: Path) -> None:
    batch = {
        "name": ["b", "a"],
        "probabilities": torch.tensor([[0.2, 0.8], [0.6, 0.4]]),
        "boxes": [torch.tensor([[1.0, 2.0, 5.0, 9.0]]), torch.zeros(0, 4)],
        "size": torch.tensor([[16, 20], [30, 40]]),
        "pictures": {
            "name": ["b"],
            "images": torch.rand(1, 3, 8, 8),
            "maps": torch.rand(1, 1, 8, 8),
            "boxes": [torch.tensor([[1.0, 2.0, 3.0, 4.0]])],
            "truth": None,
        },
    }
    table, boxes, pictures = write_localizations([batch], tmp_path / "out" / "found.csv", classes=["cat", "dog"])
    assert [row["prediction"] for row in csv.DictReader(table.read_text().splitlines())] == ["cat", "dog"]
    coco = json.loads(boxes.read_text())
    assert [(one["file_name"], one["height"], one["width"]) for one in coco["images"]] == [("a", 30, 40), ("b", 16, 20)]
    (one,) = coco["annotations"]
    assert (one["image_id"], one["category_id"], one["bbox"]) == (2, 2, [1, 2, 4, 7])
    assert one["score"] == pytest.approx(0.8)
    assert [path.name for path in pictures.iterdir()] == ["b.png"]


def made(variant: str, seed: int, maps: dict[str, tuple[float, float]]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "variant": variant,
        "fold": None,
        "seed": seed,
        "curves": {f"val/{name}/max_box_v2": [0.9, val] for name, (val, _) in maps.items()},
        "metrics": {f"{name}/max_box_v2": test for name, (_, test) in maps.items()} | {"accuracy": 0.5},
        "bags": {"train": 8, "test": 2},
        "best_epoch": None,
        "seconds": 1.0,
    }
    record["metrics"] |= summarize(record)
    return record


def test_the_map_is_chosen_on_validation_images() -> None:
    runs = [
        made("ce", 0, {"cam": (0.3, 0.6), "cam_mean": (0.4, 0.2), "whole_image": (0.8, 0.9)}),
        made("ce", 1, {"cam": (0.5, 0.4), "cam_mean": (0.4, 0.8), "whole_image": (0.8, 0.9)}),
        made("bas", 0, {"cam": (0.3, 0.6), "bas": (0.7, 0.7)}),
        made("bas", 1, {"cam": (0.3, 0.6), "bas": (0.7, 0.5)}),
    ]
    assert [chosen_map(run) for run in runs] == ["cam_mean", "cam", "bas", "bas"]  # never one that knows nothing
    assert [run["metrics"]["max_box_v2"] for run in runs] == [0.2, 0.4, 0.7, 0.5]
    assert summarize({"metrics": {"accuracy": 1.0}, "curves": {}}) == {}
    comparison = Comparison("wsol", runs, ["ce", "bas"], independent=True)
    found = numbers(comparison)
    json.dumps(found, allow_nan=False)
    assert found["ce"]["chosen"] == {"cam_mean": 1, "cam": 1}
    assert found["bas"]["maps"]["bas"]["max_box_v2"]["mean"] == pytest.approx(0.6)
    assert found["bas"]["maps"]["bas"]["max_box_v2"]["std"] == pytest.approx(np.std([0.7, 0.5], ddof=1))
    (axis,) = draw(comparison).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["cam", "cam_mean", "whole_image", "bas"]
    assert axis.get_title() == "MaxBoxAccV2"
