"""How a method that changes a model joins a Trainer."""

from __future__ import annotations

import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from lightning_entropy.surgery.report import SurgeryReport
from lightning_entropy.training.lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    returns_to_another_process,
)
from lightning_entropy.training.next_call import around_next_call
from lightning_entropy.training.weight_decay import without_weight_decay
from lightning_entropy.verbosity import announce


class ModelSurgery(Callback, ABC):
    """What callbacks that change a model share: their record, their requests, and how they leave.

    Attributes:
        report: what was done, None before the model exists.

    Raises:
        MisconfigurationException: under a strategy that shards the model or restores checkpoints after wrapping it
            (FSDP, DeepSpeed, model parallel), and where weights are on the meta device.
    """

    modules: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.report: SurgeryReport | None = None
        self._withdraw: list[Callable[[], None]] = []

    @property
    def name(self) -> str:
        """The class's name, for messages."""
        return type(self).__name__

    @property
    def state_key(self) -> str:
        """Distinguishes instances by what they operate on."""
        return self._generate_state_key(modules=self.modules)

    def _refuse_sharding(self, trainer: Trainer) -> None:
        if trainer.strategy.restore_checkpoint_after_setup:
            raise MisconfigurationException(
                f"{self.name} changes the model, and {type(trainer.strategy).__name__} shards it and restores "
                "checkpoints only after that. Use DDP or a single device, or change the model in the module's __init__."
            )

    def _check_weights(self, module: nn.Module) -> None:
        absent = [name for name, parameter in module.named_parameters() if parameter.is_meta]
        if absent:
            raise MisconfigurationException(
                f"{self.name}: {len(absent)} parameters of {type(module).__name__} are on the meta device "
                f"({', '.join(absent[:3])}): there are no weights to change. Build the model with real weights."
            )

    def _renew_averages(self, trainer: Trainer, module: LightningModule) -> None:
        """Have weight averages (EMA, SWA) that were begun as copies of the model before the surgery begin anew."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(getattr(callback, "_average_model", None), nn.Module):
                callback.setup(trainer, module, "fit")

    def leave_process(self, module: nn.Module) -> None:
        """The fit ran in a process of its own and the weights go back to a model that was not changed: fit it.

        Takes the surgery back; a warning says what the other process does not get.
        """
        if self.report is None or self.report.undone:
            return
        added = self.report.added_parameters
        self.report.undo()
        if added:
            warnings.warn(
                f"{self.name}: the model of the process that started this fit has not the {added:+,} parameters of the "
                "surgery, and is given the other weights. Load a checkpoint with this callback to have them all.",
                stacklevel=2,
            )

    def _forget_requests(self) -> None:
        while self._withdraw:
            self._withdraw.pop()()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no request behind; fit the weights to the model of the parent process where there is one."""
        self._forget_requests()
        if stage == "fit" and returns_to_another_process(trainer):
            self.leave_process(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no request behind: Lightning calls no teardown after an exception."""
        self._forget_requests()

    def state_dict(self) -> dict[str, Any]:
        """The record of the surgery; the model's weights carry what is needed to rebuild it."""
        return {} if self.report is None else {"report": self.report.record()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_withdraw": []}


class SurgeryCallback(ModelSurgery):
    """Changes the model of any LightningModule once, as soon as it exists.

    That is right after the module's own ``setup`` and ``configure_model``, before weights are restored from a
    checkpoint and before optimizers are built: what is added is trained, saved and restored like the rest. It happens
    in fit, validate, test and predict, since a checkpoint of a changed model loads into a changed model alone, and once
    for a module, however often the Trainer runs. The model stays changed when the Trainer is done; ``report.undo()``
    takes the surgery back.

    A subclass gives :meth:`operate` and keeps its arguments in ``self.modules`` and the like.
    """

    def __init__(self) -> None:
        super().__init__()
        self._operated: list[tuple[str, weakref.ref[nn.Module]]] = []
        self._new_parameters: list[weakref.ref[nn.Parameter]] = []

    @abstractmethod
    def operate(self, module: nn.Module) -> SurgeryReport:
        """Change the module; called in the state in which it is to be trained or loaded.

        New tensors must be given the device and dtype of the weights that they join, since Lightning calls this inside
        contexts that change both defaults. A module that carries the change already is left alone without an error.
        """

    def parameters_without_decay(self, module: nn.Module) -> list[nn.Parameter]:
        """Parameters of the surgery that weight decay must not touch.

        While the module's ``configure_optimizers`` runs, groups that decay are split in two where they hold some.
        """
        return []

    def added_parameters(self, module: nn.Module) -> list[nn.Parameter]:
        """Parameters of the surgery, which a method that chooses what is trained leaves trained."""
        added = [parameter for reference in self._new_parameters if (parameter := reference()) is not None]
        return [*added, *(p for p in self.parameters_without_decay(module) if not any(p is q for q in added))]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask to operate when the model exists."""
        self._refuse_sharding(trainer)
        self._forget_requests()
        requests: list[tuple[str, Callable[[], AbstractContextManager[Any]]]] = [
            ("configure_model", lambda: self._when_configured(trainer, pl_module))
        ]
        if stage == "fit" and type(self).parameters_without_decay is not SurgeryCallback.parameters_without_decay:
            kept = lambda: self.parameters_without_decay(pl_module)  # noqa: E731
            requests.append(("configure_optimizers", lambda: without_weight_decay(kept)))
        self._withdraw = [around_next_call(pl_module, name, context) for name, context in requests]

    @contextmanager
    def _when_configured(self, trainer: Trainer, module: LightningModule) -> Iterator[None]:
        yield
        if not self._is_operated(module):
            self._check_weights(module)
            known = {id(parameter) for parameter in module.parameters()}
            self.report = self.operate(module)
            self._new_parameters = [
                weakref.ref(parameter) for parameter in module.parameters() if id(parameter) not in known
            ]
            self._operated = [("", weakref.ref(module))]
            for change in self.report.changes:
                self._operated.append((change.module, weakref.ref(module.get_submodule(change.module))))
            announce(str(self.report))
            self._renew_averages(trainer, module)

    def _is_operated(self, module: nn.Module) -> bool:
        """Whether this very model was operated on: neither undone since, nor built anew by the module's setup."""
        if self.report is None or self.report.undone or not self._operated:
            return False
        now = dict(module.named_modules())
        return all(now.get(name) is operated() for name, operated in self._operated)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_operated": [], "_new_parameters": []}


__all__ = ["ModelSurgery", "SurgeryCallback"]
