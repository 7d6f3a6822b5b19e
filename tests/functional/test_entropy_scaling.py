"""The factor against its closed forms and against simulated Gaussian logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_entropy.functional import entropy_from_logits
from lightning_entropy.functional.entropy_scaling import entropy_scaling_factor


@pytest.mark.parametrize(
    ("n", "t", "mode", "expected"),
    [
        (256**2, 256, "paper", math.sqrt(2)),
        (256, 256**2, "log", 0.5),
        (4096, 4096, "paper", 1.0),
        (32**2, 8**2, "absolute", math.sqrt(1 + 2 * math.log(16) / 3.0)),
        (1, 2, "paper", 1.0),  # fewer than two tokens count as two
        (4, 0.5, "log", 2.0),
    ],
)
def test_closed_forms(n: float, t: float, mode: str, expected: float) -> None:
    assert entropy_scaling_factor(n, t, mode=mode, variance=3.0) == pytest.approx(expected, rel=1e-12)


@given(st.integers(2, 10**6), st.sampled_from(["paper", "log", "absolute"]))
def test_exactly_one_where_nothing_changes(tokens: int, mode: str) -> None:
    assert entropy_scaling_factor(tokens, tokens, mode=mode, variance=1.0) == 1.0


@given(st.integers(3, 10**5), st.integers(3, 10**5), st.sampled_from(["paper", "log"]))
def test_more_tokens_sharper(n: int, t: int, mode: str) -> None:
    c = entropy_scaling_factor(n, t, mode=mode)
    assert (c > 1) == (n > t)
    assert c * entropy_scaling_factor(t, n, mode=mode) == pytest.approx(1.0)


def simulated(n: int, variance: float, c: float) -> float:
    s = torch.randn(200, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) * variance**0.5
    return entropy_from_logits(c * s).mean().item()


def test_gaussian_logits_keep_their_normalised_entropy() -> None:
    t, v = 4096, 2.0
    base = simulated(t, v, 1.0) / math.log(t)
    for n in (256, 1024, 16384, 36864):
        scaled = simulated(n, v, entropy_scaling_factor(n, t)) / math.log(n)
        assert scaled == pytest.approx(base, rel=0.01)
    unscaled = simulated(256, v, 1.0) / math.log(256)
    assert abs(unscaled / base - 1) > 0.03


def test_gaussian_logits_keep_their_absolute_entropy() -> None:
    t, v = 4096, 2.0
    base = simulated(t, v, 1.0)
    for n in (8192, 16384, 36864):
        assert simulated(n, v, entropy_scaling_factor(n, t, mode="absolute", variance=v)) == pytest.approx(
            base, rel=0.02
        )
        assert abs(simulated(n, v, entropy_scaling_factor(n, t)) - base) > 0.1


def test_refuses() -> None:
    with pytest.raises(ValueError, match="mode must be one of paper, log, absolute, got 'exact'"):
        entropy_scaling_factor(4, 4, mode="exact")
    with pytest.raises(ValueError, match="needs variance="):
        entropy_scaling_factor(4, 4, mode="absolute")
    with pytest.raises(ValueError, match=r"16 keys cannot have the entropy of 4096 .* 7\.318 nats, and at most 2\.773"):
        entropy_scaling_factor(16, 4096, mode="absolute", variance=2.0)
