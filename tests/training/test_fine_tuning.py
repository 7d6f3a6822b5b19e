from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_entropy import LearnableTemperature
from lightning_entropy.surgery.lora import lora_modules
from tests.suite.running import loader, same, trainer, weights
from tests.training.fine_tuning_modules import Classifier, LargestGradients, Network, data
from tests.user_modules import TokenClassifier, bags

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*num_workers.*")
MODES = pytest.mark.parametrize("mode", ["full", "lora"])


def fit(callback, folder: Path, module=None, *, extra=(), ckpt_path=None, shuffle=False, **options):
    seed_everything(3, verbose=False)
    module = Classifier() if module is None else module
    run = trainer([callback, *extra], folder, **options)
    run.fit(module, data(shuffle), ckpt_path=ckpt_path)
    return module, run


def trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


@MODES
def test_what_is_trained_is_what_was_chosen(mode: str, tmp_path: Path, announced: list[str]) -> None:
    callback = LargestGradients(2, mode=mode, rank=2)
    module, run = fit(callback, tmp_path)
    names = callback.chosen.selection.names
    assert len(names) == 2
    if mode == "full":
        assert trained(module) == {*names, "head.weight", "head.bias"}
    else:
        assert set(lora_modules(module)) == {name.rpartition(".")[0] for name in names}
        ups = [p for name, p in module.named_parameters() if ".lora_B." in name]
        assert len(ups) == 2
        assert all(p.any() for p in ups)
    plain = weights(Network())
    after = {n.replace(".base_layer", "").removeprefix("network."): v for n, v in weights(module).items()}
    moved = {n for n, value in plain.items() if not torch.equal(after[n], value)}
    assert moved == ({n.removeprefix("network.") for n in names} if mode == "full" else set())  # statistics neither
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in module.parameters() if p.requires_grad} <= held
    lines = [line for line in announced if line.startswith("LargestGradients")]
    assert len(lines) == 1
    assert "besides: head" in lines[0]
    assert "gradient_norm" in lines[0]


@MODES
def test_choosing_disturbs_nothing(mode: str, tmp_path: Path) -> None:
    """A run that chooses on its data, with a shuffled loader and dropout, is the run that was told what to choose."""
    first = LargestGradients(2, mode=mode, rank=2)
    chosen, _ = fit(first, tmp_path, shuffle=True)
    path = first.chosen.selection.save(tmp_path / "selection.json")
    second = LargestGradients(mode=mode, rank=2, selection=path)
    told, _ = fit(second, tmp_path, shuffle=True)
    assert (first.chosen_times, second.chosen_times) == (1, 0)
    assert same(weights(chosen), weights(told))


def test_a_selection_of_other_weights_is_warned_of(tmp_path: Path) -> None:
    first = LargestGradients(2)
    fit(first, tmp_path)
    path = first.chosen.selection.save(tmp_path / "selection.json")
    with pytest.warns(UserWarning, match="made from other weights"):
        fit(LargestGradients(selection=path), tmp_path, module=Classifier(seed=1))


@MODES
def test_a_resumed_run_takes_the_stored_choice(mode: str, tmp_path: Path, announced: list[str]) -> None:
    callback = LargestGradients(2, mode=mode, rank=2, alpha=3)
    whole, _ = fit(callback, tmp_path, max_epochs=3)

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            trainer.should_stop = trainer.current_epoch == 0

    _, run = fit(LargestGradients(2, mode=mode, rank=2, alpha=3), tmp_path, extra=[Stop()], max_epochs=3)
    run.save_checkpoint(tmp_path / "one.ckpt")
    state = torch.get_rng_state()
    announced.clear()
    # other arguments would choose otherwise: what the checkpoint has goes before them
    later = LargestGradients(4, mode="full" if mode == "lora" else "lora", rank=5, alpha=16, head=None)
    module = Classifier()
    torch.set_rng_state(state)
    trainer([later], tmp_path, max_epochs=3).fit(module, data(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert later.chosen_times == 0
    assert later.chosen.selection.names == callback.chosen.selection.names
    assert same(weights(module), weights(whole))
    assert trained(module) == trained(whole)
    assert any("as in the checkpoint" in line for line in announced)


@MODES
def test_checkpoints_of_what_is_trained_alone(mode: str, tmp_path: Path) -> None:
    options = {"mode": mode, "rank": 2, "norms": True, "save": "adapters"}
    whole, _ = fit(LargestGradients(2, **options), tmp_path, max_epochs=2)

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            trainer.should_stop = trainer.current_epoch == 0

    _, run = fit(LargestGradients(2, **options), tmp_path, extra=[Stop()])
    run.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.get_rng_state()
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    names = {name.replace("base_layer.", "") for name in stored["state_dict"]}
    assert "network.norm.running_mean" in names
    assert "head.weight" in names
    assert "network.embed.bias" not in names
    module = Classifier()
    torch.set_rng_state(state)
    later = LargestGradients(2, **options)
    trainer([later], tmp_path).fit(module, data(), ckpt_path=tmp_path / "last.ckpt")
    assert same(weights(module), weights(whole))
    # in a process that only evaluates, and with a callback that saves otherwise
    for stage in ("validate", "test"):
        fresh = Classifier()
        other = trainer([LargestGradients(2, mode=mode)], tmp_path)
        result = getattr(other, stage)(fresh, data(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
        assert result[0]["loss"] > 0
        assert torch.equal(fresh.head.weight, stored["state_dict"]["head.weight"])

    def broken(change) -> Path:
        checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
        change(checkpoint["state_dict"])
        torch.save(checkpoint, tmp_path / "broken.ckpt")
        return tmp_path / "broken.ckpt"

    for key in ("head.weight", "network.norm.running_var"):
        path = broken(lambda state, key=key: state.pop(key))
        with pytest.raises(RuntimeError, match=f"are missing that are not frozen: {key}"):
            trainer([LargestGradients(2, **options)], tmp_path).fit(Classifier(), data(), ckpt_path=path)
    with pytest.raises(RuntimeError, match="not the ones beside which it was trained"):
        trainer([LargestGradients(2, **options)], tmp_path).fit(
            Classifier(seed=1), data(), ckpt_path=tmp_path / "last.ckpt"
        )
    path = broken(lambda state: state.update(stray=torch.zeros(1)))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        trainer([LargestGradients(2, **options)], tmp_path).fit(Classifier(), data(), ckpt_path=path)


def test_adapters_load_where_nothing_is_fitted(tmp_path: Path) -> None:
    callback = LargestGradients(2, mode="lora", rank=2)
    module, run = fit(callback, tmp_path)
    run.save_checkpoint(tmp_path / "whole.ckpt")
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    module.eval()
    x = torch.cat([batch[0] for batch in data()])
    expected = module(x)
    for name in ("whole.ckpt", "weights.ckpt"):
        fresh = Classifier(seed=1)
        later = trainer([LargestGradients(mode="lora", rank=2)], tmp_path)
        out = later.predict(fresh, data(), ckpt_path=tmp_path / name)
        torch.testing.assert_close(torch.cat(out), expected)
    assert torch.equal(torch.cat(run.predict(module, data())), expected)  # fit, then predict with the same Trainer
    untouched = Classifier()
    trainer([LargestGradients(mode="lora")], tmp_path).predict(untouched, data())
    assert not lora_modules(untouched)


def test_a_checkpoint_of_another_configuration(tmp_path: Path) -> None:
    class Named(LargestGradients):
        def __init__(self, modules: str, **options) -> None:
            super().__init__(**options)
            self.modules = modules

    _, run = fit(Named("a"), tmp_path)
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(MisconfigurationException, match="chosen anew from trained weights"):
        fit(Named("b"), tmp_path, ckpt_path=tmp_path / "a.ckpt", max_epochs=3)


def test_too_late_is_an_error(tmp_path: Path) -> None:
    class Late(Callback):
        def __init__(self, where: str) -> None:
            self.where = where

        def on_fit_start(self, trainer, pl_module) -> None:
            if self.where == "fit":
                trainer.callbacks.append(LargestGradients())

        def on_train_start(self, trainer, pl_module) -> None:
            if self.where == "train":
                trainer.callbacks.append(LargestGradients())

    for where in ("fit", "train"):
        with pytest.raises(MisconfigurationException, match="LargestGradients came too late"):
            fit(Late(where), tmp_path)


def test_one_instance_on_two_models_and_twice_on_one(tmp_path: Path) -> None:
    callback = LargestGradients(2, mode="lora", rank=2)
    first, run = fit(callback, tmp_path)
    names = trained(first)
    first.requires_grad_(True)
    run.fit_loop.max_epochs = 3
    run.fit(first, data())
    assert callback.chosen_times == 1
    assert trained(first) == names
    second, _ = fit(callback, tmp_path)
    assert callback.chosen_times == 2
    assert lora_modules(first)
    callback.report.undo()
    assert not lora_modules(second)
    third, _ = fit(callback, tmp_path, module=second)
    assert callback.chosen_times == 3
    assert lora_modules(third)


def test_what_other_surgeries_add_stays_trained(tmp_path: Path) -> None:
    module = TokenClassifier()
    run = trainer([LargestGradients(1), LearnableTemperature()], tmp_path)
    seed_everything(3, verbose=False)
    run.fit(module, loader(bags()))
    added = {name for name in trained(module) if name.endswith("attention_log_temperature")}
    assert len(added) == 2
    assert len(trained(module)) == 2 + 1 + 2
    assert all(module.get_parameter(name).any() for name in added)


def test_an_optimizer_without_the_chosen_is_warned_of(tmp_path: Path) -> None:
    class OnlyHead(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), lr=0.1)

    with pytest.warns(UserWarning, match=r"optimizers do not have network\..*, which will not be trained"):
        fit(LargestGradients(1), tmp_path, module=OnlyHead())


class Reads(Network):
    """Reads the weight of a layer without calling it, as some attention layers do."""

    def forward(self, x):
        x = nn.functional.linear(x, self.embed.weight, self.embed.bias)
        return x + self.wide(x)


def test_an_adapter_that_is_never_called_is_said(tmp_path: Path) -> None:
    module = Classifier()
    module.network = Reads()
    callback = LargestGradients(2, mode="lora", rank=2)
    with pytest.warns(UserWarning, match=r"2 of 6 trained tensors had no gradient.*network.embed"):
        fit(callback, tmp_path, module=module)
    module = Classifier()
    module.network = Reads()
    path = callback.chosen.selection.choose(["network.embed.weight"]).save(tmp_path / "embed.json")

    class Other(LargestGradients):
        pass

    alone = LargestGradients(mode="lora", selection=path, head=None)  # nothing of it is ever called
    with pytest.raises(MisconfigurationException, match="2 of 2 trained tensors had no gradient"):
        fit(alone, tmp_path, module=module, extra=[Other(1)])


def test_gradient_checkpointing_behind_frozen_layers(tmp_path: Path) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Network):
        reentrant = False

        def forward(self, x):
            x = self.norm(self.embed(x))
            return x + checkpoint(self.wide, x, use_reentrant=self.reentrant)

    for mode in ("full", "lora"):
        module = Classifier()
        module.network = Checkpointed()
        callback = LargestGradients(1, mode=mode, rank=2, head=["head", "network.wide.2"])
        fit(callback, tmp_path, module=module)
    selection = callback.chosen.selection
    path = selection.choose(["network.wide.0.weight"]).save(tmp_path / "wide.json")
    module = Classifier()
    module.network = Checkpointed()
    module.network.reentrant = True
    with (
        pytest.warns(UserWarning, match="use_reentrant=True behind frozen"),
        pytest.warns(UserWarning, match="None of the inputs"),
    ):
        fit(LargestGradients(selection=path), tmp_path, module=module)


def test_sharding_is_refused(tmp_path: Path) -> None:
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Strategy(ModelParallelStrategy):
        def setup_environment(self) -> None:
            raise AssertionError("came too far")

    run = trainer([], tmp_path)
    run.strategy.__class__ = type("Sharding", (type(run.strategy),), {"restore_checkpoint_after_setup": True})
    callback = LargestGradients()
    with pytest.raises(MisconfigurationException, match="Sharding shards it"):
        callback.setup(run, Classifier(), "fit")


def test_several_passes_over_a_batch(tmp_path: Path) -> None:
    for options in ({"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}):
        for mode in ("full", "lora"):
            module = Classifier()
            if options.get("precision") == "bf16-true":
                module.accuracy = nn.Identity()
                module.training_step = lambda batch, idx, m=module: (
                    m(batch[0].to(torch.bfloat16)).float().square().mean()
                )
                callback = LargestGradients(selection=_some(tmp_path), mode=mode, rank=2)
            else:
                callback = LargestGradients(1, mode=mode, rank=2)
            fit(callback, tmp_path, module=module, **options)
            assert all(torch.isfinite(value).all() for value in weights(module).values())


def _some(folder: Path) -> Path:
    from lightning_entropy.surgery.select_modules import select_modules

    module = Classifier()
    return select_modules(module, by="depth", budget=1, modules="network*").save(folder / "some.json")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "partial"}, "mode must be"),
        ({"save": "none"}, "save must be"),
        ({"rank": 0}, "rank"),
        ({"dropout": 1.0}, "dropout"),
        ({"head": []}, "empty list"),
    ],
)
def test_arguments_are_checked_at_once(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LargestGradients(**options)
