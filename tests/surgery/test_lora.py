from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_entropy.surgery.lora import inject_lora, lora_modules, merge_lora
from tests.user_modules import TokenEncoder, bags

pytest.importorskip("peft")


class Net(nn.Module):
    """Names that end alike, numbers that begin alike."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(12))
        self.head = nn.ModuleDict({"fc": nn.Linear(6, 2)})

    def forward(self, x):
        x = self.fc(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head["fc"](x)


def trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def fill(model: nn.Module) -> nn.Module:
    """Adapters and heads that do something."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def encoder(**options) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2)


def test_exactly_the_named_modules_and_the_output_as_before() -> None:
    model, x = Net(), torch.randn(3, 6)
    before, state, random = model(x), set(model.state_dict()), torch.get_rng_state()
    report = inject_lora(model, ["fc.weight", "blocks.1.0.weight"], rank=2, also_train="head")
    assert list(lora_modules(model)) == ["fc", "blocks.1.0"]
    assert torch.equal(model(x), before)
    assert torch.equal(torch.get_rng_state(), random)
    adapters = [f"{n}.lora_{ab}.default.weight" for n in ("fc", "blocks.1.0") for ab in "AB"]
    assert trained(model) == [*adapters, "head.fc.weight", "head.fc.bias"]
    assert report.added_parameters == 2 * 2 * 12
    assert not hasattr(model, "peft_config")
    report.undo()
    assert set(model.state_dict()) == state
    assert len(trained(model)) == len(state)


def test_names_may_be_those_of_modules() -> None:
    model = Net()
    inject_lora(model, ["blocks.11.0"], rank=1)
    assert list(lora_modules(model)) == ["blocks.11.0"]


def test_every_adapter_moves_and_the_frozen_weights_do_not() -> None:
    model = encoder()
    names = ["layers.0.self_attn.in_proj_weight", "layers.1.self_attn.out_proj.weight", "layers.1.linear2.weight"]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    frozen = {name: id(parameter) for name, parameter in model.named_parameters()}
    inject_lora(model, names, rank=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        model(torch.randn(2, 5, 16)).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    ups = {name: p for name, p in model.named_parameters() if ".lora_B." in name}
    moved = {name for name, parameter in ups.items() if parameter.any()}
    # the other half of an attention's adapter, which peft puts in too, stays at zero
    assert moved == {name for name, parameter in ups.items() if parameter.requires_grad}
    assert len(ups) - len(moved) == 2
    after = {name.replace("base_layer.", ""): p for name, p in model.named_parameters() if ".lora_" not in name}
    assert {name: id(p) for name, p in after.items()} == frozen
    assert all(torch.equal(p, before[name]) for name, p in after.items())


def test_the_fast_path_of_encoder_layers_does_not_skip_adapters() -> None:
    for names in (["layers.1.linear1.weight"], ["layers.0.self_attn.in_proj_weight"]):
        model, x = encoder(), torch.randn(3, 5, 16)
        padding = torch.zeros(3, 5, dtype=torch.bool)
        padding[0, 3:] = True
        report = inject_lora(model, names, rank=2)
        fill(model)
        slow = model(x, src_key_padding_mask=padding)
        model.eval()
        with torch.no_grad():
            fast = model(x, src_key_padding_mask=padding)
            merged = copy.deepcopy(model)
            merge_lora(merged)
            again = merged(x, src_key_padding_mask=padding)
        seen = ~padding
        torch.testing.assert_close(fast[seen], slow[seen])
        torch.testing.assert_close(again[seen], slow[seen], rtol=1e-4, atol=1e-5)
        report.undo()
        assert all(layer.activation_relu_or_gelu == 1 for layer in model.layers)
        assert model.use_nested_tensor


def test_attention_is_the_one_with_summed_weights() -> None:
    """An independent reference: the adapters added by hand."""
    torch.manual_seed(3)
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True).double(), torch.randn(2, 4, 8).double()
    model = nn.ModuleDict({"attention": attention})
    plain = copy.deepcopy(attention)
    inject_lora(model, ["attention.in_proj_weight", "attention.out_proj.weight"], rank=2, alpha=6)
    fill(model)
    state = model.state_dict()
    inner, outer = "attention.lora_{}.default.weight", "attention.base_layer.out_proj.lora_{}.default.weight"
    with torch.no_grad():
        plain.in_proj_weight += 3 * state[inner.format("B")] @ state[inner.format("A")]
        plain.out_proj.weight += 3 * state[outer.format("B")] @ state[outer.format("A")]
    for mode in (True, False):
        model.train(mode)
        with torch.set_grad_enabled(mode):
            torch.testing.assert_close(model["attention"](x, x, x), plain(x, x, x))
    merge_lora(model)
    assert type(model["attention"]) is nn.MultiheadAttention
    torch.testing.assert_close(model["attention"](x, x, x), plain(x, x, x))


def test_merging_gives_the_plain_model() -> None:
    model = Net()
    state = set(model.state_dict())
    inject_lora(model, ["fc.weight", "blocks.3.0.weight"], rank=2, alpha=5)
    fill(model)
    x = torch.randn(4, 6)
    expected = model(x)
    assert merge_lora(model) == ["fc", "blocks.3.0"]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert set(model.state_dict()) == state
    assert merge_lora(model) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_adapters_have_the_type_of_their_weights(dtype: torch.dtype) -> None:
    model = encoder().to(dtype)
    inject_lora(model, ["layers.0.self_attn.in_proj_weight", "layers.0.linear1.weight"], rank=2)
    assert {p.dtype for p in model.parameters()} == {dtype}
    out = fill(model)(torch.randn(2, 3, 16, dtype=dtype))
    assert out.dtype == dtype
    out.float().square().mean().backward()


def test_copies_and_pickles_compute_the_same() -> None:
    model = encoder()
    inject_lora(model, ["layers.0.self_attn.in_proj_weight", "layers.1.linear1.weight"], rank=2)
    fill(model)
    x = torch.randn(2, 3, 16)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        other.layers[0].self_attn.lora_B["default"].weight.data.zero_()
        assert not torch.equal(other(x), model(x))


@pytest.mark.slow
def test_compiled_in_one_graph() -> None:
    model = TokenEncoder(6, 0.0)
    batch = bags()[0]
    inject_lora(model, ["layers.0.self_attn.in_proj_weight", "layers.1.linear1.weight", "embed.weight"], rank=2)
    fill(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch["features"], batch["mask"]), model(batch["features"], batch["mask"]))


def test_two_injections_live_side_by_side() -> None:
    model, x = Net(), torch.randn(3, 6)
    before = model(x)
    first = inject_lora(model, ["fc.weight"], rank=1)
    second = inject_lora(model, ["blocks.0.0.weight", "fc.weight"], rank=3)
    assert [r.module for r in second.refused] == ["fc"]
    assert "has an adapter already" in second.refused[0].reason
    assert list(lora_modules(model)) == ["fc", "blocks.0.0"]
    second.undo()
    first.undo()
    assert torch.equal(model(x), before)
    assert lora_modules(model) == {}


def test_what_is_refused_and_why() -> None:
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(6, 4),
            "tied": nn.Linear(4, 6, bias=False),
            "grouped": nn.Conv1d(4, 4, 3, groups=4),
            "other": nn.MultiheadAttention(4, 2, kdim=3),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "good": nn.Linear(4, 4),
        }
    )
    model["tied"].weight = model["embed"].weight
    names = ["tied.weight", "grouped.weight", "other.q_proj_weight", "good.weight"]
    report = inject_lora(model, names, rank=2)
    assert [change.module for change in report.changes] == ["good"]
    reasons = {refusal.module: refusal.reason for refusal in report.refused}
    assert "tied to embed.weight" in reasons["tied"]
    assert "in 4 groups" in reasons["grouped"]
    assert "separate q_proj_weight" in reasons["other"]
    with pytest.raises(ValueError, match=r"can adapt none of the 1 weights:\n  tied: weight is tied"):
        inject_lora(model, ["tied.weight"])
    with pytest.raises(ValueError, match="is parametrised"):
        inject_lora(model, ["normed.parametrizations.weight.original1"])
    with pytest.raises(ValueError, match="of the model itself"):
        inject_lora(nn.Linear(2, 2), ["weight"])
    with pytest.raises(ValueError, match="no parameter 'goood'"):
        inject_lora(model, ["goood"])


@pytest.mark.parametrize("options", [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}])
def test_arguments_out_of_range(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        inject_lora(Net(), ["fc.weight"], **options)


def test_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv1d(8, 8, 1))
    report = inject_lora(model, ["0.weight", "1.weight"], rank=2)
    assert not report.refused
    x = torch.randn(1, 4, 3, 3)
    fill(model)
    expected = model[1](model[0](x).flatten(2))
    merge_lora(model)
    torch.testing.assert_close(model[1](model[0](x).flatten(2)), expected, rtol=1e-4, atol=1e-5)
