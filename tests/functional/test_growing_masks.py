from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightning_entropy.functional.growing_masks import growth_order, order_of


def test_the_deepest_position_comes_first_and_the_farthest_last() -> None:
    torch.manual_seed(0)
    for _ in range(10):
        inside = torch.rand(6, 8) > 0.6
        inside[2, 3], inside[0, 0] = True, False
        order = growth_order(inside)
        assert sorted(order.flatten().tolist()) == list(range(48))
        held = [tuple(p) for p in inside.nonzero().tolist()]
        free = [tuple(p) for p in (~inside).nonzero().tolist()]
        depth = {p: -min(math.dist(p, q) for q in free) for p in held}
        depth |= {q: min(math.dist(p, q) for p in held) for q in free}
        sequence = sorted(depth, key=lambda p: int(order[p]))
        values = [depth[p] for p in sequence]
        assert values == sorted(values)
        assert all(p in held for p in sequence[: len(held)])
        for a, b in itertools.pairwise(sequence):
            assert depth[a] < depth[b] or a < b


def test_an_object_that_is_everything_grows_from_the_middle() -> None:
    assert growth_order(torch.ones(3, 3, dtype=torch.bool))[1, 1] == 0
    assert growth_order(torch.ones(1, 1, dtype=torch.bool)).tolist() == [[0]]
    corners = growth_order(torch.ones(5, 5, dtype=torch.bool))[::4, ::4]
    assert corners.flatten().tolist() == [21, 22, 23, 24]


def test_the_order_of_scores() -> None:
    scores = torch.tensor([[[0.5, 2.0], [0.5, -1.0]], [[1.0, 2.0], [3.0, 4.0]]])
    assert order_of(scores).tolist() == [[[1, 0], [2, 3]], [[3, 2], [1, 0]]]


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="at least one position"):
        growth_order(torch.zeros(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="inside must be bool"):
        growth_order(torch.ones(3, 3))
