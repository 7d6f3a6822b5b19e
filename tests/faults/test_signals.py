"""SIGTERM, a killed worker and a loss that is NaN: what is finished is kept, and the same command continues."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_entropy.cli import main
from lightning_entropy.recipes import MILClassifier, run_record
from lightning_entropy.recipes.comparison import ComparisonStopped
from lightning_entropy.recipes.run_record import read_record
from tests.faults.small_runs import FEW, command, comparison, contents, state

pytestmark = pytest.mark.filterwarnings("ignore:.*The dirpath has changed.*")


def terminated_in(monkeypatch: pytest.MonkeyPatch, *, step: int) -> None:
    """SIGTERM to this process in one training step, counted from now."""
    original, seen = MILClassifier.training_step, [0]

    def dying(self: MILClassifier, batch: Any, batch_index: int) -> Any:
        seen[0] += 1
        if seen[0] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_index)

    monkeypatch.setattr(MILClassifier, "training_step", dying)


def test_sigterm_while_fitting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("fit", root=tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        terminated_in(patch, step=9)  # of six an epoch
        assert command("fit", root=tmp_path / "cut") == 143
    assert "--ckpt_path last" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert state(str(tmp_path / "cut"))["epoch"] == 0
    assert command("fit", "--ckpt_path", "last", root=tmp_path / "cut") == 0
    whole, resumed = (state(str(tmp_path / name))["state_dict"] for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_while_comparing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    original, seen = run_record.CurveRecorder.on_train_epoch_end, [0]

    def dying(self: Any, *arguments: Any) -> None:
        seen[0] += 1
        if seen[0] == 4:  # the second run's last epoch
            os.kill(os.getpid(), number)
        original(self, *arguments)

    options = json.dumps(FEW)
    arguments = ["compare", "--recipe", "mil_digits", "--vary", "aem=off,constant", "--seeds", "1"]
    arguments += [f"--data.options={options}", "--model.hidden=4", "--trainer.max_epochs=2", "--output", str(tmp_path)]
    # A shell's background job ignores Ctrl-C, and so do the tests in it.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(run_record.CurveRecorder, "on_train_epoch_end", dying)
            assert main(arguments) == 1
    finally:
        signal.signal(signal.SIGINT, interrupt)  # which Lightning has switched off
    assert "the same command continues" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    first = contents(tmp_path)
    assert list(first) == ["runs/off-seed0.json"]
    assert main(arguments) == 0
    after = contents(tmp_path)
    assert after["runs/off-seed0.json"] == first["runs/off-seed0.json"]
    assert "results.json" in after


@pytest.mark.slow
def test_a_killed_worker(tmp_path: Path) -> None:
    """Two processes begin four runs; one is killed as soon as a run is there."""

    def kill() -> None:
        while not done.wait(0.02):
            workers = multiprocessing.active_children()
            if workers and list(tmp_path.glob("runs/*.json")):
                os.kill(workers[0].pid or 0, signal.SIGKILL)
                return

    done = threading.Event()
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(ComparisonStopped, match=r"(?s)killed perhaps for want of memory.*same command continues"):
            comparison(tmp_path, workers=2)
    finally:
        done.set()
        killer.join()
    before = contents(tmp_path / "runs")
    assert 1 <= len(before) < 4
    assert all(read_record(tmp_path / "runs" / name) for name in before)
    assert not multiprocessing.active_children()
    comparison(tmp_path)
    after = contents(tmp_path / "runs")
    assert len(after) == 4
    assert {name: after[name] for name in before} == before


def test_a_comparison_with_runs_that_diverged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is NaN is a result: the run is written, and the table is made of the others."""
    original = MILClassifier.training_step

    def diverges(self: MILClassifier, batch: Any, batch_index: int) -> Any:
        loss = original(self, batch, batch_index)
        bad = any(type(c).__name__.startswith("AttentionEntropy") for c in self.trainer.callbacks)  # type: ignore[attr-defined]
        return loss * float("nan") if bad else loss

    monkeypatch.setattr(MILClassifier, "training_step", diverges)
    found = comparison(tmp_path)
    record = read_record(tmp_path / "runs" / "constant-seed0.json")
    assert record is not None
    assert record["curves"]["train/loss"] == [None, None]
    assert record["metrics"]["loss"] is None
    assert len(found.values("off", "loss")) == 2
    assert "constant" in str(found)
    assert json.loads((tmp_path / "results.json").read_text())
