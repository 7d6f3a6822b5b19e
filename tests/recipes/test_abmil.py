from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_entropy.observe import read_attention
from lightning_entropy.recipes.abmil import ABMIL, AttentionPooling, MeanPooling
from tests.recipes.bag_cases import make_batch, one_bag


@pytest.mark.parametrize("gated", [True, False])
def test_pooling_is_the_papers_formula(gated: bool) -> None:
    pool = AttentionPooling(5, hidden=7, branches=3, gated=gated).double()
    bag = torch.randn(1, 11, 5, dtype=torch.float64)
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for branch in range(3):
        scores = []
        for h in bag[0]:
            hidden = torch.tanh(pool.value.weight @ h + pool.value.bias)
            if gated:
                assert pool.gate is not None
                hidden = hidden / (1 + torch.exp(-(pool.gate.weight @ h + pool.gate.bias)))
            scores.append((pool.score.weight[branch] * hidden).sum() + pool.score.bias[branch])
        weights = torch.stack(scores).exp()
        weights = weights / weights.sum()
        expected[branch] = sum(w * h for w, h in zip(weights, bag[0]))
    torch.testing.assert_close(pool(bag)[0], expected)


@pytest.mark.parametrize("pooling", ["attention", "mean"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_padding_takes_no_part(pooling: str, dtype: torch.dtype) -> None:
    net = ABMIL(6, num_classes=3, hidden=4, branches=2, pooling=pooling)  # type: ignore[arg-type]
    batch = make_batch([3, 7, 1])
    together = net(batch["features"], batch["mask"].to(dtype))
    for i in range(3):
        bag = one_bag(batch, i)
        torch.testing.assert_close(together[i], net(bag["features"])[0])


def test_padding_gets_no_gradient_and_an_empty_bag_is_finite() -> None:
    net = ABMIL(6, hidden=None)
    batch = make_batch([3, 5])
    mask = batch["mask"].clone()
    mask[1] = False
    features = batch["features"].requires_grad_()
    logits = net(features, mask)
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    assert features.grad is not None
    assert torch.isfinite(features.grad).all()
    assert (features.grad[~mask] == 0).all()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    torch.testing.assert_close(logits[1], net.classifier.bias)


def test_mean_pooling_is_the_mean() -> None:
    batch = make_batch([2, 4])
    pooled = MeanPooling()(batch["features"], batch["mask"])
    torch.testing.assert_close(pooled[0, 0], batch["features"][0, :2].mean(0))
    torch.testing.assert_close(MeanPooling()(batch["features"])[1, 0], batch["features"][1].mean(0))


def test_attention_is_read_with_one_row_a_branch() -> None:
    net = ABMIL(6, branches=4)
    batch = make_batch([5, 9])
    _, records = read_attention(net, batch["features"], batch["mask"])
    (record,) = records
    assert record.module == "pool"
    assert record.logits.shape == (2, 4, 9)
    torch.testing.assert_close(record.weights().sum(-1), torch.ones(2, 4))
    assert (record.weights()[0, :, 5:] == 0).all()


def test_branches_leave_the_classifiers_size_alone() -> None:
    assert ABMIL(6, branches=5).classifier.weight.shape == ABMIL(6).classifier.weight.shape
    assert isinstance(ABMIL(6, hidden=None).embedding, nn.Identity)


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 1},
        {"hidden": 0},
        {"branches": 0},
        {"dropout": 1.0},
        {"pooling": "max"},
    ],
)
def test_wrong_sizes_are_named(options: dict[str, object]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=name):
        ABMIL(6, **options)  # type: ignore[arg-type]
