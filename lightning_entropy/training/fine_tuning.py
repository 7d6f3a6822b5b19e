"""How a method that chooses what of a model is trained joins a Trainer."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lightning_entropy.observe.selection import as_patterns, match_modules
from lightning_entropy.surgery.lora import inject_lora, merge_lora
from lightning_entropy.surgery.lora_files import adapted_in
from lightning_entropy.surgery.report import SurgeryReport
from lightning_entropy.surgery.selection import MODES, Selection
from lightning_entropy.surgery.task_head import task_heads
from lightning_entropy.surgery.trainable import set_trained, train_only
from lightning_entropy.training.fine_tuning_record import (
    FineTuningRecord,
    base_fingerprint,
    complete,
    keep_trained,
    what_is_trained,
)
from lightning_entropy.training.lightning import LightningModule, MisconfigurationException, Trainer
from lightning_entropy.training.next_call import around_next_call
from lightning_entropy.training.rank_zero import decide_on_rank_zero
from lightning_entropy.training.surgery import ModelSurgery, SurgeryCallback
from lightning_entropy.training.trained_part import TrainedPart, named_parameters
from lightning_entropy.verbosity import announce

SAVED = ("all", "adapters")


class FineTuningCallback(ModelSurgery):
    """Trains a part of a model that a method chooses: the weights themselves, or adapters beside them.

    The choice is made once, when the weights are there (pretrained and restored) and before the model is wrapped and
    optimizers are built. Rank zero chooses and all ranks follow. Checkpoints carry the choice: a run that resumes takes
    that one, whatever the trained weights would choose, and adapters are put in before their weights are restored; in
    validate, test and predict too. Several instances on one model train what any of them chose, and what other
    surgeries added stays trained.

    A subclass gives :meth:`choose`.

    Args:
        mode: ``"full"`` trains the chosen weights, ``"lora"`` adapters of peft beside them.
        rank: of adapters, and so for the next two; see :func:`~lightning_entropy.surgery.inject_lora`.
        alpha: see there.
        dropout: see there.
        head: shell patterns over names of modules that are trained whole and never candidates. ``"auto"``: the head of
            the task by what libraries call it (:func:`~lightning_entropy.surgery.task_heads`), None: no module.
        norms: train the scales and shifts of all normalisations too.
        selection: a JSON file of a :class:`~lightning_entropy.surgery.Selection` to take instead of choosing.
        save: ``"adapters"``: checkpoints have what is trained and the buffers alone, and load beside the same base
            weights. With ``ModelCheckpoint(save_weights_only=True)`` Lightning asks no callback, and all is saved.

    Attributes:
        chosen: what is trained and how, None before it is known.
        report: of the surgery.

    Raises:
        ValueError: if an argument is out of range.
        MisconfigurationException: if the callback joins when optimizers exist already, under a strategy that shards
            the model, or where the checkpoint was written by another configuration of the callback.
    """

    def __init__(
        self,
        *,
        mode: str = "full",
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        head: str | list[str] | None = "auto",
        norms: bool = False,
        selection: str | Path | None = None,
        save: str = "all",
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if save not in SAVED:
            raise ValueError(f"save must be one of {', '.join(SAVED)}, got {save!r}")
        if rank < 1 or not alpha > 0 or not 0 <= dropout < 1:
            raise ValueError(
                f"rank must be >= 1, alpha > 0 and dropout in [0, 1), got rank={rank}, alpha={alpha}, dropout={dropout}"
            )
        as_patterns(head, argument="head")
        self.mode, self.rank, self.alpha, self.dropout = mode, rank, alpha, dropout
        self.head, self.norms, self.selection, self.save = head, norms, selection, save
        self.chosen: FineTuningRecord | None = None
        self._stored: FineTuningRecord | None = None
        self._part: TrainedPart | None = None
        self._news: str | None = None

    @abstractmethod
    def choose(self, trainer: Trainer, module: LightningModule, *, exclude: list[str]) -> Selection:
        """Choose weights of the module, on rank zero, where the random states are put back afterwards.

        The datamodule is set up and the weights are those that training starts from; they are where Lightning left
        them before the strategy moves the model. :func:`~lightning_entropy.training.before_fit.training_batches` has
        batches and :func:`~lightning_entropy.training.before_fit.training_loss` their loss.

        Args:
            trainer: inside ``fit``.
            module: its module.
            exclude: names of modules that must not be chosen from: the heads.
        """

    def heads(self, module: nn.Module) -> list[str]:
        """The names of modules that are trained whole.

        Raises:
            ValueError: if a pattern of ``head`` matches no module.
        """
        if self.head == "auto":
            return task_heads(module)
        patterns = as_patterns(self.head) or []
        return [n for names in match_modules(module, patterns, self.name).values() for n in names] if patterns else []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask to look at a checkpoint before it is loaded, and in fit to choose before the strategy is set up."""
        self._refuse_sharding(trainer)
        self._forget_requests()
        self._stored = None
        fitting = stage == "fit"
        restoring = lambda checkpoint: self._when_loaded(trainer, pl_module, checkpoint)  # noqa: E731
        self._withdraw = [around_next_call(pl_module, "on_load_checkpoint", restoring, arguments=True)]
        if fitting:
            before = lambda: self._before_strategy(trainer, pl_module)  # noqa: E731
            self._withdraw.append(around_next_call(trainer.strategy, "setup", before))

    # What a checkpoint brings

    @contextmanager
    def _when_loaded(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> Iterator[None]:
        yield
        states = checkpoint.get("callbacks") or {}
        stored = states.get(self.state_key, {}).get("fine_tuning")
        if stored is None:
            self._without_record(trainer, module, checkpoint, states)
            return
        record = self._stored = FineTuningRecord.from_record(stored)
        if record.mode == "lora" and not self._has_done(module, record):
            if self._part is not None and self._part.is_in(module) and self.report is not None:
                self.report.undo()  # of this module, with other adapters
            self._carry_out(module, record)
        if record.saved == "adapters":
            complete(module, checkpoint["state_dict"], record, owner=self.name)

    def _without_record(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any], states: dict[str, Any]
    ) -> None:
        """A checkpoint of a plain run, of weights alone, or of another configuration."""
        mine = {c.state_key for c in trainer.callbacks}  # type: ignore[attr-defined]
        others = [key for key in states if key.startswith(type(self).__qualname__) and key not in mine]
        if others:
            raise MisconfigurationException(
                f"the checkpoint was written with {others[0]}, and this run has {self.state_key}: what it trains would "
                "be chosen anew from trained weights. Pass the arguments with which it was written."
            )
        names = adapted_in(checkpoint["state_dict"])
        if self.mode == "lora" and names and not self._is_operated(module):  # of weights alone
            report = inject_lora(module, names, rank=self.rank, alpha=self.alpha, dropout=self.dropout)
            self._accept(module, report, [n for n, p in module.named_parameters() if p.requires_grad])

    def _has_done(self, module: nn.Module, record: FineTuningRecord) -> bool:
        same = self.chosen is not None and set(self.chosen.trained) == set(record.trained)
        return same and self._is_operated(module)

    # Before optimizers exist

    @contextmanager
    def _before_strategy(self, trainer: Trainer, module: LightningModule) -> Iterator[None]:
        stored = self._stored
        if stored is not None and not self._has_done(module, stored):
            self._carry_out(module, stored)
        elif stored is None and not self._is_operated(module):
            self._check_weights(module)
            decided = decide_on_rank_zero(trainer, lambda: self.decide(trainer, module), owner=self.name)
            self._carry_out(module, self.take_decision(decided))
        self._settle(trainer, module)
        self._renew_averages(trainer, module)
        if self._news is not None:
            announce(self._news)
            self._news = None
        yield

    def decide(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """What rank zero tells all ranks, in plain values; a method that has more to tell adds to it."""
        selection = self._choice(trainer, module)
        return FineTuningRecord(selection, self.mode, self.rank, self.alpha, self.dropout).record()

    def take_decision(self, decided: dict[str, Any]) -> FineTuningRecord:
        """What :meth:`decide` told, on every rank."""
        return FineTuningRecord.from_record(decided)

    def _choice(self, trainer: Trainer, module: LightningModule) -> Selection:
        if self.selection is None:
            return self.choose(trainer, module, exclude=self.heads(module))
        selection = Selection.load(self.selection)
        if not selection.matches(module):
            warnings.warn(
                f"{self.name}: {self.selection} was made from other weights than those of {type(module).__name__}; its "
                "names are taken all the same.",
                stacklevel=2,
            )
        return selection

    def _carry_out(self, module: nn.Module, record: FineTuningRecord) -> None:
        names = record.selection.names
        if not names:
            raise MisconfigurationException(f"{self.name} chose nothing to train: {record.selection}")
        restored = bool(record.trained)
        head = None if restored else self.heads(module) or None
        modes = [(m, m.training) for m in module.modules()]
        norms = self.norms and not restored
        if record.mode == "lora":
            report = inject_lora(
                module,
                names,
                rank=record.rank,
                alpha=record.alpha,
                dropout=record.dropout,
                also_train=head,
                norms=norms,
            )
        else:
            report = train_only(module, names, also=head, norms=norms)
        if restored:  # as it was, whatever the arguments are now
            own = record.trained
            report.on_undo(set_trained(module, named_parameters(module, own, self.name).values()))
        else:
            own = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        for part, mode in modes:  # batch normalisations are held in training; Lightning warns of modes before it
            part.training = mode
        self._accept(module, report, own)
        self.chosen = replace(record, trained=own, saved=self.save)
        self._news = f"{self.name}: {what_is_trained(module, self.chosen, report, restored=restored)}"

    def _accept(self, module: nn.Module, report: SurgeryReport, own: list[str]) -> None:
        report.method = self.name
        self.report = report
        self._part = TrainedPart(module, own, self.name)

    def _is_operated(self, module: nn.Module) -> bool:
        done = self.report is not None and not self.report.undone
        return done and self._part is not None and self._part.is_in(module)

    def _settle(self, trainer: Trainer, module: LightningModule) -> None:
        """Train what any instance chose and any surgery added; remember what that is, and beside which weights."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        tuning = [c for c in callbacks if isinstance(c, FineTuningCallback) and c._is_operated(module)]
        wanted = [parameter for c in tuning if c._part is not None for parameter in c._part.parameters.values()]
        for callback in callbacks:
            if isinstance(callback, SurgeryCallback):
                wanted += callback.added_parameters(module)
        set_trained(module, wanted)
        kept = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        for record in (callback.chosen for callback in tuning):
            if record is not None:
                record.kept = kept
                if record.saved == "adapters" and not record.base:
                    record.base = base_fingerprint(module, kept)

    # During the fit

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that the choice was made in time, and write it beside the logs."""
        self._check_in_time(pl_module)
        if trainer.loggers and self.chosen is not None:
            folder = trainer.log_dir  # every rank must ask
            if trainer.is_global_zero and folder is not None:
                self.chosen.selection.save(Path(folder) / f"{self.name.lower()}_selection.json")

    def _check_in_time(self, module: nn.Module) -> TrainedPart:
        if self._part is None or not self._is_operated(module):
            raise MisconfigurationException(
                f"{self.name} came too late: optimizers were built over the whole model before it could choose. Pass "
                "it in Trainer(callbacks=[...]) or return it from the module's configure_callbacks."
            )
        return self._part

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that the optimizers have what was chosen."""
        part = self._check_in_time(pl_module)
        part.start(pl_module)
        left = part.without_optimizer(trainer)
        if left:
            warnings.warn(
                f"{self.name}: the optimizers do not have {', '.join(left[:6])}, which will not be trained. Collect "
                "the parameters in configure_optimizers, where the choice has been made.",
                stacklevel=2,
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep frozen batch normalisations in evaluation."""
        if self._part is not None:
            self._part.hold()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what had a gradient in the first batch."""
        if self._part is not None:
            self._part.note_gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say what had none."""
        problem = None if self._part is None else self._part.problem_of_first_batch()
        if problem is None:
            return
        if problem.nothing_moves:
            raise MisconfigurationException(f"{self.name}: {problem}")
        warnings.warn(f"{self.name}: {problem}", stacklevel=2)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give batch normalisations back their mode."""
        if self._part is not None:
            self._part.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same, and leave no request behind."""
        super().on_exception(trainer, pl_module, exception)
        if self._part is not None:
            self._part.release()

    def leave_process(self, module: nn.Module) -> None:
        """Merge: the plain model of the process that waits computes the same with the adapters in its weights."""
        if self.report is None or self.report.undone:
            return
        if self.chosen is not None and self.chosen.mode == "lora":
            merge_lora(module)
        self.report.undo()

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The choice in plain values, and what was done."""
        stored = {} if self.chosen is None else {"fine_tuning": self.chosen.record()}
        return {**super().state_dict(), **stored}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the choice of a checkpoint, for the fit that resumes."""
        if self._stored is None and "fine_tuning" in state_dict:
            self._stored = FineTuningRecord.from_record(state_dict["fine_tuning"])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leave out what is frozen, where every instance wants that."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        tuning = [c for c in callbacks if isinstance(c, FineTuningCallback) and c.chosen is not None]
        records = [c.chosen for c in tuning if c.chosen is not None]
        if self.chosen is None or any(record.saved != "adapters" for record in records):
            return
        kept = {name for record in records for name in record.kept}
        checkpoint["state_dict"] = keep_trained(pl_module, checkpoint["state_dict"], kept)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_part": None}


__all__ = ["SAVED", "FineTuningCallback"]
