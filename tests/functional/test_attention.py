from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from lightning_entropy.functional import aem_loss


def official(logits: torch.Tensor) -> torch.Tensor:
    """The definition, one bag: sum over instances, mean over rows."""
    rows = logits.reshape(-1, logits.shape[-1])
    return (rows.softmax(-1) * rows.log_softmax(-1)).sum() / rows.shape[0]


@given(st.integers(1, 4), st.integers(1, 3), st.integers(2, 20))
@settings(max_examples=30, deadline=None)
def test_is_the_definition(bags: int, branches: int, instances: int) -> None:
    s = torch.randn(bags, branches, instances, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([official(bag) for bag in s]).mean()
    got = aem_loss(s)
    torch.testing.assert_close(got, expected)
    (g1,) = torch.autograd.grad(got, s, retain_graph=True)
    (g2,) = torch.autograd.grad(expected, s)
    torch.testing.assert_close(g1, g2)


def test_padding_changes_nothing() -> None:
    sizes = [5, 1, 9]
    s = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(9) < torch.tensor(sizes)[:, None]
    got = aem_loss(s, mask=mask.to(torch.uint8))
    expected = sum(official(s[i, :n]) for i, n in enumerate(sizes)) / 3
    torch.testing.assert_close(got, expected)
    (g,) = torch.autograd.grad(got, s)
    assert (g[~mask] == 0).all()


def test_wholly_masked_bags_are_left_out_of_the_mean() -> None:
    s = torch.zeros(2, 4)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    assert aem_loss(s, mask=mask).item() == pytest.approx(-math.log(4))
    assert aem_loss(s[1:], mask=mask[1:]).item() == 0


def test_target_stops_pushing() -> None:
    flat = torch.zeros(1, 10, requires_grad=True)
    loss = aem_loss(flat, target=0.7)
    loss.backward()
    assert loss.item() == 0
    assert (flat.grad == 0).all()
    peaked = torch.tensor([[9.0] + [0.0] * 9], dtype=torch.float64)
    h = -(peaked.softmax(-1) * peaked.log_softmax(-1)).sum() / math.log(10)
    assert aem_loss(peaked, target=0.7).item() == pytest.approx((0.7 - h.item()) ** 2)


def test_normalised_and_top_k() -> None:
    s = torch.randn(2, 50, dtype=torch.float64)
    torch.testing.assert_close(aem_loss(s, normalize=True), aem_loss(s) / math.log(50))
    assert aem_loss(torch.zeros(1, 50), top_k=5).item() == pytest.approx(-math.log(5))
    assert aem_loss(torch.zeros(1, 50), top_k=5, normalize=True).item() == pytest.approx(-1)
    torch.testing.assert_close(aem_loss(s, top_k=50), aem_loss(s))


def test_small_logits_expand_around_uniform() -> None:
    s = 1e-3 * torch.randn(2000, dtype=torch.float64)
    assert (aem_loss(s) + math.log(2000)).item() == pytest.approx(s.var(unbiased=False).item() / 2, rel=1e-2)


def test_a_step_spreads_attention_unless_it_has_collapsed() -> None:
    for gap, moves in [(5.0, True), (60.0, False)]:
        s = torch.zeros(100)
        s[0] = gap
        s.requires_grad_()
        before = aem_loss(s)
        before.backward()
        after = aem_loss((s - 0.1 * s.grad).detach())
        assert (after < before) == moves


def test_one_instance_gives_nothing() -> None:
    s = torch.zeros(3, 1, requires_grad=True)
    for options in ({}, {"normalize": True}, {"target": 0.5}, {"top_k": 3}):
        assert aem_loss(s, **options).item() == 0


def test_reductions() -> None:
    s = torch.randn(2, 3, 7, dtype=torch.float64)
    rows = aem_loss(s, reduction="none")
    assert rows.shape == (2, 3)
    torch.testing.assert_close(aem_loss(s, reduction="sum"), rows.sum())
    torch.testing.assert_close(aem_loss(s.transpose(1, 2), dim=1, reduction="none"), rows)


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"normalize": True}, {"target": 0.99}])
def test_gradcheck(options: dict) -> None:
    s = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: aem_loss(x, **options), s)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"reduction": "max"}, "reduction"), ({"target": 1.2}, r"target.*1\.2"), ({"top_k": 0}, "at least 1")],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aem_loss(torch.zeros(1, 3), **options)
