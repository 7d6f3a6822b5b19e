from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from lightning_entropy.data import convert_bags
from lightning_entropy.data.folder_bags import open_bags
from lightning_entropy.data.rows import ContiguousRows
from tests.data.bag_folders import LAYOUTS, arrays, write


@pytest.mark.parametrize("target", ["h5", "npy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_converted_bags_hold_the_same_numbers_plainly(tmp_path: Path, layout: str, target: str) -> None:
    slides = arrays()
    options = {"chunks": True, "compression": "gzip"} if layout in ("h5", "stamp", "aem") else {}
    source = write(tmp_path / "bags", layout, slides, **options)
    done = convert_bags(source, tmp_path / "plain", layout=target)
    assert [path.name for path in done.written] == [f"{name}.{target}" for name in slides]
    bags = open_bags(tmp_path / "plain")
    for index, (features, coords) in enumerate(slides.values()):
        assert isinstance(bags.files[index].features, ContiguousRows)
        bag = bags.read(index)
        np.testing.assert_array_equal(bag.features.numpy(), features)
        if layout != "pt":
            assert bag.coords is not None
            np.testing.assert_array_equal(bag.coords.numpy(), coords)


def test_it_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    slides = arrays()
    source = write(tmp_path / "bags", "h5", slides, chunks=True)
    convert_bags(source, tmp_path / "plain")
    (tmp_path / "plain" / "s2.h5").unlink()
    (tmp_path / "plain" / "s3.h5").write_bytes(b"half")
    done = convert_bags(source, tmp_path / "plain")
    assert [path.name for path in done.written] == ["s2.h5", "s3.h5"]
    assert len(done.kept) == 4
    np.testing.assert_array_equal(
        open_bags(tmp_path / "plain", check_values=False).read(3).features.numpy(), slides["s3"][0]
    )
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == [f"s{n}.h5" for n in range(6)]


def test_precision_attributes_and_instance_labels(tmp_path: Path) -> None:
    (tmp_path / "bags").mkdir()
    with h5py.File(tmp_path / "bags" / "a.h5", "w") as file:
        file.create_dataset("features", data=np.full((4, 3), 1.5, np.float32), chunks=True)
        file.create_dataset("coords", data=np.arange(8).reshape(4, 2)).attrs["patch_size"] = 256
        file["instance_labels"] = np.array([0, 1, 0, 1])
        file.attrs["encoder"] = "test"
    convert_bags(tmp_path / "bags", tmp_path / "half", dtype="float16")
    with h5py.File(tmp_path / "half" / "a.h5") as file:
        assert file["features"].dtype == np.float16
        assert file["coords"].dtype == np.int64
        assert file["coords"].attrs["patch_size"] == 256
        assert file.attrs["encoder"] == "test"
        np.testing.assert_array_equal(file["instance_labels"], [0, 1, 0, 1])
    torch.save(torch.ones(3, 2, dtype=torch.bfloat16), tmp_path / "b.pt")
    (tmp_path / "pt").mkdir()
    (tmp_path / "b.pt").rename(tmp_path / "pt" / "b.pt")
    convert_bags(tmp_path / "pt", tmp_path / "full", layout="npy")
    assert np.load(tmp_path / "full" / "b.npy").dtype == np.float32


def test_what_cannot_be_converted_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "bags", "npz", arrays(3))
    np.savez(source / "s1.npz", features=np.full((2, 8), 1e6, np.float32))
    (source / "s2.npz").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"(?s)2 problems.*s1.npz: holds 1e\+06, and float16.*s2.npz: cannot be read"):
        convert_bags(source, tmp_path / "half", dtype="float16")
    assert [path.name for path in (tmp_path / "half").iterdir()] == ["s0.h5"]
    for options, message in (
        ({"layout": "pt"}, "layout must be one of h5, npy"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"target": source}, "is the source"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_bags(source, options.pop("target", tmp_path / "x"), **options)  # type: ignore[arg-type]
