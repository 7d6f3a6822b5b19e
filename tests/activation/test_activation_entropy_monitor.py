"""The monitor: what it logs and writes, when, over processes, and that the run is the run without it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_entropy import ActivationEntropyMonitor
from lightning_entropy.activation import CRReLU
from tests.suite.running import loader, same, trainer, weights
from tests.user_modules import BagClassifier, TokenClassifier, bags


class Net(BagClassifier):
    """A user's module with two activations of its own beside the pooling's."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 64), nn.ReLU(inplace=True), nn.Linear(64, 6), CRReLU(0.1))

    def loss(self, batch):
        return super().loss({**batch, "features": self.body(batch["features"])})


def fit(callbacks: list, folder: Path, module=None, **options):
    torch.manual_seed(3)
    module = Net() if module is None else module
    run = trainer(callbacks, folder, **options)
    run.fit(module, loader(bags()), ckpt_path=options.get("ckpt_path"))
    return module, run


def test_what_is_logged(tmp_path: Path, announced: list[str]) -> None:
    monitor = ActivationEntropyMonitor(every_n_steps=4, samples=1000)
    seen: list[dict] = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    fit([monitor, Keep()], tmp_path, logger=logger, log_every_n_steps=50)
    expected = (
        "ActivationEntropyMonitor: reading 3 activations (pool.score.1, body.*; Tanh, ReLU, CRReLU) every 4 steps"
    )
    assert announced == [expected]
    assert [row["site"] for row in monitor.report.rows] == ["body.1", "body.3", "pool.score.1"]
    assert monitor.report.step == 12
    relu, crrelu, tanh = monitor.report.rows
    assert relu["atom_mass"] > crrelu["atom_mass"] > 0  # padded instances are equal: atoms of the data
    assert crrelu["eps"] != 0.1
    last = seen[-1]
    assert last["activation_entropy/body.1/atom_mass"] == pytest.approx(relu["atom_mass"])
    assert last["activation_entropy/body.3/eps"] == pytest.approx(crrelu["eps"])
    assert last["activation_entropy/entropy"] == pytest.approx(
        sum(row["entropy"] for row in monitor.report.rows) / 3, abs=1e-5
    )
    assert "activation_entropy/body.1/eps" not in last
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        steps = [int(r["step"]) for r in csv.DictReader(file) if r.get("activation_entropy/body.1/entropy")]
    assert steps == [0, 4, 8, 12]
    with monitor.path.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows] == [s for s in (0, 4, 8, 12) for _ in range(3)]
    assert float(rows[-1]["entropy"]) == pytest.approx(tanh["entropy"])
    assert len(list((Path(logger.log_dir) / "figures").rglob("*.png"))) == 2


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}])
def test_the_run_is_bitwise_the_run_without_it(tmp_path: Path, options: dict) -> None:
    plain, _ = fit([], tmp_path, **options)
    watched, _ = fit([ActivationEntropyMonitor(every_n_steps=1, samples=1000)], tmp_path, **options)
    assert same(weights(plain), weights(watched))


def test_nothing_is_written_without_a_logger(tmp_path: Path) -> None:
    monitor = ActivationEntropyMonitor(every_n_steps=4, samples=1000)
    fit([monitor], tmp_path)
    assert monitor.path is None
    assert not list(tmp_path.iterdir())
    assert monitor.report is not None


def test_a_resumed_run_reads_in_the_same_steps_and_goes_on_in_its_file(tmp_path: Path) -> None:
    def steps(monitor: ActivationEntropyMonitor) -> list[int]:
        with monitor.path.open() as file:
            return sorted({int(r["step"]) for r in csv.DictReader(file)})

    whole = ActivationEntropyMonitor(every_n_steps=3, samples=1000)
    fit([whole], tmp_path, max_epochs=3, logger=CSVLogger(tmp_path, name="whole", version=0))
    first = ActivationEntropyMonitor(every_n_steps=3, samples=1000)
    _, run = fit([first], tmp_path, max_epochs=2, logger=CSVLogger(tmp_path, name="parts", version=0))
    run.save_checkpoint(tmp_path / "two.ckpt")
    later = ActivationEntropyMonitor(every_n_steps=3, samples=1000)
    resumed = trainer([later], tmp_path, max_epochs=3, logger=CSVLogger(tmp_path, name="parts", version=0))
    with pytest.warns(UserWarning, match="not empty"):
        resumed.fit(Net(), loader(bags()), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert steps(later) == steps(whole) == [0, 3, 6, 9, 12, 15, 18, 21]


def test_per_channel_and_patterns(tmp_path: Path) -> None:
    monitor = ActivationEntropyMonitor(every_n_steps=1, modules="body", per_channel=True, samples=1000)
    fit([monitor], tmp_path)
    assert [row["site"] for row in monitor.report.rows] == ["body.1", "body.3"]


class Write(Callback):
    """Keeps what each process has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        monitor = next(c for c in trainer.callbacks if isinstance(c, ActivationEntropyMonitor))
        (self.folder / f"rank-{trainer.global_rank}.json").write_text(monitor.report.to_json())


def test_two_processes_pool_their_samples(tmp_path: Path) -> None:
    strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo")
    run = trainer(
        [ActivationEntropyMonitor(every_n_steps=1, samples=2000), Write(tmp_path)], tmp_path, max_epochs=1, devices=2,
        strategy=strategy,
    )  # fmt: skip
    run.fit(Net(), DataLoader(bags(count=2), batch_size=None))
    one, two = ((tmp_path / f"rank-{rank}.json").read_text() for rank in (0, 1))
    assert one == two
    assert '"calls": 2' in one


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"matched 0 of .* in Net"):
        fit([ActivationEntropyMonitor(modules="blocks.*")], tmp_path)

    class Unused(BagClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.pool.score[1] = nn.Identity()
            self.spare = nn.GELU()

    with pytest.raises(Exception, match="none of the 1 activation modules of Unused ran"):
        fit([ActivationEntropyMonitor()], tmp_path, module=Unused())


def test_activations_held_as_functions_are_not_seen(tmp_path: Path) -> None:
    monitor = ActivationEntropyMonitor(every_n_steps=1, samples=1000)
    fit([monitor], tmp_path, module=TokenClassifier())
    assert [row["activation"] for row in monitor.report.rows] == ["Tanh"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1"),
        ({"samples": 10}, "samples must be between"),
        ({"method": "kde"}, "method must be one of vasicek"),
        ({"modules": []}, "at least one pattern"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationEntropyMonitor(**change)
