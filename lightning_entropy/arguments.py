"""Arguments of the wrong type, refused by name before anything is done with them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cache
from typing import Any

# Classes that stand beside plain values in annotations: what is no instance of them may still be one of the plain ones.
_CLASSES = frozenset({"nn.Module", "WeightSchedule", "LayerDiagnosis", "torch.device"})
_PLAIN = (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, type(None))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


_SIMPLE: dict[str, Callable[[Any], bool]] = {
    "int": _whole,
    "float": lambda value: isinstance(value, float) or _whole(value),
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "None": lambda value: value is None,
    "Path": lambda value: isinstance(value, os.PathLike),
    "AttentionFunction": callable,
    "Target": lambda value: _fits(value, "float | list[float] | dict[str, float | list[float]]"),
}


def _parts(text: str, separator: str) -> list[str]:
    """The parts of an annotation between separators that are in no bracket."""
    parts, depth = [""], 0
    for character in text:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _fits(value: Any, annotation: str) -> bool:
    """Whether a value may be of an annotated type; whatever is not known of it counts as fitting."""
    return any(_fits_one(value, part) for part in _parts(annotation, "|"))


def _fits_one(value: Any, name: str) -> bool:
    if name in _SIMPLE:
        return _SIMPLE[name](value)
    if name in _CLASSES:
        return not isinstance(value, _PLAIN)
    outer, bracket, inner = name.partition("[")
    if not bracket:
        return True
    items = _parts(inner.removesuffix("]"), ",")
    if outer == "Literal":
        return not isinstance(value, Mapping | Sequence | Set) or isinstance(value, str)
    if outer in ("list", "Sequence", "tuple"):
        if not isinstance(value, list | tuple):
            return False
        several = outer == "tuple" and "..." not in items
        kinds = items if several else items[:1] * len(value)
        return len(kinds) == len(value) and all(_fits(v, kind) for v, kind in zip(value, kinds))
    if outer in ("dict", "Mapping"):
        pairs = value.items() if isinstance(value, Mapping) else None
        return pairs is not None and all(_fits(k, items[0]) and _fits(v, items[-1]) for k, v in pairs)
    return True


@cache
def _annotations(function: Any) -> dict[str, str]:
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        kind = parameter.annotation
        if kind is not parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            found[name] = kind if isinstance(kind, str) else inspect.formatannotation(kind)
    return found


def check_types(owner: type, values: Mapping[str, Any]) -> None:
    """Compare the arguments of a constructor with its annotations: to be its first line.

    Numbers, words, their lists and mappings are looked at; what an annotation says beyond them is left to the class.
    ``int`` and ``float`` take no truth values, ``float`` whole numbers too; a list may be a tuple. NumPy's whole
    numbers are refused, since a checkpoint with one among its hyperparameters cannot be read with
    ``weights_only=True``, and numbers of more than 64 bits, which torch cannot hold.

    Args:
        owner: the class whose ``__init__`` it is.
        values: its ``locals()``.

    Raises:
        TypeError: naming the class, the argument, what it takes and what it got.

    Example:
        >>> class Term:
        ...     def __init__(self, weight: float = 0.1) -> None:
        ...         check_types(Term, locals())
        >>> Term("much")
        Traceback (most recent call last):
        TypeError: Term(weight=...) takes float, got the str 'much'
    """
    for name, annotation in _annotations(owner.__init__).items():  # type: ignore[misc]
        value = values[name]
        if not _fits(value, annotation):
            shown = repr(value)
            shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
            kind = "" if value is None else f"the {type(value).__name__} "
            kind = f"more than 64 bits, {kind}" if type(value) is int and not _whole(value) else kind
            raise TypeError(f"{owner.__name__}({name}=...) takes {annotation}, got {kind}{shown}")


__all__ = ["check_types"]
