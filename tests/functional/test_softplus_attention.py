"""LSSA and LSSAR against the formulas as printed, a row at a time in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from lightning_entropy.functional.softplus_attention import (
    length_scaled_softmax,
    lssa_attention,
    lssar_attention,
)


def literal(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    *,
    power: float | None = None,
    offset_rows: int = 3,
    nonlinearity: Callable[[Tensor], Tensor] = lambda s: torch.log(1 + torch.exp(s)),
) -> Tensor:
    """The weights as the paper prints them, with no eps and no rescaling; LSSA for ``power=None``."""
    width = q.shape[-1]
    groups = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:-1], k.shape[-2], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys = [j for j in range(k.shape[2]) if not causal or j <= i]
                bias = torch.zeros(k.shape[2], dtype=torch.float64)
                if mask is not None:
                    row = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])[b, h, i]
                    if mask.dtype == torch.bool:
                        keys = [j for j in keys if row[j]]
                    else:
                        bias = row
                if not keys:
                    continue
                n = len(keys)
                unit_q = q[b, h, i] / q[b, h, i].norm()
                k_h = k[b, h // groups, keys]
                s = math.log(width) * math.log(n) * (k_h / k_h.norm(dim=-1, keepdim=True)) @ unit_q + bias[keys]
                a = nonlinearity(s)
                a = a / a.sum()
                if power is not None:
                    y = torch.relu(a * n - (0 if n <= offset_rows else 1)) ** power
                    a = y / y.sum()
                out[b, h, i, keys] = a
    return out


def weights_of(attention: Callable[..., Tensor], q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The weights of a function that mixes values: its output for the unit matrix."""
    eye = torch.eye(k.shape[-2], dtype=q.dtype).expand(*k.shape[:-2], -1, -1)
    return attention(q, k, eye, *args, **kwargs)


@st.composite
def problems(draw: Any) -> dict[str, Any]:
    torch.manual_seed(draw(st.integers(0, 10**6)))
    batch, kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    n_q, n_k, width = draw(st.integers(1, 7)), draw(st.integers(1, 9)), draw(st.integers(2, 6))
    causal = draw(st.booleans())
    kind = "none" if causal else draw(st.sampled_from(["none", "bool", "bias", "row bias"]))
    mask = {
        "none": lambda: None,
        "bool": lambda: torch.rand(batch, 1, n_q, n_k) > 0.4,
        "bias": lambda: torch.randn(1, kv_heads * groups, n_q, n_k, dtype=torch.float64),
        "row bias": lambda: torch.randn(n_q, 1, dtype=torch.float64),
    }[kind]()
    size = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    return {
        "q": torch.randn(batch, kv_heads * groups, n_q, width, dtype=torch.float64) * size,
        "k": torch.randn(batch, kv_heads, n_k, width, dtype=torch.float64) / size,
        "mask": mask,
        "causal": causal,
        "gqa": groups > 1,
    }


@given(problems(), st.sampled_from([None, 1.0, 3.0, 15.0]))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_equals_the_printed_form(problem: dict[str, Any], power: float | None) -> None:
    q, k, mask, causal = problem["q"], problem["k"], problem["mask"], problem["causal"]
    options = {"enable_gqa": problem["gqa"]}
    if power is None:
        got = weights_of(lssa_attention, q, k, mask, 0.0, causal, **options)
    else:
        got = weights_of(lssar_attention, q, k, mask, 0.0, causal, power=power, **options)
    expected = literal(q, k, mask, causal, power=power)
    kept = ~expected.isnan().any(-1)  # 0/0 where nothing exceeds uniform attention
    torch.testing.assert_close(got[kept], expected[kept], rtol=1e-9, atol=1e-12)
    sums = got.sum(-1)
    some = torch.ones_like(sums, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        some = mask.any(-1).expand_as(sums)
    torch.testing.assert_close(sums, some.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attention", [lssa_attention, lssar_attention])
@pytest.mark.parametrize("kind", ["full", "causal", "bool", "bias"])
def test_gradient(attention: Callable[..., Tensor], kind: str) -> None:
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 5, 5))
    mask: Tensor | None = None
    if kind == "bool":
        mask = torch.rand(1, 1, 4, 5) > 0.3
        mask[..., 1, :] = False
    if kind == "bias":
        mask = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    inputs = [q, k, v] if mask is None or not mask.requires_grad else [q, k, v, mask]
    options: dict[str, Any] = {"power": 3.0} if attention is lssar_attention else {}

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = mask) -> Tensor:
        return attention(q, k, v, bias, is_causal=kind == "causal", **options)

    assert gradcheck(run, inputs)


def test_causal_rows_do_not_see_what_follows() -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 8)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[..., 5:, :] = torch.randn(1, 2, 4, 8)
    for attention in (lssa_attention, lssar_attention):
        before = attention(q, k, v, is_causal=True)
        after = attention(*changed, is_causal=True)
        assert torch.equal(before[..., :5, :], after[..., :5, :])


def test_one_key_is_the_value_itself() -> None:
    q, k, v = torch.randn(3, 2, 3, 1, 8)
    for attention in (lssa_attention, lssar_attention, length_scaled_softmax):
        torch.testing.assert_close(attention(q, k, v), v)


def test_a_query_that_continues_a_cache_counts_every_key() -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 8)
    for attention in (lssa_attention, lssar_attention):
        whole = attention(q, k, v, is_causal=True)
        last = attention(q[..., -1:, :], k, v)
        torch.testing.assert_close(last, whole[..., -1:, :])
        chunk = torch.ones(9, 9, dtype=torch.bool).tril()[4:]
        torch.testing.assert_close(attention(q[..., 4:, :], k, v, chunk), whole[..., 4:, :])


def test_padding_is_as_if_it_were_not_there() -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 8)
    for mask in (torch.arange(9) < 6, torch.zeros(9).masked_fill(torch.arange(9) >= 6, torch.finfo(torch.float32).min)):
        for attention in (lssa_attention, lssar_attention):
            torch.testing.assert_close(attention(q, k, v, mask), attention(q, k[..., :6, :], v[..., :6, :]))


@pytest.mark.parametrize("power", [15.0, 200.0])
def test_a_large_power_approaches_the_largest_key(power: float) -> None:
    torch.manual_seed(1)
    q, k = torch.randn(2, 1, 1, 64, 16, dtype=torch.float64)
    a = weights_of(lssa_attention, q, k)
    b = weights_of(lssar_attention, q, k, power=power)
    assert torch.equal(a.argmax(-1), b.argmax(-1))
    assert (b.amax(-1) > a.amax(-1)).all()
    if power > 100:
        assert b.amax(-1).median() > 0.99


def test_lengths_of_query_and_key_do_not_matter() -> None:
    q, k, v = torch.randn(3, 1, 2, 7, 8, dtype=torch.float64)
    for attention in (lssa_attention, lssar_attention):
        scaled = attention(q * 1e200, k * torch.rand(7, 1, dtype=torch.float64) * 1e-200, v)
        torch.testing.assert_close(scaled, attention(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_sum_to_one_and_gradients_are_finite_in_every_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 300, 64).to(dtype).requires_grad_() for _ in range(2))
    for attention in (lssa_attention, lssar_attention):
        for keys in (k, k * 0 + 1, k * 0):  # ordinary, uniform, exact zeros
            out = attention(q, keys, torch.ones(1, 2, 300, 4, dtype=dtype), is_causal=True)
            torch.testing.assert_close(out.float(), torch.ones_like(out, dtype=torch.float32), rtol=0, atol=1e-5)
        out = attention(q, k, torch.randn(1, 2, 300, 4, dtype=dtype), is_causal=True)
        assert out.dtype == dtype
        out.sum().backward()
        for x in (q, k):
            assert x.grad is not None
            assert x.grad.isfinite().all()
            x.grad = None


def test_zero_vectors_have_a_gradient_of_ordinary_size() -> None:
    q = torch.zeros(1, 1, 4, 8, requires_grad=True)
    k, v = torch.randn(2, 1, 1, 4, 8)
    lssar_attention(q, k, v).sum().backward()
    assert q.grad is not None
    assert q.grad.abs().max() < 100


@pytest.mark.parametrize("noise", [0.0, 1e-9])
def test_uniform_attention_is_kept(noise: float) -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 1, 50, 8)
    k = torch.ones(1, 1, 50, 8) + noise * torch.randn(50, 8)
    weights = weights_of(lssar_attention, q, k)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 50), rtol=1e-4, atol=0)


def test_in_low_precision_as_near_to_float64_as_the_values_allow() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 64, 32).bfloat16()
    for attention in (lssa_attention, lssar_attention):
        exact = attention(q.double(), k.double(), v.double())
        error = (attention(q, k, v).double() - exact).abs().max()
        assert error <= 2 * (exact.bfloat16().double() - exact).abs().max()


def test_autocast_does_not_lower_the_precision() -> None:
    q, k, v = torch.randn(3, 1, 2, 64, 32)
    for attention in (lssa_attention, lssar_attention):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(attention(q, k, v), torch.clone(attention(q, k, v)))
            inside = attention(q, k, v)
        assert torch.equal(inside, attention(q, k, v))


def test_dropout_keeps_the_mean() -> None:
    q, k = torch.randn(2, 1, 1, 400, 8)
    out = lssa_attention(q, k, torch.ones(1, 1, 400, 1), dropout_p=0.5)
    assert out.std() > 0.01
    assert abs(out.mean().item() - 1) < 0.05


def test_lssa_with_exp_is_cosine_softmax_at_the_length_scale() -> None:
    q, k = torch.randn(2, 1, 2, 6, 8, dtype=torch.float64)
    for causal in (False, True):
        expected = literal(q, k, causal=causal, nonlinearity=torch.exp)
        got = weights_of(length_scaled_softmax, q, k, is_causal=causal, cosine=True)
        torch.testing.assert_close(got, expected)


def test_length_scaled_softmax() -> None:
    q, k, v = torch.randn(3, 2, 3, 6, 8)
    assert torch.equal(length_scaled_softmax(q, k, v, base_length=6), F.scaled_dot_product_attention(q, k, v))
    twice = F.scaled_dot_product_attention(q, k, v, scale=2 * 8**-0.5)
    torch.testing.assert_close(
        length_scaled_softmax(q, k[..., :4, :], v[..., :4, :], base_length=2),
        F.scaled_dot_product_attention(q, k[..., :4, :], v[..., :4, :], scale=2 * 8**-0.5),
    )
    assert twice.shape == v.shape
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    mask[1, ..., 3:] = False
    padded = length_scaled_softmax(q, k, v, mask)
    torch.testing.assert_close(padded[1], length_scaled_softmax(q, k[..., :3, :], v[..., :3, :])[1])
    grouped = length_scaled_softmax(q.repeat(1, 2, 1, 1), k, v, enable_gqa=True)
    torch.testing.assert_close(grouped[:, ::2][:, 1:2], length_scaled_softmax(q[:, 2:3], k[:, 1:2], v[:, 1:2]))


def test_reweighting_sharpens_and_softplus_does_not() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 512, 64)
    entropy = {}
    for name, w in (
        ("softmax", weights_of(F.scaled_dot_product_attention, q, k)),
        ("lssa", weights_of(lssa_attention, q, k)),
        ("lssar", weights_of(lssar_attention, q, k)),
    ):
        entropy[name] = -(w * w.clamp(min=1e-30).log()).sum(-1).mean().item()
    assert abs(entropy["lssa"] - entropy["softmax"]) < 0.5
    assert entropy["lssar"] < 0.5 * entropy["softmax"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"power": 0.5}, "power must be finite and at least 1, got 0.5"),
        ({"offset_rows": -1}, "offset_rows must not be negative, got -1"),
        ({"is_causal": True, "attn_mask": torch.ones(3, 3, dtype=torch.bool)}, "exclude each other"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    x = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match=message):
        lssar_attention(x, x, x, **arguments)


def test_refuses_shapes() -> None:
    x = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match="same width, got 4 and 5"):
        lssa_attention(x, torch.randn(1, 1, 3, 5), x)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads"):
        lssa_attention(x.expand(1, 3, 3, 4), x.expand(1, 2, 3, 4), x.expand(1, 2, 3, 4), enable_gqa=True)
    with pytest.raises(ValueError, match="base_length must be at least 2"):
        length_scaled_softmax(x, x, x, base_length=1)
