from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_entropy.data import ArrayBags, Bag, stratified_folds, stratified_split
from lightning_entropy.data.split_plan import plan_splits

LABELS = st.lists(st.integers(0, 3), min_size=6, max_size=80)
COHORTS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 25)), min_size=6, max_size=100)


def _source(labels: list[int], patients: list[str], **columns: list) -> ArrayBags:  # type: ignore[type-arg]
    import torch

    bags = [Bag(torch.zeros(1, 2))] * len(labels)
    return ArrayBags([f"s{i}" for i in range(len(labels))], labels, ["a", "b", "c"], bags, patients, **columns)


@settings(deadline=None, max_examples=60)
@given(labels=LABELS, folds=st.integers(2, 5), seed=st.integers(0, 2**31))
def test_folds_of_single_bags_differ_by_one_of_each_class_at_most(labels: list[int], folds: int, seed: int) -> None:
    assigned = np.array(stratified_folds(labels, folds=folds, seed=seed))
    assert set(assigned) == set(range(folds))
    sizes = np.bincount(assigned, minlength=folds)
    assert sizes.max() - sizes.min() <= 1
    for label in set(labels):
        counts = np.bincount(assigned[np.array(labels) == label], minlength=folds)
        assert counts.max() - counts.min() <= 1


@settings(deadline=None, max_examples=60)
@given(cohort=COHORTS, folds=st.integers(2, 4), seed=st.integers(0, 1000))
def test_no_patient_is_in_two_folds(cohort: list[tuple[int, int]], folds: int, seed: int) -> None:
    labels, patients = [label for label, _ in cohort], [f"p{patient}" for _, patient in cohort]
    if len(set(patients)) < folds:
        with pytest.raises(ValueError, match="patients"):
            stratified_folds(labels, folds=folds, patients=patients, seed=seed)
        return
    assigned = stratified_folds(labels, folds=folds, patients=patients, seed=seed)
    assert set(assigned) == set(range(folds))
    assert len({(patient, fold) for patient, fold in zip(patients, assigned)}) == len(set(patients))
    assert assigned == stratified_folds(labels, folds=folds, patients=patients, seed=seed)


@settings(deadline=None, max_examples=60)
@given(
    cohort=COHORTS, seed=st.integers(0, 1000), val=st.sampled_from([0.0, 0.1, 0.3]), test=st.sampled_from([0.0, 0.2])
)
def test_a_plan_uses_every_bag_once_and_no_patient_twice(
    cohort: list[tuple[int, int]], seed: int, val: float, test: float
) -> None:
    labels, patients = [label for label, _ in cohort], [f"p{patient}" for _, patient in cohort]
    if len(set(patients)) < 4:
        return
    source = _source(labels, patients)
    plan = plan_splits(source, val_fraction=val, test_fraction=test, seed=seed)
    assert sorted(i for indices in plan.values() for i in indices) == list(range(len(labels)))
    assert bool(plan["val"]) == (val > 0)
    assert bool(plan["test"]) == (test > 0)
    owners = [{patients[i] for i in indices} for indices in plan.values()]
    assert sum(map(len, owners)) == len(set(patients))
    assert plan == plan_splits(source, val_fraction=val, test_fraction=test, seed=seed)


def test_split_shares_are_kept_in_every_class() -> None:
    labels = [0] * 600 + [1] * 300 + [2] * 100
    parts = np.array(stratified_split(labels, fractions=(0.7, 0.1, 0.2), seed=3))
    for label, size in enumerate((600, 300, 100)):
        np.testing.assert_allclose(
            np.bincount(parts[np.array(labels) == label]) / size, [0.7, 0.1, 0.2], atol=1.5 / size
        )


def test_grouped_folds_are_balanced() -> None:
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(120), rng.integers(1, 6, 120))
    labels = (np.arange(120) % 3 == 0)[patients].astype(int)
    assigned = np.array(stratified_folds(labels.tolist(), folds=5, patients=[str(p) for p in patients], seed=1))
    sizes = np.bincount(assigned) / len(labels)
    shares = np.array([labels[assigned == fold].mean() for fold in range(5)])
    np.testing.assert_allclose(sizes, 0.2, atol=0.02)
    np.testing.assert_allclose(shares, labels.mean(), atol=0.02)


def test_other_seeds_split_otherwise() -> None:
    labels = [0, 1] * 30
    drawn = {tuple(stratified_split(labels, fractions=(0.8, 0.2), seed=seed)) for seed in range(8)}
    assert len(drawn) == 8
    assert len({tuple(stratified_folds(labels, folds=5, seed=seed)) for seed in range(8)}) == 8


def test_folds_cover_all_bags_once() -> None:
    source = _source([0, 1] * 20, [f"p{i // 2}" for i in range(40)])
    tested = [plan_splits(source, fold=fold, folds=4)["test"] for fold in range(4)]
    assert sorted(i for indices in tested for i in indices) == list(range(40))


def test_given_folds_and_splits_are_used() -> None:
    folds = [i % 3 for i in range(12)]
    plan = plan_splits(_source([0, 1] * 6, [], folds=folds), fold=2, val_fraction=0)
    assert plan["test"] == [2, 5, 8, 11]
    splits = ["train", "val", "test", "train"] * 3
    plan = plan_splits(_source([0, 1] * 6, [], splits=splits))
    assert (plan["val"], plan["test"]) == ([1, 5, 9], [2, 6, 10])
    plan = plan_splits(_source([0, 1] * 6, [], splits=["train"] * 8 + ["test"] * 4), val_fraction=0.25)
    assert (len(plan["train"]), len(plan["val"]), plan["test"]) == (6, 2, [8, 9, 10, 11])


def test_what_cannot_be_split_is_refused() -> None:
    plain, labels = _source([0, 1] * 3, []), [0, 1] * 3
    for options, message in (
        ({"fold": 1}, "needs folds"),
        ({"fold": 5, "folds": 3}, r"fold=5 does not exist"),
        ({"val_fraction": 1.0}, "val_fraction must be"),
        ({"test_fraction": -0.1}, "test_fraction must be"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_splits(plain, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="come with fixed splits"):
        plan_splits(_source(labels, [], splits=["train"] * 6), fold=0, folds=2)
    with pytest.raises(ValueError, match="3 folds already"):
        plan_splits(_source(labels, [], folds=[0, 1, 2] * 2), fold=0, folds=5)
    with pytest.raises(ValueError, match="no bags are left to train on"):
        plan_splits(_source(labels, [], splits=["test"] * 6))
    for arguments, message in (
        ({"folds": 1}, "at least 2"),
        ({"folds": 7}, "at least 7 patients, got 6"),
        ({"folds": 2, "patients": ["p"]}, "6 labels and 1 patients"),
    ):
        with pytest.raises(ValueError, match=message):
            stratified_folds(labels, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sum to 1"):
        stratified_split(labels, fractions=(0.5, 0.6))
    with pytest.raises(ValueError, match="no bags"):
        stratified_folds([], folds=2)
