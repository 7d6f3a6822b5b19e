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
from typing import TYPE_CHECKING, Any


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
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
else:
    _root = import_module(DISTRIBUTION)
    Callback = _root.Callback
    LightningDataModule = _root.LightningDataModule
    LightningModule = _root.LightningModule
    Trainer = _root.Trainer
    seed_everything = _root.seed_everything
    Logger = import_module(f"{DISTRIBUTION}.loggers").Logger
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


def log_prefix(callback: Callback, name: str, trainer: Trainer) -> str:
    """What a callback's logged names begin with; numbered where a Trainer has several of its class."""
    same = [c for c in trainer.callbacks if type(c) is type(callback)]  # type: ignore[attr-defined]
    return name if len(same) < 2 else f"{name}_{same.index(callback)}"


def logs_this_step(trainer: Trainer) -> bool:
    """Whether a value logged in this training step is seen: at ``log_every_n_steps`` and at the end of an epoch."""
    connector = trainer._logger_connector
    return bool(connector.should_update_logs or trainer.is_last_batch or getattr(trainer, "fast_dev_run", False))


def is_compiled(module: LightningModule) -> bool:
    """Whether a LightningModule, or a module in it, runs through ``torch.compile``."""
    if getattr(module, "_compiler_ctx", None) is not None:  # by torch.compile(module), which Lightning unwraps
        return True
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in module.modules())


def training_loader(trainer: Trainer) -> Any:
    """A training loader as the fit will ask for one, before it has; a loader that was passed is that very one."""
    source = trainer.fit_loop._data_source
    if not source.is_defined():
        raise MisconfigurationException("there is no training data: neither a loader nor a train_dataloader method")
    return source.dataloader()


def returns_to_another_process(trainer: Trainer) -> bool:
    """Whether the run is in a process that Lightning spawned, which gives its weights back to the one that waits."""
    launchers = submodule("strategies.launchers")
    return isinstance(trainer.strategy.launcher, launchers._MultiProcessingLauncher)


__all__ = [
    "DISTRIBUTION",
    "Callback",
    "LightningDataModule",
    "LightningModule",
    "Logger",
    "MisconfigurationException",
    "Trainer",
    "cli",
    "log_prefix",
    "is_compiled",
    "logs_this_step",
    "rank_zero_info",
    "rank_zero_warn",
    "returns_to_another_process",
    "seed_everything",
    "submodule",
    "training_loader",
]
