"""The penalty on attention entropy: definitions, the authors' public sum, limiting cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_entropy.functional import attention_entropy_penalty as penalty


def by_hand(h: Tensor, keys: Tensor, objective: str, target: list[float], tolerance: float, hinge: bool, unit: bool):
    """Sample by sample, head by head, row by row."""
    values = []
    keys = keys.expand_as(h)
    for b in range(h.shape[0]):
        for head in range(h.shape[1]):
            rows = [
                (float(h[b, head, i]), math.log(float(keys[b, head, i])))
                for i in range(h.shape[2])
                if float(keys[b, head, i]) > 1
            ]
            if not rows:
                continue
            x = sum(e / (m if unit else 1) for e, m in rows) / len(rows)
            m = 1.0 if unit else sum(m for _, m in rows) / len(rows)
            d = x - target[head] * m
            values.append(
                {
                    "maximize": -x,
                    "minimize": x,
                    "floor": min(d, 0) ** 2,
                    "ceiling": max(d, 0) ** 2,
                    "target": d * d,
                    "band": max(abs(d) - tolerance * m, 0) ** 2 if hinge else (d * d if abs(d) > tolerance * m else 0),
                }[objective]
            )
    return sum(values) / max(len(values), 1)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["maximize", "minimize", "floor", "ceiling", "band", "target"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_against_the_definition(objective: str, unit: bool, hinge: bool, per_head: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    keys = torch.randint(0, 6, (2, 1, 5), generator=g).double()
    h = torch.rand(2, 3, 5, generator=g, dtype=torch.float64) * keys.clamp(min=1).log()
    free = objective in ("maximize", "minimize")
    theta = torch.rand(3, generator=g).tolist() if per_head else [0.4] * 3
    tolerance = 0.15 if objective == "band" else 0.0
    got = penalty(
        h,
        keys,
        objective=objective,
        target=None if free else (theta if per_head else 0.4),
        tolerance=tolerance,
        normalize=unit,
        gate="hinge" if hinge else "hard",
    )
    expected = by_hand(h, keys, objective, theta, tolerance, hinge, unit)
    assert got.item() == pytest.approx(expected, abs=1e-12)


def official(attention: list[Tensor], thresholds: Tensor, gamma: float) -> Tensor:
    """The published loss without its coefficient, written from its description: sums over samples and rows."""
    context = attention[0].shape[-1]
    layers = []
    for p in attention:
        h = -(p * (p + 1e-9).log()).sum(-1)
        heads = []
        for k in range(p.shape[1]):
            d = h[:, k] - thresholds[k] * math.log(context)
            heads.append(torch.where(d.abs() > gamma * math.log(context), d, 0.0).square().sum())
        layers.append(torch.stack(heads).mean())
    return torch.stack(layers).mean()


def test_official_sum_is_the_authors_loss() -> None:
    torch.manual_seed(0)
    causal = torch.ones(7, 7).tril().bool()
    maps = [torch.randn(2, 3, 7, 7, dtype=torch.float64).masked_fill(~causal, -torch.inf).softmax(-1) for _ in range(2)]
    theta = torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64)
    keys = torch.arange(1, 8)
    got = torch.stack(
        [
            penalty(
                torch.special.entr(p).sum(-1),
                keys,
                objective="band",
                target=theta,
                tolerance=0.2,
                normalize=False,
                reduction="official_sum",
                context=7,
            )
            for p in maps
        ]
    ).mean()
    torch.testing.assert_close(got, official(maps, theta, 0.2), rtol=1e-6, atol=1e-7)
    doubled = penalty(
        torch.zeros(4, 3, 7), 7.0, objective="target", target=0.5, normalize=False, reduction="official_sum"
    )
    single = penalty(
        torch.zeros(2, 3, 7), 7.0, objective="target", target=0.5, normalize=False, reduction="official_sum"
    )
    assert doubled.item() == pytest.approx(2 * single.item())


def test_oracles_of_the_paper() -> None:
    n = 16
    uniform, one_hot = torch.full((1, 2, 4), math.log(n)), torch.zeros(1, 2, 4)
    assert penalty(uniform, float(n), objective="target", target=1.0).item() == pytest.approx(0, abs=1e-12)
    nats = penalty(one_hot, float(n), objective="band", target=0.5, tolerance=0.2, normalize=False)
    assert nats.item() == pytest.approx((0.5 * math.log(n)) ** 2)
    inside = torch.full((1, 2, 4), 0.55 * math.log(n), requires_grad=True)
    value = penalty(inside, float(n), objective="band", target=0.5, tolerance=0.2)
    (gradient,) = torch.autograd.grad(value, inside)
    assert value.item() == 0
    assert (gradient == 0).all()
    theta = torch.tensor([0.5, 0.5], requires_grad=True)
    value = penalty(one_hot, float(n), objective="band", target=theta, tolerance=0.2, normalize=False)
    (gradient,) = torch.autograd.grad(value, theta)
    delta = -0.5 * math.log(n)
    torch.testing.assert_close(gradient, torch.full((2,), -2 * delta * math.log(n) / 2))


@pytest.mark.parametrize("objective", ["maximize", "minimize", "floor", "ceiling", "band", "target"])
@pytest.mark.parametrize("unit", [True, False])
def test_gradcheck(objective: str, unit: bool) -> None:
    torch.manual_seed(1)
    keys = torch.tensor([1.0, 2, 3, 4, 0])
    h = (torch.rand(2, 3, 5, dtype=torch.float64) * 0.6).requires_grad_()
    target = None if objective in ("maximize", "minimize") else 0.45
    tolerance = 0.05 if objective == "band" else 0.0

    def f(x: Tensor) -> Tensor:
        return penalty(x, keys, objective=objective, target=target, tolerance=tolerance, normalize=unit, gate="hinge")

    assert torch.autograd.gradcheck(f, h)
    (gradient,) = torch.autograd.grad(f(h), h)
    assert (gradient[..., [0, 4]] == 0).all()  # rows with one key, or none, have no entropy to give


def test_no_row_with_two_keys_is_zero() -> None:
    h = torch.zeros(1, 2, 3, requires_grad=True)
    value = penalty(h, 1.0, objective="floor", target=0.5)
    value.backward()
    assert value.item() == 0
    assert (h.grad == 0).all()


def test_a_batch_is_the_mean_of_its_samples() -> None:
    torch.manual_seed(0)
    h = torch.rand(4, 3, 5, dtype=torch.float64)
    whole = penalty(h, 5.0, objective="floor", target=0.4)
    parts = torch.stack([penalty(x[None], 5.0, objective="floor", target=0.4) for x in h]).mean()
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "rise"}, "objective must be one of maximize"),
        ({"objective": "floor"}, "needs a target"),
        ({"objective": "maximize", "target": 0.5}, "has no target"),
        ({"objective": "floor", "target": 1.5}, "between 0 and 1, got 1.5"),
        ({"objective": "floor", "target": 0.3, "tolerance": 0.1}, "belongs to objective='band'"),
        ({"objective": "band", "target": 0.3, "tolerance": 1.0}, r"tolerance must be in \[0, 1\)"),
        ({"objective": "band", "target": 0.3, "reduction": "official_sum"}, "pass normalize=False"),
        ({"objective": "band", "target": 0.3, "gate": "soft"}, "gate must be one of"),
        ({"objective": "target", "target": [0.1, 0.2]}, "2 values for 3 heads"),
    ],
)
def test_refusals(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        penalty(torch.zeros(1, 3, 4), 4.0, **arguments)
