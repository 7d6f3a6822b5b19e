"""The base of callbacks that watch the entropy of attention, in training and in validation and test runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import nn

from lightning_entropy.observe import AttentionEntropyReader
from lightning_entropy.observe.selection import as_patterns
from lightning_entropy.training.attention_report import (
    AttentionEntropyReport,
    HeadLimits,
    Heads,
    heads_of,
    mean_of_readings,
    mean_over_ranks,
)
from lightning_entropy.training.lightning import Callback, LightningModule, Trainer, log_prefix
from lightning_entropy.verbosity import announce


class AttentionEntropyWatch(Callback, ABC):
    """Reads the entropy of attention, changes nothing, and logs it in ``trainer.validate`` and ``trainer.test``.

    Args:
        every_n_steps: steps, or batches of a validation or test run, between readings.
        queries: how many query rows of each attention are read; None reads all.
        modules: shell patterns over dotted names of the modules whose attention is read; None reads all.
        limits: what is called collapsed, overloaded and a sink.

    Raises:
        ValueError: if an argument is out of range.
    """

    log_name: ClassVar[str]

    def __init__(
        self, *, every_n_steps: int, queries: int | None, modules: str | list[str] | None, limits: HeadLimits
    ) -> None:
        as_patterns(modules)
        for name, value in (("every_n_steps", every_n_steps), ("queries", queries)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.every_n_steps = every_n_steps
        self.queries = queries
        self.modules = modules
        self.limits = limits
        self.report: AttentionEntropyReport | None = None
        self._reader: AttentionEntropyReader | None = None
        self._evaluated: list[Heads] = []
        self._said = False
        self._rows = 0

    @abstractmethod
    def describe(self) -> str:
        """When and on what it reads, for the line that is said once."""

    @abstractmethod
    def scalars(self, report: AttentionEntropyReport) -> dict[str, float]:
        """What to log of a reading."""

    def prepare(self, module: nn.Module) -> None:
        """A run starts. The reader is attached while it reads and at no other time.

        A hook on ``nn.TransformerEncoderLayer`` is enough to switch its fast path off, so that validation would give
        other numbers.
        """
        self.leave()
        self._said = False
        self._reader = AttentionEntropyReader(
            module, self.modules, queries=self.queries, gradient=False, sinks=True, owner=type(self).__name__
        )

    def leave(self) -> None:
        """Leave nothing behind. Safe at any moment and any number of times."""
        self._evaluated = []
        if self._reader is not None:
            self._reader.detach()
            self._reader = None

    @property
    def reader(self) -> AttentionEntropyReader:
        """What reads, while a run is on."""
        assert self._reader is not None, "made in on_fit_start, on_validation_start or on_test_start"
        return self._reader

    def start_reading(self) -> None:
        """Read from here on."""
        self.reader.attach()
        self.reader.start()

    def stop_reading(self, module: LightningModule) -> Heads:
        """Read no further, and give what this process has read."""
        self.reader.stop()
        layers = self.reader.layers
        self._rows = max((layer.rows for layer in layers), default=0)
        self.reader.detach()
        return heads_of(layers, type(module).__name__)

    def over_ranks(self, heads: Heads) -> Heads:
        """The mean over the ranks of what each has read. Every rank must call it.

        Raises:
            ValueError: if no rank has read anything and there was no reading yet.
        """
        heads = mean_over_ranks(heads)
        if not self._said:
            if not heads:
                raise self.reader.nothing_read()
            self._said = True
            names, rows = list(heads), self._rows
            places = ", ".join(names) if len(names) < 4 else f"{names[0]} ... {names[-1]}"
            some = "every row" if self.queries is None or rows <= self.queries else f"{self.queries} of {rows:,} rows"
            announce(
                f"{type(self).__name__}: reading {len(names)} attention{'s' * (len(names) > 1)} ({places}; {some}) "
                f"{self.describe()}"
            )
        return heads

    def log_prefix(self, trainer: Trainer) -> str:
        """The name before the slash; numbered where a Trainer has several."""
        return log_prefix(self, self.log_name, trainer)

    def log_values(self, trainer: Trainer, report: AttentionEntropyReport) -> dict[str, float]:
        """The scalars under their full names."""
        prefix = self.log_prefix(trainer)
        return {f"{prefix}/{name}": value for name, value in self.scalars(report).items()}

    # Validation and test as runs of their own.

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Get ready."""
        if trainer.state.fn != "fit":
            self.prepare(pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Read every n-th batch."""
        if trainer.state.fn != "fit" and batch_idx % self.every_n_steps == 0:
            self.start_reading()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what was read."""
        if trainer.state.fn != "fit" and batch_idx % self.every_n_steps == 0:
            self._evaluated.append(self.stop_reading(pl_module))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the mean of the batches that were read."""
        if trainer.state.fn == "fit":
            return
        heads, self._evaluated = mean_over_ranks(mean_of_readings(self._evaluated)), []
        if not heads:
            raise self.reader.nothing_read()
        self.report = AttentionEntropyReport(heads, trainer.global_step, self.limits)
        values = self.log_values(trainer, self.report)
        pl_module.log_dict(values, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    on_test_start = on_validation_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


__all__ = ["AttentionEntropyWatch"]
