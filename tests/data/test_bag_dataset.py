from __future__ import annotations

import numpy as np
import torch

from lightning_entropy.data import ArrayBags, Bag, BagDataset, EpochSampler, ResumableLoader, collate_bags


def _source(sizes: list[int], *, extras: bool = True) -> ArrayBags:
    """Bags whose features say which bag and which instance they are."""
    bags = []
    for number, size in enumerate(sizes):
        rows = torch.arange(size, dtype=torch.float32)
        features = torch.stack([torch.full((size,), float(number)), rows], dim=1)
        bags.append(Bag(features, torch.stack([rows, rows], 1).long(), (rows % 2)) if extras else Bag(features))
    return ArrayBags([f"s{i}" for i in range(len(sizes))], [i % 2 for i in range(len(sizes))], ["a", "b"], bags)


def test_padding_and_mask() -> None:
    dataset = BagDataset(_source([3, 1, 5]), indices=[0, 1, 2])
    batch = collate_bags([dataset[i] for i in range(3)])
    assert batch["features"].shape == (3, 5, 2)
    assert batch["mask"].dtype == torch.bool
    assert batch["mask"].tolist() == [[i < n for i in range(5)] for n in (3, 1, 5)]
    assert batch["label"].tolist() == [0, 1, 0]
    assert batch["label"].dtype == torch.long
    assert batch["slide"] == ["s0", "s1", "s2"]
    assert (batch["features"][~batch["mask"]] == 0).all()
    assert (batch["instance_labels"][~batch["mask"]] == 0).all()
    assert (batch["coords"][~batch["mask"]] == -1).all()
    assert torch.equal(batch["features"][2], dataset[2]["bag"].features)


def test_a_bag_of_one_instance_in_a_batch_of_one_has_its_mask() -> None:
    batch = collate_bags([BagDataset(_source([1]), indices=[0])[0]])
    assert batch["features"].shape == (1, 1, 2)
    assert batch["mask"].tolist() == [[True]]


def test_what_is_not_known_for_every_bag_is_left_out() -> None:
    known, unknown = BagDataset(_source([2]), indices=[0]), BagDataset(_source([2], extras=False), indices=[0])
    batch = collate_bags([known[0], unknown[0]])
    assert "coords" not in batch
    assert "instance_labels" not in batch


def test_sampling_is_a_function_of_seed_epoch_and_slide() -> None:
    source = _source([50, 50, 4])
    first = BagDataset(source, indices=[0, 1, 2], max_instances=10, seed=3)
    again = BagDataset(source, indices=[1, 0], max_instances=10, seed=3)
    rows = first.rows(0, epoch=2)
    assert rows is not None
    assert len(rows) == 10
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, again.rows(1, epoch=2))  # wherever it stands in the dataset
    drawn = {tuple(first.rows(i, epoch=epoch)) for i in (0, 1) for epoch in range(5)}  # type: ignore[arg-type]
    assert len(drawn) == 10
    assert tuple(BagDataset(source, indices=[0], max_instances=10, seed=4).rows(0, epoch=2)) != tuple(rows)  # type: ignore[arg-type]
    assert first.rows(2, epoch=0) is None
    bag = first[(2, 0)]["bag"]
    assert bag.features[:, 1].tolist() == rows.tolist()
    assert bag.coords is not None
    assert bag.coords[:, 0].tolist() == rows.tolist()
    first.set_epoch(2)
    assert torch.equal(first[0]["bag"].features, bag.features)


def test_every_instance_is_drawn_equally_often() -> None:
    dataset = BagDataset(_source([20]), indices=[0], max_instances=5)
    counts = np.zeros(20)
    for epoch in range(2000):
        counts[dataset.rows(0, epoch=epoch)] += 1
    # 500 expected; binomial standard deviation 19.4
    assert np.abs(counts - 500).max() < 5 * 19.4


def test_ranks_share_an_epoch() -> None:
    dataset = BagDataset(_source([2] * 10), indices=range(10))
    samplers = [EpochSampler(dataset, num_replicas=2, rank=rank, seed=1) for rank in (0, 1)]
    orders = []
    for epoch in (0, 1):
        parts = []
        for sampler in samplers:
            sampler.set_epoch(epoch)
            parts.append(list(sampler))
        assert {pair[0] for part in parts for pair in part} == {epoch}
        assert sorted(pair[1] for part in parts for pair in part) == list(range(10))
        orders.append([pair[1] for pair in parts[0]])
    assert orders[0] != orders[1]


def test_a_loader_restored_for_another_epoch_starts_at_its_begin() -> None:
    dataset = BagDataset(_source([2] * 6), indices=range(6))
    loader = ResumableLoader(dataset, sampler=EpochSampler(dataset), batch_size=2, collate_fn=collate_bags)
    loader.load_state_dict({"epoch": 0, "batches": 2})
    assert loader.state_dict() == {"epoch": 0, "batches": 2}
    assert len(list(loader)) == 1
    assert loader.state_dict() == {"epoch": 0, "batches": 3}
    loader.load_state_dict({"epoch": 0, "batches": 2})
    loader.sampler.set_epoch(1)
    assert len(list(loader)) == 3
    assert len(list(loader)) == 3


def test_a_constant_feature_stays_finite() -> None:
    from lightning_entropy.data.standardizing import feature_moments

    mean, std = feature_moments(_source([3, 4]), indices=[0])
    assert mean.tolist() == [0, 1]
    assert std[0] == 1
