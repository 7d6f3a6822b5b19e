"""What a fine-tuning chose, as checkpoints keep it, and checkpoints that leave out what was not trained."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_entropy.surgery.report import SurgeryReport, name_patterns
from lightning_entropy.surgery.selection import Selection

_SAMPLES = 1024


@dataclass
class FineTuningRecord:
    """A choice and how it was carried out.

    Args:
        selection: what was chosen.
        mode: ``"full"`` or ``"lora"``.
        rank: of adapters, and so for the next two.
        alpha: see there.
        dropout: see there.
        trained: names of all parameters that the method trains, in the model as it was changed.
        kept: names of all parameters that are trained, also by others.
        saved: ``"all"``, or ``"adapters"`` where the checkpoint has what is trained alone.
        base: fingerprint of the weights that it has not; see :func:`base_fingerprint`.
    """

    selection: Selection
    mode: str
    rank: int
    alpha: float
    dropout: float
    trained: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    saved: str = "all"
    base: str = ""

    def record(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "selection": self.selection.record()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> FineTuningRecord:
        """What :meth:`record` told."""
        return cls(**{**record, "selection": Selection.from_record(record["selection"])})


def what_is_trained(model: nn.Module, record: FineTuningRecord, report: SurgeryReport, *, restored: bool) -> str:
    """One line about a choice that was carried out.

    Args:
        model: as it is now.
        record: of the choice.
        report: of the surgery.
        restored: whether a checkpoint brought the choice.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    how = "trained" if record.mode == "full" else f"adapted (LoRA, rank {record.rank})"
    chosen = set(record.selection.names)
    besides = [n for n in record.trained if n not in chosen and ".lora_" not in f".{n}"]
    patterns = name_patterns(name.rpartition(".")[0] for name in besides)
    more = f" and {len(patterns) - 6} more" if patterns[6:] else ""
    also = f"; besides: {', '.join(patterns[:6])}{more}" if besides else ""
    refused = f"; {len(report.refused)} refused: {report.refused[0].reason}" if report.refused else ""
    whence = ", as in the checkpoint" if restored else ""
    return f"{how}{whence}: {record.selection}{also}{refused}; {trained:,} of {total:,} numbers are trained"


def base_fingerprint(model: nn.Module, trained: Iterable[str]) -> str:
    """Tells the weights that are not trained from those of another base model, by numbers spread over each.

    Args:
        model: any module.
        trained: names of parameters that are left out.
    """
    left_out = set(trained)
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name in left_out:
            continue
        values = parameter.detach().reshape(-1)
        sampled = values[:: max(1, values.numel() // _SAMPLES)].to(device="cpu", dtype=torch.float32)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(sampled.numpy().tobytes())
    return digest.hexdigest()


def keep_trained(model: nn.Module, state_dict: dict[str, Any], trained: Iterable[str]) -> dict[str, Any]:
    """The part of a state dict that training changes: what is trained, and all buffers.

    Args:
        model: to which it belongs.
        state_dict: left as it is.
        trained: names of parameters to keep, besides those that require a gradient.
    """
    wanted = set(trained)
    frozen = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad and name not in wanted
    }
    return {key: value for key, value in state_dict.items() if key not in frozen}


def complete(model: nn.Module, state_dict: dict[str, Any], record: FineTuningRecord, *, owner: str) -> None:
    """Fill in what a checkpoint left out with the weights of the model, after seeing that they are the right ones.

    Args:
        model: with the base weights, changed as it was when the checkpoint was written.
        state_dict: of the checkpoint; filled in place.
        record: of the checkpoint.
        owner: for messages.

    Raises:
        RuntimeError: if something is missing that was trained or is a buffer, or the base model is another one.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state_dict]
    trained = set(record.kept)
    frozen = {name for name, _ in model.named_parameters(remove_duplicate=False) if name not in trained}
    lost = [key for key in missing if key not in frozen]
    if lost:
        raise RuntimeError(
            f"{owner}: the checkpoint was written without the frozen weights, and {len(lost)} more are missing that "
            f"are not frozen: {', '.join(name_patterns(lost)[:8])}. It does not belong to this model, or is damaged."
        )
    if missing and record.base and base_fingerprint(model, trained) != record.base:
        raise RuntimeError(
            f"{owner}: the checkpoint was written without the frozen weights, and those of this model are not the ones "
            "beside which it was trained. Build the model from the same pretrained weights, or save with save='all'."
        )
    state_dict.update({key: own[key] for key in missing})


__all__ = ["FineTuningRecord", "base_fingerprint", "complete", "keep_trained", "what_is_trained"]
