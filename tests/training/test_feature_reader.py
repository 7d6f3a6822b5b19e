from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_entropy.functional.inflection import InflectionRule
from lightning_entropy.functional.linear_probe import LinearProbe, linear_probe
from lightning_entropy.training.feature_reader import FeatureReader
from lightning_entropy.training.layer_diagnosis import measure_layers
from tests.finetuning.diagnosed_models import batches, loss, model


def read(net: nn.Module, data: list, function=loss, **options) -> LinearProbe | str:
    reader = FeatureReader(**{"least": 8, **options})
    measure_layers(net, data, loss=function, rule=InflectionRule("decay"), features=reader)
    return reader.probe()


def pooled(net: nn.Module, data: list) -> tuple[list[Tensor], Tensor]:
    means, firsts = [], []
    with torch.no_grad():
        for batch in data:
            net(batch["x"], batch["mask"])
            h, m = net.hidden[-1], batch["mask"][..., None]
            means.append((h * m).sum(1) / m.sum(1))
            firsts.append(h[:, 0])
    return [torch.cat(means), torch.cat(firsts)], torch.cat([b["y"] for b in data])


def test_it_is_the_better_probe_of_the_two_poolings_with_its_p_value_doubled() -> None:
    net, data = model(), batches(4)
    features, y = pooled(net, data)
    both = [linear_probe(x, y) for x in features]
    best = min(both, key=lambda p: (p.p_value, -p.r2))
    found = read(net, data)
    assert isinstance(found, LinearProbe)
    assert found.p_value == pytest.approx(min(1.0, 2 * best.p_value))
    assert found.r2 == pytest.approx(best.r2, abs=1e-4)
    assert found.samples == 64


def test_features_that_tell_the_targets_and_features_that_do_not() -> None:
    net, data = model(), batches(4)
    told = pooled(net, data)[0][0][:, 3]
    strong = [{**b, "y": (x > told.median()).long()} for b, x in zip(data, told.split(16))]
    assert read(net, strong).p_value <= 0.02
    weak = [read(model(seed), batches(4, seed=seed)).p_value > 0.05 for seed in range(12)]
    assert sum(weak) >= 10


def test_other_losses() -> None:
    net, data = model(), batches(3)

    def numbers(m: nn.Module, b: dict) -> Tensor:
        return F.mse_loss(m(b["x"], b["mask"])[:, 0], b["x"].mean((1, 2)))

    def several(m: nn.Module, b: dict) -> Tensor:
        return nn.BCEWithLogitsLoss()(m(b["x"], b["mask"]), F.one_hot(b["y"], 3).float())

    def ignored(m: nn.Module, b: dict) -> Tensor:
        return F.cross_entropy(m(b["x"], b["mask"]), b["y"].masked_fill(b["y"] == 2, -100))

    assert read(net, data, numbers).samples == 48
    assert read(net, data, several).samples == 48
    assert read(net, data, ignored).samples == sum(int((b["y"] != 2).sum()) for b in data)
    assert read(net, data, most=20).samples == 20


def test_what_cannot_be_told_is_said() -> None:
    net, data = model(), batches(1)
    assert "one target a sample" in read(net, data, lambda m, b: m(b["x"], b["mask"]).square().mean())
    assert "have 16 samples with a target, and 100 are needed" in read(net, data, least=100)
    few = [{k: v[:4] for k, v in data[0].items()}]
    assert "at least 8" in read(net, few, least=1)

    def tokens(m: nn.Module, b: dict) -> Tensor:
        m(b["x"], b["mask"])
        return F.cross_entropy(m.hidden[-1].flatten(0, 1), b["x"][..., 0].long().abs().flatten())

    assert "one target a sample" in read(net, data, tokens)
    same = [{**data[0], "y": torch.zeros(16, dtype=torch.long)}]
    assert "all targets are the same" in read(net, same)
