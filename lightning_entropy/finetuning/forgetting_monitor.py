r"""Watches what a model forgets of an old task while it is trained on a new one.

Forgetting is measured as :math:`\Delta = L_\text{old}(\theta_t) - L_\text{old}(\theta_0)`, the old task's mean loss on
held-out data now and before training, in nats. It says little alone: a method that has learned nothing has forgotten
nothing. So each reading is kept together with the new task's score of the same weights, and drawn against it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_entropy.arguments import check_types
from lightning_entropy.training.forgetting_figure import plot_forgetting
from lightning_entropy.training.forgetting_history import Reading
from lightning_entropy.training.forgetting_record import ForgettingRecord
from lightning_entropy.training.held_out import Loader, evaluate_held_out, find_loaders, untouched_random_state
from lightning_entropy.training.held_out_outputs import Step, bind_step, check_step, embed_pair
from lightning_entropy.training.held_out_scores import MetricLike, check_metric, make_score, metric_name
from lightning_entropy.training.lightning import Callback, LightningModule, Trainer, log_prefix
from lightning_entropy.verbosity import announce

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_UNNAMED = "old"


class ForgettingMonitor(Callback):
    r"""Evaluates an old task while a new one is trained, and draws the new task's score against the old task's loss.

    Add it to any Trainer; the run is bitwise the run without it. It reads before training, then in each validation
    (or at the end of an epoch without one), in evaluation mode, without gradients, in the run's precision. Logged are
    ``forgetting/loss``, ``forgetting/increase`` (of the loss since the first reading, nats) and what the metric gives:
    ``forgetting/perplexity``, ``/accuracy``, ``/recall_at_1`` or its own names; with named loaders
    ``forgetting/<name>/loss`` and so on. With several processes the batches are dealt out, and the values are those of
    one process.

    Args:
        loaders: held-out data of the old task, a DataLoader or a mapping of names to DataLoaders; None asks
            ``old_task_dataloaders()`` of the datamodule, else of the module (the way in YAML).
        metric: ``"perplexity"`` (token-weighted), ``"accuracy"``, ``"retrieval"`` (recall at 1 and contrastive
            likelihood of paired embeddings, over all pairs), a torchmetrics metric of logits and labels, or a function
            ``(output, batch)`` that returns a number, a tensor of one number an item, or a mapping of names to those.
        step: function ``(module, batch)``, or the name of a method of the module that takes a batch, which returns the
            output; None takes the module's ``old_task_step``, else its forward.
        new_task: name of the logged value that is the new task's score, as in ``trainer.callback_metrics``; None takes
            the one that looks most like a validation score.
        every_n_steps: optimizer steps between further readings, or None.
        every_n_epochs: read in every n-th epoch, or None.
        before: read before training: what ``increase`` is counted from. ``Trainer(num_sanity_val_steps=-1)`` gives the
            new task's score to it.
        limit_batches: batches of each loader that are evaluated, over all processes; None takes all.
        temperature: of the contrastive likelihood.
        log_figures: a figure at the ends of epochs at which a fourth more has been read, and at the end of the run.
        json: write ``forgetting.json`` into the logger's folder, or ``default_root_dir`` without a logger. A resumed
            run continues it.

    Raises:
        ValueError: if an argument is out of range (here).
        MisconfigurationException: if there is no old-task data (at the start of the fit), or the step's output does not
            have what the metric needs, or nothing of the name ``new_task`` is logged (at the first reading).

    Example:
        >>> from torch.utils.data import DataLoader
        >>> monitor = ForgettingMonitor({"wiki": DataLoader([])}, metric="perplexity", new_task="val_accuracy")
    """

    log_name = "forgetting"

    def __init__(
        self,
        loaders: Any = None,
        *,
        metric: MetricLike = "perplexity",
        step: Step | None = None,
        new_task: str | None = None,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = 1,
        before: bool = True,
        limit_batches: int | None = None,
        temperature: float = 0.05,
        log_figures: bool = True,
        json: bool = True,
    ) -> None:
        check_types(ForgettingMonitor, locals())
        owner = type(self).__name__
        check_metric(metric, owner)
        check_step(step, owner)
        for name, value in (
            ("every_n_steps", every_n_steps),
            ("every_n_epochs", every_n_epochs),
            ("limit_batches", limit_batches),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if every_n_steps is None and every_n_epochs is None:
            raise ValueError("every_n_steps and every_n_epochs are both None: nothing would be read in training")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.loaders, self.metric, self.step, self.new_task = loaders, metric, step, new_task
        self.every_n_steps, self.every_n_epochs, self.before = every_n_steps, every_n_epochs, before
        self.limit_batches, self.temperature, self.log_figures, self.json = (
            limit_batches,
            temperature,
            log_figures,
            json,
        )
        self._record = ForgettingRecord(new_task, json=json, figures=log_figures)
        self._sources: dict[str, Loader] = {}
        self._step: Callable[[Any], Any] | None = None

    # What was read.

    @property
    def history(self) -> list[Reading]:
        """The readings: ``step``, ``epoch``, ``when``, ``old`` (task -> name -> value), ``new`` (name -> value)."""
        return self._record.history.readings

    @property
    def path(self) -> Path | None:
        """The JSON file."""
        return self._record.path

    def plot(self, *, quantity: str = "loss") -> Figure:
        """The new task's score against the old tasks' values, and those over the steps.

        Args:
            quantity: of the old tasks.

        Raises:
            ValueError: if nothing was read.
        """
        return plot_forgetting(self.history, new_task=self._record.new_task, quantity=quantity)

    @property
    def state_key(self) -> str:
        """Distinct for instances that watch other tasks (by their names) or other metrics."""
        unnamed = None if self.loaders is None else [_UNNAMED]
        tasks = sorted(self.loaders) if isinstance(self.loaders, Mapping) else unnamed
        step = self.step if self.step is None or isinstance(self.step, str) else "function"
        return self._generate_state_key(metric=metric_name(self.metric), tasks=tasks, step=step)

    # When.

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the data, and begin anew or go on where the checkpoint was."""
        owner = type(self).__name__
        with untouched_random_state():
            self._sources = find_loaders(self.loaders, trainer, pl_module, owner=owner, unnamed=_UNNAMED)
        self._step = bind_step(
            self.step, pl_module, owner, forward=embed_pair if metric_name(self.metric) == "retrieval" else None
        )
        self._record.open(trainer, log_prefix(self, self.log_name, trainer))
        announce(f"{owner}: {self._described(pl_module)}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The reading that later ones are compared with."""
        if self.before and not self.history:
            self._read(trainer, pl_module, "before")
            self._record.begin(trainer, self._about())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read if enough steps have passed."""
        if self.every_n_steps is None:
            return
        last = self._record.history.last
        if trainer.global_step // self.every_n_steps > (0 if last is None else last["step"]) // self.every_n_steps:
            values = self._read(trainer, pl_module, "step")
            pl_module.log_dict(values, logger=False, on_step=True, on_epoch=False, batch_size=1)
            self._record.finish(trainer, self._about())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read while what is logged still reaches the callbacks that monitor it."""
        if self._in_fit(trainer) and self._due(trainer):
            values = self._read(trainer, pl_module, "validation")
            pl_module.log_dict(values, logger=False, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The new task's score is known now."""
        if trainer.sanity_checking:
            self._record.keep_sanity_check(trainer)
        if self._in_fit(trainer) and self._due(trainer):
            self._record.finish(trainer, self._about(), owner=type(self).__name__)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read if no validation of this epoch has; draw if there is enough that is new."""
        if self._due(trainer) and not self._record.has_read(trainer.current_epoch):
            values = self._read(trainer, pl_module, "epoch")
            pl_module.log_dict(values, logger=False, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
            self._record.finish(trainer, self._about(), owner=type(self).__name__)
        self._record.log_figure(trainer, log_prefix(self, self.log_name, trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what is new."""
        self._record.log_figure(trainer, log_prefix(self, self.log_name, trainer), every=True)
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw what was read: Lightning calls nothing else after an exception."""
        self._leave()
        try:
            self._record.log_figure(trainer, log_prefix(self, self.log_name, trainer), every=True)
        except Exception as error:  # the run's own exception is the one to see
            warnings.warn(f"{type(self).__name__}: the figure could not be logged: {error}", stacklevel=2)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the loaders, and of their workers."""
        self._leave()

    # How.

    def _read(self, trainer: Trainer, module: LightningModule, when: str) -> dict[str, float]:
        """Evaluate all old tasks; every process must call it. Returns what is logged, by its full name."""
        assert self._step is not None, "bound in on_fit_start"
        owner, old, step = type(self).__name__, {}, self._step
        last = self._record.history.last
        if last is not None and last["step"] == trainer.global_step:
            old = last["old"]  # the same weights
        for task, loader in self._sources.items() if not old else ():
            score = make_score(self.metric, module, owner=owner, temperature=self.temperature)
            evaluate_held_out(
                trainer, module, loader, step, score.update, limit=self.limit_batches, owner=f"{owner} ({task})"
            )
            with torch.inference_mode(False), torch.no_grad():
                old[task] = score.compute()
        reading = self._record.add(trainer, when, old)
        prefix = log_prefix(self, self.log_name, trainer)
        values = {
            f"{prefix}/{name}" if list(self._sources) == [_UNNAMED] else f"{prefix}/{task}/{name}": value
            for task, known in reading["old"].items()
            for name, value in known.items()
        }
        # not by log() alone: what it gets reaches a logger in the steps of log_every_n_steps only
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        return values

    def _due(self, trainer: Trainer) -> bool:
        return self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _in_fit(self, trainer: Trainer) -> bool:
        return trainer.state.fn == "fit" and not trainer.sanity_checking

    def _leave(self) -> None:
        self._sources, self._step = {}, None
        self._record.forget_restored()

    def _about(self) -> dict[str, Any]:
        return {"metric": metric_name(self.metric), "tasks": list(self._sources)}

    def _described(self, module: LightningModule) -> str:
        """What is evaluated, when, and where it is written."""
        tasks = ", ".join(f"{name} ({_length(loader)})" for name, loader in self._sources.items())
        moments = ["before training"] * self.before
        if self.every_n_steps is not None:
            moments.append(f"every {self.every_n_steps} steps")
        if self.every_n_epochs is not None:
            moments.append("in every validation" if self.every_n_epochs == 1 else f"every {self.every_n_epochs} epochs")
        where = "" if self.path is None else f"; {self.path}"
        return f"{metric_name(self.metric)} of {tasks} with {type(module).__name__}, {', '.join(moments)}{where}"

    def state_dict(self) -> dict[str, Any]:
        """The readings and where they are written."""
        return self._record.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was."""
        self._record.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        # A step may be a method of the module, and a loader may have workers: both live in this process alone.
        return {**self.__dict__, "_sources": {}, "_step": None}


def _length(loader: Loader) -> str:
    try:
        count = len(loader)  # type: ignore[arg-type]
    except TypeError:
        return "batches as they come"
    return f"{count} batch{'es' * (count != 1)}"


__all__ = ["ForgettingMonitor"]
