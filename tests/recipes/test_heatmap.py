from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from lightning_entropy import AttentionEntropyMaximization, MILClassifier, SlideBags
from lightning_entropy.data import slide_region
from lightning_entropy.recipes.attention_map import AttentionMap
from lightning_entropy.recipes.heatmap import run
from lightning_entropy.recipes.slide_features import find_features, patch_size_level0, read_features
from lightning_entropy.recipes.trained_attention import (
    attention_map,
    branch_attention,
    choose_branch,
    load_classifier,
)
from lightning_entropy.training.lightning import Trainer

from .heatmap_cases import grid, parsed, save_checkpoint, write_features, write_pyramid


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "best.ckpt", branches=3)


def test_the_map_is_the_attention_that_predict_step_returns(checkpoint: Path) -> None:
    trained = load_classifier(checkpoint)
    features = torch.randn(40, 8)
    batch = {
        "features": features[None],
        "mask": torch.ones(1, 40, dtype=torch.bool),
        "label": torch.zeros(1, dtype=torch.long),
        "slide": ["s1"],
    }
    with torch.no_grad():
        expected = trained.classifier.predict_step(batch, 0)  # type: ignore[arg-type]
    probabilities, attention = branch_attention(trained, features)
    assert attention.shape == (3, 40)
    np.testing.assert_allclose(attention.sum(axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(choose_branch(attention, "mean"), expected["attention"][0], rtol=1e-5)
    np.testing.assert_allclose(probabilities, expected["probabilities"][0], rtol=1e-6)
    np.testing.assert_array_equal(choose_branch(attention, "2"), attention[2])
    for wrong in ("3", "-1", "all"):
        with pytest.raises(ValueError, match="branch must be 'mean' or 0 to 2"):
            choose_branch(attention, wrong)


def test_nothing_is_left_on_the_model_and_no_gradient_is_kept(checkpoint: Path) -> None:
    trained = load_classifier(checkpoint)
    branch_attention(trained, torch.randn(5, 8))
    for module in trained.classifier.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(p.grad is None for p in trained.classifier.parameters())
    assert not trained.classifier.training


def test_one_tile_gets_all_attention(checkpoint: Path) -> None:
    _, attention = branch_attention(load_classifier(checkpoint), torch.randn(1, 8))
    np.testing.assert_array_equal(attention, [[1.0]])


def test_features_are_standardized_as_in_training(checkpoint: Path, tmp_path: Path) -> None:
    stored = torch.load(checkpoint, weights_only=True)
    stored["SlideBags"] = {"mean": torch.full((8,), 2.0), "std": torch.full((8,), 4.0)}
    torch.save(stored, tmp_path / "standardized.ckpt")
    features = torch.randn(20, 8)
    _, plain = branch_attention(load_classifier(checkpoint), features)
    _, shifted = branch_attention(load_classifier(tmp_path / "standardized.ckpt"), features * 4 + 2)
    np.testing.assert_allclose(shifted, plain, rtol=1e-4)


def test_checkpoints_that_cannot_be_used_are_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt does not exist"):
        load_classifier(tmp_path / "none.ckpt")
    (tmp_path / "text.ckpt").write_text("text")
    with pytest.raises(ValueError, match=r"text\.ckpt cannot be read"):
        load_classifier(tmp_path / "text.ckpt")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"foreign\.ckpt is no checkpoint of a Trainer.*weights"):
        load_classifier(tmp_path / "foreign.ckpt")
    stored = torch.load(checkpoint, weights_only=True)
    stored["hyper_parameters"]["branches"] = 2
    torch.save(stored, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt is no checkpoint of MILClassifier"):
        load_classifier(tmp_path / "other.ckpt")
    mean = save_checkpoint(tmp_path / "mean.ckpt", pooling="mean")
    with pytest.raises(ValueError, match=r"mean\.ckpt pools by the mean"):
        branch_attention(load_classifier(mean), torch.randn(5, 8))
    with pytest.raises(ValueError, match=r"features are 9 wide.*trained on 8"):
        branch_attention(load_classifier(checkpoint), torch.randn(5, 9))


def test_the_patch_size_is_taken_from_the_best_source() -> None:
    coords = grid(5, 4, 100)
    cases = [
        ({"patch_size_level0": 512, "patch_size": 256}, {}, (512, "attribute patch_size_level0")),
        ({"patch_size": 256, "patch_level": 0}, {}, (256, "attribute patch_size, level 0")),
        (
            {"patch_size": 256, "patch_level": 1, "downsample": [4.0, 4.0]},
            {},
            (1024, "attribute patch_size, downsample 4"),
        ),
        (
            {"patch_size": 256, "patch_level": 1},
            {"level_downsamples": (1.0, 2.0)},
            (512, "attribute patch_size, downsample 2 of the slide's level 1"),
        ),
        (
            {"patch_size": 256, "level0_magnification": 40, "target_magnification": 20},
            {},
            (512, "attribute patch_size, magnification ratio 2"),
        ),
        ({"tile_size_um": 256.0}, {"mpp": 0.5}, (512, "attribute tile_size_um")),
        ({"patch_size": 256, "patch_level": 1}, {}, (100, "grid of the coordinates (step 100)")),
        ({}, {}, (100, "grid of the coordinates (step 100)")),
        ({"patch_size_level0": 512}, {"given": 7}, (7, "argument")),
    ]
    for attributes, arguments, expected in cases:
        assert patch_size_level0(attributes, coords, **arguments) == expected  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pass patch_size"):
        patch_size_level0({}, np.array([[0, 0], [7, 9]]))
    with pytest.raises(ValueError, match="at least 1"):
        patch_size_level0({}, coords, given=0)


def test_features_are_found_in_every_layout(tmp_path: Path) -> None:
    coords = grid(6, 5, 100)
    clam = tmp_path / "clam"
    clam.mkdir()
    write_features(clam / "b.h5", coords, patch_size=100, patch_level=0)
    write_features(clam / "a.h5", coords, patch_size=100, patch_level=0)
    assert [f.slide for f in find_features([clam])] == ["a", "b"]
    assert [f.layout for f in find_features([clam / "b.h5", clam / "a.h5"])] == ["h5", "h5"]
    stamp = write_features(tmp_path / "stamp.h5", coords * 0.25, key="feats", unit="um", tile_size_um=25.0)
    (file,) = find_features([stamp])
    assert file.layout == "stamp"
    tiles = read_features(file, mpp=0.25)
    np.testing.assert_array_equal(tiles.coords, coords)
    assert tiles.patch_size_level0 == 100
    with pytest.raises(ValueError, match=r"stamp\.h5: coordinates are micrometres"):
        read_features(file)
    with h5py.File(tmp_path / "aem.h5", "w") as one:
        for slide in ("s1", "s2"):
            one[f"{slide}/feat"] = np.zeros((30, 8), dtype=np.float32)
            one[f"{slide}/coords"] = coords
            one[slide].attrs["label"] = 0
    found = find_features([tmp_path / "aem.h5"])
    assert [(f.slide, f.group, f.layout) for f in found] == [("s1", "s1", "aem"), ("s2", "s2", "aem")]
    assert read_features(found[1]).patch_size_level0 == 100
    np.savez(tmp_path / "n.npz", features=np.zeros((30, 8), dtype=np.float32), coords=coords)
    assert len(read_features(find_features([tmp_path / "n.npz"])[0]).features) == 30


def test_features_that_cannot_be_placed_are_named(tmp_path: Path) -> None:
    torch.save(torch.zeros(30, 8), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: no coords.*h5_files"):
        read_features(find_features([tmp_path / "a.pt"])[0])
    without = write_features(tmp_path / "b.h5", None)
    with pytest.raises(ValueError, match=r"b\.h5: no coords"):
        read_features(find_features([without])[0])
    (tmp_path / "c.h5").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"c\.h5 cannot be read as HDF5"):
        find_features([tmp_path / "c.h5"])
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["other"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"d\.h5 holds \['other'\]"):
        find_features([tmp_path / "d.h5"])
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file["features"] = np.zeros((0, 8), dtype=np.float32)
        file["coords"] = np.zeros((0, 2), dtype=np.int64)
    with pytest.raises(ValueError, match=r"e\.h5: no tiles"):
        read_features(find_features([tmp_path / "e.h5"])[0])
    (tmp_path / "f.csv").write_text("a")
    with pytest.raises(ValueError, match=r"f\.csv: features are"):
        find_features([tmp_path / "f.csv"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_features([tmp_path / "nowhere"])


def test_a_folder_is_drawn_over_the_slides_that_are_there(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features, slides = tmp_path / "features", tmp_path / "slides"
    features.mkdir()
    slides.mkdir()
    for name in ("s1", "s2"):
        write_features(features / f"{name}.h5", grid(4, 4, 256), patch_size=256, patch_level=0)
    write_features(features / "s3.h5", None)
    write_pyramid(slides / "s1.tif", np.full((1024, 1024, 3), 200, dtype=np.uint8), levels=1)
    words = ["--checkpoint", checkpoint, "--features", features, "--slide", slides, "--output", tmp_path / "out"]
    with pytest.raises(ValueError, match=r"1 of 3 slides could not be drawn:\n  s3: .*s3\.h5: no coords"):
        run(parsed(*words, "--scale", "log"))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    kinds = ("geojson", "h5", "json", "log.png")
    assert names == [f"{slide}.attention.{kind}" for slide in ("s1", "s2") for kind in kinds]
    assert "tile size in level-0 pixels: 256 (attribute patch_size, level 0)" in capsys.readouterr().out


def test_two_checkpoints_are_compared_and_one_is_not_with_itself(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "aem").mkdir()
    other = save_checkpoint(tmp_path / "aem" / "best.ckpt")
    features = write_features(tmp_path / "s1.h5", grid(6, 5, 100))
    words = ["--checkpoint", checkpoint, "--features", features, "--output", tmp_path / "out", "--device", "cpu"]
    written = run(parsed(*words, "--compare", other, "--scale", "linear", "--patch-size", 90))
    assert [path.name for path in written] == [
        "s1.attention.linear.png",
        "s1.attention.geojson",
        "s1.attention.h5",
        "s1.attention.json",
        "s1.attention.compare.geojson",
        "s1.attention.compare.h5",
        "s1.attention.compare.json",
    ]
    assert all(path.stat().st_size > 0 for path in written)
    first, second = (AttentionMap.from_h5(p) for p in (written[2], written[5]))
    assert first.patch_size_level0 == second.patch_size_level0 == 90
    assert not np.array_equal(first.attention, second.attention)
    with pytest.raises(ValueError, match="same checkpoint"):
        run(parsed(*words, "--compare", checkpoint))
    slide = tmp_path / "s.tif"
    write_pyramid(slide, np.zeros((256, 256, 3), dtype=np.uint8), levels=1)
    with pytest.raises(ValueError, match="is one slide and there are 2"):
        run(parsed(*words[:2], "--features", features, features, "--slide", slide))
    with pytest.raises(FileNotFoundError, match=r"none\.svs"):
        run(parsed(*words, "--slide", tmp_path / "none.svs"))


def test_the_real_region_from_training_to_files(tmp_path: Path) -> None:
    region = slide_region()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[AttentionEntropyMaximization(weight=0.1)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(MILClassifier(hidden=16), SlideBags("embedded:slide"))
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    words = ["--checkpoint", tmp_path / "best.ckpt", "--slide", region.svs, "--features", region.features]
    written = run(parsed(*words, "--output", tmp_path / "out", "--device", "cpu"))
    stem = f"{region.features.stem}.attention"
    kinds = ("linear.png", "log.png", "geojson", "h5", "json")
    assert [path.name for path in written] == [f"{stem}.{kind}" for kind in kinds]
    with h5py.File(region.features, "r") as file, h5py.File(written[3], "r") as drawn:
        np.testing.assert_array_equal(drawn["coords"], file["coords"])
        assert drawn["coords"].attrs["patch_size"] == file["coords"].attrs["patch_size"] == 112
        assert drawn["attention"].attrs["weight"] == 0.1
        assert drawn["attention"].attrs["checkpoint"] == "best.ckpt"
    summary = json.loads(written[4].read_text())
    assert summary["tiles"] == 183
    assert summary["patch_size_level0"] == 112
    assert sum(summary["attributes"]["probabilities"]) == pytest.approx(1.0)
    assert 0 < summary["normalized_entropy"] <= 1
    trained = load_classifier(tmp_path / "best.ckpt")
    tiles = read_features(find_features([region.features])[0])
    again = attention_map(trained, tiles, slide="s")
    np.testing.assert_array_equal(again.attention, AttentionMap.from_h5(written[3]).attention)
    assert len(json.loads(written[2].read_text())["features"]) == 183
