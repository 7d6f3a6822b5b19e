from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import nn
from torchvision.ops import masks_to_boxes

from lightning_entropy.data import LocalizationSet, localization_objects

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
SMALL = {"train_count": 24, "val_count": 4, "test_count": 40}


def ready(*arguments: str, **options: Any) -> LocalizationSet:
    images = LocalizationSet(*arguments, **(SMALL | options))
    images.setup()
    return images


def looks(images: LocalizationSet, index: int) -> np.ndarray:
    return images.source.read(index).pixels


def test_batches_of_training_have_no_boxes_and_those_of_evaluation_do() -> None:
    images = ready(batch_size=8)
    train, test = (next(iter(loader)) for loader in (images.train_dataloader(), images.test_dataloader()))
    assert set(train) == {"image", "label", "name"}
    assert set(test) == {"image", "label", "name", "boxes", "mask", "size"}
    for batch in (train, test):
        assert batch["image"].shape == (8, 3, 64, 64)
        assert batch["image"].dtype == torch.float32
        assert batch["label"].dtype == torch.int64
        assert batch["label"].shape == (8,)
    assert test["name"][:2] == ["test/00000", "test/00001"]
    assert [(box.shape, box.dtype) for box in test["boxes"]] == [((1, 4), torch.float32)] * 8
    assert (test["mask"].shape, test["mask"].dtype) == ((8, 64, 64), torch.uint8)
    assert test["size"].tolist() == [[64, 64]] * 8
    assert (images.in_channels, images.image_size, images.has_masks, images.multilabel) == (3, 64, True, False)
    assert images.classes == ["digit 0", "digit 1", "digit 2", "digit 3"]
    assert sum(len(batch["name"]) for batch in images.predict_dataloader()) == 24 + 4 + 40
    assert [len(part) for part in (images.train, images.val, images.test)] == [24, 4, 40]
    assert images.train.labels == [(i % 4,) for i in range(24)]
    assert images.val.names == [f"val/{i:05d}" for i in range(4)]


def test_images_are_normalised_as_pretrained_classifiers_expect() -> None:
    images = ready(batch_size=2)
    batch = next(iter(images.val_dataloader()))
    pixels = torch.from_numpy(looks(images, 24)).permute(2, 0, 1) / 255
    torch.testing.assert_close(batch["image"][0], (pixels - MEAN[:, None, None]) / STD[:, None, None])
    torch.testing.assert_close(images.denormalize(batch["image"])[0], pixels)
    assert float(images.denormalize(batch["image"]).max()) <= 1


def test_an_image_depends_on_seed_split_and_number_alone() -> None:
    one, more = ready(), ready(train_count=30, batch_size=5)
    for index in (23, 3, 11):  # in another order than they stand in
        assert np.array_equal(looks(one, index), looks(more, index))
    assert np.array_equal(looks(one, 24), looks(more, 30))  # the first of val
    assert not np.array_equal(looks(one, 0), looks(one, 24))
    assert not np.array_equal(looks(one, 0), looks(ready(seed=1), 0))
    assert one.source.read(0) is one.source.read(0)  # drawn once


def test_strength_changes_the_body_and_nothing_else() -> None:
    weak, strong = ready(strength=0.0), ready(strength=1.0)
    for index in range(24):
        one, other = weak.source.read(index), strong.source.read(index)
        assert torch.equal(one.boxes, other.boxes)
        assert np.array_equal(one.mask, other.mask)  # type: ignore[arg-type]
        differs = (one.pixels != other.pixels).any(-1)
        assert differs.any()
        assert not (differs & (one.mask == 0)).any()


def test_boxes_and_masks_are_exact_and_away_from_the_middle() -> None:
    images = ready(test_count=200, train_count=4)
    centres, shares = [], []
    for index in range(8, 208):
        picture = images.source.read(index)
        assert picture.mask is not None
        assert set(np.unique(picture.mask)) == {0, 1}
        inclusive = masks_to_boxes(torch.from_numpy(picture.mask)[None])
        assert picture.boxes.tolist() == (inclusive + torch.tensor([0, 0, 1, 1])).tolist()
        shares.append(picture.mask.mean())
        rows, columns = np.nonzero(picture.mask)
        centres.append([rows.mean(), columns.mean()])
    assert 0.05 < np.mean(shares) < 0.12  # pi * 12 * 9 of 64 * 64 pixels is .083
    assert min(shares) > 0
    spread = np.std(centres, axis=0)
    np.testing.assert_allclose(spread, 32 / math.sqrt(12), rtol=0.12)  # uniform over the 32 pixels that are allowed


def test_stripes_run_in_the_direction_of_the_class() -> None:
    images = ready(strength=1.0)
    for index in range(24):
        picture, label = images.source.read(index), images.source.labels[index][0]
        assert picture.mask is not None
        inner = picture.mask.astype(bool)
        for axis in (0, 1):
            for step in (-1, 1):
                inner = inner & np.roll(inner, step, axis)
        inner &= picture.pixels.min(-1) < 190  # without the digit
        down, right = np.gradient(picture.pixels.mean(-1))
        twice = np.angle(((right + 1j * down) ** 2)[inner].sum()) / 2  # dominant direction of the gradient
        apart = (twice - label * math.pi / 4) % math.pi
        assert min(apart, math.pi - apart) < math.pi / 10


def test_the_digit_is_the_class_and_each_split_has_its_own_scans() -> None:
    pools = localization_objects._glyphs(0)
    kept = {split: {glyph.tobytes() for glyphs in pool for glyph in glyphs} for split, pool in pools.items()}
    assert sum(map(len, kept.values())) == len(set().union(*kept.values()))
    assert all(len(pool) == 4 and min(map(len, pool)) >= 10 for pool in pools.values())
    images = ready(strength=0.0)
    alone = 0
    for index in range(24):
        picture, label = images.source.read(index), images.source.labels[index][0]
        left, top, right, bottom = (int(edge) for edge in picture.boxes[0])
        darkest = picture.pixels[top:bottom, left:right].min(-1) / 255
        windows = np.lib.stride_tricks.sliding_window_view(darkest, (12, 12))
        # Strokes are laid over what is there, so that no pixel is darker than its stroke.
        fits = [bool((windows >= glyphs[:, None, None] - 0.003).all((-1, -2)).any()) for glyphs in pools["train"]]
        assert fits[label]
        alone += sum(fits) == 1
    assert alone >= 20


@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_backgrounds_tell_the_class_as_often_as_asked(monkeypatch: pytest.MonkeyPatch, correlation: float) -> None:
    kinds: list[str] = []

    def note(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
        kinds.append(kind)
        return np.zeros((size, size, 3), np.float32)

    monkeypatch.setattr(localization_objects, "background", note)
    images = ready(background_correlation=correlation, train_count=400)
    for index in range(400):
        images.source.read(index)
    own = np.mean([("china", "flower", "clouds", "pebbles")[i % 4] == kind for i, kind in enumerate(kinds)])
    assert own == pytest.approx(correlation + (1 - correlation) / 5, abs=0.06)
    assert (set(kinds) == {"china", "flower", "clouds", "pebbles", "grain"}) == (correlation < 1)


def test_backgrounds_are_images() -> None:
    for kind in localization_objects.BACKGROUNDS:
        one, same, other = (
            localization_objects.background(kind, 48, np.random.default_rng(seed)) for seed in (0, 0, 1)
        )
        assert (one.shape, one.dtype) == ((48, 48, 3), np.float32)
        assert 0 <= one.min() < one.max() <= 1
        assert np.array_equal(one, same)
        assert not np.array_equal(one, other)


def test_another_size_scales_boxes_and_masks() -> None:
    plain, large = (next(iter(ready(image_size=size).test_dataloader())) for size in (None, 160))
    assert large["image"].shape[2:] == large["mask"].shape[1:] == (160, 160)
    for one, other in zip(plain["boxes"], large["boxes"]):
        torch.testing.assert_close(other, one * 2.5)
    rows = (torch.arange(160) * 64) // 160
    assert torch.equal(large["mask"], plain["mask"][:, rows][:, :, rows])
    assert large["size"].tolist() == plain["size"].tolist()


def test_augmented_images_are_crops_that_change_with_the_epoch_and_nothing_else() -> None:
    images = ready(augment=True, batch_size=24)
    loader = images.train_dataloader()
    before = torch.get_rng_state()
    first = next(iter(loader))
    assert torch.equal(before, torch.get_rng_state())
    again = next(iter(ready(augment=True, batch_size=24).train_dataloader()))
    assert torch.equal(first["image"], again["image"])
    assert images.train[(0, 5)]["image"].equal(images.train[(0, 5)]["image"])
    assert not images.train[(0, 5)]["image"].equal(images.train[(1, 5)]["image"])
    found = set()
    for position in range(24):
        pixels = Image.fromarray(looks(images, position)).resize((73, 73), Image.Resampling.BILINEAR)
        whole = torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 255
        image = images.denormalize(images.train[(0, position)]["image"])
        places = [
            (top, left)
            for top in range(10)
            for left in range(10)
            if torch.allclose(whole[:, top : top + 64, left : left + 64], image, atol=1e-5)
        ]
        assert places  # a crop, and never mirrored: that would be another class
        found |= set(places)
    assert len(found) > 12
    assert images.test[0]["image"].equal(ready().test[0]["image"])  # evaluation is left as it is


def test_centre_crop_cuts_boxes_and_masks_as_it_cuts_images() -> None:
    images = ready(evaluation="centre_crop")
    for batch in images.test_dataloader():
        for boxes, mask in zip(batch["boxes"], batch["mask"]):
            exact = masks_to_boxes((mask == 1).to(torch.uint8)[None]) + torch.tensor([0, 0, 1, 1])
            assert float((exact - boxes).abs().max()) <= 1.2  # a pixel is 73/64 wide after scaling
    assert images.train[0]["image"].equal(ready().train[0]["image"])


def test_workers_read_what_the_process_itself_reads() -> None:
    alone, others = (
        list(ready(num_workers=workers, augment=True, batch_size=12).train_dataloader()) for workers in (0, 2)
    )
    assert [batch["name"] for batch in alone] == [batch["name"] for batch in others]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(alone, others))


class Located(LightningModule):
    """Notes the batches of every stage."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)
        self.seen: dict[str, set[str]] = {}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        return self._note("train", batch)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._note("val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._note("test", batch)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        return self._note("predict", batch)

    def _note(self, stage: str, batch: dict[str, Any]) -> torch.Tensor:
        self.seen[stage] = set(batch)
        return nn.functional.cross_entropy(self.head(batch["image"].mean((2, 3))), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_trainer_uses_it_in_every_stage() -> None:
    module, images = Located(), LocalizationSet(batch_size=4, **SMALL)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(module, images)
    trainer.test(module, images, verbose=False)
    trainer.predict(module, images)
    assert module.seen.pop("train") == {"image", "label", "name"}
    assert list(module.seen.values()) == [{"image", "label", "name", "boxes", "mask", "size"}] * 3


def test_workers_can_be_started_anew() -> None:
    images = ready()
    copy = pickle.loads(pickle.dumps(images.train))  # as macOS and Windows hand it to them
    assert copy[3]["image"].equal(images.train[3]["image"])


def test_labels_can_be_given_as_zeros_and_ones() -> None:
    images = ready(multilabel=True)
    label = next(iter(images.test_dataloader()))["label"]
    assert label.dtype == torch.float32
    assert torch.equal(label, torch.eye(4).repeat(10, 1)[: len(label)])
    assert images.multilabel


def test_arguments_come_from_yaml(tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(LocalizationSet, "data")
    (tmp_path / "data.yaml").write_text("data:\n  strength: 0.3\n  evaluation: centre_crop\n  val_count: 0\n")
    parser.add_argument("--config", action="config")
    images = parser.instantiate_classes(parser.parse_args(["--config", str(tmp_path / "data.yaml")])).data
    assert (images.strength, images.evaluation, images.counts["val"]) == (0.3, "centre_crop", 0)
    images.setup()
    assert images.val_dataloader() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "embedded:birds"}, "embedded images 'birds' do not exist; there is objects"),
        ({"images": "nowhere"}, "'nowhere' is no folder; the embedded set is embedded:objects"),
        ({"images": "cub:nowhere"}, "'nowhere' is no folder"),
        ({"image_root": "here"}, "image_root='here' is for images in files"),
        ({"images": "nowhere", "strength": 0.3}, "strength=0.3 is for embedded:objects"),
        ({"images": "nowhere", "background_correlation": 0.3}, "background_correlation=0.3 is for embedded:objects"),
        ({"strength": 1.5}, r"strength must be in \[0, 1\], got 1.5"),
        ({"background_correlation": -0.1}, r"background_correlation must be in \[0, 1\]"),
        ({"train_count": 0}, "train_count must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"evaluation": "ten_crop"}, "evaluation must be one of whole, centre_crop"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ready(**options)


def test_it_says_once_what_it_holds(announced: list[str]) -> None:
    images = ready()
    images.setup("test")
    assert announced == [
        "LocalizationSet(embedded:objects): 24 train, 4 val, 40 test images of 3 x 64 x 64, 4 classes, "
        "with boxes and masks"
    ]
    with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
        LocalizationSet().train_dataloader()
