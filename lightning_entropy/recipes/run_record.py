"""One training of a recipe, in this process and quietly, as a record of numbers."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import logging
import math
import platform
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from lightning_entropy import verbosity
from lightning_entropy.recipes.bag_models import import_path
from lightning_entropy.recipes.catalog import Recipe
from lightning_entropy.recipes.step_record import StepRecord
from lightning_entropy.training.lightning import (
    DISTRIBUTION,
    Callback,
    LightningDataModule,
    LightningModule,
    Trainer,
    cli,
)

_QUIET_TRAINER = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
_PACKAGES = ("lightning-entropy", "torch", "lightning", "pytorch-lightning", "torchmetrics", "torchmil", "numpy")


class Parts(NamedTuple):
    """What a configuration describes."""

    trainer: Trainer
    model: LightningModule
    data: LightningDataModule


class CurveRecorder(Callback):
    """Keeps every epoch's logged numbers.

    ``curves[name]`` has one entry an epoch, ``None`` where there was none. What is logged by step has the value of
    the epoch's last step. ``before[name]`` is what a validation before training gave, where ``num_sanity_val_steps`` is
    -1, so that it saw all of the data.
    """

    def __init__(self) -> None:
        self.curves: dict[str, list[float | None]] = {}
        self.before: dict[str, float | None] = {}
        self._epochs = 0

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the model gives before it is trained."""
        if math.isinf(trainer.num_sanity_val_steps):  # Lightning's form of -1
            self.before = {name: _finite(value) for name, value in trainer.callback_metrics.items()}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the numbers of the epoch."""
        for name, value in trainer.callback_metrics.items():
            number = float(value)
            curve = self.curves.setdefault(name, [None] * self._epochs)
            curve.append(number if math.isfinite(number) else None)
        self._epochs += 1
        for curve in self.curves.values():
            curve.extend([None] * (self._epochs - len(curve)))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's and this package's notices and warnings; errors still raise."""
    loggers = [logging.getLogger(name) for name in (DISTRIBUTION, "lightning.fabric", "lightning_fabric")]
    loggers.append(verbosity.logger)
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def build(recipe: Recipe, config: Mapping[str, Any]) -> Parts:
    """Seed, and make Trainer, model and data from a configuration, checked as on the command line.

    Args:
        recipe: names the classes.
        config: ``seed_everything``, ``trainer``, ``model`` and ``data``.

    Raises:
        ValueError: if a key or a value of the configuration is wrong.
    """
    trainer = dict(config.get("trainer") or {})

    class ParsedCLI(cli().LightningCLI):  # type: ignore[misc,name-defined]
        def parse_arguments(self, parser: Any, args: Any) -> None:
            self.config = parser.parse_object(args)  # whatever the command line of this process is
            for key, value in trainer.items():
                if type(value) is int and isinstance(self.config.trainer[key], float):
                    self.config.trainer[key] = value  # limit_train_batches: 1 is one batch, and 1.0 all of them

    try:
        made = ParsedCLI(
            import_path(recipe.model, what="recipe model"),
            import_path(recipe.data, what="recipe data"),
            args=copy.deepcopy(dict(config)),  # it changes what it is given
            run=False,
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"exit_on_error": False},
        )
    except (TypeError, KeyError, argparse.ArgumentError) as error:
        raise ValueError(f"the configuration of {recipe.name} is wrong: {error}") from error
    return Parts(made.trainer, made.model, made.datamodule)


def fingerprint(config: Mapping[str, Any]) -> str:
    """A hash of a configuration: equal for equal settings whatever the order of the keys."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _for_selection(config: dict[str, Any], select: str) -> dict[str, Any]:
    trainer = {**config.get("trainer", {}), **_QUIET_TRAINER}
    if select == "last":
        callbacks = trainer.get("callbacks") or []
        trainer["callbacks"] = [c for c in callbacks if not str(c["class_path"]).endswith("ModelCheckpoint")]
        trainer["enable_checkpointing"] = False
    return {**config, "trainer": trainer}


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lightning leaves the process after Ctrl-C and SIGTERM (status 0 after the latter); its caller may not want to."""
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error


def train_and_test(recipe: Recipe, config: Mapping[str, Any], *, select: str = "best") -> dict[str, Any]:
    """Train a configuration, test it, and say what was seen.

    Args:
        recipe: names the classes.
        config: the configuration; its logger and progress bar are switched off.
        select: test the ``"best"`` checkpoint (by what the configuration's ModelCheckpoint monitors) or the
            ``"last"`` epoch (no checkpoint is written).

    Returns:
        ``metrics`` of the test bags, ``curves`` by epoch, ``before`` training, ``steps`` where the recipe asks for
        them, ``best_epoch``, ``seconds``, number of bags, ``trained_parameters`` (how many numbers the optimizers had),
        versions.

    Raises:
        ValueError: if the configuration is wrong, or ``"best"`` is wanted without a monitored checkpoint.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="lightning-entropy-") as folder, quiet():
        prepared = _for_selection(dict(config), select)
        prepared["trainer"]["default_root_dir"] = folder
        trainer, model, data = build(recipe, prepared)
        recorder, steps = CurveRecorder(), StepRecord(recipe.by_step)
        cast(Any, trainer).callbacks.append(recorder)
        if recipe.by_step:
            trainer.loggers = [steps]
        with _interruptible():
            trainer.fit(model, datamodule=data)
        if trainer.interrupted:
            raise KeyboardInterrupt
        fit_seconds = time.perf_counter() - start
        trained = sum(p.numel() for o in trainer.optimizers for group in o.param_groups for p in group["params"])
        report = None if recipe.report is None else import_module(recipe.report)
        observe: Any = getattr(report, "observed", None)
        observed = {} if observe is None else observe(trainer)
        trainer.loggers = []  # what is logged while testing belongs to no step
        best_epoch = None
        if select == "best":
            checkpoint: Any = trainer.checkpoint_callback
            if checkpoint is None or not checkpoint.best_model_path:
                raise ValueError("select='best' needs a ModelCheckpoint with a monitor: use select='last'")
            state = torch.load(checkpoint.best_model_path, map_location="cpu", weights_only=True)
            best_epoch = state["epoch"]
            model.load_state_dict(state["state_dict"])
        with _interruptible():
            tested = trainer.test(model, datamodule=data, verbose=False)[0]
    bags = {split: len(getattr(data, split)) for split in ("train", "val", "test") if hasattr(data, split)}
    record = {
        "metrics": {
            name.removeprefix("test/"): _finite(value) for name, value in tested.items() if name.startswith("test/")
        },
        "curves": recorder.curves,
        "before": recorder.before,
        **({"steps": steps.values} if recipe.by_step else {}),
        "best_epoch": best_epoch,
        "bags": bags,
        "trained_parameters": trained,
        "seconds": round(time.perf_counter() - start, 3),
        "fit_seconds": round(fit_seconds, 3),
        "versions": versions(),
        "device": str(trainer.strategy.root_device),
    }
    if report is not None:
        record |= observed
        record["metrics"] |= report.summarize(record)
    return record


def read_record(path: Path) -> dict[str, Any] | None:
    """Read a run's file; ``None`` if it is absent or not a whole record."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return None
    whole = isinstance(record, dict) and {"fingerprint", "metrics", "config"} <= record.keys()
    return record if whole else None


__all__ = ["CurveRecorder", "Parts", "build", "fingerprint", "quiet", "read_record", "train_and_test", "versions"]
