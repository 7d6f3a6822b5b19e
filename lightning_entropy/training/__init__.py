"""How a method joins a Trainer: the one import of Lightning, loss terms, weight schedules, figures, files."""

from lightning_entropy.training.entropy_term import AttentionEntropyTerm
from lightning_entropy.training.fine_tuning import FineTuningCallback
from lightning_entropy.training.loss_term import LossTerm
from lightning_entropy.training.reader_term import AttentionLossTerm
from lightning_entropy.training.schedule import WeightSchedule
from lightning_entropy.training.surgery import SurgeryCallback

__all__ = [
    "AttentionEntropyTerm",
    "AttentionLossTerm",
    "FineTuningCallback",
    "LossTerm",
    "SurgeryCallback",
    "WeightSchedule",
]
