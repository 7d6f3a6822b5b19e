"""Which layers of a diagnosed model are taken: those of a rule, those that were named, all, or as many at random."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_entropy.functional.inflection import InflectionRule
from lightning_entropy.observe.selection import as_patterns, match_modules
from lightning_entropy.training.layer_report import LayerDiagnosis

Layers = str | Sequence[str] | Sequence[int] | None


def as_diagnosis(source: LayerDiagnosis | str | os.PathLike[str]) -> LayerDiagnosis:
    """A diagnosis, or the one in a file: of ``LayerDiagnosis.save`` or a ``report.json``.

    Raises:
        ValueError: if the file has none.
        FileNotFoundError: if there is no such file.
    """
    return source if isinstance(source, LayerDiagnosis) else LayerDiagnosis.load(source)


def in_module(diagnosis: LayerDiagnosis, module: nn.Module, owner: str) -> LayerDiagnosis:
    """The diagnosis under the names that its layers have in a module which holds the model that was diagnosed.

    Args:
        diagnosis: of the model, alone or inside a module.
        module: that is trained.
        owner: who asks, for messages.

    Raises:
        ValueError: if the module has no such layers, or has them in several places.
    """
    names = {name for name, _ in module.named_modules()}
    first = diagnosis.layers[0] if diagnosis.rows else ""
    places = {name[: -len(first)] for name in names if name == first or name.endswith(f".{first}")}
    fitting = [place for place in sorted(places, key=len) if all(place + layer in names for layer in diagnosis.layers)]
    if "" in fitting:
        return diagnosis
    if len(fitting) != 1:
        known = ", ".join(sorted(n for n in names if n.rpartition(".")[2].isdigit())[:12])
        where = f"{len(fitting)} places ({', '.join(fitting)})" if fitting else "none of its modules"
        raise ValueError(
            f"{owner}: the diagnosis is of {diagnosis.model} with the layers {', '.join(diagnosis.layers[:4])}, and "
            f"{type(module).__name__} has them in {where}. Its numbered modules: {known or 'none'}. Diagnose this "
            "model, or pass layers=."
        )
    (place,) = fitting
    rows = [replace(r, layer=place + r.layer, attention=tuple(place + a for a in r.attention)) for r in diagnosis.rows]
    return replace(diagnosis, rows=tuple(rows), representations=None)


def is_named(layers: Layers) -> bool:
    """Whether ``layers`` names layers itself, so that no diagnosis is needed."""
    if layers is None or isinstance(layers, str):
        return layers not in (None, "random", "all")
    return all(isinstance(entry, str) for entry in layers)


def chosen_layers(
    layers: Layers, diagnosis: LayerDiagnosis | None, module: nn.Module, *, seed: int, owner: str
) -> tuple[list[str], str]:
    """The layers that are taken, in the order of the model, and by what.

    Args:
        layers: None: those of the diagnosis; ``"random"``: as many of its layers at random; ``"all"``; shell patterns
            over dotted names; or positions among the layers of the diagnosis.
        diagnosis: with layers chosen; None where patterns name them.
        module: that is trained.
        seed: of ``"random"``.
        owner: who asks, for messages.

    Raises:
        ValueError: if the diagnosis found no layer, a pattern names none, or a position is out of range.
    """
    if is_named(layers):
        patterns = as_patterns(layers) or []  # type: ignore[arg-type]
        matched = {n for found in match_modules(module, patterns, owner).values() for n in found if n}
        names = [name for name, _ in module.named_modules() if name in matched]
        return [n for n in names if not any(n.startswith(f"{other}.") for other in names)], "named_layer"
    assert diagnosis is not None
    if layers == "all":
        return diagnosis.layers, "layer"
    if layers is not None and layers != "random":
        wrong = [i for i in layers if not isinstance(i, int) or not -len(diagnosis.rows) <= i < len(diagnosis.rows)]
        if wrong:
            raise ValueError(
                f"{owner}: layers={list(layers)} must be positions among the {len(diagnosis.rows)} layers "
                f"({', '.join(diagnosis.layers)}), and {wrong[0]!r} is none"
            )
        positions = {int(i) % len(diagnosis.rows) for i in layers}
        return [diagnosis.layers[i] for i in sorted(positions)], "named_layer"
    if not diagnosis.chosen:
        raise ValueError(none_found(diagnosis, owner))
    if layers == "random":
        drawn = random.Random(seed).sample(range(len(diagnosis.rows)), len(diagnosis.chosen))
        return [diagnosis.layers[i] for i in sorted(drawn)], "random_layer"
    return diagnosis.chosen, "inflection_index" if diagnosis.rule.rule == "ski" else "gradient_decay"


def none_found(diagnosis: LayerDiagnosis, owner: str) -> str:
    """What to say where no layer is an inflection layer."""
    strongest = max(diagnosis.rows, key=lambda row: row.index)
    return (
        f"{owner} found no inflection layer among {len(diagnosis.rows)}. {' '.join(diagnosis.verdict)}\n"
        f"{diagnosis.table()}\n"
        "Pass layers=[...] with their names or positions, or choose otherwise: rule='decay' looks at the gradient "
        "alone, index_alpha=1.0 at the entropy alone, and rule='ski', minimum=0.0, peaks=False, top_k=2 takes the two "
        f"layers of the highest index (it is {strongest.index:.2f} in {strongest.layer}; 0 everywhere means a flat "
        "profile, in which no layer stands out and these adapters have no place of their own)."
    )


def rule_settings(owner: str, **settings: Any) -> dict[str, Any]:
    """Entries of :class:`InflectionRule` that were given, checked.

    Raises:
        ValueError: if one is out of range.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    try:
        InflectionRule()._replace(**given).check()
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from error
    return given


__all__ = ["Layers", "as_diagnosis", "chosen_layers", "in_module", "is_named", "none_found", "rule_settings"]
