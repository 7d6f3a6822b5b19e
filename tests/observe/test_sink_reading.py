"""Sinks read from every kind of attention against the model's own maps; readings that are no attention themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_entropy.functional import attention_sink
from lightning_entropy.observe import AttentionEntropyReader
from tests.observe.model_cases import EVERY, ModelCase


@pytest.mark.parametrize(("case", "mode"), EVERY, ids=[f"{c.library}-{c.name}-{m}" for c, m in EVERY])
def test_equals_that_of_the_models_own_maps(case: ModelCase, mode: str) -> None:
    model, arguments = case.build(mode)
    with torch.no_grad():
        maps = case.maps(model, arguments)
        with AttentionEntropyReader(model, sinks=True) as reader:
            model(**arguments)
    assert len(reader.layers) == len(maps)
    for layer, p in zip(reader.layers, maps):
        if p.shape[-2] > 64:
            continue  # told from a sample
        found = attention_sink(torch.where(p > 0, p.double().clamp(min=1e-300).log(), -math.inf))
        assert layer.sink is not None
        assert layer.rest is not None
        assert layer.sink.shape == (p.shape[-3],)
        expected = (found.mass.reshape(-1, p.shape[-3]).mean(0), found.rest.reshape(-1, p.shape[-3]).nanmean(0))
        torch.testing.assert_close(layer.sink.double(), expected[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.rest.double(), expected[1], atol=1e-4, rtol=0)


class Rows(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, x: Tensor, key: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, key, key, is_causal=self.causal, enable_gqa=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [None, 100, 32])
def test_is_told_from_at_most_64_rows(causal: bool, queries: int | None) -> None:
    torch.manual_seed(0)
    x, key = torch.randn(2, 4, 150, 8), torch.randn(2, 2, 150, 8)
    with AttentionEntropyReader(Rows(causal), queries=queries, sinks=True) as reader:
        reader.module(x, key)
    (layer,) = reader.layers
    s = x.double() @ key.double().repeat_interleave(2, 1).transpose(-2, -1) / math.sqrt(8)
    if causal:
        s = s.masked_fill(torch.ones(150, 150).triu(1).bool(), -math.inf)
    rows = torch.arange(150)
    for count in (queries, 64):
        if count is not None and count < len(rows):
            rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]]
    found = attention_sink(s[:, :, rows])
    assert layer.sink is not None
    torch.testing.assert_close(layer.sink.double(), found.mass.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(layer.rest.double(), found.rest.mean(0), atol=1e-6, rtol=0)
    assert layer.entropy.shape[-1] == (queries or 150)


def test_sinks_are_not_read_unless_asked() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with AttentionEntropyReader(layer) as reader:
        layer(torch.randn(1, 5, 8))
    assert reader.layers[0].sink is None
    assert reader.layers[0].rest is None


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_without_gradient_it_is_read_in_the_forward_and_nothing_is_held(reentrant: bool | None) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(1, 5, 8, requires_grad=True)

    def run() -> Tensor:
        if reentrant is None:
            return layer(x)
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)

    plain = run()
    plain.square().sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    reader = AttentionEntropyReader(layer, gradient=False, sinks=True)
    reader.attach()
    reader.start()
    out = run()
    assert not reader._noted
    out.square().sum().backward()
    reader.stop()
    assert torch.equal(out, plain)
    assert len(reader.layers) == 1
    assert not reader.layers[0].entropy.requires_grad
    for p, g in zip(layer.parameters(), expected):
        assert torch.equal(p.grad, g)
    reader.detach()


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("gradient", [False, True])
def test_what_one_reader_computes_is_no_attention_to_another(order: int, gradient: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    readers = [
        AttentionEntropyReader(layer, queries=4),
        AttentionEntropyReader(layer, gradient=gradient, sinks=True),
    ]
    readers = readers[:: 1 - 2 * order]
    for reader in readers:
        reader.attach()
    for _ in range(2):
        for reader in readers:
            reader.start()
        layer(torch.randn(2, 9, 16))
        for reader in readers:
            assert len(reader.layers) == 1
        for reader in readers:
            reader.stop()
        for reader in readers:
            assert [entry.source for entry in reader.layers] == ["multi_head_attention"]
    for reader in readers:
        reader.detach()
