r"""Watches the entropy of every attention head of a model while it trains.

For a query row with probabilities *p* over *n* allowed keys, :math:`H = -\sum_j p_j \log p_j`, and a head's number is
the mean over its rows of :math:`H / \log n`, rows with fewer than two keys left out: 0 where each query attends to one
key, 1 where attention is uniform. In causal attention *n* is the row's number, so uniform attention gives 1 there too.

Two ways to lose a head are told apart: *collapse* (near 0: Zhai et al., arXiv 2303.06296) and *overload* (near 1: Jha
and Reagen, arXiv 2501.03489). Attention sinks have an entropy near 0 and are no failure: a head that gives most of its
attention to one key counts as collapsed only if its attention beside that key has collapsed too (see
:func:`lightning_entropy.functional.attention_sink`). That measure and the alarms are ours.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_entropy.arguments import check_types
from lightning_entropy.training.attention_report import AttentionEntropyReport, HeadLimits, Heads
from lightning_entropy.training.entropy_record import EntropyRecord
from lightning_entropy.training.entropy_watch import AttentionEntropyWatch
from lightning_entropy.training.lightning import LightningModule, MisconfigurationException, Trainer
from lightning_entropy.training.probe import ProbeForward, fits_a_checkpoint, keep_batch, run_probe

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class AttentionEntropyMonitor(AttentionEntropyWatch):
    r"""Logs the entropy of every attention head, and says when heads collapse or stay uniform.

    Add it to any Trainer; the run is bitwise the run without it. Every ``every_n_steps`` optimizer steps it reads the
    training forward itself, or runs a fixed batch beside the training, and logs ``attention_entropy/mean``, ``/min``
    (over heads), ``/<module>`` (mean over its heads), ``/collapsed_fraction``, ``/overloaded_fraction`` and
    ``/sink_fraction`` (shares of the heads). ``trainer.validate`` and ``test`` log the same of every
    ``every_n_steps``-th batch.

    Args:
        every_n_steps: optimizer steps between readings (``validate`` and ``test``: batches).
        queries: read this many query rows of each attention, the same in every reading; None reads all.
        probe: None reads the training batches as they come. ``"train"`` reads the first training batch, ``"val"`` the
            first validation batch, anything else is the batch itself: in evaluation mode after the optimizer step.
        probe_forward: function ``(module, batch)`` that runs the probe; None calls ``predict_step`` or ``forward``.
        modules: shell patterns over dotted names of the modules whose attention is read; None reads all.
        normalize: log fractions of the largest entropy; False logs nats. Limits are fractions in either case.
        collapse: a head below this is collapsed, unless it is an attention sink.
        overload: a head above this is overloaded; None calls none so.
        sink: a head that gives more than this share of its attention to one key is a sink.
        patience: readings in a row after which a warning says so, once a run; heads that have been uniform since the
            first reading, as those of a new model are, are given ten times as long.
        log_heads: log ``attention_entropy/<module>/head_<i>`` too.
        log_figures: one figure, layers x heads at a few steps and each layer over all steps, at the ends of epochs and
            validations at which a fourth more has been read, and at the end of the run, however it ends.
        csv: write ``attention_entropy.csv`` (step, layer, head, entropy, normalized, sink, rest) into the logger's
            folder, or ``default_root_dir`` without a logger. A resumed run continues it.

    Raises:
        ValueError: if an argument is out of range (here), or if no attention runs (at the first reading).

    Reference:
        Stabilizing Transformer Training by Preventing Attention Entropy Collapse, arXiv 2303.06296; Entropy-Guided
        Attention for Private LLMs, arXiv 2501.03489.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[AttentionEntropyMonitor(every_n_steps=100)], logger=False)
    """

    log_name = "attention_entropy"

    def __init__(
        self,
        *,
        every_n_steps: int = 50,
        queries: int | None = 64,
        probe: Any = None,
        probe_forward: ProbeForward | None = None,
        modules: str | list[str] | None = None,
        normalize: bool = True,
        collapse: float = 0.05,
        overload: float | None = 0.95,
        sink: float = 0.5,
        patience: int = 5,
        log_heads: bool = False,
        log_figures: bool = True,
        csv: bool = True,
    ) -> None:
        check_types(AttentionEntropyMonitor, locals())
        limits = HeadLimits(collapse, overload, sink)
        super().__init__(every_n_steps=every_n_steps, queries=queries, modules=modules, limits=limits)
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        if isinstance(probe, str) and probe not in ("train", "val"):
            raise ValueError(f"probe must be None, 'train', 'val' or a batch, got {probe!r}")
        if probe_forward is not None and probe is None:
            raise ValueError("probe_forward runs a probe, and probe is None: pass probe='train', 'val' or a batch")
        self.probe = probe
        self.probe_forward = probe_forward
        self.normalize = normalize
        self.log_heads = log_heads
        self._record = EntropyRecord(limits, patience=patience, csv=csv, figures=log_figures)
        self._source = probe if isinstance(probe, str) else None
        self._batch: Any = None if isinstance(probe, str) else probe
        self._reading: int | None = None
        self._heads: Heads | None = None

    # What was read.

    @property
    def history(self) -> list[dict[str, Any]]:
        """One row a step, layer and head. Of long runs every second reading (the CSV file has all), ends included."""
        return self._record.history.rows()

    @property
    def path(self) -> Path | None:
        """The CSV file."""
        return self._record.path

    def plot(self) -> Figure:
        """Layers x heads at a few steps, and each layer over all steps.

        Raises:
            ValueError: if nothing was read.
        """
        return self._record.draw()

    @property
    def state_key(self) -> str:
        """Distinct for instances that read different modules, or another probe."""
        probe = self._source or (None if self.probe is None else "batch")
        return self._generate_state_key(modules=self.modules, probe=probe)

    # Training.

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew or go on where the checkpoint was."""
        if self._source == "val" and not trainer.enable_validation:
            raise MisconfigurationException(
                f"{type(self).__name__}: probe='val' needs validation batches, this fit has none. Use probe='train'."
            )
        if not self._record.open(trainer, self.log_prefix(trainer)) and self._source is not None:
            self._batch = None
        self.prepare(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Read this step if one is due."""
        if self._source == "train" and self._batch is None:
            self._batch = trainer.strategy.broadcast(keep_batch(batch))
        if self.probe is None and self._due(trainer.global_step):
            self._reading = trainer.global_step
            self.start_reading()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Read no further: a forward after a backward pass belongs to another loss, and the weights change after it."""
        if self._reading is not None and self._heads is None:
            self._heads = self.stop_reading(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was read; or run the probe if that is due."""
        if self._reading is not None:
            step, local = self._reading, self._heads
            self._reading = self._heads = None
            if local is None:  # the step called no manual_backward
                local = self.stop_reading(pl_module)
        elif self.probe is not None and self._batch is not None and self._due(trainer.global_step):
            step = trainer.global_step
            self.start_reading()
            run_probe(trainer, pl_module, self._batch, self.probe_forward, type(self).__name__)
            local = self.stop_reading(pl_module)
        else:
            return
        heads = self.over_ranks(local)
        if not heads:
            return
        self.report = report = AttentionEntropyReport(heads, step, self.limits)
        self._record.add(report, owner=type(self).__name__, write=trainer.is_global_zero)
        values = self.log_values(trainer, report)
        # not by log() alone: what it gets reaches a logger in the steps of log_every_n_steps only
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        pl_module.log_dict(values, logger=False, on_step=True, on_epoch=False, batch_size=1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, within a fit, if there is enough that is new."""
        if trainer.state.fn == "fit":
            self._record.log_figure(trainer, self.log_prefix(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw if there is enough that is new."""
        self._record.log_figure(trainer, self.log_prefix(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what is new."""
        self.leave()
        self._record.log_figure(trainer, self.log_prefix(trainer), every=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw what was read: Lightning calls nothing else after an exception."""
        self.leave()
        self._record.forget_restored()
        try:
            self._record.log_figure(trainer, self.log_prefix(trainer), every=True)
        except Exception as error:  # the run's own exception is the one to see
            warnings.warn(f"{type(self).__name__}: the figure could not be logged: {error}", stacklevel=2)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self._record.forget_restored()
        self.leave()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the probe; or read, in a validation run of its own."""
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        if trainer.state.fn == "fit" and self._source == "val" and self._batch is None:
            self._batch = trainer.strategy.broadcast(keep_batch(batch))

    def leave(self) -> None:
        """Leave nothing behind."""
        self._reading = self._heads = None
        super().leave()

    def describe(self) -> str:
        """When, on what, and where to."""
        probes = {None: "the given batch", "train": "the first training batch", "val": "the first validation batch"}
        where = "" if self.probe is None else f" on {probes[self._source]}"
        return f"every {self.every_n_steps} steps{where}" + ("" if self.path is None else f"; {self.path}")

    def scalars(self, report: AttentionEntropyReport) -> dict[str, float]:
        """What to log of a reading."""
        return report.scalars(normalize=self.normalize, log_heads=self.log_heads)

    def _due(self, step: int) -> bool:
        last = self._record.history.last
        return last is None or step // self.every_n_steps > last // self.every_n_steps

    def state_dict(self) -> dict[str, Any]:
        """The readings, the alarms' counts, and a small probe batch."""
        probe = self._batch if self._source is not None and fits_a_checkpoint(self._batch) else None
        return {**self._record.state_dict(), "probe": probe}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was, on the same probe."""
        self._record.load_state_dict(state_dict)
        if self._source is not None:
            self._batch = state_dict["probe"]


__all__ = ["AttentionEntropyMonitor"]
