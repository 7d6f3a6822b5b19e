"""Generated for every registered case: what every method promises of every Trainer."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from tests.cases import CASES, Case
from tests.suite.running import first_gradients, loader, same, traces, trainer, weights
from tests.user_modules import PicturedTokens, pictured_bags

every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
weighted_case = pytest.mark.parametrize("case", [c for c in CASES if c.weighted], ids=lambda c: c.name)


def fit(case: Case, callbacks: list, folder: Path, module=None, **options):
    seed_everything(3, verbose=False)
    module = case.module() if module is None else module
    run = trainer(callbacks, folder, **options)
    batches = pictured_bags() if isinstance(module, PicturedTokens) else case.batches()
    run.fit(module, loader(batches), ckpt_path=options.get("ckpt_path"))
    return module, run


@every_case
def test_fits_twice_with_one_instance(case: Case, tmp_path: Path) -> None:
    callback = case.build()
    first, _ = fit(case, [callback], tmp_path)
    second, _ = fit(case, [callback], tmp_path)
    assert same(weights(first), weights(second))
    plain, _ = fit(case, [], tmp_path)
    if case.only_watches:
        assert same(weights(first), weights(plain))
    else:
        assert not same(weights(first), weights(plain)), "the method changed nothing"


@every_case
def test_nothing_is_left_behind(case: Case, tmp_path: Path) -> None:
    seed_everything(3, verbose=False)
    module = case.module()
    before = traces(module)
    callback = case.build()
    fit(case, [callback], tmp_path, module=module)
    if case.undo is not None:
        case.undo(callback)
    after = traces(module)
    untouched = traces(fit(case, [], tmp_path)[0])
    assert after["hooks"] == before["hooks"]
    assert after["modes"] == before["modes"] == 0
    assert after == untouched


class Bomb(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == 3:
            raise RuntimeError("planted")


class ForwardBomb:
    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, module, args) -> None:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("planted")


@every_case
@pytest.mark.parametrize("where", ["optimizer", "first forward", "later forward"])
def test_nothing_is_left_after_an_exception(case: Case, where: str, tmp_path: Path) -> None:
    callback = case.build()
    module = case.module()
    extra: list = []
    handle = None
    if where == "optimizer":
        extra = [Bomb()]
    else:
        target = next(m for _, m in reversed(list(module.pool.named_modules())))
        handle = target.register_forward_pre_hook(ForwardBomb(0 if where == "first forward" else 3))
    with pytest.raises(RuntimeError, match="planted"):
        fit(case, [callback, *extra], tmp_path, module=module)
    if handle is not None:
        handle.remove()
    if case.undo is not None:
        case.undo(callback)
    left = traces(module)
    assert left["modes"] == 0
    assert left["hooks"] == traces(case.module())["hooks"]
    again, _ = fit(case, [callback], tmp_path)
    clean, _ = fit(case, [case.build()], tmp_path)
    assert same(weights(again), weights(clean))


@weighted_case
def test_weight_zero_is_bitwise_the_plain_run(case: Case, tmp_path: Path) -> None:
    plain, _ = fit(case, [], tmp_path)
    zero, _ = fit(case, [case.build(weight=0.0)], tmp_path)
    own = weights(plain)
    assert same(own, {name: value for name, value in weights(zero).items() if name in own})


@every_case
def test_resumed_is_bitwise_the_uninterrupted_run(case: Case, tmp_path: Path) -> None:
    whole, _ = fit(case, [case.build()], tmp_path, max_epochs=4)

    class StopAfterTwo(Callback):  # as a walltime limit would
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    _, run = fit(case, [case.build(), StopAfterTwo()], tmp_path, max_epochs=4)
    path = tmp_path / "two.ckpt"
    run.save_checkpoint(path)
    # Dropout draws from the global state, which the uninterrupted run had at this moment.
    state = torch.get_rng_state()
    module = case.module()
    torch.set_rng_state(state)
    later = trainer([case.build()], tmp_path, max_epochs=4)
    later.fit(module, loader(case.batches()), ckpt_path=path, weights_only=True)
    assert same(weights(module), weights(whole))


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.cases import CASES
from tests.suite.running import loader, trainer, weights

name, folder, mode = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
case = next(c for c in CASES if c.name == name)

class Kill(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 13:
            os.kill(os.getpid(), signal.SIGKILL)

keep = ModelCheckpoint(dirpath=folder, save_last=True, every_n_train_steps=5, save_top_k=0)
seed_everything(3, verbose=False)
module = case.module(dropout=0.0)
run = trainer([case.build(), keep] + ([Kill()] if mode == "kill" else []), folder, max_epochs=3,
              enable_checkpointing=True)
run.fit(module, loader(case.batches()), ckpt_path=str(folder / "last.ckpt") if mode == "resume" else None)
torch.save(weights(module), folder / f"{mode}.pt")
"""


@every_case
def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(case: Case, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}

    def run(mode: str) -> int:
        command = [sys.executable, "-W", "ignore", "-c", KILLED, case.name, str(tmp_path), mode]
        return subprocess.run(command, env=environment, capture_output=True, timeout=300).returncode

    assert run("whole") == 0
    (tmp_path / "last.ckpt").unlink()
    assert run("kill") == -signal.SIGKILL
    assert (tmp_path / "last.ckpt").exists()
    assert run("resume") == 0
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    resumed = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert same(whole, resumed)


@every_case
def test_accumulation_gives_the_gradient_of_one_batch(case: Case, tmp_path: Path) -> None:
    four = case.batches(count=4, batch_size=1, dtype=torch.float64)
    joint = {k: torch.cat([b[k] for b in four]) for k in four[0]}
    callback = case.steady()

    def gradients(batches: list, **options):
        seed_everything(3, verbose=False)
        module = case.module(dropout=0.0).double()
        return first_gradients(module, [callback], batches, tmp_path, **options)

    apart = gradients(four, accumulate_grad_batches=4)
    together = gradients([joint])
    for name, gradient in together.items():
        torch.testing.assert_close(apart[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@every_case
def test_incomplete_last_window_is_scaled_like_its_loss(case: Case, tmp_path: Path) -> None:
    """Lightning divides a last window of 3 of 4 batches by 4: the term must be divided alike."""
    three = case.batches(count=3, batch_size=1, dtype=torch.float64)
    joint = {k: torch.cat([b[k] for b in three]) for k in three[0]}

    def gradients(batches: list, **options):
        seed_everything(3, verbose=False)
        module = case.module(dropout=0.0).double()
        return first_gradients(module, [case.steady()], batches, tmp_path, **options)

    apart = gradients(three, accumulate_grad_batches=4)
    together = gradients([joint])
    for name, gradient in together.items():
        torch.testing.assert_close(apart[name], gradient * 0.75, rtol=1e-9, atol=1e-12, msg=name)


@every_case
def test_two_processes_give_the_gradient_of_one(case: Case, tmp_path: Path) -> None:
    batches = case.batches(count=2, batch_size=2, dtype=torch.float64)
    joint = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}

    def gradients(data: list, **options):
        seed_everything(3, verbose=False)
        module = case.module(dropout=0.0).double()
        return first_gradients(module, [case.steady()], data, tmp_path, **options)

    strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo")
    apart = gradients(batches, devices=2, strategy=strategy)
    together = gradients([joint])
    for name, gradient in together.items():
        torch.testing.assert_close(apart[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


@every_case
def test_bf16(case: Case, tmp_path: Path) -> None:
    module, _ = fit(case, [case.build()], tmp_path, precision="bf16-mixed")
    assert all(torch.isfinite(v).all() for v in weights(module).values())


@every_case
def test_compiled_equals_eager(case: Case, tmp_path: Path) -> None:
    def gradients(compiled: bool):
        seed_everything(3, verbose=False)
        module = case.module(dropout=0.0).double()
        subject = torch.compile(module, backend="aot_eager") if compiled else module
        return first_gradients(subject, [case.build()], case.batches(dtype=torch.float64), tmp_path)

    torch._dynamo.reset()
    eager, compiled = gradients(False), gradients(True)
    for name, gradient in eager.items():
        torch.testing.assert_close(compiled[name], gradient, msg=name)


@every_case
def test_compiled_trains_like_eager_for_many_steps(case: Case, tmp_path: Path) -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        seed_everything(3, verbose=False)
        module = case.module(dropout=0.0).double()
        subject = torch.compile(module, backend="aot_eager") if compiled else module
        trainer([case.build()], tmp_path).fit(subject, loader(case.batches(dtype=torch.float64)))
        results.append(weights(module))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=name)


@every_case
def test_two_instances_coexist(case: Case, tmp_path: Path) -> None:
    a, b = case.build(), case.build(**case.second)
    assert a.state_key != b.state_key
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    one, _ = fit(case, [a, b, keep], tmp_path, enable_checkpointing=True)
    other, _ = fit(case, [case.build(**case.second), case.build()], tmp_path)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=1e-4, atol=1e-5, msg=name)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert a.state_key in stored
    assert b.state_key in stored


@every_case
def test_yaml_round_trip(case: Case, tmp_path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    config = parser.parse_object({"callback": {"class_path": case.class_path, "init_args": dict(case.arguments)}})
    path = tmp_path / "config.yaml"
    path.write_text(parser.dump(config))
    text = ArgumentParser(exit_on_error=False)
    text.add_argument("--config", action="config")
    text.add_subclass_arguments(Callback, "callback")
    built = text.instantiate_classes(text.parse_args(["--config", str(path)])).callback
    assert type(built) is case.make
    module, _ = fit(case, [built], tmp_path)
    direct, _ = fit(case, [case.build()], tmp_path)
    assert same(weights(module), weights(direct))


@every_case
def test_no_target_is_an_error(case: Case, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=case.error):
        fit(case, [case.build()], tmp_path, module=case.without_target())


@every_case
def test_a_deep_copy_of_the_module_keeps_no_live_hook(case: Case, tmp_path: Path) -> None:
    copies = []

    class Copy(Callback):  # as EMA and weight averaging do
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            trained = pl_module._trainer
            pl_module._trainer = None
            copies.append(copy.deepcopy(pl_module.pool))
            pl_module._trainer = trained

    fit(case, [case.build(), Copy()], tmp_path)
    for pool in copies if case.undo is None else []:
        for module in pool.modules():
            for hook in [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]:
                assert type(hook).__name__ == "InertHook"
    batch = case.batches()[0]
    assert torch.isfinite(copies[-1](batch["features"], batch["mask"])).all()


PAIRS = [(a, b) for i, a in enumerate(CASES) for b in CASES[i + 1 :]]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=[f"{a.name}+{b.name}" for a, b in PAIRS])
def test_pairs(first: Case, second: Case, tmp_path: Path, record_property: Any) -> None:
    # PicturedTokens has what every method reads.
    module = first.module() if first.module is second.module else PicturedTokens()
    reason = first.incompatible_with.get(second.name) or second.incompatible_with.get(first.name)
    if reason:
        record_property("refused", reason)
        with pytest.raises(Exception, match=reason):
            fit(first, [first.build(), second.build()], tmp_path, module=module)
    else:
        module, _ = fit(first, [first.build(), second.build()], tmp_path, module=module)
        assert all(torch.isfinite(v).all() for v in weights(module).values())
