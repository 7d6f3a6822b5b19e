"""The sink's mass and the attention beside it against the definition in float64, written row by row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_entropy.functional import attention_sink


def by_hand(logits: Tensor) -> tuple[float, int, float]:
    """One head, (queries, keys), float64, plain Python."""
    rows = [[math.exp(x) if x > -math.inf else 0.0 for x in row] for row in logits.tolist()]
    rows = [[x / sum(row) for x in row] for row in rows if sum(x > 0 for x in row) > 1]
    if not rows:
        return math.nan, 0, math.nan
    columns = [sum(row[j] for row in rows) / len(rows) for j in range(len(rows[0]))]
    sink = columns.index(max(columns))
    numerator = denominator = 0.0
    for row in rows:
        others = [x for j, x in enumerate(row) if j != sink and x > 0]
        if len(others) < 2:
            continue
        mass = sum(others)
        h = -sum(x / mass * math.log(x / mass) for x in others)
        numerator += mass * h / math.log(len(others))
        denominator += mass
    return max(columns), sink, numerator / denominator if denominator else math.nan


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 6),
    st.integers(1, 7),
    st.floats(0.1, 8),
    st.sampled_from(["", "causal", "random"]),
)
def test_equals_the_definition(seed: int, queries: int, keys: int, spread: float, mask: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, queries, keys, generator=generator, dtype=torch.float64) * spread
    if mask == "causal":
        logits = logits.masked_fill(torch.ones(queries, keys).triu(1).bool(), -torch.inf)
    elif mask == "random":
        logits = logits.masked_fill(torch.rand(2, 1, queries, keys, generator=generator) < 0.4, -torch.inf)
    found = attention_sink(logits)
    for b in range(2):
        for h in range(3):
            mass, key, rest = by_hand(logits[b, h])
            assert found.mass[b, h].item() == pytest.approx(mass, rel=1e-9, nan_ok=True)
            if not math.isnan(mass):
                assert found.key[b, h].item() == key
            assert found.rest[b, h].item() == pytest.approx(rest, rel=1e-7, abs=1e-12, nan_ok=True)


def test_uniform_attention_has_the_smallest_mass_and_a_uniform_rest() -> None:
    found = attention_sink(torch.zeros(2, 4, 8))
    torch.testing.assert_close(found.mass, torch.full((2,), 1 / 8))
    torch.testing.assert_close(found.rest, torch.ones(2))


@pytest.mark.parametrize("gap", [50.0, 1e3])
def test_a_sink_keeps_its_rest_whatever_its_mass(gap: float) -> None:
    """With all mass on the sink the weights are those of the limit: exp(lse of the others - logit of the sink)."""
    logits = (
        torch.randint(-256, 256, (1, 16, 9), generator=torch.Generator().manual_seed(0)) / 128
    )  # exact with the gap
    s = logits[0].double()
    others = s[:, 1:].softmax(-1)
    h = -(others * others.log()).sum(-1) / math.log(8)
    weight = (s[:, 1:].logsumexp(-1) - s[:, 0]).softmax(0)
    logits[..., 0] += gap
    found = attention_sink(logits)
    assert found.key.item() == 0
    assert found.mass.item() == 1.0
    assert found.rest.item() == pytest.approx((weight * h).sum().item(), abs=1e-4)


def test_rows_that_ignore_the_sink_count_by_their_mass() -> None:
    """Half the queries go to key 0, half to one key each: collapsed, although the sinking rows' rest is spread."""
    logits = torch.zeros(8, 9)
    logits[:, 0] = 30.0
    logits[4:, 0] = 0.0
    for i in range(4, 8):
        logits[i, i + 1] = 40.0
    found = attention_sink(logits)
    assert found.mass.item() == pytest.approx(0.5)
    assert found.rest.item() < 1e-6


def test_gradcheck() -> None:
    logits = torch.randn(2, 5, 6, dtype=torch.float64)
    logits[0, 1, 2:] = -torch.inf
    logits[1, 0] = -torch.inf
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: attention_sink(s)[::2], logits)
    found = attention_sink(logits)
    (gradient,) = torch.autograd.grad(found.mass.sum() + found.rest.sum(), logits)
    assert gradient.isfinite().all()


def test_mask_equals_minus_infinity_and_dtypes() -> None:
    logits = torch.randn(2, 3, 5, 6)
    mask = torch.rand(3, 5, 6) > 0.3
    for a, b in zip(attention_sink(logits, mask), attention_sink(logits.masked_fill(~mask, -torch.inf))):
        torch.testing.assert_close(a, b, equal_nan=True)
    low = attention_sink(logits.bfloat16())
    assert low.mass.dtype == torch.float32
    torch.testing.assert_close(low.mass, attention_sink(logits.bfloat16().double()).mass.float())
    with pytest.raises(ValueError, match=r"must be \(..., queries, keys\), got the shape \(3,\)"):
        attention_sink(torch.zeros(3))
