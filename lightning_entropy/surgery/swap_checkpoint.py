"""What a state dict that is loaded into a model with swapped activations must hold."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_entropy.surgery.report import name_patterns


class SwapCheckpoint:
    """A load pre-hook: refuses the state dict of another swap, and takes that of a plain model.

    Args:
        method: who swapped, for messages.
        names: dotted names of the new activations.
    """

    def __init__(self, method: str, names: list[str]) -> None:
        self.method, self.names = method, names

    def __call__(self, model: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Called by ``load_state_dict`` before anything is loaded.

        Raises:
            RuntimeError: if the state dict has parameters of some of the new activations and not of others, or of
                activations that are not swapped here.
        """
        own = model.state_dict(prefix=prefix)
        mine = [key for key in own if any(key.startswith(f"{prefix}{name}.") for name in self.names)]
        absent = [key for key in mine if key not in state_dict]
        if len(absent) == len(mine):  # of a plain model: the new activations keep their values
            state_dict.update({key: own[key] for key in absent})
            return
        ends = {key.rpartition(".")[2] for key in mine}
        more = [key for key in state_dict if key not in own and key.rpartition(".")[2] in ends]
        if absent or more:
            told = []
            if absent:
                told.append(f"swapped here and not there: {_listed(absent)}")
            if more:
                told.append(f"swapped there and not here: {_listed(more)}")
            raise RuntimeError(
                f"{self.method}: the checkpoint was written with other activations swapped ({'; '.join(told)}). "
                "Use the old=, new=, modules= and share= with which it was trained."
            )


def _listed(keys: list[str]) -> str:
    patterns = name_patterns(keys)
    return ", ".join(patterns[:5]) + (f" and {len(patterns) - 5} more" if len(patterns) > 5 else "")


__all__ = ["SwapCheckpoint"]
