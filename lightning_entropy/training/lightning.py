"""The one import of Lightning in this package.

Lightning is distributed twice, as ``lightning`` and as ``pytorch_lightning``, and classes of the two do not mix.
This module binds to the one that the process has already loaded, else to the one that is installed (``lightning``
first). Every other module takes Lightning's names from here.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING


def _distribution() -> str:
    if "lightning.pytorch" in sys.modules:
        return "lightning.pytorch"
    if "pytorch_lightning" in sys.modules:
        return "pytorch_lightning"
    if find_spec("lightning") is not None:
        return "lightning.pytorch"
    if find_spec("pytorch_lightning") is not None:
        return "pytorch_lightning"
    raise ImportError("neither lightning nor pytorch_lightning is installed: pip install lightning")


DISTRIBUTION = _distribution()

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
    from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
else:
    _root = import_module(DISTRIBUTION)
    Callback = _root.Callback
    LightningDataModule = _root.LightningDataModule
    LightningModule = _root.LightningModule
    Trainer = _root.Trainer
    seed_everything = _root.seed_everything
    _utilities = import_module(f"{DISTRIBUTION}.utilities")
    rank_zero_info = _utilities.rank_zero_info
    rank_zero_warn = _utilities.rank_zero_warn
    MisconfigurationException = import_module(f"{DISTRIBUTION}.utilities.exceptions").MisconfigurationException


def submodule(name: str) -> ModuleType:
    """Import a module of the bound distribution, for example ``submodule("loggers")``."""
    return import_module(f"{DISTRIBUTION}.{name}")


def cli() -> ModuleType:
    """The module that holds ``LightningCLI``; imported late, since it needs jsonargparse."""
    return submodule("cli")


def logs_this_step(trainer: Trainer) -> bool:
    """Whether a value logged in this training step is seen: at ``log_every_n_steps`` and at the end of an epoch."""
    connector = trainer._logger_connector
    return bool(connector.should_update_logs or trainer.is_last_batch or getattr(trainer, "fast_dev_run", False))


__all__ = [
    "DISTRIBUTION",
    "Callback",
    "LightningDataModule",
    "LightningModule",
    "MisconfigurationException",
    "Trainer",
    "cli",
    "logs_this_step",
    "rank_zero_info",
    "rank_zero_warn",
    "seed_everything",
    "submodule",
]
