"""Splitting bags: stratified by label, grouped by patient, the same for the same seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def _group(labels: Sequence[int], patients: Sequence[str] | None, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Patient number of each bag, and the bags of each class that each patient has, in an order made by the
    seed.
    """
    if len(labels) == 0:
        raise ValueError("no bags to split")
    if patients is None:
        patients = [str(i) for i in range(len(labels))]
    if len(patients) != len(labels):
        raise ValueError(f"{len(labels)} labels and {len(patients)} patients: one of each is needed for every bag")
    names = {name: i for i, name in enumerate(dict.fromkeys(patients))}
    order = np.random.default_rng(seed).permutation(len(names))
    group = order[[names[name] for name in patients]]
    classes = {label: i for i, label in enumerate(sorted(set(labels)))}
    counts = np.zeros((len(names), len(classes)), dtype=np.int64)
    np.add.at(counts, (group, np.array([classes[label] for label in labels])), 1)
    return group, counts


def _deal(counts: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Deal patients out to parts of given shares so that each class is spread in these shares.

    Patients with many bags go first. Each goes to the part where the squared error of the class counts
    against their targets, relative to the size of the class, becomes smallest; patients are already in a
    random order, and ties go to the part that lacks most bags.
    """
    totals = counts.sum(0)
    targets = shares[:, None] * totals[None, :]
    have = np.zeros_like(targets)
    part = np.empty(len(counts), dtype=np.int64)
    rarity = (counts / np.maximum(totals, 1)).sum(1)
    # Largest first; among equals the rarest class first, so that few patients of a class are spread before
    # the rest.
    for patient in np.lexsort((-rarity, -counts.sum(1))):
        lack = (targets - have) / np.maximum(totals, 1)
        added = counts[patient] / np.maximum(totals, 1)
        gain = ((lack - added) ** 2 - lack**2).sum(1)
        best = np.flatnonzero(gain <= gain.min() + 1e-12)
        part[patient] = best[np.argmax((targets - have)[best].sum(1))]
        have[part[patient]] += counts[patient]
    return part


def stratified_folds(
    labels: Sequence[int], *, folds: int, patients: Sequence[str] | None = None, seed: int = 0
) -> list[int]:
    """Assign each bag to one of ``folds`` folds.

    Args:
        labels: class of each bag.
        folds: number of folds, at least 2.
        patients: patient of each bag; all bags of a patient go to one fold. None: each bag is its own
            patient.
        seed: same seed, same folds.

    Returns:
        A fold number in ``[0, folds)`` for each bag. Without patients of several bags, the folds differ by at
        most one bag of each class.

    Raises:
        ValueError: if there are fewer patients than folds, or fewer than 2 folds.
    """
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")
    group, counts = _group(labels, patients, seed=seed)
    if len(counts) < folds:
        raise ValueError(f"{folds} folds need at least {folds} patients, got {len(counts)}")
    if counts.sum(1).max() == 1:
        part = _round_robin(counts.argmax(1), folds)
    else:
        part = _deal(counts, np.full(folds, 1 / folds))
    return [int(value) for value in part[group]]


def _round_robin(classes: np.ndarray, folds: int) -> np.ndarray:
    """Deal single bags out in turn, class after class, going on where the class before ended."""
    order = np.argsort(classes, kind="stable")
    part = np.empty(len(classes), dtype=np.int64)
    part[order] = np.arange(len(classes)) % folds
    return part


def stratified_split(
    labels: Sequence[int],
    *,
    fractions: Sequence[float],
    patients: Sequence[str] | None = None,
    seed: int = 0,
) -> list[int]:
    """Assign each bag to one of several parts of given sizes; repeat with other seeds for repeated splitting.

    Args:
        labels: class of each bag.
        fractions: share of each part; they sum to 1. A part of a positive share gets at least one patient
            when there are enough patients.
        patients: patient of each bag; all bags of a patient go to one part. None: each bag is its own
            patient.
        seed: same seed, same split.

    Returns:
        The number of the part for each bag.

    Raises:
        ValueError: if the fractions are negative or do not sum to 1, or a part of a positive share would be
            empty.
    """
    shares = np.asarray(fractions, dtype=np.float64)
    if (shares < 0).any() or abs(shares.sum() - 1) > 1e-9:
        raise ValueError(f"fractions must be at least 0 and sum to 1, got {list(fractions)}")
    group, counts = _group(labels, patients, seed=seed)
    wanted = np.flatnonzero(shares > 0)
    if len(counts) < len(wanted):
        raise ValueError(f"{len(wanted)} parts need at least {len(wanted)} patients, got {len(counts)}")
    part = wanted[_deal(counts, shares[wanted])]
    for missing in wanted[~np.isin(wanted, part)]:
        # A share smaller than one patient: take the smallest patient of the part that has most patients.
        largest = np.bincount(part, minlength=len(shares)).argmax()
        members = np.flatnonzero(part == largest)
        part[members[counts[members].sum(1).argmin()]] = missing
    return [int(value) for value in part[group]]


__all__ = ["stratified_folds", "stratified_split"]
