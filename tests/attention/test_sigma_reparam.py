"""SigmaReparam on models: oracles of the formula, real architectures, folding, refusals, state dicts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.checkpoint import checkpoint

from lightning_entropy.attention import fold_sigma, folded_state_dict, sigma_reparametrize, update_sigma
from lightning_entropy.surgery.spectral_weight import original, spectral_weights


class FusedAttention(nn.Module):
    """The layout of timm: one projection named qkv."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


class Kinds(nn.Module):
    """A weight of every kind, with 16 x 16 inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.attn = FusedAttention()
        self.multi = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=3, vdim=3, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.attn(self.conv(image).flatten(2).mT)
        x = x + self.multi(x, x, x, need_weights=False)[0]
        context = image.flatten(2).mT
        return self.head(x + self.cross(x, context, context, need_weights=False)[0])


def parts_of(weight: Tensor, spectral: Any) -> Tensor:
    """The matrices that have one sigma each, written out here once more."""
    if spectral.transposed:
        return torch.stack(weight.chunk(spectral.parts, 1)).mT
    return torch.stack([chunk.flatten(1) for chunk in weight.chunk(spectral.parts, 0)])


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=dtype)


def move(model: nn.Module, amount: float = 0.1) -> None:
    """What an optimizer step does: every weight goes elsewhere."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, module, tensor, _ in spectral_weights(model):
            weight = original(module, tensor)
            weight += amount * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)


@pytest.fixture
def rescaled() -> Kinds:
    model = Kinds().double()
    sigma_reparametrize(model)
    return model


def test_the_gradient_is_orthogonal_to_the_weight(rescaled: Kinds) -> None:
    move(rescaled)  # sigma is not exact now: orthogonality does not need it to be
    rescaled(image(torch.float64)).square().mean().backward()
    seen = 0
    for _, module, tensor, spectral in spectral_weights(rescaled):
        weight = original(module, tensor)
        assert weight.grad is not None
        assert weight.grad.norm() > 0
        inner = (parts_of(weight, spectral) * parts_of(weight.grad, spectral)).sum((1, 2))
        assert inner.abs().max() <= 1e-14 * weight.norm()
        seen += 1
    assert seen == 9


def test_the_effective_norm_is_gamma_after_iterations(rescaled: Kinds) -> None:
    move(rescaled)
    update_sigma(rescaled, iterations=500)
    for name, module, tensor, spectral in spectral_weights(rescaled):
        norms = torch.linalg.matrix_norm(parts_of(getattr(module, tensor), spectral), 2)
        torch.testing.assert_close(norms, spectral.gamma.detach(), rtol=1e-6, atol=0.0, msg=name)


def test_gamma_one_gives_unit_norms() -> None:
    model = Kinds()
    sigma_reparametrize(model, gamma_init="one")
    for _, module, tensor, spectral in spectral_weights(model):
        norms = torch.linalg.matrix_norm(parts_of(getattr(module, tensor), spectral), 2)
        torch.testing.assert_close(norms, torch.ones_like(norms))


def test_the_model_does_not_see_the_size_of_its_weights(rescaled: Kinds) -> None:
    before = rescaled(image(torch.float64))
    with torch.no_grad():
        for _, module, tensor, _ in spectral_weights(rescaled):
            original(module, tensor).mul_(7.5)
    update_sigma(rescaled)
    torch.testing.assert_close(rescaled(image(torch.float64)), before)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_step_moves_gamma_by_its_own_gradient(parts: int) -> None:
    model = FusedAttention().double()
    sigma_reparametrize(model, split_qkv=parts == 3)
    ((_, module, _, spectral),) = spectral_weights(model)
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    effective = module.weight.detach().requires_grad_()
    out = torch.func.functional_call(
        nn.Linear(8, 24, dtype=torch.float64), {"weight": effective, "bias": module.bias}, x
    )
    q, k, v = out.chunk(3, -1)
    (gradient,) = torch.autograd.grad(nn.functional.scaled_dot_product_attention(q, k, v).square().sum(), effective)
    gamma = spectral.gamma.detach().clone()
    expected = (parts_of(gradient, spectral) * parts_of(effective.detach(), spectral)).sum((1, 2)) / gamma
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(x).square().sum().backward()
    optimizer.step()
    assert gamma.shape == (parts,)
    torch.testing.assert_close(spectral.gamma.detach(), gamma - 0.01 * expected)


def test_q_k_and_v_have_norms_of_their_own() -> None:
    layer = FusedAttention()
    with torch.no_grad():
        layer.qkv.weight[8:16] *= 100
    joint, apart = copy.deepcopy(layer), layer
    sigma_reparametrize(joint, split_qkv=False)
    sigma_reparametrize(apart)
    assert next(spectral_weights(joint))[3].gamma.numel() == 1
    gamma = next(spectral_weights(apart))[3].gamma.detach()
    torch.testing.assert_close(gamma[1] / gamma[0], torch.tensor(100.0), rtol=0.7, atol=0.0)


def test_grouped_queries_have_one_sigma() -> None:
    attention = FusedAttention()
    attention.num_kv_heads = 1
    assert "weight rescaled (qkv)" in str(sigma_reparametrize(attention))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nothing_changes_at_the_start_and_folding_changes_nothing(dtype: torch.dtype) -> None:
    model = Kinds().to(dtype)
    keys, order = list(model.state_dict()), [n for n, _ in model.named_parameters()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    out = model(image(dtype))
    classes = [type(m) for m in model.modules()]
    report = sigma_reparametrize(model)
    assert report.added_parameters == sum(s.gamma.numel() for _, _, _, s in spectral_weights(model)) == 13
    assert torch.equal(model(image(dtype)), out)
    assert all(s.gamma.dtype == torch.promote_types(dtype, torch.float32) for _, _, _, s in spectral_weights(model))
    report.undo()
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_parameters()] == order
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    sigma_reparametrize(model)
    move(model)
    moved = model(image(dtype))
    folded = folded_state_dict(model.state_dict())
    assert len(fold_sigma(model)) == 9
    assert torch.equal(model(image(dtype)), moved)
    assert not torch.equal(moved, out)
    assert folded.keys() == set(keys)
    assert all(torch.equal(folded[k], v) for k, v in model.state_dict().items())
    assert not model._load_state_dict_pre_hooks


def test_undo_keeps_what_was_learned_and_may_be_repeated() -> None:
    layer = nn.Linear(4, 4)
    weight = layer.weight
    report = sigma_reparametrize(layer)
    move(layer)
    learned = layer.weight.detach().clone()
    report.undo()
    report.undo()
    assert report.undone
    assert layer.weight is weight  # an optimizer goes on with it
    assert torch.equal(layer.weight, learned)


def test_vit_of_timm() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32).eval()
    before = model(torch.ones(1, 3, 32, 32))
    report = sigma_reparametrize(model)
    assert torch.equal(model(torch.ones(1, 3, 32, 32)), before)
    what = {change.module: change.what for change in report.changes}
    assert what["blocks.1.attn.qkv"] == "weight rescaled for q, k and v"
    assert {"patch_embed.proj", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "head"} <= what.keys()


def test_vit_of_torchvision() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=3).eval()
    nn.init.normal_(model.heads.head.weight)
    for grad in (True, False):  # torch's fused layer runs without gradient
        with torch.set_grad_enabled(grad):
            before = model(image())
            report = sigma_reparametrize(model)
            torch.testing.assert_close(model(image()), before, rtol=0 if grad else 1e-5, atol=0 if grad else 1e-6)
            assert any(c.what == "in_proj_weight rescaled for q, k and v" for c in report.changes)
            report.undo()


def test_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.arange(6)[None]
    before = model(tokens).logits
    report = sigma_reparametrize(model)
    assert torch.equal(model(tokens).logits, before)
    assert [(r.module, r.reason) for r in report.refused] == [("lm_head", "weight is tied to transformer.wte.weight")]
    found = {name: s for name, _, _, s in spectral_weights(model)}
    assert found["transformer.h.1.attn.c_attn"].transposed
    assert found["transformer.h.1.attn.c_attn"].gamma.shape == (3,)
    move(model)
    update_sigma(model, iterations=300)
    for name, module, tensor, spectral in spectral_weights(model):
        norms = torch.linalg.matrix_norm(parts_of(getattr(module, tensor), spectral), 2)
        torch.testing.assert_close(norms, spectral.gamma.detach(), rtol=1e-4, atol=0.0, msg=name)
    moved = model(tokens).logits
    folded = folded_state_dict(model.state_dict())
    fold_sigma(model)
    assert torch.equal(model(tokens).logits, moved)
    assert all(torch.equal(folded[k], v) for k, v in model.state_dict().items())


def refusals(model: nn.Module) -> dict[str, str]:
    return {r.module: r.reason for r in sigma_reparametrize(model).refused}


def with_fine(**modules: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"fine": nn.Linear(4, 4), **modules})


def test_what_cannot_be_rescaled_is_refused_with_the_reason() -> None:
    zero, partly, broken = nn.Linear(4, 4), FusedAttention(), nn.Linear(4, 4)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(partly.qkv.weight[8:16])
    with torch.no_grad():
        broken.weight[0, 0] = torch.nan
    tied = nn.Linear(4, 4)
    embedding = nn.Embedding(4, 4)
    embedding.weight = tied.weight
    integers = nn.Linear(4, 4)
    integers.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    found = refusals(
        with_fine(
            zero=zero,
            partly=partly,
            broken=broken,
            tied=tied,
            embedding=embedding,
            grouped=nn.Conv2d(4, 4, 3, groups=2),
            spectral=parametrizations.spectral_norm(nn.Linear(4, 4)),
            lazy=nn.LazyLinear(4),
            meta=nn.Linear(4, 4, device="meta"),
            integers=integers,
        )
    )
    assert found == {
        "zero": "weight is all zeros: sigma is 0 and W / sigma is not defined",
        "partly.qkv": "weight has parts (of q, k, v: k) that are all zeros: sigma is 0 and W / sigma is not defined",
        "broken": "weight has 1 values that are not finite",
        "tied": "weight is tied to embedding.weight",
        "grouped": "weight belongs to a convolution in 2 groups, which is several matrices",
        "spectral": "weight is parametrised already, by _SpectralNorm",
        "lazy": "weight has no shape yet: run a batch through the model first",
        "meta": "weight is on the meta device",
        "integers": "weight is a Parameter of torch.int8, not a matrix of floating-point numbers",
    }


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_an_older_weight_norm_is_refused() -> None:
    found = refusals(with_fine(old=weight_norm(nn.Linear(4, 4))))
    assert "is no parameter of the module" in found["old"]


def test_a_refused_weight_is_left_exactly_as_it_was() -> None:
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    model = with_fine(zero=layer)
    sigma_reparametrize(model)
    assert type(layer) is nn.Linear
    assert model["zero"](torch.ones(1, 4)).isfinite().all()


def test_nothing_to_rescale_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"found no linear layer.*in Sequential.*own: LayerNorm"):
        sigma_reparametrize(nn.Sequential(nn.LayerNorm(3)))
    with pytest.raises(ValueError, match=r"modules='had'\) matched 0 of .*\n.*[Cc]losest names: head"):
        sigma_reparametrize(Kinds(), modules="had")
    with pytest.raises(ValueError, match=r"matched 1 modules in ModuleDict, and none of them holds.*that do: fine"):
        sigma_reparametrize(with_fine(norm=nn.LayerNorm(4)), modules="norm")
    layer = nn.Linear(2, 2)
    nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match=r"can rescale none of the 1 weights:\n.*all zeros"):
        sigma_reparametrize(layer)
    with pytest.raises(ValueError, match="gamma_init must be 'sigma' or 'one', got 'two'"):
        sigma_reparametrize(nn.Linear(2, 2), gamma_init="two")


def test_twice_is_once() -> None:
    model = Kinds()
    sigma_reparametrize(model)
    keys = list(model.state_dict())
    again = sigma_reparametrize(model)
    assert not again.changes
    assert {r.reason for r in again.refused} >= {"weight is rescaled already", "in_proj_weight is rescaled already"}
    assert list(model.state_dict()) == keys
    again.undo()
    assert list(model.state_dict()) == keys


def test_patterns_choose_modules_and_what_they_contain() -> None:
    report = sigma_reparametrize(Kinds(), modules=["multi", "h*d"])
    assert [c.module for c in report.changes] == ["multi", "multi.out_proj", "head"]


def test_a_copy_goes_its_own_way() -> None:
    model = Kinds()
    report = sigma_reparametrize(model)
    twin = copy.deepcopy(model)
    out = model(image())
    fold_sigma(twin)  # torch's own removal would break the original here
    assert torch.equal(model(image()), out)
    assert torch.equal(twin(image()), out)
    other = copy.deepcopy(model)
    move(other)
    assert torch.equal(model(image()), out)
    report.undo()
    assert len(list(spectral_weights(other))) == 9
    assert not torch.equal(other(image()), out)


def test_an_average_of_models_keeps_its_norm() -> None:
    """Averaged u and v are no unit vectors; their length must not enter sigma."""
    model = nn.Linear(6, 6)
    sigma_reparametrize(model)
    ((_, _, _, spectral),) = spectral_weights(model)
    out = model(torch.ones(1, 6))
    spectral.u.mul_(0.5)
    spectral.v.mul_(0.25)
    torch.testing.assert_close(model(torch.ones(1, 6)), out)


def test_a_weight_that_becomes_zero_gives_no_nan() -> None:
    model = nn.Linear(3, 3)
    sigma_reparametrize(model)
    with torch.no_grad():
        original(model, "weight").zero_()
    update_sigma(model)
    model(torch.ones(1, 3)).sum().backward()
    assert model.weight.eq(0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if "gamma" in n)


def test_sigma_is_computed_in_float32_under_autocast() -> None:
    model = nn.Linear(64, 64)
    sigma_reparametrize(model)
    ((_, _, _, spectral),) = spectral_weights(model)
    weight = original(model, "weight")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(spectral.sigma(weight), spectral.gamma)
        update_sigma(model)
        assert model(torch.ones(1, 64)).dtype == torch.bfloat16
        torch.testing.assert_close(spectral.sigma(weight), spectral.gamma, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_forwards_have_the_same_gradient(reentrant: bool) -> None:
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Kinds().double()
        sigma_reparametrize(model)
        move(model)
        x = image(torch.float64).requires_grad_()
        out = checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
        out.square().mean().backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-12, atol=1e-14, msg=name)


def test_following_the_weights_does_not_touch_a_graph_that_waits() -> None:
    model = nn.Linear(4, 4)
    sigma_reparametrize(model)
    loss = model(torch.ones(1, 4)).square().sum()
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    update_sigma(model)
    loss.backward()
    for parameter, gradient in zip(model.parameters(), expected):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0)


def test_frozen_weights_are_rescaled_and_not_followed() -> None:
    model = nn.Linear(4, 4).requires_grad_(False)
    sigma_reparametrize(model)
    ((_, _, _, spectral),) = spectral_weights(model)
    assert not spectral.gamma.requires_grad
    u = spectral.u.clone()
    move(model)
    update_sigma(model)
    assert torch.equal(spectral.u, u)


# State dicts.


def zero_head() -> Kinds:
    model = Kinds()
    nn.init.zeros_(model.head.weight)
    return model


def test_a_state_dict_decides_which_weights_are_rescaled() -> None:
    saved = zero_head()  # a head that starts as zeros, and has moved when it is saved
    sigma_reparametrize(saved)
    nn.init.normal_(saved.head.weight)
    fresh = Kinds()
    report = sigma_reparametrize(fresh)
    assert "head" in {c.module for c in report.changes}
    fresh.load_state_dict(saved.state_dict())
    assert torch.equal(fresh(image()), saved(image()))
    assert ("head", "weight is not rescaled in the checkpoint that was loaded") in {
        (r.module, r.reason) for r in report.refused
    }
    assert "head" not in {c.module for c in report.changes}
    other = zero_head()
    report = sigma_reparametrize(other)
    assert report.added_parameters == 12
    whole = Kinds()
    sigma_reparametrize(whole, split_qkv=False)
    other.load_state_dict(whole.state_dict())
    assert torch.equal(other(image()), whole(image()))
    assert report.added_parameters == 9
    assert not report.refused
    report.undo()
    assert list(other.state_dict()) == list(Kinds().state_dict())


def test_a_plain_state_dict_is_rescaled_as_it_is_loaded() -> None:
    plain = Kinds()
    outer = nn.ModuleDict({"net": Kinds()})
    report = sigma_reparametrize(outer)
    outer.load_state_dict({f"net.{name}": value for name, value in plain.state_dict().items()})
    assert torch.equal(outer["net"](image()), plain(image()))
    assert len(report.changes) == 9
    zeros = zero_head()
    model = Kinds()
    report = sigma_reparametrize(model)
    model.load_state_dict(zeros.state_dict())
    assert torch.equal(model(image()), zeros(image()))
    assert [r.reason for r in report.refused] == ["weight is all zeros in the checkpoint that was loaded"]


def test_a_part_of_a_model_can_be_rescaled_and_loaded_within_it() -> None:
    outer, saved = nn.ModuleDict({"net": Kinds()}), nn.ModuleDict({"net": Kinds()})
    sigma_reparametrize(outer["net"])
    sigma_reparametrize(saved["net"], modules="head")
    outer.load_state_dict(saved.state_dict())
    assert [name for name, _, _, _ in spectral_weights(outer)] == ["net.head"]


def test_a_state_dict_of_another_model_is_torchs_error() -> None:
    model = Kinds()
    sigma_reparametrize(model)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})
    state = model.state_dict()
    state["other.parametrizations.weight.0.gamma"] = torch.ones(1)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(state)
