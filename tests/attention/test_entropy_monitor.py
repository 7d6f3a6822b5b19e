"""The monitor in a Trainer: exact numbers, the run unchanged, alarms, resumed runs, two processes."""

from __future__ import annotations

import csv
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_entropy import AttentionEntropyMonitor, AttentionEntropyRegularizer, attention_entropy_report
from tests.suite.running import loader, same, trainer, weights
from tests.user_modules import MeanClassifier, TokenClassifier, bags


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run_loss(module: LightningModule, batch: Any) -> None:
    """A probe's forward that YAML can name."""
    module.loss(batch)


class Logged(Callback):
    """The losses of a run, and the random state at its end."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].clone())

    def on_fit_end(self, trainer, pl_module) -> None:
        self.state = torch.get_rng_state()


class Validated(TokenClassifier):
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    test_step = validation_step


class Normed(Validated):
    """Batch norm, dropout and a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.pool(self.norm(features.transpose(1, 2)).transpose(1, 2), mask))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch["features"], batch["mask"]), batch["label"])


def maps_of(module: TokenClassifier, batch: dict[str, Tensor]) -> list[Tensor]:
    """Attention maps of a TokenClassifier without dropout, from its own layers, in float64."""
    module = module.double()
    mask, x = batch["mask"], module.pool.embed(batch["features"].double())
    maps = []
    for layer in module.pool.layers:
        maps.append(layer.self_attn(x, x, x, key_padding_mask=~mask, average_attn_weights=False)[1])
        x = layer(x, src_key_padding_mask=~mask)
    return maps


def expected_heads(p: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy in nats, normalised entropy and sink mass of each head."""
    h = -(p * torch.where(p > 0, p, 1.0).log()).sum(-1)
    n = mask.sum(-1).double().log()[:, None, None]
    return h.mean((0, 2)), (h / n).mean((0, 2)), p.mean(2).amax(-1).mean(0)


@pytest.mark.parametrize("probe", [None, "train"])
def test_the_numbers_are_those_of_the_maps(probe: str | None, tmp_path: Path) -> None:
    seed_everything(1, verbose=False)
    module = TokenClassifier(dropout=0.0, lr=0.0)
    batch = bags()[0]
    monitor = AttentionEntropyMonitor(probe=probe, probe_forward=run_loss if probe else None, log_heads=True)
    run = trainer([monitor], tmp_path, max_epochs=1, logger=CSVLogger(tmp_path))
    run.fit(module, loader(bags()))
    rows = monitor.history
    assert {row["step"] for row in rows} == {0 if probe is None else 1}
    names = [f"pool.layers.{i}.self_attn" for i in range(2)]
    assert [(row["layer"], row["head"]) for row in rows] == [(name, i) for name in names for i in range(2)]
    logged = {k: float(v) for k, v in rows_of(Path(run.logger.log_dir, "metrics.csv"))[0].items() if v}
    every = []
    for name, p in zip(names, maps_of(module, batch)):
        h, e, sink = (x.tolist() for x in expected_heads(p, batch["mask"]))
        every += e
        of_layer = [row for row in rows if row["layer"] == name]
        for i, row in enumerate(of_layer):
            assert row["entropy"] == pytest.approx(h[i], abs=1e-5)
            assert row["normalized"] == pytest.approx(e[i], abs=1e-5)
            assert row["sink"] == pytest.approx(sink[i], abs=1e-5)
            assert logged[f"attention_entropy/{name}/head_{i}"] == pytest.approx(e[i], abs=1e-5)
        assert logged[f"attention_entropy/{name}"] == pytest.approx(sum(e) / 2, abs=1e-5)
    assert logged["attention_entropy/mean"] == pytest.approx(sum(every) / 4, abs=1e-5)
    assert logged["attention_entropy/min"] == pytest.approx(min(every), abs=1e-5)
    assert float(run.callback_metrics["attention_entropy/mean"]) == pytest.approx(sum(every) / 4, abs=1e-5)
    written = rows_of(Path(run.logger.log_dir, "attention_entropy.csv"))
    assert [float(row["normalized"]) for row in written] == pytest.approx(every, abs=1e-5)
    assert monitor.path == Path(run.logger.log_dir, "attention_entropy.csv")
    assert len(list(Path(run.logger.log_dir, "figures", "attention_entropy").glob("*.png"))) == 1
    assert monitor.plot().axes


OPTIONS: list[dict[str, Any]] = [
    {},
    {"queries": 4},
    {"probe": "train"},
    {"probe": "val"},
    {"probe": bags()[3], "probe_forward": run_loss},
]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("options", OPTIONS, ids=["live", "sampled", "train", "val", "batch"])
def test_the_run_is_bitwise_the_run_without_it(options: dict, precision: str, tmp_path: Path) -> None:
    def fit(callbacks: list) -> tuple[dict[str, Tensor], Logged]:
        seed_everything(3, verbose=False)
        module, logged = Normed(), Logged()
        run = trainer([*callbacks, logged], tmp_path, precision=precision, accumulate_grad_batches=2)
        run.fit(module, loader(bags()), loader(bags(2)))
        logged.losses.append(run.callback_metrics["val_loss"])
        return weights(module), logged

    plain, plain_log = fit([])
    monitor = AttentionEntropyMonitor(every_n_steps=1, patience=100, **options)
    watched, watched_log = fit([monitor])
    assert same(plain, watched)
    assert torch.equal(plain_log.state, watched_log.state)
    for a, b in zip(plain_log.losses, watched_log.losses):
        assert torch.equal(a, b)
    steps = sorted({row["step"] for row in monitor.history})
    first = 1 if options.get("probe") is not None else 0
    # a step is read once however many batches it accumulates, the probe first after the first batch
    assert steps == ([0, *range(1, 9)] if first else list(range(8)))
    assert all(math.isfinite(row["normalized"]) for row in monitor.history)


@pytest.mark.parametrize("every", [1, 3, 100])
def test_reads_every_n_optimizer_steps(every: int, tmp_path: Path) -> None:
    monitor = AttentionEntropyMonitor(every_n_steps=every, patience=100)
    trainer([monitor], tmp_path).fit(TokenClassifier(), loader(bags()))
    assert sorted({row["step"] for row in monitor.history}) == list(range(0, 16, every))


class Sharp(TokenClassifier):
    """Heads as given: ``"sink"`` looks at the first token, ``"self"`` at its own position alone, else uniform."""

    def __init__(self, *heads: str) -> None:
        super().__init__(dropout=0.0, lr=0.0)
        self.kinds = heads

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        features = batch["features"]
        count = features.shape[1]
        logits = features.new_zeros(len(self.kinds), count, count)
        for i, kind in enumerate(self.kinds):
            if kind == "sink":
                logits[i, :, 0] = 12.0
            elif kind == "self":
                logits[i].fill_diagonal_(40.0)
        p = torch.softmax(logits.expand(len(features), -1, -1, -1), dim=-1)
        mixed = p.mean(1) @ features
        return super().loss({**batch, "features": mixed})


def test_collapse_is_alarmed_and_sinks_are_not(tmp_path: Path) -> None:
    def run(*kinds: str, **options: Any) -> tuple[AttentionEntropyMonitor, list[str], Any]:
        monitor = AttentionEntropyMonitor(every_n_steps=2, patience=3, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = trainer([monitor], tmp_path)
            run.fit(Sharp(*kinds), loader(bags()))
        return monitor, [str(w.message) for w in caught if "attention" in str(w.message)], run

    monitor, messages, fitted = run("sink", "self", "uniform", "sink")
    (message,) = messages
    assert "AttentionEntropyMonitor: attention has collapsed in 1 of 8 heads (Sharp: 1)" in message
    assert "up to step 4" in message
    assert monitor.report.sinks == [("Sharp", 0), ("Sharp", 3)]
    assert monitor.report.collapsed == [("Sharp", 1)]
    entropies = {row["head"]: row["normalized"] for row in monitor.history if row["layer"] == "Sharp"}
    assert max(entropies[0], entropies[1], entropies[3]) < 0.05  # by entropy alone they are alike
    assert float(fitted.callback_metrics["attention_entropy/sink_fraction"]) == pytest.approx(2 / 8)
    assert float(fitted.callback_metrics["attention_entropy/collapsed_fraction"]) == pytest.approx(1 / 8)
    assert run("sink", "sink")[1] == []
    # without the sinks' rest both would be alarmed
    assert run("sink", "sink", sink=0.999999)[1] != []


def test_figures_and_file_survive_an_exception(tmp_path: Path) -> None:
    class Stop(Callback):
        def __init__(self, error: type[BaseException]) -> None:
            self.error = error

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if batch_idx == 5:
                raise self.error("planted")

    for i, error in enumerate((RuntimeError, KeyboardInterrupt)):
        monitor = AttentionEntropyMonitor(every_n_steps=2)
        logger = CSVLogger(tmp_path, version=i)
        with pytest.raises((RuntimeError, SystemExit)):
            trainer([monitor, Stop(error)], tmp_path, logger=logger).fit(TokenClassifier(), loader(bags()))
        assert len(rows_of(Path(logger.log_dir, "attention_entropy.csv"))) == 3 * 4
        assert list(Path(logger.log_dir, "figures", "attention_entropy").glob("*.png"))


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
@pytest.mark.parametrize("probe", [None, "train"])
@pytest.mark.parametrize("version", [0, 1])
def test_a_resumed_run_continues_history_and_file(probe: str | None, version: int, tmp_path: Path) -> None:
    def build() -> AttentionEntropyMonitor:
        forward = None if probe is None else run_loss
        return AttentionEntropyMonitor(every_n_steps=3, patience=100, probe=probe, probe_forward=forward)

    def fit(monitor: AttentionEntropyMonitor, folder: Path, epochs: int, version: int = 0, **options: Any) -> Any:
        torch.manual_seed(0)
        module = TokenClassifier(dropout=0.0)
        run = trainer([monitor], tmp_path, max_epochs=epochs, logger=CSVLogger(folder, version=version))
        run.fit(module, loader(bags()), **options)
        return run

    whole, half, later = build(), build(), build()
    fit(whole, tmp_path / "whole", 4)
    first = fit(half, tmp_path / "parts", 2)
    first.save_checkpoint(tmp_path / "half.ckpt")
    assert half.path is not None
    with half.path.open("a") as file:  # the run went on after its last checkpoint, and was killed
        file.write("17,pool.layers.0.self_attn,0,1,1,1,1\n18,pool.lay")
    fit(later, tmp_path / "parts", 4, version, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert later.history == whole.history
    assert later.path is not None
    assert whole.path is not None
    assert later.path.parent.name == f"version_{version}"
    assert later.path.read_text() == whole.path.read_text()
    # a new run of the same instance begins anew, and a new run in the same folder overwrites nothing
    fit(later, tmp_path / "parts", 1, version)
    assert max(row["step"] for row in later.history) <= 8
    assert later.path.name == "attention_entropy-1.csv"


def test_validation_and_test_runs_log_and_find_nothing_loudly(tmp_path: Path) -> None:
    module, batches = Validated(dropout=0.0), bags(4)
    monitor = AttentionEntropyMonitor(every_n_steps=2)
    (values,) = trainer([monitor], tmp_path).validate(module, loader(batches), verbose=False)
    assert monitor.report is not None
    maps = [maps_of(module, batches[i]) for i in (0, 2)]
    e = torch.stack([torch.stack([expected_heads(p, batches[i]["mask"])[1] for p in m]) for i, m in zip((0, 2), maps)])
    assert values["attention_entropy/mean"] == pytest.approx(e.mean().item(), abs=1e-5)
    module.float()
    (tested,) = trainer([monitor], tmp_path).test(module, loader(batches), verbose=False)
    assert tested["attention_entropy/mean"] == pytest.approx(e.mean().item(), abs=1e-5)
    assert monitor.history == []
    assert monitor.path is None

    class Nothing(MeanClassifier):
        validation_step = Validated.validation_step

    with pytest.raises(ValueError, match="no attention between tokens ran in Nothing"):
        trainer([monitor], tmp_path).validate(Nothing(), loader(batches), verbose=False)


class Manual(TokenClassifier):
    def __init__(self, through_lightning: bool) -> None:
        super().__init__(dropout=0.0)
        self.automatic_optimization = False
        self.through_lightning = through_lightning

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss) if self.through_lightning else loss.backward()
            optimizer.step()


@pytest.mark.parametrize("through_lightning", [True, False])
def test_manual_optimization(through_lightning: bool, tmp_path: Path) -> None:
    monitor = AttentionEntropyMonitor(every_n_steps=4, patience=100)
    trainer([monitor], tmp_path, max_epochs=1).fit(Manual(through_lightning), loader(bags()))
    assert sorted({row["step"] for row in monitor.history}) == [0, 4, 8, 12]  # two optimizer steps a batch


class Checkpointed(TokenClassifier):
    def __init__(self, reentrant: bool) -> None:
        super().__init__(dropout=0.0)
        self.reentrant = reentrant

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        z = torch.utils.checkpoint.checkpoint(
            self.pool, batch["features"].requires_grad_(), batch["mask"], use_reentrant=self.reentrant
        )
        return nn.functional.cross_entropy(self.head(z), batch["label"])


@pytest.mark.parametrize("kind", ["reentrant", "nonreentrant", "compiled"])
def test_checkpointed_and_compiled_models_read_the_same(kind: str, tmp_path: Path) -> None:
    histories = []
    for plain in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        module: Any = TokenClassifier(dropout=0.0) if plain or kind == "compiled" else Checkpointed(kind == "reentrant")
        module = module.double()
        subject = torch.compile(module, backend="aot_eager") if kind == "compiled" and not plain else module
        monitor = AttentionEntropyMonitor(every_n_steps=3, patience=100)
        trainer([monitor], tmp_path, max_epochs=1).fit(subject, loader(bags(dtype=torch.float64)))
        histories.append(monitor.history)
    assert len(histories[0]) == len(histories[1]) == 3 * 4
    for a, b in zip(*histories):
        assert (a["step"], a["layer"], a["head"]) == (b["step"], b["layer"], b["head"])
        assert a["normalized"] == pytest.approx(b["normalized"], rel=1e-6)


def test_two_processes_log_the_mean_of_unlike_data(tmp_path: Path) -> None:
    batches = bags(2)  # one batch a rank

    def fit(data: list, folder: Path, **options: Any) -> list[dict[str, str]]:
        seed_everything(3, verbose=False)
        module = Selective()
        run = trainer([AttentionEntropyMonitor()], folder, max_epochs=1, **options)
        run.fit(module, DataLoader(data, batch_size=None, shuffle=False))
        return rows_of(folder / "attention_entropy.csv")

    strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo", find_unused_parameters=True)
    joint = fit(batches, tmp_path / "joint", devices=2, strategy=strategy)
    apart = [fit([batch], tmp_path / str(i)) for i, batch in enumerate(batches)]
    assert len(list((tmp_path / "joint").glob("*.csv"))) == 1
    layers = [f"pool.layers.{i}.self_attn" for i in range(2)]
    assert [row["layer"] for row in joint] == [layers[0]] * 2 + [layers[1]] * 2
    for name in ("normalized", "sink"):
        both = [[float(row[name]) for row in rows] for rows in apart]
        assert len(both[0]) != len(both[1])  # one rank lacks a layer
        full, part = (both[0], both[1]) if len(both[0]) == 4 else (both[1], both[0])
        expected = [(a + b) / 2 for a, b in zip(full[:2], part)] + full[2:]
        assert [float(row[name]) for row in joint] == pytest.approx(expected, abs=1e-5)


class Selective(TokenClassifier):
    """Leaves its second layer out in batches that start with label 0... of the second rank's data only."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        layers = self.pool.layers
        try:
            if not bool(batch["mask"][0].all()):
                self.pool.layers = layers[:1]
            return super().loss(batch)
        finally:
            self.pool.layers = layers


def test_beside_a_term_that_reads_too(tmp_path: Path) -> None:
    results = []
    for probe in (None, "train"):
        for order in (1, -1):
            monitor = AttentionEntropyMonitor(
                every_n_steps=1, patience=100, probe=probe, probe_forward=run_loss if probe else None
            )
            callbacks = [AttentionEntropyRegularizer(3.0, objective="floor", target=0.99), monitor][::order]
            torch.manual_seed(0)
            module = TokenClassifier(dropout=0.0)
            trainer(callbacks, tmp_path).fit(module, loader(bags()))
            results.append(weights(module))
            assert len({row["layer"] for row in monitor.history}) == 2
    assert all(same(results[0], other) for other in results[1:])


def test_says_once_what_it_reads(announced: list[str], tmp_path: Path) -> None:
    monitor = AttentionEntropyMonitor(queries=4, csv=False)
    trainer([monitor], tmp_path).fit(TokenClassifier(), loader(bags()))
    assert [text for text in announced if "Monitor" in text] == [
        "AttentionEntropyMonitor: reading 2 attentions (pool.layers.0.self_attn, pool.layers.1.self_attn; 4 of 9 rows) "
        "every 50 steps"
    ]
    assert not list(tmp_path.glob("*.csv"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"queries": 0}, "queries must be at least 1, got 0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"probe": "test"}, "probe must be None, 'train', 'val' or a batch, got 'test'"),
        ({"probe_forward": run_loss}, "probe_forward runs a probe, and probe is None"),
        ({"collapse": 2.0}, "collapse must be"),
    ],
)
def test_arguments_are_checked_at_once(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionEntropyMonitor(**arguments)


def test_a_probe_of_validation_needs_validation(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="probe='val' needs validation batches"):
        trainer([AttentionEntropyMonitor(probe="val")], tmp_path).fit(TokenClassifier(), loader(bags()))


def test_report_of_a_model_without_a_trainer() -> None:
    torch.manual_seed(0)
    module, batch = TokenClassifier(), bags()[0]
    state = torch.get_rng_state()
    report = attention_entropy_report(module.pool, batch["features"], batch["mask"])
    assert torch.equal(torch.get_rng_state(), state)
    assert module.pool.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    module.eval()
    for values, p in zip(report.heads.values(), maps_of(module, batch)):
        h, e, sink = expected_heads(p, batch["mask"])
        torch.testing.assert_close(values[:3].double(), torch.stack([h, e, sink]), atol=1e-5, rtol=0)
    assert str(report).splitlines()[1].startswith("layers.0.self_attn      2")
    assert report.plot().axes
    with pytest.raises(ValueError, match="attention_entropy_report: no attention between tokens ran in Linear"):
        attention_entropy_report(nn.Linear(2, 2), torch.zeros(1, 2))
