"""What is exchanged by what: names, classes, modules, factories and functions as a user gives them."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_entropy.activation.catalog import find_activation
from lightning_entropy.surgery.activation_swap import Rule
from lightning_entropy.surgery.old_activation import OldActivation


class FunctionActivation(nn.Module):
    """A plain function as an activation module, for ``new=F.silu`` and the like.

    Example:
        >>> FunctionActivation(torch.nn.functional.silu)
        FunctionActivation(silu)
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """The function of x."""
        return self.function(x)

    def extra_repr(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", repr(self.function))


def activation_rules(old: Any, new: Any) -> list[Rule]:
    """The pairs of what is exchanged by what.

    Raises:
        TypeError: if an entry is no activation.
        ValueError: if tuples of unequal length are given, or a name is unknown.
    """
    olds = list(old) if isinstance(old, tuple | list) else [old]
    if not olds:
        raise ValueError("old must name at least one activation, got an empty sequence")
    news = list(new) if isinstance(new, tuple | list) else [new] * len(olds)
    if len(news) != len(olds):
        raise ValueError(f"old and new must have the same length if both are tuples, got {len(olds)} and {len(news)}")
    return [Rule(OldActivation(o), *_factory(n)) for o, n in zip(olds, news, strict=True)]


def _factory(new: Any) -> tuple[Callable[[], nn.Module], str]:
    if isinstance(new, str):
        new = named_activation(new)
    if isinstance(new, nn.Module):
        prototype = new
        return _sharing(lambda: copy.deepcopy(prototype))
    if isinstance(new, type) and not issubclass(new, nn.Module):
        raise TypeError(f"new must be an activation module, got the class {new.__name__}")
    if not callable(new):
        raise TypeError(f"new must be a name, a module class, a factory or a function, got {new!r}")
    if isinstance(new, type) or not _takes_input(new):
        return _sharing(new)
    return (lambda: FunctionActivation(new)), f"FunctionActivation.{getattr(new, '__name__', repr(new))}"


def _sharing(make: Callable[[], nn.Module]) -> tuple[Callable[[], nn.Module], str]:
    """A factory and the label of what it makes; with ``scope="global"`` all that it makes hold the same parameters."""
    first = make()
    if not isinstance(first, nn.Module):
        raise TypeError(f"new must make modules; the factory {make!r} made {type(first).__name__}")
    if getattr(first, "scope", None) == "global":
        return (lambda: copy.deepcopy(first, {id(p): p for p in first.parameters()})), _label(first)
    return make, _label(first)


def _takes_input(function: Any) -> bool:
    """Whether a callable needs an argument, so that it is an activation function and no factory."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # builtins such as F.gelu
        return True
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)


def _label(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def class_name(label: str) -> str:
    """The class in the label of a rule."""
    return label.rpartition(".")[2]


def named_activation(name: str, options: dict[str, Any] | None = None) -> Any:
    """The class of an activation, or a factory of it with options, from a name or a dotted path.

    Args:
        name: a name of the catalog (``"crrelu"``, ``"gelu"``) or the dotted path of a class (``"torch.nn.Mish"``).
        options: keyword arguments of the class.

    Raises:
        ValueError: if there is nothing by that name.
    """
    if "." in name:
        where, _, kind = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(where), kind)
        except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two of names like "../.."
            raise ValueError(f"new={name!r} cannot be imported: {error}") from error
    else:
        found = find_activation(name)
    return functools.partial(found, **options) if options else found


__all__ = ["FunctionActivation", "activation_rules", "class_name", "named_activation"]
