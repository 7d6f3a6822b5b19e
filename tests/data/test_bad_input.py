from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from lightning_entropy.data import SlideBags
from lightning_entropy.data.value_check import VERDICTS, not_finite
from tests.data.bag_folders import LAYOUTS, arrays, table, write


def _open(folder: Path, **options: object) -> SlideBags:
    bags = SlideBags(str(folder / "bags"), str(folder / "slides.csv"), **options)  # type: ignore[arg-type]
    bags.setup("fit")
    return bags


def _bags(folder: Path, layout: str = "h5") -> Path:
    slides = arrays(10)
    write(folder / "bags", layout, slides)
    table(folder / "slides.csv", list(slides))
    return folder / "bags"


def _missing(bags: Path) -> None:
    (bags / "s3.h5").unlink()


def _with_nan(bags: Path) -> None:
    with h5py.File(bags / "s3.h5", "r+") as file:
        file["features"][7, 2] = np.nan


def _with_inf(bags: Path) -> None:
    with h5py.File(bags / "s3.h5", "r+") as file:
        file["features"][1:3, 0] = np.inf


def _empty(bags: Path, shape: tuple[int, ...] = (0, 8)) -> None:
    with h5py.File(bags / "s3.h5", "w") as file:
        file["features"] = np.zeros(shape, np.float32)
        file["coords"] = np.zeros((0,) if len(shape) == 1 else (0, 2))


def _no_shape(bags: Path) -> None:
    _empty(bags, (0,))


def _wide(bags: Path) -> None:
    with h5py.File(bags / "s3.h5", "w") as file:
        file["features"] = np.zeros((4, 9), np.float32)


def _other_rows(bags: Path) -> None:
    with h5py.File(bags / "s3.h5", "w") as file:
        file["features"] = np.zeros((4, 8), np.float32)
        file["coords"] = np.zeros((3, 2))


def _text(bags: Path) -> None:
    with h5py.File(bags / "s3.h5", "w") as file:
        file["features"] = np.array([[b"a", b"b"]])


def _other_key(bags: Path) -> None:
    with h5py.File(bags / "s3.h5", "w") as file:
        file["embedding"] = np.zeros((4, 8))


def _flat(bags: Path) -> None:
    with h5py.File(bags / "s3.h5", "w") as file:
        file["features"] = np.zeros((4,))


def _rubbish(bags: Path) -> None:
    (bags / "s3.h5").write_bytes(b"no HDF5 at all")


def _cut(bags: Path) -> None:
    content = (bags / "s3.h5").read_bytes()
    (bags / "s3.h5").write_bytes(content[: len(content) // 2])


FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing slide": (_missing, "no such file"),
    "NaN": (_with_nan, "feature 2 of instance 7 is nan"),
    "infinite": (_with_inf, r"feature 0 of instance 1 is inf \(and in 1 more"),
    "empty": (_empty, "no instances; on_empty='skip'"),
    "empty without width": (_no_shape, "no instances"),
    "other width": (_wide, "9 features, 9 other slides have 8"),
    "coords of other length": (_other_rows, "coords is 3 x 2, expected 4 x 2"),
    "not numbers": (_text, "not numbers"),
    "other key": (_other_key, r"holds \['embedding'\], expected features"),
    "one axis": (_flat, r"shape \(4,\), expected \(N, D\)"),
    "not HDF5": (_rubbish, "cannot be read as h5"),
    "truncated": (_cut, "cannot be read as h5: .*truncated"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_named_with_its_row(tmp_path: Path, case: str) -> None:
    damage, message = FILES[case]
    damage(_bags(tmp_path))
    with pytest.raises(ValueError, match=rf"slides.csv row 5 \(slide s3\): .*bags/s3.h5: .*{message}") as caught:
        _open(tmp_path)
    assert "1 problem\n" in str(caught.value)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "aem"])
def test_a_cut_file_of_any_layout_is_named(tmp_path: Path, layout: str) -> None:
    bags = _bags(tmp_path, layout)
    path = next(path for path in bags.iterdir() if path.name.startswith("s3.") and "coords" not in path.name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(ValueError, match=r"slides.csv row 5 \(slide s3\): .*s3"):
        _open(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_seen_in_every_precision(dtype: torch.dtype, value: float) -> None:
    block = torch.randn(5, 4).to(dtype)
    block[0, 0] = torch.finfo(dtype).max
    assert not_finite(block) is None
    block[3, 2] = value
    bad = not_finite(block)
    assert bad is not None
    assert bad.nonzero().tolist() == [[3, 2]]


def test_a_pt_file_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Danger:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "was_here"),)

    bags = _bags(tmp_path, "pt")
    torch.save(Danger(), bags / "s3.pt")
    torch.save({"features": torch.zeros(2, 8)}, bags / "s4.pt")
    with pytest.raises(
        ValueError, match=r"(?s)row 5 .*s3.pt: cannot be read.*row 6 .*holds a dict with \['features'\]"
    ):
        _open(tmp_path)
    assert not (tmp_path / "was_here").exists()


def test_empty_slides_can_be_left_out(tmp_path: Path) -> None:
    _empty(_bags(tmp_path))
    bags = _open(tmp_path, on_empty="skip")
    assert len(bags.source.slides) == 9
    assert "s3" not in bags.source.slides


TABLES = {
    "no label column": ("slide,diagnosis", ["s0,1"], r"row 1: no column 'label' among .*label_column"),
    "close name": ("slide_id,label", ["s0,1"], r"did you mean slide_column='slide_id'"),
    "column twice": ("slide,label,label", ["s0,1,1"], "column 'label' is there 2 times"),
    "duplicate slide": ("slide,label", ["s0,0", "s1,1", "s0,0"], "row 4: slide s0 is also in row 2"),
    "short row": ("slide,label", ["s0,0", "s1"], "row 3: 1 values, the header has 2"),
    "no label": ("slide,label", ["s0,0", "s1,"], "row 3: nothing in column label"),
    "unknown split": ("slide,label,split", ["s0,0,train", "s1,1,tset"], r"row 3 \(slide s1\): split 'tset'"),
    "fold is no number": ("slide,label,fold", ["s0,0,0", "s1,1,a"], r"row 3 \(slide s1\): fold 'a'"),
    "patient in two splits": (
        "slide,label,patient,split",
        ["s0,0,p,train", "s1,1,q,test", "s2,0,p,test"],
        r"row 4 \(slide s2\): patient p is in split test, and in split train by row 2",
    ),
    "patient in two folds": (
        "slide,label,patient,fold",
        ["s0,0,p,0", "s1,1,q,1", "s2,0,p,1"],
        r"row 4 \(slide s2\): patient p is in fold 1, and in fold 0 by row 2",
    ),
    "one class": ("slide,label", ["s0,0", "s1,0"], "all 2 slides have the label '0'"),
    "no rows": ("slide,label", [], "a header and no rows"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_bad_table_is_named_with_its_row(tmp_path: Path, case: str) -> None:
    header, rows, message = TABLES[case]
    _bags(tmp_path)
    table(tmp_path / "slides.csv", [], header=header, rows=rows)
    with pytest.raises(ValueError, match=rf"slides.csv.*{message}"):
        _open(tmp_path)


def test_an_unknown_label_is_named(tmp_path: Path) -> None:
    _bags(tmp_path)
    table(tmp_path / "slides.csv", [], rows=["s0,benign", "s1,tumor", "s2,tumour"])
    with pytest.raises(ValueError, match=r"row 4 \(slide s2\): label 'tumour' is not one of \['benign', 'tumor'\]"):
        _open(tmp_path, classes=["benign", "tumor"])


def test_everything_is_reported_together_up_to_twenty(tmp_path: Path) -> None:
    bags = _bags(tmp_path)
    _wide(bags)
    (bags / "s5.h5").write_bytes(b"")
    rows = [f"s{n},{n % 2}" for n in range(10)] + [f"absent{n},1" for n in range(30)]
    table(tmp_path / "slides.csv", [], rows=rows)
    with pytest.raises(ValueError, match="32 problems") as caught:
        _open(tmp_path)
    text = str(caught.value)
    assert text.count("\n") == 21
    assert "row 7 (slide s5)" in text
    assert text.endswith("... and 12 more")


def test_a_table_and_a_folder_that_do_not_exist(tmp_path: Path) -> None:
    _bags(tmp_path)
    (tmp_path / "slides.csv").unlink()
    with pytest.raises(ValueError, match="no such table"):
        _open(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder or file of features"):
        SlideBags(str(tmp_path / "none"), str(tmp_path / "slides.csv")).setup()


def test_values_are_read_once_and_again_when_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning_entropy.data.value_check as value_check

    bags = _bags(tmp_path)
    looked: list[str] = []
    original = value_check.find_not_finite

    def noting(bag: value_check.BagFile) -> str | None:
        looked.append(bag.path.name)
        return original(bag)

    monkeypatch.setattr(value_check, "find_not_finite", noting)
    _open(tmp_path)
    assert len(looked) == 10
    assert len(json.loads((bags / VERDICTS).read_text())["finite"]) == 10
    _open(tmp_path)
    assert len(looked) == 10
    _with_nan(bags)
    os.utime(bags / "s3.h5", ns=(1, 1))
    for _ in range(2):  # a finding is never remembered as good
        with pytest.raises(ValueError, match="instance 7 is nan"):
            _open(tmp_path)
    assert looked[10:] == ["s3.h5", "s3.h5"]
    (bags / VERDICTS).write_text("not json")
    with pytest.raises(ValueError, match="instance 7 is nan"):
        _open(tmp_path)
    assert len(looked) == 22


def test_headers_only_does_not_read_values(tmp_path: Path) -> None:
    bags = _bags(tmp_path)
    _with_nan(bags)
    _open(tmp_path, check="headers")
    assert not (bags / VERDICTS).exists()


def test_bad_values_in_the_one_file_name_the_group(tmp_path: Path) -> None:
    path = write(tmp_path, "aem", arrays(10))
    with h5py.File(path, "r+") as file:
        file["s4/feat"][2, 1] = np.nan
        del file["s6"].attrs["label"]
    with pytest.raises(ValueError, match=r"all\.h5 group s6: no attribute label"):
        SlideBags(str(path)).setup("fit")
    with h5py.File(path, "r+") as file:
        file["s6"].attrs["label"] = 0
    with pytest.raises(ValueError, match=r"all\.h5 group s4: feature 1 of instance 2 is nan"):
        SlideBags(str(path)).setup("fit")
