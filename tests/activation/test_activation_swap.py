"""ActivationSwap: when the swap happens in a run, what is trained, saved, refused and logged."""

from __future__ import annotations

import copy
import csv
import pickle
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_entropy.activation.activation_swap import ActivationSwap
from lightning_entropy.surgery.swap_report import SwapReport


class Net(LightningModule):
    def __init__(self, late: bool = False) -> None:
        super().__init__()
        if not late:
            self.build()
        self.late = late

    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    def configure_model(self) -> None:
        if self.late and not hasattr(self, "net"):
            self.build()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)


class Chosen(Net):
    """Its optimizer has the parameters of a list made in the constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen = [id(p) for p in self.parameters()]

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if id(p) in self.chosen], lr=0.1)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 6, generator=generator)
    return torch.utils.data.DataLoader(list(zip(x, (x[:, 0] > 0).long(), strict=True)), batch_size=4)


def trainer(*callbacks: Callback, **arguments: Any) -> Trainer:
    plain: dict[str, Any] = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
                             "enable_progress_bar": False, "enable_model_summary": False}  # fmt: skip
    return Trainer(**{**plain, **arguments}, callbacks=list(callbacks))


def prelu(**arguments: Any) -> ActivationSwap:
    return ActivationSwap("relu", "torch.nn.PReLU", **arguments)


@pytest.mark.parametrize("late", [False, True])
def test_the_new_parameters_are_trained_and_do_not_decay(data, late, announced):
    swap = prelu()
    run, model = trainer(swap), Net(late)
    run.fit(model, data)
    assert [type(m).__name__ for m in model.net] == ["Linear", "PReLU", "Linear", "PReLU", "Linear"]
    assert model.net[1].weight != 0.25
    (decayed, exempt) = run.optimizers[0].param_groups
    assert {id(p) for p in exempt["params"]} == {id(model.net[1].weight), id(model.net[3].weight)}
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    assert announced == ["PReLU: 2 of 2 ReLU swapped (net.*), +2 parameters; nothing refused"]
    run.test(model, data)
    assert len(announced) == 1


def test_decay_where_it_is_asked_for(data):
    run = trainer(prelu(decay=True))
    run.fit(Net(), data)
    assert [g["weight_decay"] for g in run.optimizers[0].param_groups] == [0.1]


def test_a_run_in_which_no_optimizer_has_them_ends_at_its_start(data):
    with pytest.raises(MisconfigurationException, match=r"no optimizer has net\.\*\.weight \(2 of 2"):
        trainer(prelu()).fit(Chosen(), data)


def test_frozen_parameters_are_said(data):
    class Freeze(Callback):
        def on_fit_start(self, trainer, pl_module):
            pl_module.net[1].weight.requires_grad_(False)

    with pytest.warns(UserWarning, match="net.1.weight do not require a gradient"):
        trainer(prelu(), Freeze(), max_epochs=1).fit(Net(), data)


def test_resumed_equals_uninterrupted(data, tmp_path):
    torch.manual_seed(0)
    whole = Net()
    start = copy.deepcopy(whole.state_dict())
    trainer(prelu()).fit(whole, data)
    first = Net()
    first.load_state_dict(start)
    run = trainer(prelu(), max_epochs=1)
    run.fit(first, data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    second = Net()
    trainer(prelu()).fit(second, data, ckpt_path=tmp_path / "a.ckpt", weights_only=False)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def test_a_checkpoint_of_the_plain_model_is_taken(data, tmp_path):
    run = trainer(max_epochs=1)
    run.fit(Net(), data)
    run.save_checkpoint(tmp_path / "plain.ckpt", weights_only=True)
    model = Net()
    trainer(prelu()).test(model, data, ckpt_path=tmp_path / "plain.ckpt", weights_only=False)
    assert model.net[1].weight == 0.25
    assert torch.equal(model.net[0].weight, torch.load(tmp_path / "plain.ckpt")["state_dict"]["net.0.weight"])


@pytest.mark.parametrize(("there", "here", "error"), [
    ({"modules": "net.1"}, {}, r"swapped here and not there: net\.3\.weight"),
    ({}, {"modules": "net.1"}, r"swapped there and not here: net\.3\.weight"),
])  # fmt: skip
def test_a_checkpoint_of_another_swap_is_refused(data, tmp_path, there, here, error):
    run = trainer(prelu(**there), max_epochs=1)
    run.fit(Net(), data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(RuntimeError, match=error):
        trainer(prelu(**here)).test(Net(), data, ckpt_path=tmp_path / "a.ckpt", weights_only=False)


def test_a_checkpoint_of_another_swap_without_parameters_is_refused(data, tmp_path):
    run = trainer(ActivationSwap("relu", "silu"), max_epochs=1)
    run.fit(Net(), data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(RuntimeError, match="SiLU there, Mish here"):
        trainer(ActivationSwap("relu", "mish")).fit(Net(), data, ckpt_path=tmp_path / "a.ckpt", weights_only=False)


def test_logs_and_figure(data, tmp_path):
    logger = CSVLogger(tmp_path)
    run = trainer(prelu(log_figures=True), logger=logger, log_every_n_steps=1)
    model = Net()
    run.fit(model, data)
    with open(next(tmp_path.rglob("metrics.csv"))) as file:
        rows = list(csv.DictReader(file))
    means = [row for row in rows if row["activation/weight_mean"]]
    assert len(means) == 8
    slopes = [m.weight.item() for m in model.net if isinstance(m, nn.PReLU)]
    assert float(means[-1]["activation/weight_max"]) == pytest.approx(max(slopes))
    spread = [float(row["activation/input_std_mean"]) for row in rows if row["activation/input_std_mean"]]
    assert len(set(spread)) == 2  # one an epoch
    assert all(0.05 < s < 5 for s in spread)
    assert len(list(tmp_path.rglob("step=*.png"))) == 2
    assert not model.net[1]._forward_pre_hooks


def test_input_spread_is_the_standard_deviation(data):
    seen: dict[str, torch.Tensor] = {}

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                seen["x"] = pl_module.net[0](batch[0]).detach()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 0:
                seen["read"] = torch.tensor(swap._input_std["net.1"])

    swap = prelu()
    trainer(Look(), swap, max_epochs=1).fit(Net(), data)
    assert torch.allclose(seen["read"], seen["x"].std(correction=0), atol=1e-6)


def test_nothing_to_swap_is_an_error(data):
    with pytest.raises(ValueError, match="swapped nothing in Net: no gelu"):
        trainer(ActivationSwap("gelu", "silu")).fit(Net(), data)


class Written(Net):
    """Calls functions itself."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(6, width), nn.Linear(width, 2))

    def forward(self, x):
        return self.net[1](nn.functional.relu(self.net[0](x)))


def test_a_module_that_calls_functions_itself(data, tmp_path):
    run, model = trainer(prelu(), max_epochs=1), Written(7)
    run.fit(model, data)
    assert model.relu.weight != 0.25
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match=r"relu\.weight"):  # without the callback it is the plain model
        again = Written.load_from_checkpoint(tmp_path / "a.ckpt", strict=False, weights_only=False)
    assert again.hparams.width == 7
    fresh = Written(7)
    trainer(prelu()).validate(fresh, data, ckpt_path=tmp_path / "a.ckpt", weights_only=False, verbose=False)
    assert torch.equal(fresh.relu.weight, model.relu.weight)
    assert torch.equal(fresh(torch.ones(2, 6)), model.eval()(torch.ones(2, 6)))


def test_a_second_callback_finds_the_swap_of_the_first(data):
    model = Net()
    trainer(prelu(), max_epochs=1).fit(model, data)
    run = trainer(prelu(), max_epochs=1)
    run.fit(model, data)
    assert [g["weight_decay"] for g in run.optimizers[0].param_groups] == [0.1, 0.0]


def test_undone_and_fitted_again(data):
    swap, model = prelu(), Net()
    trainer(swap, max_epochs=1).fit(model, data)
    swap.report.undo()
    assert isinstance(model.net[1], nn.ReLU)
    trainer(swap, max_epochs=1).fit(model, data)
    assert isinstance(model.net[1], nn.PReLU)


def test_arguments_pickle_and_key(data):
    with pytest.raises(ValueError, match="no_such"):
        ActivationSwap("relu", "no_such")
    with pytest.raises(TypeError, match=r"modules=\.\.\.\) takes str"):
        ActivationSwap("relu", "silu", modules=[3])
    swap = ActivationSwap(["relu", "gelu"], "torch.nn.PReLU", new_options={"init": 0.5})
    assert swap.state_key != ActivationSwap("relu", "silu").state_key
    model = Net()
    trainer(swap, max_epochs=1).fit(model, data)
    again = pickle.loads(pickle.dumps(swap))
    assert isinstance(again.report, SwapReport)
    assert str(again.report) == str(swap.report)
    assert swap.state_dict()["report"]["swapped"][0]["new"] == "PReLU"
