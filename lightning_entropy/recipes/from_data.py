"""What a model of a recipe takes from the data that it is fitted with."""

from __future__ import annotations

from typing import Any

from lightning_entropy.training.lightning import LightningModule


def datamodule_of(module: LightningModule) -> Any:
    """The Trainer's datamodule, or None."""
    try:
        return getattr(module.trainer, "datamodule", None)
    except RuntimeError:  # Lightning's answer outside a Trainer
        return None


def take_from_data(module: LightningModule, *names: str, fit_with: str) -> None:
    """Set the sizes that were not given to those of the data, in the module and among its hyperparameters.

    Args:
        module: has them as attributes, None where they were not given.
        *names: of attributes that the datamodule has too, after its ``setup``.
        fit_with: a DataModule that has them, for the message.

    Raises:
        ValueError: naming the first that neither the module nor the datamodule knows.
    """
    datamodule = datamodule_of(module)
    for name in names:
        if getattr(module, name) is not None:
            continue
        value = getattr(datamodule, name, None)
        if value is None:
            where = "the Trainer has no datamodule" if datamodule is None else f"its datamodule has no {name}"
            raise ValueError(f"{type(module).__name__} needs {name}: {where}. Pass {name}=, or fit with {fit_with}.")
        setattr(module, name, int(value))
        module.hparams[name] = int(value)  # so that a checkpoint can be loaded without the data


__all__ = ["datamodule_of", "take_from_data"]
