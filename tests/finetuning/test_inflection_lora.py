"""On transformers whose blocked layers are known."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_entropy import InflectionLoRA, KappaTune
from lightning_entropy.finetuning import LayerDiagnosis, diagnose_layers
from lightning_entropy.surgery.lora import lora_modules, merge_lora
from tests.finetuning.diagnosed_models import Classifier, batches, block_gradient, loss, saturate
from tests.suite.running import loader, same, trainer, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*num_workers.*"),
    pytest.mark.filterwarnings("ignore:.*base features are weak"),
]
PARTS = ("query", "key", "value", "out")


class User(Classifier):
    """The user's module with its two blocked layers; the head and the data are what the seed makes them."""

    def __init__(self, seed: int = 0, *, depth: int = 8, blocked: bool = True, lr: float = 0.1, **options) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(depth=depth, **options)
        self.lr = lr
        saturate(self.net, (2, 5))
        if blocked:
            block_gradient(self.net, (2, 5))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val", loss(self.net, batch))

    test_step = validation_step


def fit(callback, folder: Path, module=None, *, extra=(), data=None, ckpt_path=None, **options):
    seed_everything(3, verbose=False)
    module = User() if module is None else module
    run = trainer([callback, *extra], folder, **options)
    run.fit(module, loader(batches(4) if data is None else data), ckpt_path=ckpt_path)
    return module, run


def expected(layers, parts=PARTS, prefix="net.blocks.") -> set[str]:
    return {f"{prefix}{i}.{part}" for i in layers for part in parts}


# What is chosen


def test_two_blocked_layers_get_adapters_at_twenty_seeds(tmp_path: Path) -> None:
    for seed in range(20):
        callback = InflectionLoRA(rule="intersection", rank=2, batches=2)
        module, _ = fit(callback, tmp_path, User(seed), data=batches(2, seed=seed), max_epochs=1)
        assert callback.layers_taken == ["net.blocks.2", "net.blocks.5"], seed
        assert set(lora_modules(module)) == expected((2, 5)), seed


def test_it_chooses_what_diagnose_layers_finds(tmp_path: Path) -> None:
    callback = InflectionLoRA(rank=2, batches=3)
    fit(callback, tmp_path, User(blocked=False))
    module = User(blocked=False)
    found = diagnose_layers(module, batches(4)[:3])
    assert callback.layers_taken == found.chosen == ["net.blocks.2", "net.blocks.5"]  # by the default rule
    made = callback.diagnosis_made
    assert [r.gradient for r in made.rows] == pytest.approx([r.gradient for r in found.rows])
    assert made.samples == 48
    rows = {row.layer: row.index for row in found.rows}
    assert [row.score for row in callback.chosen.selection.chosen] == pytest.approx(
        [rows[row.group] for row in callback.chosen.selection.chosen]
    )
    assert len(callback.chosen.selection.rows) == 32
    assert "8 of 32 weights by highest inflection_index" in str(callback.chosen.selection)


def test_only_what_is_expected_is_trained_and_the_output_starts_where_it_was(tmp_path: Path) -> None:
    data = batches(4)

    class AtStart(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            plain = User().net.eval()
            pl_module.eval()
            with torch.no_grad():
                assert torch.equal(pl_module.net(data[0]["x"], data[0]["mask"]), plain(data[0]["x"], data[0]["mask"]))
            pl_module.train()

    module, run = fit(InflectionLoRA(rule="intersection", rank=2), tmp_path, extra=[AtStart()], data=data)
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    adapters = {f"{name}.lora_{ab}.default.weight" for name in expected((2, 5)) for ab in "AB"}
    assert trained == adapters | {"net.head.weight", "net.head.bias"}
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in module.parameters() if p.requires_grad} <= held
    assert all(p.any() for n, p in module.named_parameters() if ".lora_B." in n)
    frozen = {n.replace(".base_layer", ""): v for n, v in weights(module).items()}
    for name, value in weights(User()).items():
        if "head" not in name and "accuracy" not in name:
            assert torch.equal(frozen[name], value), name
    before = module.net.eval()(data[0]["x"], data[0]["mask"])
    assert set(merge_lora(module)) == expected((2, 5))
    torch.testing.assert_close(module.net(data[0]["x"], data[0]["mask"]), before, rtol=1e-4, atol=1e-5)
    assert sorted(module.state_dict()) == sorted(User().state_dict())


def test_layers_that_are_named_all_or_at_random(tmp_path: Path) -> None:
    def layers(**options) -> list[str]:
        callback = InflectionLoRA(rank=1, batches=1, **options)
        fit(callback, tmp_path, max_epochs=1, data=batches(1))
        return [int(name.rpartition(".")[2]) for name in callback.layers_taken]

    assert layers(layers=["net.blocks.7", "net.blocks.[01]"]) == [0, 1, 7]
    assert layers(layers="net.blocks.3") == [3]
    assert layers(layers=[0, -1]) == [0, 7]
    assert layers(layers="all") == list(range(8))
    drawn = [layers(layers="random", rule="intersection", seed=seed) for seed in range(4)]
    assert drawn == [sorted(random.Random(seed).sample(range(8), 2)) for seed in range(4)]
    assert layers(rule="ski", minimum=0.0, peaks=False, top_k=3) != [2, 5]
    assert len(layers(rule="intersection", band=1)) == 6


def test_projections(tmp_path: Path) -> None:
    for projections, parts in (
        ("attention+mlp", (*PARTS, "mlp.0", "mlp.2")),
        (["*.query", "*.value"], ("query", "value")),
    ):
        callback = InflectionLoRA(layers="net.blocks.1", projections=projections, rank=1, weak_features=None)
        module, _ = fit(callback, tmp_path, max_epochs=1, data=batches(1))
        assert set(lora_modules(module)) == expected((1,), parts)
        assert callback.diagnosis_made is None  # nothing asked for one


@pytest.mark.parametrize("kind", ["object", "file", "report", "model alone"])
def test_a_diagnosis_that_was_made_before(kind: str, tmp_path: Path) -> None:
    module = User()
    inner = kind == "model alone"
    found = diagnose_layers(
        module.net if inner else module, batches(2), loss=loss if inner else None, rule="intersection"
    )
    path = tmp_path / "report.json"
    if kind == "file":
        found.save(path)
    elif kind == "report":
        path.write_text(json.dumps({"kind": "report", "layer_diagnosis": found.record()}))
    callback = InflectionLoRA(path if path.exists() else found, rank=1)
    fit(callback, tmp_path, module)
    assert callback.layers_taken == ["net.blocks.2", "net.blocks.5"]
    assert callback.features is None
    other = InflectionLoRA(found, rule="ski", index_alpha=1.0, peaks=False, minimum=0.9, top_k=1, rank=1)
    fit(other, tmp_path)
    assert len(other.layers_taken) == 1


def test_a_diagnosis_of_another_model_is_an_error(tmp_path: Path) -> None:
    found = diagnose_layers(User(depth=9), batches(1), rule="intersection")
    with pytest.raises(
        ValueError, match=r"the diagnosis is of User with the layers net.blocks.0.* none of its modules"
    ):
        fit(InflectionLoRA(found), tmp_path)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no layer diagnosis"):
        fit(InflectionLoRA(tmp_path / "other.json"), tmp_path)


# What is said


def test_no_layer_is_an_error_that_says_what_to_pass(tmp_path: Path) -> None:
    class Flat(User):
        def __init__(self) -> None:
            super().__init__(blocked=False)
            for i in (2, 5):
                for linear in (self.net.blocks[i].query, self.net.blocks[i].key):
                    linear.weight.data.div_(8)
                    linear.bias.data.div_(8)

    with pytest.raises(ValueError, match="found no inflection layer among 8") as caught:
        fit(InflectionLoRA(), tmp_path, Flat())
    for word in ("layers=[...]", "rule='decay'", "top_k=2", "net.blocks.7", "flat"):
        assert word in str(caught.value)


def test_too_late_and_by_hand(tmp_path: Path) -> None:
    class Late(Callback):
        def on_fit_start(self, trainer, pl_module) -> None:
            trainer.callbacks.append(InflectionLoRA())

        def on_train_start(self, trainer, pl_module) -> None:
            trainer.callbacks[-1].on_train_start(trainer, pl_module)

    with pytest.raises(MisconfigurationException, match="InflectionLoRA came too late"):
        fit(Late(), tmp_path)

    class ByHand(User):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()

    with pytest.raises(ValueError, match="optimizes manually"):
        fit(InflectionLoRA(), tmp_path, ByHand())
    callback = InflectionLoRA(layers="net.blocks.2", weak_features=None, rank=1)
    module, _ = fit(callback, tmp_path, ByHand())
    assert set(lora_modules(module)) == expected((2,))


def test_a_layer_without_attention_is_an_error_with_its_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"net.head has no weights of attention projections.*attention.mlp"):
        fit(InflectionLoRA(layers="net.head", head=None, weak_features=None), tmp_path)


class Sorted(User):
    """Its labels are told by its features, or by nothing."""

    def __init__(self, told: bool) -> None:
        super().__init__()
        self.told = told

    def labelled(self) -> list[dict[str, Tensor]]:
        data = batches(8)
        if self.told:
            with torch.no_grad():
                for batch in data:
                    self.net.eval()(batch["x"], batch["mask"])
                    h, m = self.net.hidden[-1], batch["mask"][..., None]
                    mean = (h * m).sum(1) / m.sum(1)
                    batch["y"] = (mean[:, 0] > mean[:, 0].median()).long()
            self.net.train()
        return data


@pytest.mark.filterwarnings("default:.*base features are weak")
def test_weak_features_are_said_and_full_path_is_trained(tmp_path: Path) -> None:
    strong = Sorted(told=True)
    callback = InflectionLoRA(rule="intersection", full_path="if_weak", rank=1)
    fit(callback, tmp_path, strong, data=strong.labelled(), max_epochs=1)
    assert callback.features.p_value < 0.05
    assert callback.chosen.mode == "lora"

    weak = Sorted(told=False)
    plain = InflectionLoRA(rule="intersection", rank=1)
    with pytest.warns(UserWarning, match="base features are weak.*no better than chance.*full_path=True"):
        fit(plain, tmp_path, weak, data=weak.labelled(), max_epochs=1)
    assert plain.chosen.mode == "lora"
    whole = InflectionLoRA(rule="intersection", full_path="if_weak", every_n_epochs=1)
    module = Sorted(told=False)
    with pytest.warns(UserWarning, match="from net.blocks.2 up are trained wholly instead"):
        fit(whole, tmp_path, module, data=weak.labelled(), max_epochs=1)
    assert whole.chosen.mode == "full"
    assert whole.readings[-1].recovery > 0
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    own = [(f"net.blocks.{i}.", n) for i in range(2, 8) for n, _ in module.net.blocks[i].named_parameters()]
    assert trained == {a + b for a, b in own} | {"net.head.weight", "net.head.bias"}
    assert not lora_modules(module)


# What is measured as it trains


def test_the_blocked_signal_recovers(tmp_path: Path) -> None:
    """Adapters in the blocked layers carry the gradient again; the factor is the one of two diagnoses."""
    for seed in range(3):
        data = batches(4, seed=seed)
        callback = InflectionLoRA(rule="intersection", rank=4, every_n_epochs=10)
        module, _ = fit(callback, tmp_path, User(seed), data=data, max_epochs=20)
        assert [r.step for r in callback.readings] == [0, 40, 80]
        first, last = callback.readings[0], callback.readings[-1]
        assert first.recovery == first.relative_recovery == 1.0
        now = diagnose_layers(module, data[:1], rule="decay")
        before = diagnose_layers(User(seed), data[:1], rule="decay")
        logs = [math.log(a.input_gradient / b.input_gradient) for a, b in zip(now.rows[:6], before.rows[:6])]
        assert last.recovery == pytest.approx(math.exp(sum(logs) / 6), rel=1e-4)
        error = before.output_error / now.output_error
        assert last.relative_recovery == pytest.approx(math.exp(sum(logs) / 6) * error, rel=1e-4)
        assert last.recovery > 2, seed
        assert last.relative_recovery > 2, seed


def test_a_run_that_diverges_goes_on_and_says_so(tmp_path: Path) -> None:
    class Diverging(User):
        def training_step(self, batch, batch_idx):
            value = super().training_step(batch, batch_idx)
            return value * torch.nan if self.trainer.global_step >= 4 else value

    callback = InflectionLoRA(rule="intersection", rank=1, every_n_epochs=1)
    with pytest.warns(UserWarning, match="could not be measured again.*nan"):
        fit(callback, tmp_path, Diverging(), max_epochs=2)
    assert [r.step for r in callback.readings] == [0]


@pytest.mark.parametrize("interval", [{"every_n_epochs": 1}, {"every_n_steps": 3}])
def test_looking_again_disturbs_nothing(interval: dict, tmp_path: Path) -> None:
    def accumulating(callback, folder):
        return fit(callback, folder, User(batch_norm=True), max_epochs=3, accumulate_grad_batches=2)

    plain, _ = accumulating(InflectionLoRA(rule="intersection", rank=2), tmp_path)
    watching = InflectionLoRA(rule="intersection", rank=2, **interval)
    watched, run = accumulating(watching, tmp_path)
    assert same(weights(plain), weights(watched))
    steps = [r.step for r in watching.readings]
    assert steps == ([0, 2, 4, 6] if "every_n_epochs" in interval else [0, 3, 6])
    assert run.callback_metrics["inflection_lora/recovery"] == pytest.approx(watching.readings[-1].recovery)
    last = watching.readings[-1]
    assert last.entropy["net.blocks.5"] < min(last.entropy[f"net.blocks.{i}"] for i in (0, 1, 3, 4, 6, 7))
    assert run.callback_metrics["inflection_lora/entropy/net.blocks.5"] == pytest.approx(last.entropy["net.blocks.5"])
    assert "inflection_lora/gradient_norm/net.blocks.0" in run.callback_metrics


def test_files_and_figures(tmp_path: Path) -> None:
    callback = InflectionLoRA(rule="intersection", rank=2, every_n_epochs=1, log_figures=True)
    _, run = fit(callback, tmp_path, logger=CSVLogger(tmp_path))
    folder = Path(run.log_dir)
    again = LayerDiagnosis.load(folder / "inflectionlora_diagnosis.json")
    assert again.chosen == callback.layers_taken
    assert (folder / "inflectionlora_selection.json").exists()
    assert len(callback.plot().axes) == 2
    told, _ = fit(InflectionLoRA(folder / "inflectionlora_diagnosis.json", rank=2), tmp_path)
    named, _ = fit(InflectionLoRA(layers=callback.layers_taken, rank=2, weak_features=None), tmp_path)
    assert same(weights(told), weights(named))
    with pytest.raises(ValueError, match="every_n_steps"):
        InflectionLoRA().plot()


# Checkpoints


@pytest.mark.parametrize("save", ["all", "adapters"])
def test_a_resumed_run_has_the_stored_layers_and_is_the_uninterrupted_one(save: str, tmp_path: Path) -> None:
    options = {"rule": "intersection", "rank": 2, "every_n_epochs": 1, "save": save}
    whole_callback = InflectionLoRA(**options)
    whole, _ = fit(whole_callback, tmp_path, max_epochs=4)

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    _, run = fit(InflectionLoRA(**options), tmp_path, extra=[Stop()], max_epochs=4)
    path = tmp_path / "two.ckpt"
    run.save_checkpoint(path)
    assert (path.stat().st_size < 150_000) == (save == "adapters")
    state = torch.get_rng_state()
    module = User()
    torch.set_rng_state(state)
    later = InflectionLoRA(**options)
    # other data, on which other layers might be chosen
    trainer([later], tmp_path, max_epochs=4).fit(module, loader(batches(4)), ckpt_path=path, weights_only=True)
    assert later.layers_taken == whole_callback.layers_taken
    assert same(weights(module), weights(whole))
    assert [r.record() for r in later.readings] == [r.record() for r in whole_callback.readings]
    assert later.diagnosis_made.chosen == whole_callback.diagnosis_made.chosen
    tested = User()
    quiet = trainer([InflectionLoRA(**options)], tmp_path)
    quiet.test(tested, loader(batches(2)), ckpt_path=path, weights_only=True, verbose=False)
    assert set(lora_modules(tested)) == expected((2, 5))


def test_with_kappatune_the_union_is_trained(tmp_path: Path) -> None:
    kappa = KappaTune(1, by="depth", modules="net.blocks.7.mlp*", head=None)
    module, _ = fit(InflectionLoRA(rule="intersection", rank=1), tmp_path, extra=[kappa])
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert "net.blocks.7.mlp.2.weight" in trained
    assert "net.blocks.2.query.lora_A.default.weight" in trained


# Arguments


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rule": "other"}, "rule must be one of"),
        ({"index_alpha": 2.0}, "alpha must be between"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"batches": 0}, "batches must be"),
        ({"weak_features": 1.0}, "weak_features must be"),
        ({"full_path": "maybe"}, "full_path must be"),
        ({"full_path": "if_weak", "weak_features": None}, "needs weak_features"),
        ({"full_path": "if_weak", "diagnosis": "report.json"}, "needs weak_features"),
        ({"layers": []}, "at least one layer"),
        ({"projections": []}, "empty list"),
        ({"every_n_steps": 0}, "every_n_steps must be"),
        ({"rank": 0}, "rank must be"),
    ],
)
def test_arguments_are_checked_at_once(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        InflectionLoRA(**options)


def test_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    for given in (
        {"diagnosis": "report.json", "layers": [0, 2], "full_path": True, "projections": ["*query"]},
        {"layers": "random", "full_path": "if_weak", "every_n_steps": 5, "index_alpha": 0.7},
        {"layers": ["a.*", "b"], "weak_features": None},
    ):
        config = {"class_path": "lightning_entropy.InflectionLoRA", "init_args": given}
        built = parser.instantiate_classes(parser.parse_object({"callback": config})).callback
        for name, value in given.items():
            found = built.rule["alpha"] if name == "index_alpha" else getattr(built, name, None)
            assert found == value or name == "every_n_steps", (name, found)


def test_a_module_in_no_block_that_is_named_is_watched_too(tmp_path: Path) -> None:
    class Odd(LightningModule):
        """Its attention is in blocks, and what is adapted beside them."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))
            self.mixer = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
            self.head = nn.Linear(8, 3)

        def training_step(self, batch, batch_idx):
            x = batch["x"]
            for block in self.blocks:
                x = block(x)
            return F.cross_entropy(self.head(self.mixer(x).mean(1)), batch["y"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = InflectionLoRA(layers="mixer", projections="attention+mlp", rank=1, every_n_epochs=1)
    module, _ = fit(callback, tmp_path, Odd())
    assert set(lora_modules(module)) == {"mixer.0", "mixer.2"}
    assert list(callback.readings[-1].gradient_norm) == ["mixer"]
