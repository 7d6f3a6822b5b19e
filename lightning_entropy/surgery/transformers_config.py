"""A swapped transformers model and its configuration: what is saved is built again by ``from_pretrained``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_entropy.extras import require

# What configurations call the activation of their feed-forward layers.
_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation", "dense_act_fn", "hidden_act_fn")


def register_activation(name: str, make: Callable[[], nn.Module]) -> None:
    """Make an activation known to transformers, so that ``config.hidden_act = name`` builds it.

    ``from_pretrained`` creates parameters that a checkpoint lacks without values and initializes only classes that it
    knows. Activations that are registered here get their initial values then.

    Args:
        name: what configurations call it.
        make: returns a new module with its initial values.

    Raises:
        ImportError: if transformers is not installed.
        ValueError: if transformers has an activation of its own by that name.

    Example:
        >>> register_activation("my_prelu", lambda: nn.PReLU(init=0.1))
    """
    activations = require("transformers.activations", extra="finetuning")
    if name in activations.ACT2CLS:
        raise ValueError(f"transformers has an activation {name!r} of its own; choose another name")
    with torch.device("cpu"):
        prototype = make()
    activations.ACT2FN[name] = _Registered(prototype)


class _Registered:
    """Called by transformers for a new activation."""

    def __init__(self, prototype: nn.Module) -> None:
        self.prototype = prototype

    def __call__(self) -> nn.Module:
        module = copy.deepcopy(self.prototype)
        values = {name: p.detach().clone() for name, p in module.named_parameters(recurse=False)}
        module.__class__ = _loadable(type(module))
        module.__dict__["_initial_values"] = values
        return module


_classes: dict[type, type] = {}


def _loadable(kind: type) -> type:
    if "_initial_values_class" in kind.__dict__:
        return kind
    if kind not in _classes:
        body: dict[str, Any] = {
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            "__doc__": kind.__doc__,
            "__reduce_ex__": _reduce,
            "_initial_values_class": kind,
            "_is_hf_initialized": property(_is_initialized, _set_initialized),
        }
        _classes[kind] = type(kind)(kind.__name__, (kind,), body)
    return _classes[kind]


def _is_initialized(self: nn.Module) -> bool:
    return bool(self.__dict__.get("_marked_initialized", False))


def _set_initialized(self: nn.Module, value: bool) -> None:
    """Transformers sets this when it has initialized a module: now a parameter without values gets them."""
    self.__dict__["_marked_initialized"] = value
    initial: dict[str, Tensor] = self.__dict__["_initial_values"]
    for name, parameter in self.named_parameters(recurse=False):
        if value and name in initial and not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False):
            with torch.no_grad():
                parameter.copy_(initial[name])


def _reduce(self: nn.Module, protocol: Any) -> Any:
    kind = type(self).__dict__["_initial_values_class"]
    reduced = super(type(self), self).__reduce_ex__(protocol)
    return (_restore, (kind,), *reduced[2:])


def _restore(kind: type) -> Any:
    loadable = _loadable(kind)
    return object.__new__(loadable)


def is_pretrained_model(model: nn.Module) -> bool:
    """Whether a model is one of transformers, told without importing it."""
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers")
        for base in type(model).__mro__
    )


def follow_in_config(
    model: nn.Module, name: str, make: Callable[[], nn.Module], swapped: list[str]
) -> Callable[[], None] | None:
    """Name a new activation in a model's configuration, if the model that it then describes is the swapped one.

    Args:
        model: a transformers model whose activations were swapped.
        name: of the new activation.
        make: makes one.
        swapped: the names of its new modules.

    Returns:
        What restores the configuration; None where no field of it describes the model.
    """
    activations = require("transformers.activations", extra="finetuning")
    if name in activations.ACT2CLS:
        name = f"swapped_{name}"
    config: Any = model.config
    for holder, path in _holders(config):
        for field in _FIELDS:
            before = getattr(holder, field, None)
            if not isinstance(before, str):
                continue
            described = copy.deepcopy(config)
            setattr(described if not path else getattr(described, path), field, name)
            register_activation(name, make)
            if _builds(type(model), described, model, swapped):
                setattr(holder, field, name)
                return lambda h=holder, f=field, b=before: setattr(h, f, b)  # type: ignore[misc]
    return None


def _holders(config: Any) -> list[tuple[Any, str]]:
    inner = [(getattr(config, n, None), n) for n in ("text_config", "vision_config")]
    return [(config, ""), *((c, n) for c, n in inner if c is not None)]


def _builds(kind: type, config: Any, model: nn.Module, swapped: list[str]) -> bool:
    try:
        with torch.device("meta"):
            built = kind(config)
    except Exception:
        return False  # a configuration that its model does not take describes no model
    if set(built.state_dict()) != set(model.state_dict()):
        return False
    mine, modules = dict(model.named_modules()), dict(built.named_modules())
    # Also where the new activation has no parameters: the same class must stand at the same places, and nowhere else.
    expected = {name for name, module in mine.items() if type(module).__name__ == type(mine[swapped[0]]).__name__}
    found = {name for name, module in modules.items() if type(module).__name__ == type(mine[swapped[0]]).__name__}
    return expected == found and set(swapped) <= found


__all__ = ["follow_in_config", "is_pretrained_model", "register_activation"]
