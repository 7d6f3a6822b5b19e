"""From the arguments of ``SlideBags`` to a source of bags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_entropy.data.embedded import embedded_bags, is_generated
from lightning_entropy.data.folder_bags import open_bags
from lightning_entropy.data.source import BagSource

_EMBEDDED = "embedded:"


def check_arguments(
    *,
    least: Sequence[tuple[str, int | None, int]],
    words: Sequence[tuple[str, str | None, Sequence[str | None]]],
) -> None:
    """Refuse arguments that are out of their range.

    Args:
        least: name, value and smallest allowed value; None is allowed.
        words: name, value and allowed values.

    Raises:
        ValueError: for the first that is not allowed.
    """
    for name, number, bound in least:
        if number is not None and number < bound:
            raise ValueError(f"{name} must be at least {bound}, got {number}")
    for name, word, known in words:
        if word not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {word!r}")


def is_draw(features: str) -> bool:
    """Whether the bags are generated, so that a fold is another draw of them."""
    return features.startswith(_EMBEDDED) and is_generated(features[len(_EMBEDDED) :])


def open_source(
    features: str,
    *,
    table: str | None,
    layout: str,
    columns: Mapping[str, str],
    classes: Sequence[str] | None,
    on_empty: str,
    check_values: bool,
    seed: int,
    draw: int | None,
    options: Mapping[str, Any],
) -> BagSource:
    """Open an embedded set or files.

    Args:
        features: ``"embedded:NAME"``, a folder, or a file.
        table: CSV of slides.
        layout: of the files.
        columns: names of the table's columns.
        classes: labels in the order of the classes.
        on_empty: what to do with bags without instances.
        check_values: look for features that are not finite.
        seed: of a generated set.
        draw: number of the draw of a generated set.
        options: of an embedded set.

    Raises:
        ValueError: if the arguments do not go together, or with all that is wrong with table and files.
    """
    if not features.startswith(_EMBEDDED):
        if options:
            raise ValueError(f"options {dict(options)} are for embedded sets, and features is {features!r}")
        return open_bags(
            Path(features),
            table=None if table is None else Path(table),
            layout=layout,
            columns=columns,
            classes=classes,
            on_empty=on_empty,
            check_values=check_values,
        )
    if table is not None or classes is not None:
        raise ValueError(f"{features} brings its own labels: leave table and classes out")
    name, chosen = features[len(_EMBEDDED) :], dict(options)
    if not is_generated(name):  # the folds of a real set stay the same whatever the seed of the run
        return embedded_bags(name, **chosen)
    if draw is not None:
        chosen["draw"] = draw
    return embedded_bags(name, seed=seed, **chosen)


__all__ = ["check_arguments", "is_draw", "open_source"]
