from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_entropy.localization import EvidenceCurve, evidence_curve
from tests.localization.user_modules import ImageClassifier, SmallNet


def linear_classifier(channels: int = 3, classes: int = 2) -> nn.Sequential:
    """A tail without bias and nonlinearity: what masks take away adds up exactly."""
    layers = nn.Identity(), nn.Conv2d(channels, channels, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    net = nn.Sequential(*layers, nn.Linear(channels, classes, bias=False)).double()
    net[1].weight.data = torch.eye(channels, dtype=torch.float64)[:, :, None, None]
    return net


def scenes(evidence: str, count: int = 12, side: int = 16) -> dict:
    """Objects of 4 x 6 pixels; the channel of the label is lit on the object, outside of it, or everywhere."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    images = torch.zeros(count, 3, side, side, dtype=torch.float64)
    masks, boxes = torch.zeros(count, side, side, dtype=torch.uint8), []
    for image, mask, label in zip(images, masks, labels):
        top, left = torch.randint(0, side - 6, (2,), generator=generator).tolist()
        mask[top : top + 4, left : left + 6] = 1
        boxes.append(torch.tensor([[left, top, left + 6, top + 4]], dtype=torch.float32))
        lit = {"object": mask == 1, "background": mask == 0, "everywhere": mask >= 0}[evidence]
        image[label] += lit * (1 + 0.1 * torch.rand(side, side, generator=generator, dtype=torch.float64))
    return {"image": images, "label": labels, "mask": masks, "boxes": boxes}


def classifier() -> nn.Sequential:
    net = linear_classifier()
    net[4].weight.data = torch.tensor([[1.0, -0.2, 0], [-0.2, 1.0, 0]], dtype=torch.float64)
    return net


@pytest.mark.parametrize("evidence", ["object", "background", "everywhere"])
def test_with_a_linear_tail_the_parts_add_up_and_grow(evidence: str) -> None:
    curve = evidence_curve(classifier(), [scenes(evidence)], split="1", steps=6)
    assert curve.masks == "masks"
    assert curve.images == 12
    torch.testing.assert_close(torch.tensor(curve.foreground) + torch.tensor(curve.background), torch.ones(13))
    assert curve.foreground[0] == 0
    assert curve.foreground == sorted(curve.foreground)
    assert curve.areas == sorted(curve.areas)
    assert (curve.areas[0], curve.areas[-1]) == (0, 1)
    assert curve.cross_entropy == sorted(curve.cross_entropy, reverse=True)
    assert curve.areas[6] == curve.object_area == pytest.approx(24 / 256)
    edge = {"object": 1.0, "background": 0.0}.get(evidence)
    if edge is None:
        assert curve.foreground[6] == pytest.approx(24 / 256, abs=0.01)
    else:
        assert curve.foreground[6] == pytest.approx(edge)


def test_the_numbers_are_those_of_masking_by_hand() -> None:
    """With group norm, a ReLU and a bias: every image by itself, through a deep copy of the tail."""
    torch.manual_seed(1)
    net = SmallNet(0.3).double()
    images, labels = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    masks = torch.zeros(6, 16, 16)
    for i, mask in enumerate(masks):
        mask[2 * i : 2 * i + 4, 4:12] = 1
    net.fc.bias.data += 2.0
    curve = evidence_curve(
        net, [{"x": images, "y": labels, "mask": masks}], split="stage3", steps=1, correct_only=False
    )
    tail = copy.deepcopy(net).eval()
    sums = torch.zeros(4, dtype=torch.float64)
    used = 0
    with torch.no_grad():
        for image, label, mask in zip(images, labels, masks):
            features = tail.stage2(tail.stage1(image[None]))
            s = tail.fc(tail.stage3(features).mean((2, 3)))[0]
            if s[label] <= 0:
                continue
            used += 1
            m = (F.avg_pool2d(mask[None, None], 2) >= 0.5).double()
            fore = tail.fc(tail.stage3(features * m).mean((2, 3)))
            back = tail.fc(tail.stage3(features * (1 - m)).mean((2, 3)))
            sums += torch.stack([s[label], fore[0, label], back[0, label], F.cross_entropy(fore, label[None])])
    assert used >= 4
    assert curve.images == used
    assert curve.foreground[1] == pytest.approx((sums[1] / sums[0]).item())
    assert curve.background[1] == pytest.approx((sums[2] / sums[0]).item())
    assert curve.cross_entropy[1] == pytest.approx((sums[3] / used).item())
    assert curve.growth == [0, 1, 2]
    assert curve.foreground[2] == pytest.approx(1)
    assert curve.background[0] == pytest.approx(1)
    assert curve.background_cross_entropy[0] == pytest.approx(curve.cross_entropy[2])


def test_the_verdicts() -> None:
    on = evidence_curve(classifier(), [scenes("object")], split="1")
    assert on.lies_on_object
    assert "lies on the object" in on.verdict
    assert "without it 0% is left" in on.verdict
    off = evidence_curve(classifier(), [scenes("background")], split="1")
    assert off.lies_on_object is False
    assert "does not lie on the object" in off.verdict
    assert "without it 100% is left and 100% of the images" in off.verdict
    half = scenes("object")
    half["image"] += 0.12 * scenes("background")["image"]
    both = evidence_curve(classifier(), [half], split="1")
    assert both.lies_on_object is False
    assert "the object and its surroundings" in both.verdict


def test_boxes_stand_in_for_masks_and_are_taken_where_there_are_none() -> None:
    batch = scenes("object")
    with_masks = evidence_curve(classifier(), [batch], split="1")
    del batch["mask"]
    with_boxes = evidence_curve(classifier(), [batch], split="1")
    assert with_boxes.masks == "boxes"
    assert with_boxes.foreground == with_masks.foreground
    del batch["boxes"]
    grown = evidence_curve(classifier(), [batch], split="1", steps=8)
    assert grown.masks == "cam"
    assert grown.lies_on_object is None
    assert grown.object_area is None
    assert grown.growth == grown.areas == [i / 16 for i in range(17)]
    # The class map finds the 9 % of the positions that are lit first.
    assert grown.foreground[2] == pytest.approx(1)
    assert "only true masks or boxes can tell" in grown.verdict
    centre = evidence_curve(classifier(), [batch], split="1", masks="centre")
    assert "from the middle" in centre.verdict


def test_unknown_pixels_are_no_object_and_images_without_one_are_left_out() -> None:
    batch = scenes("object")
    batch["mask"][batch["mask"] == 0] = 255
    assert evidence_curve(classifier(), [batch], split="1").object_area == pytest.approx(24 / 256)
    batch["mask"][:3] = 0
    batch["label"][5] = 1 - batch["label"][5]
    batch["image"][7] = 0
    batch["image"][7, 2] = -1
    curve = evidence_curve(classifier(), [batch], split="1")
    assert curve.images == 7
    assert curve.left_out == {"without an object": 3, "classified wrongly": 2, "activation not positive": 0}
    curve = evidence_curve(classifier(), [batch], split="1", correct_only=False)
    assert curve.left_out == {"without an object": 3, "classified wrongly": 0, "activation not positive": 2}


def test_an_object_smaller_than_a_position_has_the_one_that_it_covers_most() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 4, 4), *list(linear_classifier())[1:]).double()
    for parameter in net.parameters():
        nn.init.constant_(parameter, 0.1)
    mask = torch.zeros(2, 16, 16)
    mask[:, 5:7, 9:11] = 1
    batch = {"image": torch.ones(2, 3, 16, 16, dtype=torch.float64), "label": torch.tensor([0, 1]), "mask": mask}
    curve = evidence_curve(net, [batch], split="1", correct_only=False)
    assert curve.object_area == pytest.approx(1 / 16)


def test_batches_add_up_and_the_number_of_images_is_limited() -> None:
    whole = scenes("everywhere")
    parts = [{k: v[i : i + 5] for k, v in whole.items()} for i in (0, 5, 10)]
    one, several = (evidence_curve(classifier(), b, split="1") for b in ([whole], parts))
    assert several.images == 12
    assert several.background == pytest.approx(one.background)
    first = evidence_curve(classifier(), parts, split="1", max_images=7)
    assert first.images == 7


def test_tokens_that_are_no_patches_stay() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64, depth=2, global_pool="avg")
    net.head.bias.data += 2.0
    batch = {"image": torch.randn(4, 3, 64, 64), "label": torch.tensor([0, 1, 2, 0])}
    curve = evidence_curve(net, [batch], split="blocks.1", masks="centre", correct_only=False, steps=2)
    assert curve.foreground[-1] == 1
    assert curve.background[0] == pytest.approx(1)
    assert curve.areas == [0, 0.25, 0.5, 0.75, 1]


def test_the_module_is_as_it_was() -> None:
    torch.manual_seed(0)
    module = ImageClassifier(norm="batch")
    batch = {"image": torch.randn(4, 3, 12, 12), "label": torch.tensor([0, 1, 2, 0])}
    module.pool.fc.bias.data += 2.0
    module.train()
    module.pool.stage1.eval()
    before, modes, state = (
        copy.deepcopy(module.state_dict()),
        [m.training for m in module.modules()],
        torch.get_rng_state(),
    )
    evidence_curve(module, [batch], split="pool.stage3", correct_only=False, masks="cam")
    assert [m.training for m in module.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_it_can_be_saved_read_and_drawn(tmp_path: Path) -> None:
    curve = evidence_curve(classifier(), [scenes("object")], split="1")
    path = curve.save(tmp_path / "curve.json")
    assert EvidenceCurve.load(path) == curve
    figure = curve.plot()
    assert [len(axis.lines) for axis in figure.axes] == [4, 3]
    (tmp_path / "other.json").write_text('{"kind": "report"}')
    with pytest.raises(ValueError, match=r"other.json holds no evidence curve: its kind is 'report'"):
        EvidenceCurve.load(tmp_path / "other.json")


def labelled(**entries: Tensor) -> list[dict]:
    return [{"image": torch.ones(2, 3, 8, 8, dtype=torch.float64), "label": torch.tensor([0, 1]), **entries}]


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        (labelled(), {"masks": "saliency"}, "masks must be one of masks, boxes, cam, centre or None"),
        (labelled(), {"masks": "boxes"}, "the batch has no entry 'boxes'"),
        (labelled(), {"masks": "masks"}, "the batch has no entry 'mask'"),
        (labelled(), {"steps": 0}, "steps must be at least 1"),
        (labelled(mask=torch.zeros(2, 8, 8)), {}, "no image is left for the curve: 2 without an object"),
        ([], {}, "no image is left for the curve: the loader gave none"),
        ([{"label": torch.tensor([0])}], {}, "found no images"),
    ],
)
def test_what_it_refuses(batches: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evidence_curve(classifier(), batches, split="1", **options)


def test_an_activation_that_does_not_come_from_the_features_is_said_to_be_so() -> None:
    net = classifier()
    net[4].bias = nn.Parameter(torch.full((2,), 5.0, dtype=torch.float64))
    batch = scenes("object")
    curve = evidence_curve(net, [batch], split="1")
    assert curve.foreground[0] > 0.9
    assert "is left even of nothing" in curve.verdict
    batch["label"][:8] = 1 - batch["label"][:8]
    assert "Most images (8 of 12) are classified wrongly" in evidence_curve(classifier(), [batch], split="1").verdict


def test_images_that_are_not_square_with_as_many_channels_as_rows() -> None:
    torch.manual_seed(0)
    net = SmallNet(0.0).double()  # features (8, 8, 10) at the split
    net.fc.bias.data += 3.0
    masks = torch.zeros(2, 16, 20)
    masks[:, 2:6, 4:12] = 1  # 2 x 4 of 8 x 10 positions
    batch = {"image": torch.randn(2, 3, 16, 20, dtype=torch.float64), "label": torch.tensor([0, 1]), "mask": masks}
    assert evidence_curve(net, [batch], split="stage3", correct_only=False).object_area == pytest.approx(8 / 80)
