"""A LightningModule at the moment at which a fit would begin: built, with its data, on its device."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lightning_entropy.recipes.bag_models import import_path
from lightning_entropy.recipes.catalog import find_recipe
from lightning_entropy.recipes.diagnosis.subject import Subject, load_weights, take
from lightning_entropy.training.kept_state import silent
from lightning_entropy.training.lightning import Callback, LightningDataModule, LightningModule, Trainer, cli

Measure = Callable[[Subject, list[Any]], Any]


class _AtFitStart(Callback):
    """Measures once, when everything that a fit needs is there, and trains nothing."""

    def __init__(self, name: str, measure: Measure, batches: int, checkpoint: str | None) -> None:
        self.name, self.measure, self.batches, self.checkpoint = name, measure, batches, checkpoint
        self.result: Any = None
        self.loaded = ""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.checkpoint is not None:
            self.loaded = load_weights(pl_module, self.checkpoint)
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        loader = (datamodule if datamodule is not None else pl_module).train_dataloader()
        found = [pl_module.transfer_batch_to_device(b, pl_module.device, 0) for b in take(loader, self.batches)]
        with silent(pl_module):
            self.result = self.measure(_subject(self.name, pl_module), found)


def _subject(name: str, module: LightningModule) -> Subject:
    if not module.automatic_optimization:
        raise ValueError(
            f"{name} optimizes by hand: its training_step would change it. Diagnose the model that it trains, in "
            "Python: diagnose_layers(model, batches, loss=...)"
        )

    def loss(_: nn.Module, batch: Any) -> Any:
        output = module.training_step(batch, 0)
        output = output["loss"] if isinstance(output, Mapping) else output
        if output is None:
            raise ValueError(f"{type(module).__name__}.training_step returns no loss on the first batch")
        return output

    return Subject(name, module, "batches", lambda batch: loss(module, batch), loss, "its training_step")


def diagnose_module(
    name: str,
    measure: Measure,
    *,
    data: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    batches: int = 8,
    checkpoint: str | os.PathLike[str] | None = None,
    accelerator: str = "auto",
) -> tuple[Any, str]:
    """Build a LightningModule and its data as a fit would, and measure it before the first step.

    Args:
        name: dotted path of a LightningModule, or ``recipe:NAME`` for a packaged recipe or a YAML file.
        measure: called with the subject and its batches.
        data: dotted path of a LightningDataModule; None takes the recipe's, or the module's own ``train_dataloader``.
        arguments: of the LightningModule.
        batches: how many training batches are read.
        checkpoint: weights to load.
        accelerator: of the Trainer.

    Returns:
        What ``measure`` returned, and what was loaded, in words.

    Raises:
        ValueError: if the class is not found, cannot be built from the arguments, or has no training data.
    """
    if name.startswith("recipe:"):
        module, datamodule = _from_recipe(name.partition(":")[2])
    else:
        module, datamodule = _built(name, LightningModule, arguments or {}), None
    if data is not None:
        datamodule = _built(data, LightningDataModule, {})
    if datamodule is None and type(module).train_dataloader is LightningModule.train_dataloader:
        raise ValueError(
            f"{name} defines no train_dataloader: give --data with the dotted path of a LightningDataModule"
        )
    callback = _AtFitStart(name, measure, batches, None if checkpoint is None else str(Path(checkpoint)))
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        logger=False,
        callbacks=[callback],
        max_epochs=1,
        limit_train_batches=0,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*limit_train_batches.*")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*trying to `self.log\\(\\)`.*")
        trainer.fit(module, datamodule=datamodule)
    return callback.result, callback.loaded


def _built(path: str, base: type, arguments: Mapping[str, Any]) -> Any:
    cls = import_path(path, what="class")
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(f"{path} is no {base.__name__}")
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"{path} cannot be built from {dict(arguments)}: {error}. Give --arguments as JSON") from error


def _from_recipe(name: str) -> tuple[LightningModule, LightningDataModule]:
    recipe = find_recipe(name)
    built = cli().LightningCLI(
        import_path(recipe.model, what="recipe model"),
        import_path(recipe.data, what="recipe data"),
        args=["--config", str(recipe.path)],
        run=False,
        save_config_callback=None,
        auto_configure_optimizers=False,
        seed_everything_default=0,
    )
    return built.model, built.datamodule


__all__ = ["diagnose_module"]
