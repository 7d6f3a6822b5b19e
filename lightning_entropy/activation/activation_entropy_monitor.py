"""Watches the activations of a model as it trains: spread of their input, entropies of their output, atoms, eps."""

from __future__ import annotations

import csv
import math
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_entropy.arguments import check_types
from lightning_entropy.functional.activation_entropy import spacing_entropy
from lightning_entropy.observe.activation_report import COLUMNS, ActivationReport
from lightning_entropy.observe.activations import ActivationReader, ActivationSample
from lightning_entropy.observe.selection import as_patterns
from lightning_entropy.surgery.report import name_patterns
from lightning_entropy.training.figures import log_figure
from lightning_entropy.training.files import atomic_write
from lightning_entropy.training.lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    log_prefix,
)
from lightning_entropy.verbosity import announce

_LOGGED = ("entropy", "standardized", "atom_mass", "input_std", "input_entropy", "eps")


class ActivationEntropyMonitor(Callback):
    """Logs, for every activation of any LightningModule, what goes in and how much entropy comes out.

    Add it to any Trainer; the run is bitwise the run without it. Every ``every_n_steps`` optimizer steps a random
    sample of each activation's input is kept, the activation is computed again in float32, and logged are, as
    ``activation_entropy/<module>/<quantity>`` and as means over the modules ``activation_entropy/<quantity>``:
    ``entropy`` (nats, of the continuous part), ``standardized`` (of the output divided by its standard deviation),
    ``atom_mass`` (share of exact repeats, as ReLU's zeros), ``input_std``, ``input_entropy``, and ``eps`` where the
    activation has a learned amount. ``report`` is the last reading: it prints as a table and has ``to_json()`` and
    ``plot()``. With several processes the samples of all are pooled.

    Args:
        every_n_steps: optimizer steps between readings.
        modules: shell patterns over dotted module names; None takes every activation module.
        samples: values of each activation that are looked at, over all processes; 1e4 to 2e5.
        per_channel: the mean of the channels' entropies instead of the entropy of all values together, which mixes
            the scales of the channels.
        channel_dim: dimension of the channels; None takes 1 for inputs of four dimensions and the last otherwise.
        method: estimator, see :func:`lightning_entropy.functional.spacing_entropy`.
        log_figures: draw each epoch's last reading over depth.
        log_csv: keep all readings in ``activation_entropy.csv`` beside the logger's files, if it has a folder.

    Raises:
        ValueError: if an argument is out of range (here), or the model has no activation module or a pattern matches
            none (at the start of the fit).
        MisconfigurationException: if none of the activation modules ran in the first step that is read.

    Reference:
        Entropies as in arXiv 2405.12954; estimator of Vasicek (1976).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ActivationEntropyMonitor(every_n_steps=100)], logger=False)
    """

    log_name = "activation_entropy"

    def __init__(
        self,
        *,
        every_n_steps: int = 50,
        modules: str | list[str] | None = None,
        samples: int = 50_000,
        per_channel: bool = False,
        channel_dim: int | None = None,
        method: str = "vasicek",
        log_figures: bool = True,
        log_csv: bool = True,
    ) -> None:
        check_types(ActivationEntropyMonitor, locals())
        as_patterns(modules)
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        if not 1_000 <= samples <= 10_000_000:
            raise ValueError(f"samples must be between 1,000 and 10,000,000, got {samples}")
        spacing_entropy(torch.arange(4.0), method=method, window=1)  # it knows the methods
        self.every_n_steps, self.modules, self.samples = every_n_steps, modules, samples
        self.per_channel, self.channel_dim, self.method = per_channel, channel_dim, method
        self.log_figures, self.log_csv = log_figures, log_csv
        self.report: ActivationReport | None = None
        self.path: Path | None = None
        self._reader: ActivationReader | None = None
        self._reading: int | None = None
        self._last: int | None = None
        self._restored = False
        self._drawn = True
        self._rows: list[dict[str, Any]] = []

    @property
    def state_key(self) -> str:
        """Distinct for instances that read different modules."""
        return self._generate_state_key(modules=self.modules, per_channel=self.per_channel)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach: the model is whole now, also when it was built in ``configure_model``."""
        self._detach()
        name = type(self).__name__
        share = max(1_000, self.samples // trainer.world_size)
        self._reader = ActivationReader(
            pl_module,
            self.modules,
            samples=share,
            per_channel=self.per_channel,
            channel_dim=self.channel_dim,
            owner=name,
        )
        self._reader.attach()
        if not self._restored:
            self._last = None
        self._restored = False
        folder = trainer.log_dir if trainer.loggers else None  # asked on every rank: it is broadcast
        self.path = Path(folder, f"{log_prefix(self, self.log_name, trainer)}.csv") if folder and self.log_csv else None
        self._rows = [] if self._last is None else _rows_until(self.path, self._last)
        places = ", ".join(name_patterns(self._reader.sites))
        kinds = ", ".join(dict.fromkeys(type(m).__name__ for m in self._reader.sites.values()))
        count = len(self._reader.sites)
        what = f"{count} activation{'s' * (count > 1)} ({places}; {kinds})"
        announce(f"{name}: reading {what} every {self.every_n_steps} steps")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Read this step if one is due."""
        step = trainer.global_step
        if self._reader is None:
            return
        if self._last is None or step // self.every_n_steps > self._last // self.every_n_steps:
            self._reading = step
            self._reader.start(seed=step)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure and log what was read."""
        if self._reader is None or self._reading is None:
            return
        step, self._reading = self._reading, None
        reader = self._reader
        reader.stop()
        samples = _pooled(reader.samples)
        reader.clear()
        if not samples:
            if self._last is None:
                raise MisconfigurationException(str(reader.nothing_read()))
            return
        self._last = step
        self.report = ActivationReport.of(
            samples, reader.sites, per_channel=self.per_channel, method=self.method, step=step
        )
        self._drawn = False
        self._rows += [{"step": step, **row} for row in self.report.rows]
        prefix = log_prefix(self, self.log_name, trainer)
        values = {f"{prefix}/{key}": value for key, value in _scalars(self.report).items()}
        # Not by log() alone: what it gets reaches a logger in the steps of log_every_n_steps only.
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        pl_module.log_dict(values, logger=False, on_step=True, on_epoch=False, batch_size=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last reading and write the file."""
        self._publish(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach, and write what is new."""
        self._detach()
        self._publish(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach."""
        self._restored = False
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach, and write what was read: Lightning calls nothing else after an exception."""
        self._restored = False
        self._detach()
        try:
            self._publish(trainer)
        except Exception as error:  # the run's own exception is the one to see
            warnings.warn(f"{type(self).__name__}: the last reading could not be written: {error}", stacklevel=2)

    def _publish(self, trainer: Trainer) -> None:
        if self._drawn or self.report is None:
            return
        self._drawn = True
        if self.path is not None and trainer.is_global_zero:
            with atomic_write(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=["step", *COLUMNS])
                writer.writeheader()
                writer.writerows(self._rows)
        if self.log_figures and trainer.loggers:
            log_figure(
                trainer, f"{log_prefix(self, self.log_name, trainer)}/depth", self.report.plot(), step=self.report.step
            )

    def _detach(self) -> None:
        self._reading = None
        if self._reader is not None:
            self._reader.detach()
            self._reader = None

    def state_dict(self) -> dict[str, Any]:
        """The step of the last reading, so that a resumed run reads in the steps of the uninterrupted one."""
        return {"last_step": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was."""
        self._last = state_dict["last_step"]
        self._restored = True

    def __getstate__(self) -> dict[str, Any]:
        # Hooks live in this process alone.
        return {**self.__dict__, "_reader": None, "_reading": None}


def _scalars(report: ActivationReport) -> dict[str, float]:
    out: dict[str, float] = {}
    for key in _LOGGED:
        known = [(row["site"], row[key]) for row in report.rows if math.isfinite(row[key])]
        out |= {f"{site or 'model'}/{key}": value for site, value in known}
        if known:
            out[key] = sum(value for _, value in known) / len(known)
    return out


def _pooled(samples: list[ActivationSample]) -> list[ActivationSample]:
    """The samples of all processes together, the same in each."""
    samples = [s._replace(values=s.values.cpu()) for s in samples]
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return samples
    gathered: list[list[ActivationSample]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(gathered, samples)
    pooled: dict[str, ActivationSample] = {}
    for sample in (sample for ranks in gathered for sample in ranks):
        other = pooled.get(sample.site)
        if other is not None and other.values.shape[1:] == sample.values.shape[1:]:
            sample = other._replace(
                values=torch.cat([other.values, sample.values]),
                seen=other.seen + sample.seen,
                calls=other.calls + sample.calls,
            )
        pooled[sample.site] = sample
    return list(pooled.values())


def _rows_until(path: Path | None, step: int) -> list[dict[str, Any]]:
    """What an earlier part of a resumed run has written."""
    if path is None or not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if int(row["step"]) <= step]


__all__ = ["ActivationEntropyMonitor"]
