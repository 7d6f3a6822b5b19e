"""What a run's readings of forgetting leave: history, JSON file, figures in the logger."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_entropy.training.entropy_history import unused
from lightning_entropy.training.figures import log_figure
from lightning_entropy.training.forgetting_figure import plot_forgetting
from lightning_entropy.training.forgetting_history import ForgettingHistory, Reading, choose_new_task
from lightning_entropy.training.lightning import MisconfigurationException, Trainer

_GROWTH = 1.25  # a new figure when there is a fourth more to see: their number grows with the log of the run


class ForgettingRecord:
    """Keeps the readings of one run.

    Args:
        new_task: name of the logged value that is the new task's score; None chooses one.
        json: write a JSON file.
        figures: log figures.
    """

    def __init__(self, new_task: str | None, *, json: bool, figures: bool) -> None:
        self.given = new_task
        self.new_task = new_task
        self.json = json
        self.figures = figures
        self.path: Path | None = None
        self.history = ForgettingHistory()
        self._drawn = self._added = 0
        self._restored = False
        self._validated: dict[str, float] = {}

    def open(self, trainer: Trainer, name: str) -> None:
        """A fit starts. Every rank must call it.

        It goes on where an earlier fit was, from its checkpoint or with the same Trainer; else it begins anew.

        Args:
            trainer: its logger's folder gets the file; ``default_root_dir`` without one.
            name: of the file.
        """
        last = self.history.last
        going_on = self._restored or (last is not None and trainer.global_step >= max(last["step"], 1))
        earlier = self.path if going_on else None
        self._restored = False
        self._validated = {}
        if not going_on:
            self.history = ForgettingHistory()
            self.new_task = self.given
        self._drawn = self._added = len(self.history)
        self.path = None
        folder = trainer.log_dir or trainer.default_root_dir  # asks rank zero
        if not self.json or getattr(trainer, "fast_dev_run", False):
            return
        path = Path(folder, f"{name}.json")
        if earlier is not None and earlier.parent == path.parent:
            path = earlier
        elif trainer.is_global_zero:
            path = unused(path)
        self.path = path

    def add(self, trainer: Trainer, when: str, old: Mapping[str, Mapping[str, float]]) -> Reading:
        """Keep a reading."""
        self._added += 1
        return self.history.add(step=trainer.global_step, epoch=trainer.current_epoch, when=when, old=old)

    def finish(self, trainer: Trainer, about: dict[str, Any], *, owner: str | None = None) -> None:
        """Complete the last reading by what is logged of the new task, and write it.

        Args:
            trainer: has the logged values.
            about: entries of the file.
            owner: the name in messages, where a missing score is an error.

        Raises:
            MisconfigurationException: if a score was asked for by name and is not logged.
        """
        reading = self.history.last
        assert reading is not None, "add() comes before"
        reading["new"] = logged_values(trainer)
        if self.new_task is None:
            self.new_task = choose_new_task(list(reading["new"]))
        elif self.given is not None and owner is not None and self.given not in reading["new"]:
            names = ", ".join(reading["new"]) or "nothing"
            raise MisconfigurationException(
                f"{owner}: new_task={self.given!r} was not logged by the end of epoch {trainer.current_epoch}; logged: "
                f"{names}. Log it with self.log({self.given!r}, ...), or name one of those."
            )
        self.write(trainer, about)

    def begin(self, trainer: Trainer, about: dict[str, Any]) -> None:
        """Complete the reading before training by a validation before training, if there was one, and write it."""
        reading = self.history.last
        assert reading is not None, "add() comes before"
        reading["new"], self._validated = self._validated, {}
        self.write(trainer, about)

    def keep_sanity_check(self, trainer: Trainer) -> None:
        """A sanity check that runs all of validation is a validation before training; one of two batches is none."""
        if trainer.num_sanity_val_steps == float("inf"):
            self._validated = logged_values(trainer)

    def write(self, trainer: Trainer, about: dict[str, Any]) -> None:
        """Write the file."""
        if self.path is not None and trainer.is_global_zero:
            self.history.write(self.path, **about, new_task=self.new_task)

    def has_read(self, epoch: int) -> bool:
        """Whether this epoch had a reading with the new task's score."""
        last = [r for r in self.history.readings if r["when"] in ("validation", "epoch")][-1:]
        return bool(last) and last[0]["epoch"] == epoch

    def log_figure(self, trainer: Trainer, name: str, *, every: bool = False) -> None:
        """Hand the figure to the loggers if there is a fourth more to see than in the last.

        Args:
            trainer: whose loggers get it.
            name: what its name begins with.
            every: whenever there is anything new.
        """
        wanted = self._drawn + 1 if every else max(self._drawn * _GROWTH, self._drawn + 1)
        if not self.figures or self._added < wanted or getattr(trainer, "fast_dev_run", False):
            return
        self._drawn = self._added
        if trainer.is_global_zero and trainer.loggers:
            figure = plot_forgetting(self.history.readings, new_task=self.new_task)
            log_figure(trainer, f"{name}/tradeoff", figure)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        path = None if self.path is None else str(self.path)
        return {"readings": self.history.state_dict(), "new_task": self.new_task, "json": path}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was."""
        self.history.load_state_dict(state["readings"])
        self.new_task = self.given or state["new_task"]
        self.path = None if state["json"] is None else Path(state["json"])
        self._restored = True

    def forget_restored(self) -> None:
        """A checkpoint that was loaded to validate or test does not begin a fit."""
        self._restored = False


def logged_values(trainer: Trainer) -> dict[str, float]:
    """What is logged of the new task: single numbers, the monitors' own left out."""
    return {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if not name.startswith("forgetting") and (not isinstance(value, torch.Tensor) or value.numel() == 1)
    }


__all__ = ["ForgettingRecord", "logged_values"]
