from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from lightning_entropy.data.bag_files import open_bag_file
from lightning_entropy.data.bag_layout import find_layout
from lightning_entropy.data.folder_bags import open_bags
from lightning_entropy.data.gather import gather
from lightning_entropy.data.h5_rows import ChunkedRows, H5Handles
from lightning_entropy.data.problems import BagFileError
from lightning_entropy.data.rows import ContiguousRows, WholeRows
from tests.data.bag_folders import LAYOUTS, arrays, table, write

ROWS = np.array([0, 2, 3, 7, 11, 12, 19])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_found_and_read_back(tmp_path: Path, layout: str) -> None:
    slides = arrays()
    features = write(tmp_path / "bags", layout, slides)
    source = open_bags(features, table=table(tmp_path / "slides.csv", list(slides)))
    assert source.slides == list(slides)
    assert source.in_features == 8
    assert source.labels == [0, 1, 0, 1, 0, 1]
    for index, (expected, coords) in enumerate(slides.values()):
        bag = source.read(index)
        assert bag.features.dtype == torch.float32
        np.testing.assert_array_equal(bag.features.numpy(), expected)
        some = source.read(index, np.array([1, 3, 4]))
        np.testing.assert_array_equal(some.features.numpy(), expected[[1, 3, 4]])
        if layout == "pt":
            assert bag.coords is None
        else:
            np.testing.assert_array_equal(bag.coords.numpy(), coords)
            np.testing.assert_array_equal(some.coords.numpy(), coords[[1, 3, 4]])


STORAGE = {
    "contiguous": ({}, ContiguousRows),
    "a chunk a row": ({"chunks": (1, 10)}, ChunkedRows),
    "tiles that do not divide": ({"chunks": (7, 4)}, ChunkedRows),
    "gzip": ({"chunks": (6, 10), "compression": "gzip"}, ChunkedRows),
    "gzip and shuffle": ({"chunks": (4, 3), "compression": "gzip", "shuffle": True}, ChunkedRows),
    "big endian": ({"dtype": ">f4"}, ContiguousRows),
}


@pytest.mark.parametrize("leading", [False, True])
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("userblock", [0, 512])
def test_hdf5_rows_equal_those_of_h5py(tmp_path: Path, storage: str, leading: bool, userblock: int) -> None:
    options, kind = STORAGE[storage]
    options = dict(options)
    values = np.random.default_rng(0).normal(size=(20, 10)).astype(np.float32)
    if leading and "chunks" in options:
        options["chunks"] = (1, *options["chunks"])
    with h5py.File(tmp_path / "s.h5", "w", userblock_size=userblock) as file:
        file.create_dataset("features", data=values[None] if leading else values, **options)
        file.create_dataset("instance_labels", data=np.arange(20) % 2)
    bag = open_bag_file(tmp_path / "s.h5", layout="h5", handles=H5Handles())
    assert isinstance(bag.features, kind)
    for rows in (None, ROWS, np.arange(3, 9), np.array([19]), np.array([], dtype=np.int64)):
        wanted = slice(None) if rows is None else rows
        got = bag.read(rows)
        np.testing.assert_array_equal(got.features.numpy(), values[wanted])
        np.testing.assert_array_equal(got.instance_labels.numpy(), (np.arange(20) % 2)[wanted])


def test_a_chunk_that_was_never_written_reads_as_its_fill_value(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "s.h5", "w") as file:
        data = file.create_dataset("features", (20, 4), "f4", chunks=(5, 4), fillvalue=3)
        data[:5] = 1
    bag = open_bag_file(tmp_path / "s.h5", layout="h5", handles=H5Handles())
    np.testing.assert_array_equal(bag.read(ROWS).features.numpy()[:, 0], np.where(ROWS < 5, 1, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("old", [False, True])
def test_pt_rows(tmp_path: Path, dtype: torch.dtype, old: bool) -> None:
    values = torch.randn(40, 6).to(dtype)
    cases = {
        "plain": values[:20],
        "leading": values[None, :20],
        "view": values[10:30],
        "strided": values.T.contiguous().T[:20],
    }
    for name, tensor in cases.items():
        torch.save(tensor, tmp_path / f"{name}.pt", _use_new_zipfile_serialization=not old)
        bag = open_bag_file(tmp_path / f"{name}.pt", layout="pt", handles=H5Handles())
        assert isinstance(bag.features, WholeRows if old or name == "strided" else ContiguousRows)
        expected = tensor.reshape(20, 6).float()
        assert torch.equal(bag.read().features, expected)
        assert torch.equal(bag.read(ROWS).features, expected[torch.from_numpy(ROWS)])


def test_compressed_npz_is_read_whole(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(1, 20, 6)).astype(np.float16)
    np.savez_compressed(tmp_path / "s.npz", features=values, instance_labels=np.arange(20) % 3 == 0)
    bag = open_bag_file(tmp_path / "s.npz", layout="npz", handles=H5Handles())
    assert isinstance(bag.features, WholeRows)
    got = bag.read(ROWS)
    np.testing.assert_array_equal(got.features.numpy(), values[0, ROWS].astype(np.float32))
    np.testing.assert_array_equal(got.instance_labels.numpy(), ROWS % 3 == 0)


def test_coordinates_in_micrometres_are_rounded(tmp_path: Path) -> None:
    slides = arrays(2)
    write(tmp_path / "bags", "stamp", slides)
    bag = open_bag_file(tmp_path / "bags" / "s1.h5", layout="stamp", handles=H5Handles())
    np.testing.assert_array_equal(bag.read().coords.numpy(), slides["s1"][1])


def test_only_the_asked_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where bytes leave the file: sampling 4 of 1,000 rows takes 4 rows, with either plain storage."""
    import lightning_entropy.data.h5_rows as h5_rows
    import lightning_entropy.data.rows as rows_module

    taken: list[int] = []

    def counting(path: Path, offsets: np.ndarray, *, length: int) -> np.ndarray:
        taken.append(len(offsets) * length)
        return gather(path, offsets, length=length)

    values = np.random.default_rng(0).normal(size=(1000, 16)).astype(np.float32)
    for name, options in {"plain": {}, "rows": {"chunks": (1, 16)}, "tiles": {"chunks": (100, 8)}}.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file.create_dataset("features", data=values, **options)
        bag = open_bag_file(tmp_path / f"{name}.h5", layout="h5", handles=H5Handles())
        with monkeypatch.context() as patch:
            patch.setattr(h5_rows, "gather", counting)
            patch.setattr(rows_module, "gather", counting)
            patch.setattr(h5py.Dataset, "__getitem__", None)
            patch.setattr(rows_module, "read_stretch", None)
            got = bag.features.read(np.array([5, 100, 101, 999]))
        np.testing.assert_array_equal(got.numpy(), values[[5, 100, 101, 999]])
    assert taken == [4 * 64, 4 * 64, 4 * 64]


def test_only_chunks_that_hold_an_asked_row_are_decompressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(1000, 16)).astype(np.float32)
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file.create_dataset("features", data=values, chunks=(100, 16), compression="gzip")
    bag = open_bag_file(tmp_path / "s.h5", layout="h5", handles=H5Handles())
    read: list[slice] = []
    original = ChunkedRows._slice

    def noting(self: ChunkedRows, dataset: object, start: int, stop: int) -> np.ndarray:
        read.append(slice(start, stop))
        return original(self, dataset, start, stop)

    monkeypatch.setattr(ChunkedRows, "_slice", noting)
    np.testing.assert_array_equal(bag.read(np.array([5, 130, 131, 999])).features.numpy(), values[[5, 130, 131, 999]])
    assert read == [slice(0, 200), slice(900, 1000)]


def test_gather_across_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_entropy.data.gather.WINDOW_BYTES", 8192)
    content = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8)
    content.tofile(tmp_path / "f")
    for length in (1, 64, 1000, 20_000):
        for offsets in (
            np.arange(0, 100_000 - length, 997),
            np.arange(3, 100_000 - length, length),
            np.array([70_000, 5, 5, 40_001, 100_000 - length]) % (100_001 - length),
        ):
            expected = np.stack([content[o : o + length] for o in offsets])
            np.testing.assert_array_equal(gather(tmp_path / "f", offsets, length=length), expected)
    with pytest.raises(BagFileError, match="truncated"):
        gather(tmp_path / "f", np.array([0, 99_999]), length=2)


def test_a_file_cut_off_while_in_use_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    slides = arrays()
    write(tmp_path / "bags", "npy", slides)
    source = open_bags(tmp_path / "bags", table=table(tmp_path / "t.csv", list(slides)), check_values=False)
    path = tmp_path / "bags" / "s5.npy"
    path.write_bytes(path.read_bytes()[:-40])
    for rows in (None, ROWS):
        with pytest.raises(ValueError, match=r"s5.npy \(slide s5\): .*truncated"):
            source.read(5, rows)


def _read_in_child(source: object, queue: object) -> None:
    queue.put(source.read(1, ROWS[:3]).features.numpy())  # type: ignore[attr-defined]


def test_handles_are_not_carried_into_another_process(tmp_path: Path) -> None:
    slides = arrays()
    features = write(tmp_path / "bags", "h5", slides, chunks=(2, 8), compression="gzip")
    source = open_bags(features, table=table(tmp_path / "t.csv", list(slides)))
    assert not source.handles._files  # nothing is held open, and locked, before it is read
    source.read(1)
    assert source.handles._files
    copy = pickle.loads(pickle.dumps(source))
    assert not copy.handles._files
    np.testing.assert_array_equal(copy.read(1).features.numpy(), slides["s1"][0])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(source, queue))
    child.start()
    np.testing.assert_array_equal(queue.get(timeout=60), slides["s1"][0][ROWS[:3]])
    child.join()
    source.close()


def test_a_clam_folder_is_entered(tmp_path: Path) -> None:
    write(tmp_path / "clam" / "pt_files", "pt", arrays(2))
    assert find_layout(tmp_path / "clam", handles=H5Handles()).layout == "pt"
    write(tmp_path / "clam" / "h5_files", "h5", arrays(2))
    with pytest.raises(ValueError, match="pt_files and h5_files"):
        find_layout(tmp_path / "clam", handles=H5Handles())
    assert find_layout(tmp_path / "clam", layout="h5", handles=H5Handles()).root.name == "h5_files"


def test_layouts_that_cannot_be_told(tmp_path: Path) -> None:
    handles = H5Handles()
    with pytest.raises(FileNotFoundError, match="absent"):
        find_layout(tmp_path / "absent", handles=handles)
    with pytest.raises(ValueError, match="layout must be"):
        find_layout(tmp_path, layout="zarr", handles=handles)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.zarr").touch()
    with pytest.raises(ValueError, match=r"found \['.zarr'\]"):
        find_layout(tmp_path / "a", handles=handles)
    write(tmp_path / "mixed", "pt", arrays(2))
    write(tmp_path / "mixed", "npz", arrays(1))
    with pytest.raises(ValueError, match=r"1 .npz, 2 .pt"):
        find_layout(tmp_path / "mixed", handles=handles)
    (tmp_path / "both").mkdir()
    with h5py.File(tmp_path / "both" / "x.h5", "w") as file:
        file["features"], file["feats"] = np.zeros((2, 2)), np.zeros((2, 2))
    with pytest.raises(ValueError, match="h5 and stamp"):
        find_layout(tmp_path / "both", handles=handles)
    (tmp_path / "none").mkdir()
    with h5py.File(tmp_path / "none" / "x.h5", "w") as file:
        file["embedding"] = np.zeros((2, 2))
    with pytest.raises(ValueError, match=r"x\.h5: embedding"):
        find_layout(tmp_path / "none", handles=handles)
    with pytest.raises(ValueError, match="a group for each slide"):
        find_layout(tmp_path / "none" / "x.h5", handles=handles)


def test_a_slide_is_found_with_its_image_suffix(tmp_path: Path) -> None:
    slides = arrays(2)
    write(tmp_path / "bags", "pt", slides)
    source = open_bags(tmp_path / "bags", table=table(tmp_path / "t.csv", ["s0.svs", "s1.pt"]))
    assert source.slides == ["s0.svs", "s1.pt"]
    np.testing.assert_array_equal(source.read(1).features.numpy(), slides["s1"][0])
