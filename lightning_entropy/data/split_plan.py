"""Which bags train, validate and test: from columns of the table, or made here."""

from __future__ import annotations

import numpy as np

from lightning_entropy.data.source import BagSource
from lightning_entropy.data.splits import stratified_folds, stratified_split

Plan = dict[str, list[int]]


def plan_splits(
    source: BagSource,
    *,
    fold: int | None = None,
    folds: int | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Plan:
    """Decide the split of every bag.

    With ``fold``, the test bags are those of that fold: of the source's own folds, or of ``folds`` folds made
    here. Without it, the source's own splits hold, and where there are none ``test_fraction`` of the bags are
    drawn. Where no bags are set apart for validation, ``val_fraction`` of the bags that are left are drawn.
    What is drawn is stratified by label, grouped by patient, and the same for the same seed.

    Args:
        source: the bags.
        fold: number of the fold that tests.
        folds: number of folds to make, where the source has none.
        val_fraction: share of the bags that do not test; 0 for no validation.
        test_fraction: share of the bags, where neither folds nor splits say it; 0 for no test.
        seed: of the drawing.

    Returns:
        Positions in the source for ``"train"``, ``"val"`` and ``"test"``.

    Raises:
        ValueError: if a fold does not exist, the source has both fixed splits and a fold was asked for, or no
            bags are left to train on.
    """
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")
    everything = list(range(len(source.slides)))
    if fold is not None:
        test = _fold_members(source, fold=fold, folds=folds, seed=seed)
        plan = _with_validation(source, _without(everything, test), test, val_fraction, seed)
    elif any(split is not None for split in source.splits):
        plan = {split: [i for i in everything if source.splits[i] == split] for split in ("train", "val", "test")}
        if not plan["val"] and plan["train"]:
            plan = _with_validation(source, plan["train"], plan["test"], val_fraction, seed)
    elif any(number is not None for number in source.folds) and folds is not None:
        raise ValueError(f"folds={folds} without fold: pass fold=0 to say which of the folds tests")
    else:
        test = _draw(source, everything, test_fraction, seed, what="test_fraction")
        plan = _with_validation(source, _without(everything, test), test, val_fraction, seed)
    if not plan["train"]:
        raise ValueError(
            f"no bags are left to train on: {len(plan['val'])} validate and {len(plan['test'])} test of "
            f"{len(everything)}"
        )
    return plan


def _without(indices: list[int], taken: list[int]) -> list[int]:
    out = set(taken)
    return [i for i in indices if i not in out]


def _fold_members(source: BagSource, *, fold: int, folds: int | None, seed: int) -> list[int]:
    own = sorted({number for number in source.folds if number is not None})
    if own:
        if folds is not None and folds != len(own):
            raise ValueError(f"folds={folds}, but the bags come in {len(own)} folds already: {own}; leave folds out")
        numbers: list[int | None] = list(source.folds)
    else:
        if any(split is not None for split in source.splits):
            raise ValueError(
                f"fold={fold} was asked for, but the bags come with fixed splits and without folds: leave "
                "fold out, or replace the column of splits by one of folds"
            )
        if folds is None:
            raise ValueError(f"fold={fold} needs folds, the number of folds to make: the bags come without folds")
        numbers = list(stratified_folds(source.labels, folds=folds, patients=source.patients, seed=seed))
        own = list(range(folds))
    if fold not in own:
        raise ValueError(f"fold={fold} does not exist; there are folds {own}")
    return [i for i, number in enumerate(numbers) if number == fold]


def _draw(source: BagSource, among: list[int], fraction: float, seed: int, *, what: str) -> list[int]:
    if fraction == 0 or not among:
        return []
    patients = [source.patients[i] for i in among]
    if len(set(patients)) < 2:
        raise ValueError(f"{what}={fraction} cannot be drawn from {len(set(patients))} patient; pass {what}=0")
    parts = stratified_split(
        [source.labels[i] for i in among], fractions=(1 - fraction, fraction), patients=patients, seed=seed
    )
    return [among[i] for i in np.flatnonzero(np.asarray(parts) == 1)]


def _with_validation(source: BagSource, rest: list[int], test: list[int], fraction: float, seed: int) -> Plan:
    # Another stream than the one that drew the test bags, from the same seed.
    val = _draw(source, rest, fraction, seed + 1_000_003, what="val_fraction")
    return {"train": _without(rest, val), "val": val, "test": test}


__all__ = ["Plan", "plan_splits"]
