"""A full disk, and a folder that cannot be written: what was there stays, and the message names the file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_entropy.files import atomic_write
from lightning_entropy.recipes import comparison as comparison_module
from lightning_entropy.recipes.run_record import read_record
from lightning_entropy.surgery import inject_lora
from lightning_entropy.surgery.lora_files import save_adapter
from lightning_entropy.surgery.report import Refusal
from lightning_entropy.surgery.selection import ScoredWeight, Selection
from tests.faults.small_runs import command, comparison, contents, no_file_beyond, state

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE"),
    pytest.mark.filterwarnings("ignore:.*The dirpath has changed.*"),
]


def selection(rows: int) -> Selection:
    scored = [
        ScoredWeight(f"layer.{i}.weight", f"layer.{i}", 1.0 + i, 0.0, True, 1.0 + i, (8, 8), 64, chosen=i < 3)
        for i in range(rows)
    ]
    return Selection(by="condition", rows=scored, skipped=[Refusal("head", "it is the head")], budget=3)


def test_a_full_disk_names_the_file_and_leaves_the_former(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    target.write_text("former")

    def write() -> None:
        with no_file_beyond(1000), atomic_write(target) as part:
            part.write_text("x" * 5000)

    with pytest.raises(OSError, match=r"result\.json"):
        write()
    assert contents(tmp_path) == {"result.json": b"former"}


def adapter(folder: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    inject_lora(model, "0", rank=32)
    save_adapter(model, folder)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "selection": lambda folder: selection(60).save(folder / "selection.json"),
    "adapter": adapter,
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_saved_by_hand_is_whole_or_as_before(tmp_path: Path, name: str) -> None:
    pytest.importorskip("peft")
    WRITERS[name](tmp_path)
    before = contents(tmp_path)
    with no_file_beyond(3000), pytest.raises(OSError, match=r"selection\.json|adapter_model\.safetensors"):
        WRITERS[name](tmp_path)
    assert contents(tmp_path) == before


def test_fit_on_a_full_disk_keeps_its_checkpoints_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("fit", root=tmp_path, epochs=1) == 0
    before = {name: content for name, content in contents(tmp_path).items() if name.endswith(".ckpt")}
    assert len(before) == 2
    capsys.readouterr()
    with no_file_beyond(2500):
        assert command("fit", "--ckpt_path", "last", root=tmp_path) == 1
    said = capsys.readouterr().err
    assert "Make room" in said
    assert "--ckpt_path last" in said
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert command("fit", "--ckpt_path", "last", root=tmp_path) == 0
    assert state(str(tmp_path))["epoch"] == 2


def test_a_comparison_on_a_full_disk_keeps_its_runs_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = comparison_module.train_and_test

    def big(*arguments: Any, **options: Any) -> dict[str, Any]:
        return {**original(*arguments, **options), "curves": {"x": [0.5] * 100_000}}

    comparison(tmp_path, seeds=[0])
    before = contents(tmp_path)
    with monkeypatch.context() as patch, no_file_beyond(300_000):
        patch.setattr(comparison_module, "train_and_test", big)
        with pytest.raises(OSError, match=r"runs/off-seed1\.json"):
            comparison(tmp_path)
    assert contents(tmp_path) == before
    comparison(tmp_path)
    assert all(read_record(path) for path in (tmp_path / "runs").iterdir())
    assert len(contents(tmp_path / "runs")) == 4


@pytest.fixture
def unwritable(tmp_path: Path) -> Path:
    """Below a file no folder can be made, whoever asks: permissions do not bind root."""
    (tmp_path / "file").write_text("mine")
    return tmp_path / "file" / "out"


def test_a_comparison_knows_before_training(unwritable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trains(job: Any) -> Path:
        raise AssertionError("trained for a folder that cannot be written")

    monkeypatch.setattr(comparison_module, "run_job", trains)
    with pytest.raises(OSError, match=str(unwritable)):
        comparison(unwritable)
    assert unwritable.parent.read_text() == "mine"


def test_fit_says_where_it_cannot_write(unwritable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("fit", root=unwritable) == 1
    said = capsys.readouterr().err
    assert str(unwritable) in said
    assert "--trainer.default_root_dir" in said
    assert unwritable.parent.read_text() == "mine"
