from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_entropy.functional import (
    area_constraint,
    background_activation_ratio,
    bas_loss,
    foreground_region_guidance,
    label_convolution,
    mean_of_top_classes,
    multi_label_cross_entropy,
)
from lightning_entropy.functional.bas import VARIANTS, pool_foreground

# (overall, background): value and derivative by the background, by hand from the formulas.
EXTENSION = [
    (4.0, 1.0, 0.25, 0.25),
    (4.0, 4.0, 1.0, 0.25),  # the exact tie keeps its gradient
    (1.0, 2.0, 1.0, 0.0),
    (0.0, 0.0, 0.0, 0.0),
    (-1.0, -2.0, 0.0, 0.0),
    (-1.0, 0.5, 1.0, 0.0),
    (0.5, -0.2, 0.0, 0.0),
]
CVPR = [
    (4.0, 1.0, 0.25, 0.25),
    (4.0, 4.0, 0.0, 0.0),
    (1.0, 2.0, 0.0, 0.0),
    (0.0, 0.0, 0.0, 0.0),
    (-1.0, -2.0, 2.0, -1.0),  # the wrong way, for which the extension has its ReLU
    (0.5, -0.2, -0.4, 2.0),
]


@pytest.mark.parametrize(
    ("variant", "row"), [("extension", r) for r in EXTENSION] + [("cvpr", r) for r in CVPR], ids=str
)
def test_the_ratio_by_its_table(variant: str, row: tuple[float, ...]) -> None:
    overall, background, value, slope = row
    s = torch.tensor([overall], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([background], dtype=torch.float64, requires_grad=True)
    ratio = background_activation_ratio(s, b, variant=variant)
    ratio.sum().backward()
    assert ratio.item() == pytest.approx(value, abs=1e-7)
    assert b.grad.item() == pytest.approx(slope, abs=1e-6)
    assert s.grad is None, "the denominator is detached"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_ratio_is_finite_in_half_precision(variant: str, dtype: torch.dtype) -> None:
    s = torch.tensor([0.0, 0.0, 1e-4, 3.0], dtype=dtype)  # of a classifier that ends in a ReLU, as cvpr supposes
    b = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=dtype, requires_grad=True)
    ratio = background_activation_ratio(s, b, variant=variant)
    assert ratio.dtype == torch.float32
    ratio.sum().backward()
    assert torch.isfinite(ratio).all()
    assert torch.isfinite(b.grad).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=6))
def test_the_ratio_of_the_extension_is_a_share(pairs: list[tuple[float, float]]) -> None:
    s, b = torch.tensor(pairs, dtype=torch.float64).T
    ratio = background_activation_ratio(s, b)
    assert ((ratio >= 0) & (ratio <= 1)).all()
    assert (ratio[b > s.clamp(min=0)] == 1).all()


def maps(batch: int = 3, classes: int = 4, size: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    plain = torch.randn(batch, classes, size // 2, size // 2, generator=g, dtype=torch.float64) + 1
    background = torch.randn(batch, classes, size // 2, size // 2, generator=g, dtype=torch.float64) * 0.2
    foreground = torch.rand(batch, 1, size, size, generator=g, dtype=torch.float64)
    return plain, background, foreground, torch.randint(0, classes, (batch,), generator=g)


def slow_loss(plain, background, foreground, target, alpha, beta, variant):
    """One image, one class, one pixel at a time, in Python numbers."""
    total = 0.0
    batch, classes, height, width = plain.shape
    for i in range(batch):
        y = int(target[i])

        def logit(k: int, i: int = i, weights=None, of=plain) -> float:
            cells = [(a, b) for a in range(height) for b in range(width)]
            return sum(float(of[i, k, a, b]) * (weights[a][b] if weights else 1.0) for a, b in cells) / len(cells)

        def ce(scores: list[float], y: int = y) -> float:
            return math.log(sum(math.exp(s) for s in scores)) - scores[y]

        m = foreground[i, 0]
        pooled = [
            [float(m[2 * a : 2 * a + 2, 2 * b : 2 * b + 2].sum()) / 4 for b in range(width)] for a in range(height)
        ]
        s, left = logit(y), logit(y, of=background)
        if variant == "extension":
            s, left = max(s, 0.0), max(left, 0.0)
            ratio = 1.0 if left > s else left / (s + 1e-8)
        else:
            ratio = 0.0 if left >= s else left / (s + 1e-8)
        guidance = ce([logit(k, weights=pooled) for k in range(classes)])
        total += ce([logit(k) for k in range(classes)]) + alpha * guidance + ratio + beta * float(m.mean())
    return total / batch


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(4))
def test_the_loss_against_plain_python(variant: str, seed: int) -> None:
    plain, background, foreground, target = maps(seed=seed)
    terms = bas_loss(plain, background, foreground, target, alpha=0.7, beta=1.3, variant=variant)
    wanted = slow_loss(plain, background, foreground, target, 0.7, 1.3, variant)
    assert terms.loss.item() == pytest.approx(wanted, rel=1e-12)
    by_logits = bas_loss(plain, background.mean((2, 3)), foreground, target, alpha=0.7, beta=1.3, variant=variant)
    torch.testing.assert_close(by_logits.loss, terms.loss)


def test_gradcheck() -> None:
    plain, background, foreground, target = maps(batch=2, classes=3, size=4)

    def loss(b: Tensor, f: Tensor) -> Tensor:
        return bas_loss(plain, b, f, target).loss

    inputs = (background.abs().requires_grad_(), foreground.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)
    guided = torch.autograd.gradcheck(
        lambda a: foreground_region_guidance(a, foreground.detach(), target), (plain.requires_grad_(),)
    )
    assert guided


def test_each_term_reaches_what_it_should() -> None:
    plain, background, foreground, target = maps()
    for name, reached in {
        "classification": "p",
        "guidance": "pf",
        "background": "b",
        "area": "f",
    }.items():
        p, b, f = plain.clone().requires_grad_(), background.abs().requires_grad_(), foreground.clone().requires_grad_()
        getattr(bas_loss(p, b, f, target), name).backward()
        got = "".join(letter for letter, t in zip("pbf", (p, b, f)) if t.grad is not None and t.grad.abs().sum() > 0)
        assert got == reached, name
    p, f = plain.clone().requires_grad_(), foreground.clone().requires_grad_()
    bas_loss(p, background, f, target, guide_classifier=False).guidance.backward()
    assert p.grad is None
    assert f.grad.abs().sum() > 0


def test_a_uniform_map_is_worth_one_unit_of_area() -> None:
    """Oracle 1: identity head, tail = mean of one channel; L_BAS + beta area = 1 + (beta - 1) m."""
    features = torch.rand(2, 1, 4, 4, dtype=torch.float64) + 0.5
    target = torch.zeros(2, dtype=torch.long)
    for beta, sign in ((0.7, -1), (1.0, 0), (1.6, 1)):
        m = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        foreground = m.expand(2, 1, 4, 4)
        terms = bas_loss(features, features * (1 - foreground), foreground, target, alpha=0.0, beta=beta)
        value = terms.background + beta * terms.area
        assert value.item() == pytest.approx(1 + (beta - 1) * 0.3, abs=1e-7)
        (slope,) = torch.autograd.grad(value, m)
        assert slope.item() == pytest.approx(beta - 1, abs=1e-7)
        assert math.copysign(1, slope.item()) == sign or sign == 0


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
def test_the_best_map_is_where_the_activation_exceeds_beta_times_its_mean(beta: float) -> None:
    """Oracle 2: linear tail; a free map, optimised, is binary at the threshold beta * mean."""
    torch.manual_seed(3)
    activation = torch.rand(1, 1, 6, 6, dtype=torch.float64) ** 2
    free = torch.zeros(1, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=0.2)
    for _ in range(400):
        foreground = free.sigmoid()
        overall, left = activation.mean((2, 3))[:, 0], (activation * (1 - foreground)).mean((2, 3))[:, 0]
        loss = background_activation_ratio(overall, left).mean() + beta * area_constraint(foreground)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clear = (activation - beta * activation.mean()).abs() > 0.02
    assert torch.equal((free > 0)[clear], (activation > beta * activation.mean())[clear])


def test_pooling_of_sizes_that_divide_and_that_do_not() -> None:
    m = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(pool_foreground(m, (4, 4)), m.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)))
    assert pool_foreground(m, (8, 8)) is m
    odd = pool_foreground(m, (3, 5))
    assert odd.shape == (2, 1, 3, 5)
    torch.testing.assert_close(odd[:, :, 0, 0], m[:, :, :3, :2].mean((-1, -2)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(2, 6), st.integers(0, 10_000))
def test_multi_label_against_brute_force(batch: int, classes: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=g, dtype=torch.float64, requires_grad=True)
    present = torch.rand(batch, classes, generator=g) < 0.4
    total = torch.zeros((), dtype=torch.float64)
    for i in range(batch):
        for p in present[i].nonzero()[:, 0].tolist():
            rivals = [p, *(~present[i]).nonzero()[:, 0].tolist()]
            total = total + F.cross_entropy(logits[i, rivals][None], torch.tensor([0]))
    loss = multi_label_cross_entropy(logits, present)
    torch.testing.assert_close(loss, total / batch)
    got = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    wanted = torch.autograd.grad(total / batch, logits, allow_unused=True)[0] if total.requires_grad else None
    torch.testing.assert_close(got, torch.zeros_like(got) if wanted is None else wanted)


def test_one_label_an_image_is_the_ordinary_cross_entropy() -> None:
    logits, target = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    one_hot = F.one_hot(target, 4)
    torch.testing.assert_close(multi_label_cross_entropy(logits, one_hot), F.cross_entropy(logits, target))
    everything = multi_label_cross_entropy(logits.requires_grad_(), torch.ones(5, 4))
    everything.backward()
    assert everything.item() == 0
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("side", [1, 3, 5])
def test_the_labels_maps_are_those_of_the_full_convolution(side: int) -> None:
    """Oracle 5."""
    features = torch.randn(4, 6, 5, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 6, side, side, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[8, 0], [3, 3], [1, 7], [0, 2]])
    out = label_convolution(features, weight, bias, labels)
    full = F.conv2d(features, weight, bias, padding=side // 2)
    wanted = full.gather(1, labels[:, :, None, None].expand(-1, -1, 5, 7))
    torch.testing.assert_close(out, wanted)
    scale = torch.randn_like(out)
    got = torch.autograd.grad((out * scale).sum(), (features, weight, bias))
    for a, b in zip(got, torch.autograd.grad((wanted * scale).sum(), (features, weight, bias))):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(label_convolution(features, weight, bias, labels[:, 0]), out[:, :1])


def test_the_mean_of_the_likeliest_classes() -> None:
    held, scores = torch.rand(3, 5, 2, 2), torch.randn(3, 5)
    torch.testing.assert_close(mean_of_top_classes(held, scores, 5), held.mean(1, keepdim=True))
    torch.testing.assert_close(mean_of_top_classes(held, scores, 99), held.mean(1, keepdim=True))
    for i in range(3):
        order = scores[i].argsort(descending=True)
        torch.testing.assert_close(mean_of_top_classes(held, scores, 1)[i, 0], held[i, order[0]])
        torch.testing.assert_close(mean_of_top_classes(held, scores, 2)[i, 0], held[i, order[:2]].mean(0))


def test_what_is_refused() -> None:
    plain, background, foreground, target = maps()
    with pytest.raises(ValueError, match="variant must be one of extension, cvpr, got 'iccv'"):
        bas_loss(plain, background, foreground, target, variant="iccv")
    with pytest.raises(ValueError, match=r"beta must be finite and >= 0, got -1"):
        bas_loss(plain, background, foreground, target, beta=-1)
    with pytest.raises(ValueError, match=r"foreground must be \(3, 1, H, W\)"):
        bas_loss(plain, background, foreground.expand(-1, 2, -1, -1), target)
    with pytest.raises(ValueError, match=r"class_map must be"):
        bas_loss(plain.mean((2, 3)), background, foreground, target)
    with pytest.raises(ValueError, match=r"background_map \(3, 2\)"):
        bas_loss(plain, torch.zeros(3, 2), foreground, target)
    with pytest.raises(ValueError, match="must have one shape"):
        background_activation_ratio(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="odd k"):
        label_convolution(torch.zeros(1, 2, 3, 3), torch.zeros(4, 2, 2, 2), None, torch.tensor([0]))
    with pytest.raises(ValueError, match="do not fit"):
        label_convolution(torch.zeros(1, 2, 3, 3), torch.zeros(4, 5, 3, 3), None, torch.tensor([0]))
    with pytest.raises(ValueError, match="k must be at least 1"):
        mean_of_top_classes(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2), 0)
    with pytest.raises(ValueError, match="shape of the logits"):
        multi_label_cross_entropy(torch.zeros(1, 2), torch.zeros(1, 3))
