"""The split of each labelled item: its own, or drawn here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_entropy.data.splits import stratified_folds, stratified_split


def check_split_arguments(
    items: str, *, fold: int | None, folds: int | None, val_fraction: float, test_fraction: float
) -> None:
    """Refuse arguments of splitting that are out of their range.

    Args:
        items: what is split, for the error.
        fold: the fold that tests.
        folds: number of folds.
        val_fraction: share for validation.
        test_fraction: share for testing.

    Raises:
        ValueError: if the fold does not exist, or nothing would be left to train on.
    """
    if (fold is not None) and (folds is None or fold >= folds):
        raise ValueError(f"fold must be under folds, got fold={fold}, folds={folds}")
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise ValueError(
            f"val_fraction and test_fraction must be at least 0 and leave {items} to train on, got "
            f"{val_fraction} and {test_fraction}"
        )


def split_items(
    labels: Sequence[int],
    splits: Sequence[str] | None,
    *,
    items: str,
    about: str,
    fold: int | None = None,
    folds: int | None = None,
    val_fraction: float = 0.15,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> list[str]:
    """Decide the split of every item.

    Args:
        labels: index of the class of each.
        splits: the items' own; None where they have none.
        items: what they are, for the error.
        about: where they are from, for the error.
        fold: the fold that tests, of ``folds`` folds made here.
        folds: number of folds.
        val_fraction: share of all items for validation, where no split says it.
        test_fraction: share of all items for testing, where neither fold nor split says it.
        seed: of the drawing, which is stratified by class.

    Returns:
        ``"train"``, ``"val"`` or ``"test"`` for each.

    Raises:
        ValueError: if a fold was asked for and the items have splits, or nothing is left to train on.
    """
    if splits is not None and fold is not None:
        raise ValueError(f"fold={fold} cannot be used: {about} has splits of its own")
    part = list(splits) if splits is not None else [""] * len(labels)
    what = f"{items} to train on in {about}"
    if fold is not None and folds is not None:
        numbers = stratified_folds(labels, folds=folds, seed=seed)
        part = ["test" if number == fold else "" for number in numbers]
    elif splits is None:
        part = _deal(labels, part, "test", test_fraction, seed, what)
    if "val" not in part and val_fraction > 0:
        part = ["" if own == "train" else own for own in part]
        # Another stream for validation than for testing, from the same seed.
        part = _deal(labels, part, "val", val_fraction, seed + 1_000_003, what)
    return [own or "train" for own in part]


def _deal(labels: Sequence[int], part: list[str], name: str, fraction: float, seed: int, what: str) -> list[str]:
    """Give a share of all items, drawn from those that have no split yet, to one."""
    free = [i for i, own in enumerate(part) if not own]
    share = fraction * len(part) / len(free)
    if share == 0:
        return part
    if share >= 1:
        raise ValueError(f"{name}_fraction={fraction} leaves no {what}")
    dealt = stratified_split([labels[i] for i in free], fractions=(1 - share, share), seed=seed)
    chosen = {i for i, number in zip(free, dealt) if number == 1}
    return [name if i in chosen else own for i, own in enumerate(part)]


def draw_items(labels: Sequence[int], among: Sequence[int], count: int | None, *, seed: int) -> list[int]:
    """Draw some items, each class in its share.

    Args:
        labels: class of every item.
        among: positions to draw from.
        count: how many; None for all.
        seed: of the drawing. A smaller draw of a seed is part of a larger one.

    Returns:
        Positions, ascending; all of ``among`` where there are no more than ``count``.
    """
    if count is None or count >= len(among):
        return list(among)
    order = np.random.default_rng(seed).permutation(len(among))
    by_class: dict[int, list[int]] = {}
    for place in order:
        by_class.setdefault(labels[among[place]], []).append(among[place])
    # Every item has a place in its class; those at equal shares of their classes come together.
    ranked = [((rank + 0.5) / len(members), i) for members in by_class.values() for rank, i in enumerate(members)]
    return sorted(i for _, i in sorted(ranked)[:count])


__all__ = ["check_split_arguments", "draw_items", "split_items"]
