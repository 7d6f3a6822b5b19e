"""What a run's readings of attention entropy leave: history, CSV file, figures in the logger, alarms."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_entropy.training.attention_report import AttentionEntropyReport, HeadLimits, draw
from lightning_entropy.training.entropy_alarm import EntropyAlarm
from lightning_entropy.training.entropy_history import EntropyHistory, append_rows, continue_file, unused
from lightning_entropy.training.figures import log_figure
from lightning_entropy.training.lightning import Trainer, rank_zero_warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GROWTH = 1.25  # a new figure when there is a fourth more to see: their number grows with the log of the run


class EntropyRecord:
    """Keeps the readings of one run.

    Args:
        limits: what is called collapsed, overloaded and a sink.
        patience: readings in a row that make an alarm.
        csv: write a CSV file.
        figures: log figures.
    """

    def __init__(self, limits: HeadLimits, *, patience: int, csv: bool, figures: bool) -> None:
        self.limits = limits
        self.patience = patience
        self.csv = csv
        self.figures = figures
        self.path: Path | None = None
        self.history = EntropyHistory()
        self._alarm = EntropyAlarm(patience)
        self._read = self._drawn = 0
        self._restored = False

    def open(self, trainer: Trainer, name: str) -> bool:
        """A fit starts. Every rank must call it.

        Args:
            trainer: its logger's folder gets the file; ``default_root_dir`` without one.
            name: of the file and of the figure.

        Returns:
            Whether the fit goes on where an earlier one was, from its checkpoint or with the same Trainer.
        """
        last = self.history.last
        going_on = self._restored or (last is not None and trainer.global_step >= max(last, 1))
        earlier = self.path if going_on else None
        self._restored = False
        if not going_on:
            self.history, self._alarm = EntropyHistory(), EntropyAlarm(self.patience)
        self._alarm.rearm()
        self._read = self._drawn = len(self.history)
        self.path = None
        folder = trainer.log_dir or trainer.default_root_dir  # asks rank zero
        if not self.csv or getattr(trainer, "fast_dev_run", False):
            return going_on
        path = Path(folder, f"{name}.csv")
        if earlier is not None and earlier.parent == path.parent:
            path = earlier
        elif trainer.is_global_zero:
            path = unused(path)
        if going_on and trainer.is_global_zero:
            continue_file(path, earlier, self.history)
        self.path = path
        return going_on

    def add(self, report: AttentionEntropyReport, *, owner: str, write: bool) -> None:
        """Keep a reading, write it, and warn of what has lasted."""
        self.history.add(report.step, report.heads)
        self._read += 1
        if self.path is not None and write:
            append_rows(self.path, report.rows())
        for message in self._alarm.update(report):
            rank_zero_warn(f"{owner}: {message}")

    def draw(self) -> Figure:
        """Layers x heads at a few steps, and each layer over all steps."""
        return draw(self.history.reports(self.limits))

    def log_figure(self, trainer: Trainer, name: str, *, every: bool = False) -> None:
        """Hand the figure to the loggers if there is a fourth more to see than in the last.

        Args:
            trainer: whose loggers get it.
            name: of the figure.
            every: whenever there is anything new.
        """
        wanted = self._drawn + 1 if every else max(self._drawn * _GROWTH, self._drawn + 1)
        if not self.figures or self._read < wanted or getattr(trainer, "fast_dev_run", False):
            return
        self._drawn = self._read
        if trainer.is_global_zero and trainer.loggers:
            log_figure(trainer, name, self.draw())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        path = None if self.path is None else str(self.path)
        return {"history": self.history.state_dict(), "alarm": self._alarm.state_dict(), "csv": path}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was."""
        self.history.load_state_dict(state["history"])
        self._alarm.load_state_dict(state["alarm"])
        self.path = None if state["csv"] is None else Path(state["csv"])
        self._restored = True

    def forget_restored(self) -> None:
        """A checkpoint that was loaded to validate or test does not begin a fit."""
        self._restored = False


__all__ = ["EntropyRecord"]
