"""Configurations as plain dictionaries: read, changed at dotted keys, multiplied into variants."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from lightning_entropy.recipes.catalog import Recipe

_CALLBACKS = "callbacks."


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ValueError: if it holds something else.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a mapping, it holds {type(value).__name__}")
    return value


def parse_value(text: str) -> Any:
    """Read a value as YAML does, and ``1e-3`` as the number that it is meant to be."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _change_callback(callbacks: list[dict[str, Any]], key: str, value: Any) -> None:
    name, _, argument = key.partition(".")
    found = next((c for c in callbacks if str(c["class_path"]).rpartition(".")[2] == name), None)
    if not argument and value is None:
        callbacks[:] = [c for c in callbacks if c is not found]
        return
    if found is None:
        found = {"class_path": f"lightning_entropy.{name}", "init_args": {}}
        callbacks.append(found)
    changes = {argument: value} if argument else value
    if not isinstance(changes, Mapping):
        raise ValueError(f"callbacks.{name} takes null or a mapping of its arguments, got {value!r}")
    found["init_args"] = {**found.get("init_args", {}), **changes}


def change(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a value at a dotted key, in place.

    ``callbacks.NAME`` addresses the callback of class NAME among the Trainer's: ``None`` removes it, a
    mapping changes its arguments (a callback of this package that is absent is added);
    ``callbacks.NAME.ARGUMENT`` changes one.

    Raises:
        ValueError: if the key leads into something that is not a mapping.
    """
    inner = key.removeprefix("trainer.")
    if inner.startswith(_CALLBACKS):
        callbacks = config.setdefault("trainer", {}).setdefault("callbacks", [])
        _change_callback(callbacks, inner.removeprefix(_CALLBACKS), value)
        return
    *parents, last = key.split(".")
    place = config
    for parent in parents:
        following = place.get(parent)
        if following is None:
            following = place[parent] = {}
        if not isinstance(following, dict):
            raise ValueError(f"cannot set {key}: {parent} is {following!r}, not a mapping")
        place = following
    place[last] = value


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a configuration with values set at dotted keys (see :func:`change`)."""
    result = copy.deepcopy(dict(config))
    for key, value in changes.items():
        change(result, key, value)
    return result


def with_seed(value: Any, seed: int) -> Any:
    """A copy of a value in which the text ``"{seed}"`` is the number of the run's seed, wherever it stands."""
    if isinstance(value, Mapping):
        return {key: with_seed(part, seed) for key, part in value.items()}
    if isinstance(value, list):
        return [with_seed(part, seed) for part in value]
    return seed if value == "{seed}" else value


def _choices(recipe: Recipe, key: str, values: Sequence[Any]) -> list[tuple[str, dict[str, Any]]]:
    sections = read_yaml(recipe.variants_path) if recipe.variants_path.is_file() else {}
    if key in sections:
        named = {str(name): changes for name, changes in sections[key].items()}
        unknown = [str(v) for v in values if str(v) not in named]
        if unknown:
            raise ValueError(
                f"recipe {recipe.name!r} has no {key} variant {', '.join(unknown)}; it has {', '.join(named)}"
            )
        return [(str(value), named[str(value)]) for value in values]
    if "." not in key:
        raise ValueError(
            f"recipe {recipe.name!r} has no variants {key!r}; it has {', '.join(sections) or 'none'}. A dotted "
            "key of the configuration works too, for example model.lr=1e-4,2e-4"
        )
    label = key.rpartition(".")[2]
    return [(f"{label}={v}", {key: parse_value(v) if isinstance(v, str) else v}) for v in values]


def variants(recipe: Recipe, vary: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Every combination of what is varied.

    Args:
        recipe: the recipe whose variants file names sections.
        vary: section of the variants file, or dotted key of the configuration -> values; several keys
            multiply.

    Returns:
        Name of the variant -> changes by dotted key, in the order given.

    Raises:
        ValueError: if a section or a variant is unknown, or a value is given twice.
    """
    if not vary:
        return {recipe.name: {}}
    axes = [_choices(recipe, key, values) for key, values in vary.items()]
    result: dict[str, dict[str, Any]] = {}
    for combination in itertools.product(*axes):
        name = ", ".join(part for part, _ in combination)
        if name in result:
            raise ValueError(f"variant {name!r} is given twice")
        result[name] = {k: v for _, changes in combination for k, v in changes.items()}
    return result


__all__ = ["change", "changed", "parse_value", "read_yaml", "variants", "with_seed"]
