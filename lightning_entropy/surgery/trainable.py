"""Training some parameters of a model and leaving the others exactly as they are."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_entropy.observe.selection import as_patterns, match_modules
from lightning_entropy.surgery.report import Change, Refusal, SurgeryReport

_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)


def plain_name(name: str) -> str:
    """The name that a parameter has without the wrapping of adapters.

    Args:
        name: of a parameter or module in a model that may carry adapters.

    Example:
        >>> plain_name("layer.0.dense.base_layer.weight")
        'layer.0.dense.weight'
    """
    return ".".join(part for part in name.split(".") if part != "base_layer")


def parameters_by_name(model: nn.Module, names: Iterable[str], *, owner: str) -> dict[str, nn.Parameter]:
    """The parameters that names mean, where adapters may have been put around the modules since.

    Args:
        model: any module.
        names: of parameters, as they were without adapters; a name of a tied weight may be any of its names.
        owner: who asks, for messages.

    Raises:
        ValueError: if there is no such parameter; the message has the nearest names.
    """
    known = {plain_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    found = {}
    for name in dict.fromkeys(names):
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            hint = f"Closest names: {', '.join(close)}." if close else f"Parameters: {', '.join(list(known)[:20])}."
            raise ValueError(f"{owner}: {type(model).__name__} has no parameter {name!r}.\n{hint}")
        found[name] = known[name]
    return found


def is_normalisation(module: nn.Module) -> bool:
    """Whether a module normalises and has vectors of its own to scale and shift with (by its class or its name)."""
    if isinstance(module, _NORMS):
        return True
    own = list(module.parameters(recurse=False))
    named = any("norm" in kind.__name__.lower() for kind in type(module).__mro__[:3])
    return named and bool(own) and all(parameter.dim() <= 1 for parameter in own)


def parameters_of(
    model: nn.Module, *, also: str | Iterable[str] | None, norms: bool, owner: str
) -> dict[str, nn.Parameter]:
    """Parameters of the modules that patterns name, and of normalisations; those of adapters excepted.

    Args:
        model: any module.
        also: shell patterns over dotted names of modules.
        norms: add every normalisation's.
        owner: who asks, for messages.

    Raises:
        ValueError: if a pattern matches no module, or only modules without parameters.
    """
    chosen: dict[str, nn.Parameter] = {}
    patterns = as_patterns(also)
    for pattern, modules in match_modules(model, patterns, owner).items() if patterns else ():
        inside = {
            f"{name}.{key}" if name else key: parameter
            for name in modules
            for key, parameter in model.get_submodule(name).named_parameters()
            if ".lora_" not in f".{key}"
        }
        if not inside:
            raise ValueError(f"{owner}: {pattern!r} matched {', '.join(modules)}, without parameters to train")
        chosen |= inside
    if norms:
        for name, module in model.named_modules():
            if is_normalisation(module):
                chosen |= {f"{name}.{k}" if name else k: p for k, p in module.named_parameters(recurse=False)}
    return chosen


def set_trained(model: nn.Module, trained: Iterable[nn.Parameter]) -> Callable[[], None]:
    """Have these parameters trained and no other; what is frozen loses its gradient, which would still move it.

    Args:
        model: any module.
        trained: parameters of it.

    Returns:
        What sets the flags back.
    """
    wanted = {id(parameter) for parameter in trained}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        if parameter.is_floating_point() or parameter.is_complex():  # others cannot have gradients
            parameter.requires_grad_(id(parameter) in wanted)
        if not parameter.requires_grad:
            parameter.grad = None

    def undo() -> None:
        for parameter, flag in before:
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(flag)

    return undo


def frozen_batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Batch normalisations that are not trained: without a trained parameter of their own.

    One without parameters belongs to the module that holds it, and is frozen where that has nothing trained.
    """
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        own = list(module.parameters(recurse=False))
        around = own or list(model.get_submodule(name.rpartition(".")[0]).parameters())
        if not any(parameter.requires_grad for parameter in around):
            found.append(module)
    return found


def hold_batch_norms(model: nn.Module) -> Callable[[], None]:
    """Have frozen batch normalisations use their stored statistics and leave them as they are.

    ``model.train()`` undoes this: call it again afterwards.

    Args:
        model: any module.

    Returns:
        What sets their modes back.

    Example:
        >>> layer = nn.BatchNorm1d(2).requires_grad_(False)
        >>> _ = hold_batch_norms(layer)
        >>> layer.training
        False
    """
    before = [(module, module.training) for module in frozen_batch_norms(model)]
    for module, _ in before:
        module.training = False

    def undo() -> None:
        for module, mode in before:
            module.training = mode

    return undo


def train_only(
    model: nn.Module,
    names: Iterable[str],
    *,
    also: str | Iterable[str] | None = None,
    norms: bool = False,
) -> SurgeryReport:
    """Train the parameters of these names and no other.

    Everything else is frozen and loses its gradient, so that an optimizer that holds it leaves it alone, weight decay
    included. Batch normalisations of frozen parts use their stored statistics (:func:`hold_batch_norms` does so again
    after ``model.train()``). Biases and norms are not trained with the weight beside them unless they are named.

    Args:
        model: any module; changed in place.
        names: of parameters, for example ``Selection.names``.
        also: shell patterns over dotted names of modules that are trained whole, a task head for example.
        norms: train the scales and shifts of all normalisations too.

    Returns:
        The report. ``undo()`` restores what was trained and the modes of batch normalisations.

    Raises:
        ValueError: if a name or pattern is not in the model, or nothing of it can be trained (quantised weights).

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> report = train_only(model, ["0.weight"], also="2")
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.weight', '2.weight', '2.bias']
        >>> report.undo()
    """
    report = SurgeryReport("train_only")
    named = parameters_by_name(model, names, owner="train_only")
    trained: list[nn.Parameter] = []
    for name, parameter in named.items():
        module, _, tensor = name.rpartition(".")
        if parameter.is_floating_point() or parameter.is_complex():
            trained.append(parameter)
            report.changes.append(Change(module, f"{tensor} trained"))
        else:
            reason = f"{tensor} is quantised ({parameter.dtype}) and cannot be trained itself: adapt it (mode='lora')"
            report.refused.append(Refusal(module, reason))
    extra = parameters_of(model, also=also, norms=norms, owner="train_only")
    extra = {name: p for name, p in extra.items() if p.is_floating_point() and not any(p is q for q in trained)}
    if not trained and not extra:
        told = "; ".join(f"{r.module}: {r.reason}" for r in report.refused) or "no names were given"
        raise ValueError(f"train_only would train nothing of {type(model).__name__}: {told}")
    for holder in dict.fromkeys(name.rpartition(".")[0] for name in extra):
        report.changes.append(Change(holder, "trained besides"))
    report.on_undo(set_trained(model, [*trained, *extra.values()]))
    report.on_undo(hold_batch_norms(model))
    return report


__all__ = [
    "frozen_batch_norms",
    "hold_batch_norms",
    "is_normalisation",
    "parameters_by_name",
    "parameters_of",
    "plain_name",
    "set_trained",
    "train_only",
]
