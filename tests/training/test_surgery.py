"""When a surgery happens in a Trainer, that it happens once, and what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_entropy.surgery import Change, SurgeryReport
from lightning_entropy.training import SurgeryCallback
from lightning_entropy.training.next_call import around_next_call
from tests.suite.running import trainer


class Shift(SurgeryCallback):
    """Gives each linear layer a parameter of its own, once."""

    def __init__(self, key: str = "shift") -> None:
        super().__init__()
        self.modules = key
        self.key = key
        self.times = 0

    def operate(self, module: nn.Module) -> SurgeryReport:
        self.times += 1
        report = SurgeryReport("Shift")
        for name, layer in list(module.named_modules()):
            if isinstance(layer, nn.Linear) and not hasattr(layer, self.key):
                layer.register_parameter(self.key, nn.Parameter(layer.weight.new_zeros(1)))
                report.changes.append(Change(name, "shifted"))
                report.on_undo(lambda layer=layer: delattr(layer, self.key))
        report.added_parameters = len(report.changes)
        return report


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean() + sum(p.sum() for n, p in self.named_parameters() if "shift" in n)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.net(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Late(Plain):
    """Built in ``setup`` anew for each stage, or in ``configure_model`` once."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.net = nn.Identity()

    def setup(self, stage: str) -> None:
        if self.where == "setup":
            self.net = nn.Linear(2, 1)

    def configure_model(self) -> None:
        if self.where == "configure_model" and isinstance(self.net, nn.Identity):
            self.net = nn.Linear(2, 1)


def data() -> DataLoader:
    return DataLoader([torch.ones(2, 2) for _ in range(2)], batch_size=None)


@pytest.mark.parametrize("where", ["init", "setup", "configure_model"])
def test_it_happens_when_the_model_exists_and_once_a_model(where: str, tmp_path: Path) -> None:
    module = Plain() if where == "init" else Late(where)
    callback = Shift()
    run = trainer([callback], tmp_path, max_epochs=1)
    run.fit(module, data())
    assert callback.report is not None
    assert [c.module for c in callback.report.changes] == ["net"]
    assert {id(p) for p in module.parameters()} == {id(p) for p in run.optimizers[0].param_groups[0]["params"]}
    assert module.net.shift.item() == pytest.approx(-0.2)
    run.test(module, data(), verbose=False)
    trainer([callback], tmp_path, max_epochs=1).fit(module, data())
    assert callback.times == (3 if where == "setup" else 1)  # that module builds its layer anew in each stage
    assert "configure_model" not in vars(module)


def test_it_happens_again_when_it_was_undone(tmp_path: Path) -> None:
    module, callback = Plain(), Shift()
    for _ in range(2):
        trainer([callback], tmp_path, max_epochs=1).fit(module, data())
        assert callback.report is not None
        assert callback.report.changes
        callback.report.undo()
        assert not hasattr(module.net, "shift")
    assert callback.times == 2


def test_several_operate_in_their_order(tmp_path: Path) -> None:
    module = Plain()
    callbacks = [Shift("shift_a"), Shift("shift_b")]
    run = trainer(list(callbacks), tmp_path, max_epochs=1)
    run.fit(module, data())
    assert [n for n, _ in module.net.named_parameters()] == ["weight", "bias", "shift_a", "shift_b"]
    assert callbacks[0].state_key != callbacks[1].state_key
    run.save_checkpoint(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][callbacks[0].state_key]
    assert stored["report"]["changes"] == [{"module": "net", "what": "shifted"}]
    fresh = Plain()
    trainer([Shift("shift_a"), Shift("shift_b")], tmp_path).test(
        fresh, data(), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False, weights_only=True
    )
    assert torch.equal(fresh.net.shift_b, module.net.shift_b)


class Fails(Callback):
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        raise RuntimeError("planted")


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_failure_before_it_leaves_nothing(order: int, tmp_path: Path) -> None:
    module = Plain()
    callbacks: list[Callback] = [Shift("shift_a"), Shift("shift_b")]
    callbacks.insert(order, Fails())
    with pytest.raises(RuntimeError, match="planted"):
        trainer(callbacks, tmp_path, max_epochs=1).fit(module, data())
    assert "configure_model" not in vars(module)


def test_a_compiled_module(tmp_path: Path) -> None:
    module, callback = Plain(), Shift()
    trainer([callback], tmp_path, max_epochs=1).fit(torch.compile(module, backend="aot_eager"), data())
    assert module.net.shift.item() == pytest.approx(-0.2)
    torch._dynamo.reset()


def test_what_shards_the_model_is_refused(tmp_path: Path) -> None:
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    with pytest.raises(Exception, match="Shift changes the model, and ModelParallelStrategy shards it"):
        Shift().setup(_Named(strategy), Plain(), "fit")


class _Named:
    """A Trainer reduced to its strategy: a whole one would start processes."""

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy


def test_weights_on_the_meta_device_are_refused(tmp_path: Path) -> None:
    module = Plain()
    module.net = nn.Linear(2, 1, device="meta")
    with pytest.raises(NotImplementedError) as raised:  # Lightning's teardown fails too, on top of our error
        trainer([Shift()], tmp_path, max_epochs=1).fit(module, data())
    told = str(raised.value.__context__)
    assert "Shift: 2 parameters of Plain are on the meta device (net.weight, net.bias)" in told


def test_processes_without_the_added_parameters_are_told(tmp_path: Path) -> None:
    callback = Shift()
    module = Plain()
    callback.report = callback.operate(module)
    with pytest.warns(UserWarning, match=r"has not the \+1 parameters of the surgery"):
        callback.leave_process(module)
    assert not hasattr(module.net, "shift")
    callback.leave_process(module)


def test_the_base_class_is_not_a_callback_of_its_own() -> None:
    with pytest.raises(TypeError, match="abstract"):
        SurgeryCallback()  # type: ignore[abstract]


class Door:
    def open(self, how: str = "wide") -> str:
        return how


def test_the_next_call_is_covered_once_and_may_be_withdrawn() -> None:
    from contextlib import contextmanager

    door, seen = Door(), []

    def context(name: str) -> Any:
        @contextmanager
        def entered() -> Any:
            seen.append(f"+{name}")
            yield
            seen.append(f"-{name}")

        return entered

    around_next_call(door, "open", context("a"))
    around_next_call(door, "open", context("b"))
    withdraw = around_next_call(door, "open", context("c"))
    withdraw()
    withdraw()
    assert door.open(how="narrow") == "narrow"
    assert seen == ["+b", "+a", "-a", "-b"]
    assert not vars(door)
    door.open()
    assert len(seen) == 4
    own = lambda how="mine": how  # noqa: E731
    door.open = own  # type: ignore[method-assign]
    around_next_call(door, "open", context("d"))
    assert door.open() == "mine"
    assert vars(door) == {"open": own}
    kept = around_next_call(door, "open", context("e"))
    covered = door.open
    door.open = lambda: covered()  # type: ignore[method-assign]
    kept()
    assert door.open() == "mine"
    assert seen[-1] == "-d"
