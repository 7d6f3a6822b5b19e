"""SigmaReparam in a Trainer: one iteration a step, weight decay, checkpoints, several optimizers, processes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_entropy import SigmaReparam
from lightning_entropy.attention import fold_sigma, sigma_reparametrize
from lightning_entropy.surgery.spectral_weight import original, spectral_weights
from tests.suite.running import trainer


class Regression(LightningModule):
    """Two layers; the second starts as zeros, as adaLN-zero and LoRA do."""

    def __init__(self, zero: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 1)
        if zero:
            nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self(batch) - batch.sum(-1, keepdim=True)).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.training_step(batch, batch_idx))

    test_step = validation_step

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def data(count: int = 6) -> DataLoader:
    generator = torch.Generator().manual_seed(5)
    return DataLoader([torch.randn(3, 4, generator=generator) for _ in range(count)], batch_size=None)


class Watch(Callback):
    """Sigma in each batch, with its vectors, before and after the forward and backward pass."""

    def __init__(self) -> None:
        self.u: list[Tensor] = []
        self.stepped: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.u.append(next(spectral_weights(pl_module))[3].u.clone())
        self.stepped.append(trainer.global_step)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert torch.equal(next(spectral_weights(pl_module))[3].u, self.u[-1])


def test_one_iteration_a_step_and_none_between(tmp_path: Path) -> None:
    watch = Watch()
    trainer([SigmaReparam(), watch], tmp_path, max_epochs=1, accumulate_grad_batches=3).fit(Regression(), data())
    assert watch.stepped == [0, 0, 0, 1, 1, 1]
    assert all(torch.equal(watch.u[i], watch.u[0]) for i in (1, 2))
    assert not torch.equal(watch.u[3], watch.u[2])
    assert all(torch.equal(watch.u[i], watch.u[3]) for i in (4, 5))


def test_sigma_is_followed_over_a_run(tmp_path: Path, announced: list[str]) -> None:
    module, callback = Regression(), SigmaReparam()
    trainer([callback], tmp_path, max_epochs=30).fit(module, data())
    ((name, layer, tensor, spectral),) = spectral_weights(module)
    assert name == "first"
    exact = torch.linalg.matrix_norm(original(layer, tensor).detach(), 2)
    torch.testing.assert_close(spectral.sigma(original(layer, tensor)).detach()[0], exact, rtol=1e-3, atol=0.0)
    assert announced == [
        "SigmaReparam: 1 of 2 weight rescaled (first), +1 parameters; refused: second (weight is all zeros: sigma is 0 "
        "and W / sigma is not defined)"
    ]


class WithScheduler(Regression):
    """Groups, and a scheduler that is built on them."""

    def configure_optimizers(self) -> Any:
        groups: list[dict[str, Any]] = [
            {"params": self.first.parameters(), "lr": 0.02},
            {"params": self.second.parameters(), "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


@pytest.mark.parametrize("decayed", [False, True])
def test_gamma_has_no_weight_decay_and_the_scheduler_knows_its_group(decayed: bool, tmp_path: Path) -> None:
    module = WithScheduler(zero=False)
    plain = torch.optim.Optimizer.add_param_group
    run = trainer([SigmaReparam(decay_gamma=decayed)], tmp_path, max_epochs=1)
    run.fit(module, data())
    assert torch.optim.Optimizer.add_param_group is plain
    assert "configure_optimizers" not in vars(module)
    found = {name: spectral.gamma for name, _, _, spectral in spectral_weights(module)}
    groups = run.optimizers[0].param_groups
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert len(groups) == (2 if decayed else 3)
    assert [decay[id(found[name])] for name in ("first", "second")] == [0.1 if decayed else 0.0, 0.0]
    assert decay[id(original(module.first, "weight"))] == 0.1
    assert [g["lr"] for g in groups] == pytest.approx([0.01, 0.005] if decayed else [0.01, 0.01, 0.005])
    assert len(decay) == len(list(module.parameters()))


def test_gammas_in_no_optimizer_are_said(tmp_path: Path) -> None:
    class Early(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.collected = [list(self.parameters())]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.collected[0], lr=0.1)

    with pytest.warns(UserWarning, match="the optimizers train the weights of first and not their gammas"):
        trainer([SigmaReparam()], tmp_path, max_epochs=1).fit(Early(), data())


def test_a_checkpoint_loads_into_every_stage_of_a_new_trainer(tmp_path: Path) -> None:
    module = Regression()
    run = trainer([SigmaReparam()], tmp_path, max_epochs=3)
    run.fit(module, data())
    assert module.second.weight.abs().max() > 0
    run.save_checkpoint(tmp_path / "last.ckpt")
    expected = [module(batch).detach() for batch in data()]
    for stage in ("validate", "test", "predict"):
        # What is trained need not be what a fresh model starts from: here the second layer is not zero.
        fresh, callback = Regression(zero=False), SigmaReparam()
        later = trainer([callback], tmp_path)
        out = getattr(later, stage)(fresh, data(), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)
        assert callback.report is not None
        assert [c.module for c in callback.report.changes] == ["first"]
        if stage == "predict":
            assert all(torch.equal(a, b) for a, b in zip(out, expected))


def test_resuming_a_fresh_model_with_other_zeros_is_bitwise_the_whole_run(tmp_path: Path) -> None:
    def fit(module: Regression, epochs: int, **options: Any) -> Trainer:
        run = trainer([SigmaReparam()], tmp_path, max_epochs=epochs)
        run.fit(module, data(), **options)
        return run

    torch.manual_seed(1)
    whole = Regression()
    fit(whole, 4)
    torch.manual_seed(1)
    fit(Regression(), 2).save_checkpoint(tmp_path / "two.ckpt")
    resumed = Regression(zero=False)
    fit(resumed, 4, ckpt_path=str(tmp_path / "two.ckpt"), weights_only=True)
    assert whole.state_dict().keys() == resumed.state_dict().keys()
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())


def test_fit_then_test_operates_once_and_folds_for_export(tmp_path: Path, announced: list[str]) -> None:
    module, callback = Regression(), SigmaReparam()
    run = trainer([callback], tmp_path, max_epochs=1)
    run.fit(module, data())
    first = callback.report
    run.test(module, data(), verbose=False)
    assert callback.report is first
    assert len(announced) == 1
    out = [module(batch) for batch in data()]
    assert fold_sigma(module) == ["first.weight"]
    assert all(torch.equal(module(batch), o) for batch, o in zip(data(), out))
    assert sorted(module.state_dict()) == sorted(Regression().state_dict())


def test_a_model_that_was_rescaled_by_hand_is_followed(tmp_path: Path) -> None:
    module = Regression()
    sigma_reparametrize(module)
    keys = list(module.state_dict())
    watch = Watch()
    trainer([SigmaReparam(), watch], tmp_path, max_epochs=1).fit(module, data())
    assert list(module.state_dict()) == keys
    assert not torch.equal(watch.u[0], watch.u[1])


class TwoOptimizers(Regression):
    """Manual optimization, as a GAN has it."""

    def __init__(self) -> None:
        super().__init__(zero=False)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(m.parameters(), lr=0.05, weight_decay=0.1) for m in (self.first, self.second)]


def test_several_optimizers_and_two_instances(tmp_path: Path) -> None:
    module = TwoOptimizers()
    a, b = SigmaReparam(modules="first"), SigmaReparam(modules="second", gamma_init="one")
    run = trainer([a, b], tmp_path, max_epochs=20)
    run.fit(module, data())
    assert [len(o.param_groups) for o in run.optimizers] == [2, 2]
    for _, layer, tensor, spectral in spectral_weights(module):
        exact = torch.linalg.matrix_norm(original(layer, tensor).detach(), 2)
        torch.testing.assert_close(spectral.sigma(original(layer, tensor)).detach()[0], exact, rtol=1e-3, atol=0.0)
    assert b.report is not None
    b.report.undo()
    assert [name for name, _, _, _ in spectral_weights(module)] == ["first"]


def test_what_is_logged_and_drawn(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    module = Regression(zero=False)
    run = trainer([SigmaReparam(log_figures=True)], tmp_path, max_epochs=2, logger=logger, log_every_n_steps=2)
    run.fit(module, data())
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("sigma_reparam/sigma_max")]
    assert [int(row["step"]) for row in rows] == [1, 3, 5, 7, 9, 11]
    spectra = [
        (float(s.u[0] @ original(layer, t).detach() @ s.v[0]), float(s.gamma.detach()))
        for _, layer, t, s in spectral_weights(module)
    ]
    last = {key.removeprefix("sigma_reparam/"): float(value) for key, value in rows[-1].items() if "reparam" in key}
    expected = {"sigma_max": max(s for s, _ in spectra), "sigma_mean": sum(s for s, _ in spectra) / 2}
    expected |= {"gamma_max": max(g for _, g in spectra), "gamma_mean": sum(g for _, g in spectra) / 2}
    assert last == pytest.approx(expected, rel=1e-5)
    assert len(list(Path(logger.log_dir).glob("figures/sigma_reparam/spectral_norms/*.png"))) == 2


def test_processes_give_the_effective_weights_back(tmp_path: Path) -> None:
    """With spawned processes the model of this one was never rescaled: it gets the folded weights."""
    module = Regression()
    before = module.first.weight.detach().clone()
    strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo")
    run = trainer([SigmaReparam(), Save(tmp_path / "state.pt")], tmp_path, max_epochs=1, devices=2, strategy=strategy)
    run.fit(module, data())
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    assert torch.equal(kept["u0"], kept["u1"])
    assert torch.equal(module.first.weight, kept["effective"])
    assert not torch.equal(module.first.weight, before)


class Save(Callback):
    """What the processes had at the end of the fit."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ((_, layer, _, spectral),) = spectral_weights(pl_module)
        u = trainer.strategy.all_gather(spectral.u)
        if trainer.global_rank == 0:
            torch.save({"effective": layer.weight.detach().clone(), "u0": u[0], "u1": u[1]}, self.path)


def test_arguments_are_checked_at_once() -> None:
    with pytest.raises(ValueError, match="gamma_init must be 'sigma' or 'one', got 'sgima'"):
        SigmaReparam(gamma_init="sgima")
    with pytest.raises(ValueError, match="at least one pattern"):
        SigmaReparam(modules=[])
