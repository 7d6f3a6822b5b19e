"""Entropy of dot-product attention against the map itself, written out here in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from lightning_entropy.functional import attention_entropy, dot_product_entropy, sampled_mean


def oracle(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The definition over the whole map, a row at a time."""
    groups = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            s = scale * q[b, h] @ k[b, h // groups].T
            if softcap is not None:
                s = softcap * torch.tanh(s / softcap)
            allowed = torch.ones_like(s, dtype=torch.bool)
            if causal:
                allowed = allowed.tril()
            if mask is not None:
                full = mask.expand(q.shape[0], q.shape[1], *s.shape)[b, h]
                if mask.dtype == torch.bool:
                    allowed = allowed & full
                else:
                    s = s + full
            for i in range(s.shape[0]):
                row = s[i][allowed[i]]
                log_p = row.log_softmax(0)
                out.append(-(log_p.exp() * log_p).sum() if len(row) else 0 * s[i].sum())
    return torch.stack(out).view(q.shape[:-1])


@st.composite
def problems(draw: Any) -> dict[str, Any]:
    torch.manual_seed(draw(st.integers(0, 10**6)))
    batch, kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    n_q, n_k, width = draw(st.integers(1, 9)), draw(st.integers(1, 11)), draw(st.integers(1, 6))
    causal = draw(st.booleans())
    kind = "none" if causal else draw(st.sampled_from(["none", "bool", "bias", "row bias"]))
    mask = {
        "none": lambda: None,
        "bool": lambda: torch.rand(batch, 1, n_q, n_k) > 0.4,
        "bias": lambda: torch.randn(1, kv_heads * groups, n_q, n_k, dtype=torch.float64),
        "row bias": lambda: torch.randn(n_q, 1, dtype=torch.float64),
    }[kind]()
    return {
        "q": torch.randn(batch, kv_heads * groups, n_q, width, dtype=torch.float64) * draw(st.sampled_from([1.0, 8.0])),
        "k": torch.randn(batch, kv_heads, n_k, width, dtype=torch.float64) + draw(st.sampled_from([0.0, 3.0])),
        "mask": mask,
        "causal": causal,
        "scale": draw(st.sampled_from([None, 0.3, 1.0])),
        "softcap": draw(st.sampled_from([None, None, 2.0])),
        "gqa": groups > 1,
    }


@given(problems())
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_value_and_gradient_equal_the_map(problem: dict[str, Any]) -> None:
    mask = problem["mask"]
    differentiable = mask is not None and mask.dtype != torch.bool
    leaves = [problem["q"].requires_grad_(), problem["k"].requires_grad_()]
    if differentiable:
        leaves.append(mask.requires_grad_())
    expected = oracle(*leaves[:2], mask, problem["causal"], problem["scale"], problem["softcap"])
    weights = torch.linspace(-1, 2, expected.numel(), dtype=torch.float64).view_as(expected)
    expected_grads = torch.autograd.grad((expected * weights).sum(), leaves, allow_unused=True)
    backends = ["dense", "blockwise"]
    if not differentiable and problem["softcap"] is None:
        backends += ["two_call", "few_rows"]
    for backend in [*backends, "auto"]:
        got = attention_entropy(
            *leaves[:2],
            mask,
            problem["causal"],
            problem["scale"],
            problem["gqa"],
            logit_softcap=problem["softcap"],
            backend=backend,
        )
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9, msg=backend)
        grads = torch.autograd.grad((got * weights).sum(), leaves, allow_unused=True)
        for a, b in zip(grads, expected_grads):
            zero = torch.zeros(())
            a, b = (zero if a is None else a), (zero if b is None else b)
            torch.testing.assert_close(a.expand_as(b) if a.dim() == 0 else a, b, atol=1e-8, rtol=1e-7, msg=backend)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck_of_the_blockwise_backward(softcap: float | None) -> None:
    q = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 1, 3, 5, dtype=torch.float64, requires_grad=True)

    def both(q: Tensor, k: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out = attention_entropy(q, k, bias, logit_softcap=softcap, backend="blockwise", return_lse=True)
        return out.entropy, out.lse

    assert gradcheck(both, (q, k, bias))


@pytest.mark.parametrize("backend", ["two_call", "blockwise", "few_rows", "dense"])
def test_many_blocks_and_closed_forms(backend: str) -> None:
    n = 700  # three blocks of keys
    uniform = attention_entropy(torch.zeros(1, 1, 2, 4).double(), torch.randn(1, 1, n, 4).double(), backend=backend)
    torch.testing.assert_close(uniform, torch.full_like(uniform, math.log(n)))
    k = torch.zeros(1, 1, n, 1, dtype=torch.float64)
    k[..., 400, 0] = 1.0
    length = 5.0
    z = math.exp(length) + n - 1
    one = attention_entropy(torch.tensor([[[[length]]]]).double(), k, scale=1.0, backend=backend)
    assert one.item() == pytest.approx(math.log(z) - length * math.exp(length) / z, rel=1e-12)


@pytest.mark.parametrize("backend", ["two_call", "blockwise", "few_rows", "dense"])
def test_moving_all_keys_changes_nothing_and_sharpening_lowers(backend: str) -> None:
    q, k = torch.randn(1, 2, 6, 8).double(), torch.randn(1, 2, 30, 8).double()
    h = attention_entropy(q, k, backend=backend)
    torch.testing.assert_close(attention_entropy(q, k + torch.randn(8).double(), backend=backend), h)
    assert (attention_entropy(q, k, scale=0.8, backend=backend) < h).all()


@pytest.mark.parametrize("backend", ["two_call", "blockwise", "few_rows", "dense"])
def test_a_query_without_keys_gives_zero_and_no_gradient(backend: str) -> None:
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    k = torch.randn(1, 1, 5, 4, requires_grad=True)
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    mask[..., 1, :] = False
    h = attention_entropy(q, k, mask, backend=backend)
    h.sum().backward()
    assert h[0, 0, 1] == 0
    assert (q.grad[0, 0, 1] == 0).all()
    assert torch.isfinite(q.grad).all()
    assert torch.isfinite(k.grad).all()


@pytest.mark.parametrize(("dtype", "backend", "limit"), [
    (torch.float32, "two_call", 1e-5),
    (torch.float32, "blockwise", 1e-5),
    (torch.float32, "few_rows", 1e-5),
    (torch.bfloat16, "two_call", 0.03),
    (torch.bfloat16, "blockwise", 0.03),
    (torch.bfloat16, "few_rows", 1e-5),
])  # fmt: skip
def test_error_by_dtype(dtype: torch.dtype, backend: str, limit: float) -> None:
    q, k = torch.randn(1, 4, 256, 64), torch.randn(1, 4, 1024, 64) + torch.randn(64)
    q, k = q.to(dtype), k.to(dtype)
    got = attention_entropy(q, k, backend=backend)
    assert got.dtype == torch.float32
    exact = attention_entropy(q.double(), k.double(), backend="dense")
    assert (got - exact).abs().max().item() <= limit


def test_sampled_rows_are_rows_of_the_whole_and_their_mean_is_unbiased() -> None:
    q, k = torch.randn(1, 2, 40, 8).double(), torch.randn(1, 2, 40, 8).double()
    for causal in (False, True):
        whole = attention_entropy(q, k, is_causal=causal)
        means, errors = [], []
        for seed in range(200):
            generator = torch.Generator().manual_seed(seed)
            h = attention_entropy(q, k, is_causal=causal, queries=10, generator=generator)
            assert h.shape == (1, 2, 10)
            assert (h[0, 0][:, None] - whole[0, 0]).abs().min(1).values.max() < 1e-12
            mean, error = sampled_mean(h, 40)
            means.append(mean)
            errors.append(error)
        spread = torch.stack(means)
        bias = (spread.mean(0) - whole.mean(-1)).abs()
        assert (bias < 4 * spread.std(0) / math.sqrt(200)).all()
        ratio = torch.stack(errors).mean(0) / spread.std(0)
        assert ((ratio > 0.8) & (ratio < 1.2)).all()
    everything = attention_entropy(q, k, queries=40)
    torch.testing.assert_close(everything, attention_entropy(q, k))
    assert (sampled_mean(everything, 40)[1] == 0).all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("backend", ["auto", "two_call", "blockwise", "few_rows", "dense"])
def test_gradient_of_sampled_rows(backend: str, is_causal: bool) -> None:
    q = torch.randn(2, 4, 40, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 2, 30, 8, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randperm(40, generator=generator)[:6].sort().values
    expected = oracle(q, k.expand(2, -1, -1, -1), causal=is_causal)[..., rows]
    options = {"queries": 6, "generator": torch.Generator().manual_seed(3), "enable_gqa": True, "backend": backend}
    h = attention_entropy(q, k, is_causal=is_causal, **options)
    torch.testing.assert_close(h, expected)
    weights = torch.randn_like(h)
    for got, exact in zip(
        torch.autograd.grad((h * weights).sum(), (q, k)), torch.autograd.grad((expected * weights).sum(), (q, k))
    ):
        torch.testing.assert_close(got, exact)


def test_gradcheck_of_few_rows() -> None:
    q = torch.randn(1, 2, 6, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 5) > 0.3
    mask[1] = False
    assert gradcheck(lambda q, k: attention_entropy(q[:, :, :3], k, mask, backend="few_rows"), (q, k))
    assert gradcheck(lambda q, k: attention_entropy(q, k, queries=3, backend="few_rows"), (q, k))
    assert gradgradcheck(lambda q, k: attention_entropy(q, k, mask, backend="few_rows"), (q[:, :, :3], k))
    assert gradgradcheck(lambda q: attention_entropy(q, k, queries=3, backend="few_rows"), (q,))


def test_few_rows_takes_no_more_rows_than_a_head_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    choose = dot_product_entropy._fastest
    monkeypatch.setattr(dot_product_entropy, "_fastest", lambda *a: chosen.append(choose(*a)) or chosen[-1])
    q = torch.randn(1, 1, 40, 8)
    attention_entropy(q, q, queries=8)
    attention_entropy(q, q, queries=9)
    attention_entropy(q, q, queries=8, logit_softcap=3.0)
    attention_entropy(q, q, queries=8, return_lse=True)
    assert chosen == ["few_rows", "two_call", "blockwise", "two_call"]


@pytest.mark.parametrize("backend", ["two_call", "blockwise", "dense"])
def test_the_log_sum_exp_is_that_of_the_logits(backend: str) -> None:
    q = torch.randn(1, 2, 6, 8).double()
    k = torch.randn(1, 2, 30, 8).double() + torch.randn(8)  # two_call centres the keys, and must not return that
    out = attention_entropy(q, k, is_causal=True, backend=backend, return_lse=True)
    s = (q @ k.mT / 8**0.5).masked_fill(torch.ones(6, 30).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(out.lse, s.logsumexp(-1))


def test_no_global_random_state_is_used() -> None:
    q = torch.randn(1, 1, 20, 4)
    state = torch.get_rng_state()
    a, b = attention_entropy(q, q, queries=5), attention_entropy(q, q, queries=5)
    assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "flash"}, "backend must be one of auto"),
        ({"backend": "two_call", "logit_softcap": 3.0}, "two_call needs .* bilinear"),
        ({"backend": "few_rows", "attn_mask": torch.zeros(4, 4)}, "few_rows needs .* bilinear"),
        ({"backend": "few_rows", "return_lse": True}, "few_rows has no log-sum-exp"),
        ({"logit_softcap": -1.0}, r"positive, got -1\.0"),
        ({"queries": 9}, "between 1 and 4 query rows, got 9"),
        ({"is_causal": True, "attn_mask": torch.ones(4, 4, dtype=torch.bool)}, "exclude each other"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    q = torch.randn(1, 1, 4, 4)
    with pytest.raises(ValueError, match=message):
        attention_entropy(q, q, **options)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="same width, got 4 and 5"):
        attention_entropy(torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 5))
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads"):
        attention_entropy(torch.randn(1, 3, 4, 4), torch.randn(1, 2, 4, 4), enable_gqa=True)
