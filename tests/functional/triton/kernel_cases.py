"""The kernels against the whole map in float64.

Run by ``test_attention_entropy.py`` in a process of its own, on a GPU or with ``TRITON_INTERPRET=1``, which must be set
before anything imports triton; not collected by itself.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_entropy.functional import attention_entropy
from lightning_entropy.functional.triton import attention_with_entropy, entropy_and_lse, launch

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, entropy and log-sum-exp by their definitions, row for row without the entries that take no part."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    s = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    ok = torch.ones(s.shape, dtype=torch.bool, device=s.device)
    if is_causal:
        ok = ok.tril()
    if attn_mask is not None:
        ok = ok & attn_mask
    some = ok.any(-1, keepdim=True)
    s = s.masked_fill(~ok & some, -torch.inf)  # a row without keys keeps finite logits, and is left out afterwards
    log_p = s.log_softmax(-1)
    p = torch.where(ok, log_p.exp(), 0.0)
    h = -(p * torch.where(ok, log_p, 0.0)).sum(-1)
    lse = torch.where(some[..., 0], s.logsumexp(-1), -torch.inf)
    return p @ v, h, lse


def problem(
    n_q: int,
    n_k: int,
    width: int,
    value_width: int | None = None,
    *,
    heads: int = 2,
    key_heads: int | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    value_width = width if value_width is None else value_width
    shapes = [(heads, n_q, width), (key_heads or heads, n_k, width), (key_heads or heads, n_k, value_width)]
    return [torch.randn(batch, *shape).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def assert_equal_to_dense(leaves: list[Tensor], *, active: tuple[int, ...] = (0, 1, 2), **options: Any) -> None:
    """Values, and the gradients of a weighted sum of the results in ``active`` (output, entropy, lse)."""
    softcap = options.pop("softcap", None)
    gqa = leaves[0].shape[1] != leaves[1].shape[1]
    got = attention_with_entropy(*leaves, **options, enable_gqa=gqa, logit_softcap=softcap)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = dense(*wide, **options, softcap=softcap)
    for name, a, b in zip(got._fields, got, expected):
        torch.testing.assert_close(a.double(), b, atol=5e-6, rtol=5e-6, msg=lambda m, name=name: f"{name}: {m}")
    has_keys = (expected[2] > -torch.inf).double()
    weights = [torch.randn_like(expected[0]), torch.randn_like(expected[1]), torch.randn_like(expected[2])]
    loss = sum((torch.where(has_keys > 0, got[2], 0.0) if i == 2 else got[i]).mul(weights[i]).sum() for i in active)
    exact = sum(
        (torch.where(has_keys > 0, expected[2], 0.0) if i == 2 else expected[i]).mul(weights[i]).sum() for i in active
    )
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    exact_grads = torch.autograd.grad(exact, wide, allow_unused=True)
    for name, a, b in zip("qkv", grads, exact_grads):
        a, b = (torch.zeros((), device=DEVICE) if x is None else x for x in (a, b))
        b = b.expand_as(a).double() if a.dim() else b.double()
        torch.testing.assert_close(
            a.double().expand_as(b), b, atol=2e-5, rtol=2e-5, msg=lambda m, name=name: f"d{name}: {m}"
        )


def some_mask(*shape: int) -> Tensor:
    """About half; the first key is taken out too, so that no block is wholly kept."""
    mask = torch.rand(shape) > 0.5
    mask[..., 0] = False
    mask[..., -1] = True
    return mask.to(DEVICE)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((70, 53, 16), {}),
        ((70, 70, 16), {"is_causal": True}),
        ((70, 53, 24), {"is_causal": True}),
        ((33, 80, 16), {"is_causal": True}),
        ((64, 64, 32), {"is_causal": True}),
        ((1, 1, 16), {"is_causal": True}),
        ((1, 200, 64), {}),
        ((40, 53, 20, 40), {"scale": 0.3}),
        ((40, 53, 72, 8), {"scale": -0.2}),
        ((20, 30, 160, 256), {"is_causal": True}),
        ((20, 30, 1, 1), {}),
        ((40, 53, 16), {"softcap": 1.5}),
        ((40, 53, 16), {"softcap": 1.5, "is_causal": True, "scale": -0.4}),
    ],
)
def test_all_three_results_and_their_gradients(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    assert_equal_to_dense(problem(*shape), **options)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 2.0}, {"attn_mask": (2, 1, 1, 53)}])
def test_heads_that_share_keys(options: dict[str, Any]) -> None:
    if "attn_mask" in options:
        options = {"attn_mask": some_mask(*options["attn_mask"])}
    assert_equal_to_dense(problem(40, 53, 16, 24, heads=6, key_heads=2, batch=2), **options)


@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 53), (1, 1, 1, 53), (53,), (2, 2, 40, 53), (40, 53), (1, 2, 1, 53), (40, 1)]
)
def test_bool_masks(shape: tuple[int, ...]) -> None:
    mask = some_mask(*shape)
    if shape == (40, 1):
        mask[3] = False
    assert_equal_to_dense(problem(40, 53, 16, batch=2), attn_mask=mask)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_queries_without_keys(softcap: float | None) -> None:
    leaves = problem(40, 53, 16, batch=2)
    mask = some_mask(2, 1, 40, 53)
    mask[0, 0, 7] = mask[1, 0, 38:] = False
    assert_equal_to_dense(leaves, attn_mask=mask, softcap=softcap)
    got = attention_with_entropy(*leaves, attn_mask=mask, logit_softcap=softcap)
    assert (got.output[0, :, 7] == 0).all()
    assert (got.entropy[0, :, 7] == 0).all()
    assert (got.lse[0, :, 7] == -torch.inf).all()
    (got.output.sum() + got.entropy.sum()).backward()
    assert (leaves[0].grad[0, :, 7] == 0).all()
    assert all(torch.isfinite(x.grad).all() for x in leaves)


def test_a_sample_all_of_whose_keys_are_masked() -> None:
    mask = torch.ones(2, 1, 1, 53, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    assert_equal_to_dense(problem(20, 53, 16, batch=2), attn_mask=mask)


@pytest.mark.parametrize("active", [(0,), (1,), (2,), (0, 1), (1, 2)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_of_some_of_the_results(active: tuple[int, ...], is_causal: bool) -> None:
    assert_equal_to_dense(problem(40, 40, 16), active=active, is_causal=is_causal)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_gradient_of_one_input(wanted: int) -> None:
    leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(problem(40, 53, 16))]
    wide = [x.detach().double().requires_grad_(i == wanted) for i, x in enumerate(leaves)]
    got, expected = attention_with_entropy(*leaves), dense(*wide)
    (got.output.sum() + (got.entropy + got.lse).sum()).backward()
    (expected[0].sum() + (expected[1] + expected[2]).sum()).backward()
    for a, b in zip(leaves, wide):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad.double(), b.grad, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": (2, 1, 1, 53)}, {"logit_softcap": 2.0}])
def test_the_entropy_alone(options: dict[str, Any]) -> None:
    if "attn_mask" in options:
        options = {"attn_mask": some_mask(*options["attn_mask"])}
    q, k, v = problem(40, 53, 20, batch=2)
    h, lse = entropy_and_lse(q, k, **options)
    whole = attention_with_entropy(q, k, v, **options)
    torch.testing.assert_close(h, whole.entropy, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lse, whole.lse, atol=1e-6, rtol=1e-6)
    a = torch.autograd.grad((h * h).sum() + lse.sum(), (q, k))
    b = torch.autograd.grad((whole.entropy**2).sum() + whole.lse.sum(), (q, k))
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"queries": 9}, {"queries": 9, "is_causal": True}])
def test_as_a_backend_of_attention_entropy(options: dict[str, Any]) -> None:
    q, k, _ = problem(40, 53, 16, heads=4, key_heads=2)
    got = attention_entropy(q, k, enable_gqa=True, backend="triton", **options)
    expected = attention_entropy(q.double(), k.double(), enable_gqa=True, backend="dense", **options)
    torch.testing.assert_close(got.double(), expected, atol=5e-6, rtol=5e-6)
    grads = torch.autograd.grad(got.square().sum(), (q, k))
    for a, b in zip(grads, torch.autograd.grad(expected.square().sum(), (q, k))):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("n", [1, 15, 53, 129])
def test_keys_beyond_the_end_do_not_count(n: int) -> None:
    q, k, v = problem(3, n, 16)
    got = attention_with_entropy(torch.zeros_like(q), k, v)
    torch.testing.assert_close(got.entropy, torch.full_like(got.entropy, math.log(n)), atol=2e-6, rtol=0)
    torch.testing.assert_close(got.lse, torch.full_like(got.lse, math.log(n)), atol=2e-6, rtol=0)
    torch.testing.assert_close(got.output, v.mean(2, keepdim=True).expand_as(got.output), atol=2e-6, rtol=1e-5)
    # logits of -200 on average: a key of zeros would take the whole row, and overflow the recomputed probabilities
    low = attention_with_entropy(torch.full_like(q, -5.0), (k * 0.1 + 10).detach().requires_grad_(), v, scale=0.25)
    assert (low.entropy > math.log(n) - 1).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(low.output.sum() + low.entropy.sum(), v))


@pytest.mark.parametrize("blocks", [(16, 16), (16, 64), (64, 16), (128, 64), (32, 128)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_any_block_sizes(blocks: tuple[int, int], is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "candidates", lambda *_: [launch.Blocks(*blocks, 4, 1)])
    assert_equal_to_dense(problem(70, 83, 16, batch=1), is_causal=is_causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_in_low_precision(dtype: torch.dtype) -> None:
    q, k, v = (x.detach() for x in problem(256, 1024, 64, heads=1, batch=1))
    k = k + torch.randn(64, device=DEVICE)
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    got = attention_with_entropy(*leaves)
    assert got.output.dtype == dtype
    assert got.entropy.dtype == torch.float32
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = dense(*wide)
    assert (got.entropy - exact[1]).abs().max().item() <= 1e-3
    plain = F.scaled_dot_product_attention(*leaves)
    rounding = (plain - exact[0]).abs().max().item()
    assert (got.output - exact[0]).abs().max().item() <= 2 * rounding
    # the gradients: at most twice the error of the map in this precision
    low = [x.detach().clone().requires_grad_() for x in leaves]
    naive = attention_entropy(low[0], low[1], backend="dense").mean() + F.scaled_dot_product_attention(*low).sum()
    naive.backward()
    (got.entropy.mean() + got.output.sum()).backward()
    (exact[1].mean() + exact[0].sum()).backward()
    for a, b, c in zip(leaves, low, wide):
        allowed = 2 * (b.grad - c.grad).abs().max() + 2e-3 * c.grad.abs().max()
        assert (a.grad - c.grad).abs().max() <= allowed


def test_layouts() -> None:
    q, k, v = (x.detach() for x in problem(40, 53, 16, batch=2))
    expected = attention_with_entropy(q, k, v)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    every_second = [torch.stack([x, -x], -1).flatten(-2)[..., ::2] for x in (q, k, v)]
    for inputs in (strided, every_second):
        leaves = [x.requires_grad_() for x in inputs]
        got = attention_with_entropy(*leaves)
        assert all(torch.equal(a, b) for a, b in zip(got, expected))
        got.output.sum().backward()  # a gradient without strides
    assert torch.equal(attention_with_entropy(q[0], k[0], v[0]).output, expected.output[0])
    five = attention_with_entropy(q[None], k[None], v[None], attn_mask=torch.ones(1, 2, 1, 1, 53, device=DEVICE) > 0)
    torch.testing.assert_close(five.output[0], expected.output)
    assert five.entropy.shape == (1, 2, 2, 40)
    shared = [q, k[:1].requires_grad_(), v[:1]]
    broadcast = attention_with_entropy(*shared)
    torch.testing.assert_close(broadcast.entropy, dense(q, k[:1].expand_as(k), v[:1].expand_as(v))[1])
    assert torch.autograd.grad(broadcast.entropy.sum(), shared[1])[0].shape == (1, 2, 53, 16)


def test_no_queries() -> None:
    q, k, v = problem(0, 5, 16, batch=2)
    got = attention_with_entropy(q, k, v)
    assert got.output.shape == (2, 2, 0, 16)
    (got.output.sum() + got.entropy.sum()).backward()
    assert (k.grad == 0).all()


def test_logits_that_are_far_apart_or_far_from_zero() -> None:
    q, k, v = (x.detach() for x in problem(20, 53, 16))
    for factor, shift in ((300.0, 0.0), (1.0, 1e4)):
        leaves = [x.clone().requires_grad_() for x in (q * factor, k + shift, v)]
        got = attention_with_entropy(*leaves)
        (got.entropy.sum() + got.output.sum()).backward()
        assert all(torch.isfinite(x).all() for x in (*got, *(leaf.grad for leaf in leaves)))
        assert (got.entropy >= 0).all()


def test_finite_differences() -> None:
    q, k, v = problem(20, 21, 16, batch=1)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        got = attention_with_entropy(q, k, v, is_causal=True, logit_softcap=3.0)
        return got.output.double().square().sum() + got.entropy.double().sum() + got.lse.double().sum()

    grads = torch.autograd.grad(loss(q, k, v), (q, k, v))
    for i, grad in enumerate(grads):
        direction = grad / grad.norm()
        moved = [[x + step * direction if j == i else x for j, x in enumerate((q, k, v))] for step in (1e-2, -1e-2)]
        slope = (loss(*moved[0]) - loss(*moved[1])).item() / 2e-2
        assert slope == pytest.approx(grad.norm().item(), rel=2e-3)


def test_the_kernels_are_given_their_arguments_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter drops an argument that a kernel does not have, the compiler raises."""
    checked = []
    launched = launch._launch

    def check(kernel: Any, blocks: Any, programs: Any, **arguments: Any) -> None:
        sizes = {"BLOCK_Q", "BLOCK_K"} if blocks[0].keys else {"BLOCK_Q"}
        assert set(kernel.arg_names) == set(arguments) | sizes
        checked.append(kernel)
        launched(kernel, blocks, programs, **arguments)

    monkeypatch.setattr(launch, "_launch", check)
    q, k, v = problem(4, 5, 16)
    attention_with_entropy(q, k, v).entropy.sum().backward()
    entropy_and_lse(q, k, attn_mask=some_mask(4, 5))[0].sum().backward()
    assert len(checked) == 8


def test_two_runs_give_the_same_bits() -> None:
    leaves = problem(70, 83, 16, heads=4, key_heads=2)
    results = []
    for _ in range(2):
        got = attention_with_entropy(*leaves, enable_gqa=True)
        results.append([*got, *torch.autograd.grad(sum(x.sum() for x in got), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_compiled() -> None:
    q, k, v = problem(20, 33, 16)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        got = attention_with_entropy(q, k, v, is_causal=True)
        return got.output.square().sum() + got.entropy.sum() + entropy_and_lse(q, k)[1].sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(q, k, v), (q, k, v)), torch.autograd.grad(loss(q, k, v), (q, k, v))):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck reads that of its own copies
def test_the_operator_is_registered_as_torch_wants() -> None:
    q, k, v = problem(20, 33, 16, batch=2)
    mask = some_mask(2, 2, 20, 33)
    op = torch.ops.lightning_entropy.attention_with_entropy.default
    for value in (v, None):
        torch.library.opcheck(op, (q, k, value, mask, False, 0.25, 0.0))


def test_not_differentiable_twice() -> None:
    q, k, v = problem(4, 5, 16)
    (grad,) = torch.autograd.grad(attention_with_entropy(q, k, v).entropy.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"attention_with_entropy_backward\.default but no autograd"):
        grad.sum().backward()


@st.composite
def problems(draw: Any) -> tuple[list[Tensor], dict[str, Any]]:
    torch.manual_seed(draw(st.integers(0, 10**6)))
    key_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    n_q, n_k = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    leaves = problem(
        n_q,
        n_k,
        draw(st.integers(1, 40)),
        draw(st.integers(1, 40)),
        heads=key_heads * groups,
        key_heads=key_heads,
        batch=draw(st.integers(1, 2)),
    )
    options: dict[str, Any] = {"scale": draw(st.sampled_from([None, 0.3, -0.2]))}
    options["softcap"] = draw(st.sampled_from([None, None, 2.0]))
    kind = draw(st.sampled_from(["none", "causal", "keys", "full"]))
    options["is_causal"] = kind == "causal"
    if kind == "keys":
        options["attn_mask"] = (torch.rand(leaves[0].shape[0], 1, 1, n_k) > 0.4).to(DEVICE)
    if kind == "full":
        options["attn_mask"] = (torch.rand(1, leaves[0].shape[1], n_q, n_k) > 0.4).to(DEVICE)
    return leaves, options


@given(problems())
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_shape(drawn: tuple[list[Tensor], dict[str, Any]]) -> None:
    leaves, options = drawn
    assert_equal_to_dense(leaves, **options)
