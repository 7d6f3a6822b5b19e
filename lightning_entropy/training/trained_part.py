"""The parameters that a method trains, and whether they are trained indeed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import nn

from lightning_entropy.surgery.report import name_patterns
from lightning_entropy.surgery.trainable import frozen_batch_norms, parameters_by_name
from lightning_entropy.training.lightning import Trainer


class IdleParameters:
    """Parameters that ought to be trained and had no gradient; ``str()`` of it says why that can be.

    Args:
        names: theirs.
        total: how many were to be trained.
    """

    def __init__(self, names: list[str], total: int) -> None:
        self.names = names
        self.total = total

    @property
    def nothing_moves(self) -> bool:
        """Whether that is all of them."""
        return len(self.names) == self.total

    def __str__(self) -> str:
        return (
            f"{len(self.names)} of {self.total} trained tensors had no gradient in the first batch: "
            f"{', '.join(name_patterns(self.names)[:6])}. Reasons: an expert that nothing was routed to; a module "
            "whose weight is read without calling it, where an adapter has no effect (leave it out with exclude=); "
            "gradient checkpointing with use_reentrant=True behind frozen layers (pass use_reentrant=False, or call "
            "the model's enable_input_require_grads())."
        )


class TrainedPart:
    """Parameters by name, held weakly.

    Args:
        module: that has them.
        names: of parameters in it, or without the adapters that were put around them since.
        owner: who trains them, for messages.
    """

    def __init__(self, module: nn.Module, names: Iterable[str], owner: str) -> None:
        self.module = weakref.ref(module)
        found = named_parameters(module, names, owner)
        self._references = {name: weakref.ref(parameter) for name, parameter in found.items()}
        self._idle: set[str] | None = None
        self._held: list[nn.Module] = []

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that exist still."""
        return {n: parameter for n, reference in self._references.items() if (parameter := reference()) is not None}

    def is_in(self, module: nn.Module) -> bool:
        """Whether it is that of this very module, as it was."""
        inside = {id(parameter) for parameter in module.parameters()}
        mine = self.parameters
        whole = len(mine) == len(self._references)
        return self.module() is module and whole and all(id(parameter) in inside for parameter in mine.values())

    def start(self, module: nn.Module) -> None:
        """A fit begins: watch the first batch, and the batch normalisations that are not trained."""
        self._idle = set(self._references)
        self._held = [norm for norm in frozen_batch_norms(module) if norm.training]

    def without_optimizer(self, trainer: Trainer) -> list[str]:
        """Names of parameters that no optimizer has, as patterns."""
        held = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        return name_patterns(name for name, parameter in self.parameters.items() if id(parameter) not in held)

    def hold(self) -> None:
        """Frozen batch normalisations use their stored statistics, whatever called ``train()`` in between."""
        for module in self._held:
            module.training = False

    def release(self) -> None:
        """Give them back their mode, so that the next fit finds the modes that it expects."""
        for module in self._held:
            module.training = True
        self._held = []

    def note_gradients(self) -> None:
        """Call after each backward of the first batch."""
        if self._idle:
            self._idle -= {name for name, parameter in self.parameters.items() if parameter.grad is not None}

    def problem_of_first_batch(self) -> IdleParameters | None:
        """What had no gradient in the first batch; None where all is well and after the first call."""
        idle, self._idle = self._idle, None
        return IdleParameters(sorted(idle), len(self._references)) if idle else None


def named_parameters(module: nn.Module, names: Iterable[str], owner: str) -> dict[str, nn.Parameter]:
    """Parameters by their names; by those without adapters where some were put around them since.

    Args:
        module: that has them.
        names: of parameters.
        owner: for messages.

    Raises:
        ValueError: if there is no such parameter.
    """
    own = dict(module.named_parameters(remove_duplicate=False))
    wanted = list(names)
    found = {name: own[name] for name in wanted if name in own}
    left = [name for name in wanted if name not in own]
    return found | (parameters_by_name(module, left, owner=owner) if left else {})


__all__ = ["IdleParameters", "TrainedPart", "named_parameters"]
