from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score, log_loss, roc_auc_score

from lightning_entropy.observe import AttentionRecord
from lightning_entropy.recipes.bag_attention import instance_attention, uniform_attention
from lightning_entropy.recipes.mil_metrics import AttentionMetrics, BagMetrics, key_coverage, ranking_auc


@pytest.mark.parametrize("classes", [2, 4])
def test_bag_metrics_against_scikit_learn(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = (8 * torch.randn(60, classes, generator=generator)).round() / 8  # exact, and with ties
    label = torch.randint(classes, (60,), generator=generator)
    metrics = BagMetrics(classes)
    for part in range(0, 60, 7):
        metrics.update(logits[part : part + 7], label[part : part + 7])
    found = {name: float(value) for name, value in metrics.compute().items()}
    p, y = logits.softmax(-1).double().numpy(), label.numpy()
    guess = p.argmax(-1)
    area = np.mean([roc_auc_score(y == c, p[:, c]) for c in range(classes)])
    assert found["auc"] == pytest.approx(area, abs=1e-6)
    assert found["f1"] == pytest.approx(f1_score(y, guess, average="macro"), abs=1e-6)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, guess), abs=1e-6)
    assert found["loss"] == pytest.approx(log_loss(y, p / p.sum(1, keepdims=True), labels=range(classes)), abs=1e-6)
    metrics.reset()
    metrics.update(logits[:9], label[:9])
    assert float(metrics.compute()["loss"]) == pytest.approx(
        log_loss(y[:9], p[:9] / p[:9].sum(1, keepdims=True), labels=range(classes)), abs=1e-6
    )


def test_f1_is_not_the_accuracy() -> None:
    metrics = BagMetrics(2)
    metrics.update(torch.tensor([[1.0, 0.0]] * 10), torch.tensor([0] * 9 + [1]))
    assert float(metrics.compute()["f1"]) == pytest.approx((18 / 19 + 0) / 2)


def test_missing_classes_are_left_out_of_the_auc() -> None:
    metrics = BagMetrics(3)
    logits = torch.randn(12, 3)
    label = torch.arange(12) % 2
    metrics.update(logits, label)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        auc = float(metrics.compute()["auc"])
    p = logits.softmax(-1).numpy()
    assert auc == pytest.approx(np.mean([roc_auc_score(label.numpy() == c, p[:, c]) for c in (0, 1)]), abs=1e-6)
    assert metrics.missing() == [2]
    alone = BagMetrics(2)
    alone.update(logits[:4, :2], torch.ones(4, dtype=torch.long))
    values = alone.compute()
    assert math.isnan(values["auc"])
    assert math.isfinite(values["f1"])
    assert alone.missing() == [0]


def test_ranking_auc_and_coverage_against_counting() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        scores = torch.randint(6, (30,), generator=generator).float()
        key = torch.rand(30, generator=generator) < 0.3
        key[:2] = torch.tensor([True, False])
        assert float(ranking_auc(scores, key)) == pytest.approx(roc_auc_score(key.numpy(), scores.numpy()), abs=1e-6)
        count = int(key.sum())
        draws = []
        rng = np.random.default_rng(0)
        for _ in range(400):  # break ties at random: the expectation is what is reported
            order = np.lexsort((rng.random(30), -scores.numpy()))
            draws.append(key.numpy()[order[:count]].mean())
        assert float(key_coverage(scores, key)) == pytest.approx(np.mean(draws), abs=0.05)


def test_coverage_without_ties_is_exact() -> None:
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    assert float(key_coverage(scores, torch.tensor([True, False, True, False, False]))) == 0.5
    assert float(key_coverage(torch.zeros(4), torch.tensor([True, False, False, False]))) == 0.25


def test_attention_metrics_by_hand() -> None:
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.7, 0.2, 0.1, 0.0], [0.25, 0.25, 0.25, 0.25]])
    mask = torch.tensor([[True, True, True, False], [True, True, True, False], [True] * 4])
    keys = torch.tensor([[1.0, 0, 0, 0], [0.0, 0, 0, 0], [1.0, 1, 0, 0]])
    metric = AttentionMetrics(2)
    metric.update(weights.log(), mask, torch.tensor([1, 0, 1]), keys)
    found = {name: float(value) for name, value in metric.compute().items()}
    entropy = [1.5 * math.log(2), math.log(4)]  # the negative bag does not count
    assert found["entropy"] == pytest.approx(np.mean(entropy))
    assert found["normalized_entropy"] == pytest.approx((entropy[0] / math.log(3) + 1) / 2)
    assert found["effective_number"] == pytest.approx((2**1.5 + 4) / 2)
    assert found["instance_auc"] == pytest.approx((1.0 + 0.5) / 2)
    assert found["coverage"] == pytest.approx((1.0 + 0.5) / 2)
    assert found["key_mass"] == pytest.approx((0.5 + 0.5) / 2)


def test_attention_metrics_say_nothing_where_nothing_is_known() -> None:
    metric = AttentionMetrics(2)
    metric.update(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.tensor([0]), None)
    assert metric.compute() == {}
    metric.update(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.tensor([1]), torch.ones(1, 1))
    assert {name: float(v) for name, v in metric.compute().items()} == {
        "entropy": 0,
        "normalized_entropy": 1,
        "effective_number": 1,
    }
    multi = AttentionMetrics(3)  # no class is the negative one
    multi.update(
        uniform_attention(torch.ones(1, 5, dtype=torch.bool)), torch.ones(1, 5, dtype=torch.bool), torch.zeros(1)
    )
    assert float(multi.compute()["effective_number"]) == pytest.approx(5)


def test_instance_attention_is_the_mean_over_branches() -> None:
    logits = torch.randn(2, 3, 6)
    logits[1, :, 4:] = -torch.inf
    record = AttentionRecord.from_logits(logits)
    found = instance_attention([record], bags=2, instances=6)
    assert found is not None
    torch.testing.assert_close(found.exp(), logits.softmax(-1).mean(1))
    assert (found[1, 4:] == -torch.inf).all()
    assert instance_attention([record], bags=2, instances=5) is None
    empty = AttentionRecord.from_logits(torch.full((1, 1, 3), -torch.inf))
    nothing = instance_attention([empty], bags=1, instances=3)
    assert nothing is not None
    assert (nothing == -torch.inf).all()
