"""Measures the layers of a model again as it trains, always on the batch that was there at the start."""

from __future__ import annotations

import warnings
from typing import Any

from lightning_entropy.functional.inflection import InflectionRule
from lightning_entropy.training.before_fit import training_batches
from lightning_entropy.training.diagnosis_totals import in_one_process
from lightning_entropy.training.layer_diagnosis import measure_layers
from lightning_entropy.training.layer_report import LayerDiagnosis
from lightning_entropy.training.lightning import LightningModule, Trainer, submodule
from lightning_entropy.training.probe import fits_a_checkpoint, keep_batch
from lightning_entropy.training.signal_recovery import SignalReading, signal_recovery


class SignalWatch:
    """The measurements of one callback.

    Rank zero measures, and all processes are told; the module is left as it was.

    Args:
        owner: the name in messages.
        every_n_steps: optimizer steps between measurements, or None.
        every_n_epochs: epochs between them, or None.

    Raises:
        ValueError: if one is less than 1.
    """

    def __init__(self, owner: str, every_n_steps: int | None, every_n_epochs: int | None) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.owner, self.every_n_steps, self.every_n_epochs = owner, every_n_steps, every_n_epochs
        self.layers: list[str] = []
        self.readings: list[SignalReading] = []
        self._start: LayerDiagnosis | None = None
        self._batch: Any = None

    @property
    def on(self) -> bool:
        """Whether anything is to be measured."""
        return self.every_n_steps is not None or self.every_n_epochs is not None

    def begin(self, layers: list[str]) -> None:
        """A new choice: forget what was measured."""
        self.layers, self.readings, self._start, self._batch = list(layers), [], None, None

    def start(self, trainer: Trainer, module: LightningModule, prefix: str) -> None:
        """Keep a batch and measure the layers before the first step, unless a checkpoint brought both."""
        if not self.on or (trainer.strategy.broadcast(self._batch is not None) and self._start is not None):
            return
        resumed = self._start is not None or bool(self.readings)
        if trainer.is_global_zero:
            with training_batches(trainer, module, 1) as batches:
                self._batch = keep_batch(batches[0])
        if resumed:
            warnings.warn(
                f"{self.owner}: the batch that the layers were measured on is not in the checkpoint (it is large, or "
                "not made of plain tensors): recovery is counted anew from here.",
                stacklevel=2,
            )
        self._start = None
        self._measure(trainer, module, prefix)

    def after_step(self, trainer: Trainer, module: LightningModule, prefix: str) -> None:
        """Measure where that many optimizer steps have passed since the last time."""
        n = self.every_n_steps
        if n is not None and trainer.global_step // n > (self.readings[-1].step if self.readings else 0) // n:
            self._log(trainer, module, self._measure(trainer, module, prefix), on_step=True)

    def after_epoch(self, trainer: Trainer, module: LightningModule, prefix: str) -> None:
        """Measure at the end of every so many epochs."""
        n = self.every_n_epochs
        if n is None or (trainer.current_epoch + 1) % n:
            return
        if self.readings and self.readings[-1].step == trainer.global_step:
            return
        self._log(trainer, module, self._measure(trainer, module, prefix), on_step=False)

    def _measure(self, trainer: Trainer, module: LightningModule, prefix: str) -> dict[str, float]:
        told: dict[str, Any] | None = None
        if trainer.is_global_zero:
            told = self._look(trainer, module)
        told = trainer.strategy.broadcast(told)
        if told is None:
            return {}
        self._start = LayerDiagnosis.from_record(told["start"])
        reading = SignalReading(**told["reading"])
        self.readings.append(reading)
        values = {f"{prefix}/gradient_norm/{layer}": g for layer, g in reading.gradient_norm.items()}
        values |= {f"{prefix}/entropy/{layer}": h for layer, h in reading.entropy.items() if h == h}
        values |= {
            f"{prefix}/recovery": reading.recovery,
            f"{prefix}/relative_recovery": reading.relative_recovery,
        }
        values = {name: value for name, value in values.items() if value == value}
        for logger in trainer.loggers:  # what log() gets reaches a logger in the steps of log_every_n_steps only
            logger.log_metrics(values, step=trainer.global_step)
        return values

    def _look(self, trainer: Trainer, module: LightningModule) -> dict[str, Any] | None:
        """What rank zero sees; None where a run that has diverged has no gradients to speak of."""
        try:
            now = self._diagnose(trainer, module)
        except ValueError as error:
            if self._start is None:
                raise
            warnings.warn(f"{self.owner}: the layers could not be measured again: {error}", stacklevel=2)
            return None
        if self._start is None:
            self._start = now
        reading = signal_recovery(self._start, now, self.layers, trainer.global_step)
        return {"start": self._start.record(), "reading": reading.record()}

    def _diagnose(self, trainer: Trainer, module: LightningModule) -> LayerDiagnosis:
        batch = submodule("utilities").move_data_to_device(self._batch, module.device)
        batch = trainer.precision_plugin.convert_input(batch)
        layers = None if self._start is None else self._start.layers
        rule = InflectionRule("decay")  # chooses nothing here
        with in_one_process(), trainer.precision_plugin.forward_context():
            found = measure_layers(module, [batch], layers=layers, rule=rule)
            if not set(self.layers) & set(found.layers):  # named by the user, and no block around attention
                found = measure_layers(module, [batch], layers=self.layers, rule=rule)
        return found

    def _log(self, trainer: Trainer, module: LightningModule, values: dict[str, float], *, on_step: bool) -> None:
        module.log_dict(values, logger=False, on_step=on_step, on_epoch=not on_step, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        """Plain values; the batch where it is small enough to travel."""
        travels = self._batch is not None and fits_a_checkpoint(self._batch)
        return {
            "layers": self.layers,
            "readings": [reading.record() for reading in self.readings],
            "start": None if self._start is None else self._start.record(),
            "batch": self._batch if travels else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What :meth:`state_dict` told."""
        self.layers = list(state["layers"])
        self.readings = [SignalReading(**record) for record in state["readings"]]
        self._start = None if state["start"] is None else LayerDiagnosis.from_record(state["start"])
        self._batch = state["batch"]


__all__ = ["SignalWatch"]
