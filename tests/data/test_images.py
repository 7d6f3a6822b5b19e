from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from lightning_entropy import ImageSet


def ready(*arguments: str, **options: Any) -> ImageSet:
    images = ImageSet(*arguments, **options)
    images.setup()
    return images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images of two classes, the first column of pixels brighter in the second class."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for i in range(6):
            pixels = np.full((12, 20, 3), 40 * i, dtype=np.uint8)
            pixels[:, 10] = 255 * label
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_digits_are_those_of_scikit_learn() -> None:
    images, found = ready(), load_digits()
    assert (images.in_channels, images.image_size, images.num_classes) == (1, 8, 10)
    assert [len(images.train), len(images.val), len(images.test)] == [1169, 269, 359]
    assert sorted(images.train.indices + images.val.indices + images.test.indices) == list(range(1797))
    for position in (0, 100):
        sample, index = images.test[position], images.test.indices[position]
        np.testing.assert_array_equal(sample["image"][0].numpy(), found.images[index].astype(np.float32) / 8 - 1)
        assert sample["label"] == found.target[index]
        assert sample["name"] == f"digits/{index:04d}"
    for split in (images.val, images.test):  # stratified: about as many of each class
        counts = Counter(split.labels)
        assert len(counts) == 10
        assert max(counts.values()) - min(counts.values()) <= 3


def test_splits_depend_on_the_seed_and_on_nothing_else() -> None:
    torch.manual_seed(1)
    one, same, other = ready(seed=3), ready(seed=3, batch_size=7), ready(seed=4)
    assert one.train.indices == same.train.indices
    assert one.val.indices == same.val.indices
    assert one.test.indices != other.test.indices


def test_folds_cover_all_images_once() -> None:
    tests = [ready(fold=fold, folds=5, val_fraction=0.0) for fold in range(5)]
    assert sorted(i for images in tests for i in images.test.indices) == list(range(1797))
    assert tests[0].val_dataloader() == []
    assert set(tests[0].train.indices).isdisjoint(tests[0].test.indices)


def test_batches_and_their_order() -> None:
    images = ready(batch_size=32)
    loader = images.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 1169 // 32
    assert batches[0]["image"].shape == (32, 1, 8, 8)
    assert batches[0]["image"].dtype == torch.float32
    assert batches[0]["label"].dtype == torch.int64
    before = torch.get_rng_state()
    again = list(images.train_dataloader())
    assert torch.equal(before, torch.get_rng_state())  # the training's random numbers are its own
    assert all(a["name"] == b["name"] for a, b in zip(batches, again))
    loader.sampler.set_epoch(1)  # type: ignore[attr-defined]
    assert next(iter(loader))["name"] != batches[0]["name"]
    assert sum(len(batch["label"]) for batch in images.test_dataloader()) == 359
    assert sum(len(batch["label"]) for batch in images.predict_dataloader()) == 1797
    whole = ready(batch_size=5000).train_dataloader()
    assert [len(batch["label"]) for batch in whole] == [1169]  # fewer than a batch are not left out


def test_digits_can_be_brought_to_another_size() -> None:
    images = ready(image_size=16)
    assert images.train[0]["image"].shape == (1, 16, 16)
    assert images.image_size == 16
    assert abs(float(images.train[0]["image"].mean() - ready().train[0]["image"].mean())) < 0.05


def test_folders_of_classes(folder: Path) -> None:
    images = ready(str(folder), image_size=12, val_fraction=0.25, test_fraction=0.25, batch_size=3)
    assert (images.classes, images.in_channels, images.image_size) == (["cat", "dog"], 3, 12)
    for split, count in ((images.train, 6), (images.val, 2), (images.test, 2)):
        assert len(split) >= count
        assert set(split.labels) == {0, 1}
    where = {name: i for i, name in enumerate(images.source.names)}
    cat, dog = (images.source.read(where[f"{name}/3.png"]) for name in ("cat", "dog"))
    assert cat.shape == (3, 12, 12)  # the middle of 12 x 20: columns 4 to 15
    assert float(cat[0, 0, 0]) == pytest.approx(120 / 127.5 - 1, abs=1e-6)
    assert (float(cat[0, 0, 6]), float(dog[0, 0, 6])) == (-1.0, 1.0)


def test_folders_of_splits(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / split).mkdir()
        for name in ("cat", "dog"):
            (folder / split / name).mkdir()
            for i in range(4):
                Image.new("RGB", (8, 8)).save(folder / split / name / f"{i}.png")
    images = ready(str(folder), image_size=8, val_fraction=0.25)
    assert {name.split("/")[0] for name in images.test.names} == {"test"}
    assert {name.split("/")[0] for name in images.train.names + images.val.names} == {"train"}
    assert len(images.val) == 4
    with pytest.raises(ValueError, match=r"fold=0 cannot be used: .* has splits of its own"):
        ready(str(folder), fold=0, folds=2)
    (folder / "test" / "emu").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "test" / "emu" / "0.png")
    with pytest.raises(ValueError, match=r"train has the classes \['cat', 'dog'\], test has"):
        ready(str(folder))


@pytest.mark.parametrize("ten", [True, False])
def test_cifar_as_torchvision_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ten: bool) -> None:
    folders = ("cifar-10-batches-py", "cifar-100-python")
    root, key = tmp_path / folders[not ten], "labels" if ten else "fine_labels"
    generator = np.random.default_rng(0)
    root.mkdir()
    with pytest.raises(ValueError, match=r"is not CIFAR10+ as it was published"):
        ready(str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # checksums of the real files
    names = {"label_names" if ten else "fine_label_names": ["cat", "dog"]}
    (root / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(names))
    pixels = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch") if ten else ("train", "test"):
        pixels[name] = generator.integers(0, 256, (20, 3 * 32 * 32), dtype=np.uint8)
        (root / name).write_bytes(pickle.dumps({"data": pixels[name], key: [0, 1] * 10}))
    images = ready(str(tmp_path), val_fraction=0.1)
    total = 20 * len(pixels)
    assert (images.classes, images.in_channels, images.image_size) == (["cat", "dog"], 3, 32)
    assert (len(images.test), len(images.val)) == (20, round(0.1 * total))
    assert len(images.train) == total - 20 - len(images.val)
    assert images.test.names[3] == "test/00003"
    first = pixels["test_batch" if ten else "test"][3].reshape(3, 32, 32)  # planes of red, green and blue
    assert np.abs(images.test[3]["image"].numpy() - (first / 127.5 - 1)).max() < 1e-6
    assert images.test[3]["label"] == 1
    assert ready(str(tmp_path), image_size=64).test[0]["image"].shape == (3, 64, 64)
    (tmp_path / folders[ten]).mkdir()
    with pytest.raises(ValueError, match="put each into a folder of its own"):
        ready(str(tmp_path))


def test_a_damaged_file_is_named(folder: Path) -> None:
    (folder / "dog" / "0.png").write_bytes(b"no picture")
    images = ready(str(folder), image_size=8)
    with pytest.raises(ValueError, match=r"dog/0\.png cannot be read as an image"):
        images.source.read(images.source.names.index("dog/0.png"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "embedded:cifar"}, "there are digits"),
        ({"images": "nowhere"}, "is no folder; embedded sets are written"),
        ({"images": "."}, "must hold a folder of images for each class"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"fold": 2, "folds": 2}, "fold must be under folds"),
        ({"fold": 2}, "fold must be under folds"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "leave images to train on"),
        ({"fold": 0, "folds": 2, "val_fraction": 0.6}, "leaves no images to train on"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ready(**options)


def test_asking_too_early_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
        ImageSet().train_dataloader()
    with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
        _ = ImageSet().image_size


def test_it_says_once_what_it_holds(announced: list[str]) -> None:
    images = ready()
    images.setup("test")
    assert announced == ["ImageSet(embedded:digits): 1,169 train, 269 val, 359 test images of 1 x 8 x 8, 10 classes"]
