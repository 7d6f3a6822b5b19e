from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_entropy.observe.token_entropy import TokenEntropyReader


class Attend(nn.Module):
    """One attention, in each of its three spellings."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.way = way
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.way == "mha":
            return self.mha(x, x, x, key_padding_mask=~mask, need_weights=False)[0]
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (2 * x, x, x))
        if self.way == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        if self.way == "additive":
            added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=added[:, None, None, :])
        s = (q @ k.mT / 2).masked_fill(~mask[:, None, None, :], torch.finfo(torch.float32).min)
        return s.softmax(-1) @ v


def read(model: nn.Module, *batches: tuple[Tensor, Tensor], **options: object) -> tuple[Tensor, Tensor]:
    reader = TokenEntropyReader(model, gradient=False, **options)
    reader.attach()
    for x, mask in batches:
        reader.start()
        model(x, mask)
        reader.stop()
        reader.add()
    reader.detach()
    (found,) = reader.means().values()
    return found


@pytest.mark.parametrize("way", ["sdpa", "additive", "softmax", "mha"])
def test_padding_changes_nothing(way: str) -> None:
    model = Attend(way)
    x = torch.randn(2, 6, 8)
    whole = read(model, (x, torch.ones(2, 6, dtype=torch.bool)))
    padded = torch.cat([x, torch.randn(2, 5, 8)], 1)
    mask = (torch.arange(11) < 6).expand(2, 11)
    for a, b in zip(whole, read(model, (padded, mask))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(whole, read(model, (x[:1], mask[:1, :6]), (padded[1:], mask[1:]))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_against_the_map() -> None:
    x, mask = torch.randn(3, 7, 8), torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    q, k = (t.unflatten(-1, (2, 4)).transpose(1, 2).double() for t in (2 * x, x))
    p = (q @ k.mT / 2).masked_fill(~mask[:, None, None, :], -torch.inf).softmax(-1)
    h = -torch.special.xlogy(p, p).sum(-1)
    rows = mask[:, None, :].expand_as(h)
    raw = torch.stack([h[:, i][rows[:, i]].mean() for i in range(2)])
    keys = mask.sum(1)[:, None, None].expand_as(h)
    several = rows & (keys > 1)
    normalized = torch.stack([(h / keys.log())[:, i][several[:, i]].mean() for i in range(2)])
    found = read(Attend("sdpa"), (x, mask))
    torch.testing.assert_close(found[0], normalized, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], raw, rtol=1e-5, atol=1e-6)


def test_uniform_and_one_hot_attention() -> None:
    every = torch.ones(2, 9, dtype=torch.bool)
    normalized, raw = read(Attend("sdpa"), (torch.zeros(2, 9, 8), every))
    torch.testing.assert_close(raw, torch.full((2,), math.log(9), dtype=torch.float64))
    torch.testing.assert_close(normalized, torch.ones(2, dtype=torch.float64))


def test_one_hot_attention() -> None:
    class Sharp(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q = x[:, None]
            return F.scaled_dot_product_attention(100 * q, q, q)

    normalized, raw = read(Sharp(), (torch.eye(5).expand(2, 5, 5), torch.ones(2, 5, dtype=torch.bool)))
    assert float(normalized) == pytest.approx(0, abs=1e-6)
    assert float(raw) == pytest.approx(0, abs=1e-6)


def test_uniform_causal_attention() -> None:
    class Causal(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q = x[:, None]
            return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    normalized, raw = read(Causal(), (torch.zeros(2, 6, 4), torch.ones(2, 6, dtype=torch.bool)))
    assert float(raw) == pytest.approx(sum(math.log(i + 1) for i in range(6)) / 6)
    assert float(normalized) == pytest.approx(1)


def test_sampled_rows_skip_padding_too() -> None:
    x = torch.zeros(2, 40, 8)
    mask = (torch.arange(40) < 11).expand(2, 40)
    normalized, raw = read(Attend("sdpa"), (x, mask), queries=20)
    torch.testing.assert_close(normalized, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(raw, torch.full((2,), math.log(11), dtype=torch.float64))
