"""Rewritten attention of every kind of module against its own map, and what happens around it."""

from __future__ import annotations

import copy
import inspect
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_entropy.observe import AttentionEntropyReader
from lightning_entropy.surgery.attention_call import (
    AttentionCall,
    ReplacedAttention,
    ScaledLogits,
    restore_attention,
    rewrite_attention,
)
from lightning_entropy.surgery.attention_modules import attention_heads, attention_modules
from tests.observe.model_cases import EVERY, ModelCase


class Times(ScaledLogits):
    """Logits times a number, or times a number a head."""

    method = "Times"

    def __init__(self, factor: float, per_head: bool = False, kinds: tuple[str, ...] = ("self", "cross")) -> None:
        self.value, self.per_head, self.kinds = factor, per_head, kinds
        self.calls: list[tuple[str, str, int, int]] = []

    def describe(self) -> str:
        return f"times {self.value}"

    def factor(self, call: AttentionCall) -> float | Tensor:
        self.calls.append((call.name, call.kind, call.queries, call.keys))
        if call.kind not in self.kinds:
            return 1.0
        heads = attention_heads(call.module)
        return torch.full((heads, 1), self.value) if self.per_head and heads is not None else self.value


class Uniform(ReplacedAttention):
    """Every query takes the mean of the values."""

    method = "Uniform"

    def describe(self) -> str:
        return "uniform"

    def attend(
        self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
    ) -> Tensor:
        mean = value.mean(-2, keepdim=True)
        return mean.repeat_interleave(query.shape[-3] // value.shape[-3], -3).expand(*query.shape[:-1], -1)


class DotProduct(nn.Module):
    """A user's attention, without a number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.fail: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        if self.fail is not None:
            raise self.fail("on request")
        return x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def expected(self, x: Tensor, factor: float) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return x + ((factor * q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Stack(nn.Module):
    def __init__(self, mode: str = "none") -> None:
        super().__init__()
        self.mode = mode
        self.layers = nn.ModuleList(DotProduct() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.mode == "none" else checkpoint(layer, x, use_reentrant=self.mode == "reentrant")
        return x


def output_of(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def modes_entered() -> int:
    return torch._C._len_torch_function_stack()


@pytest.mark.parametrize("per_head", [False, True], ids=["scalar", "per head"])
@pytest.mark.parametrize(("case", "mode"), EVERY, ids=[f"{c.library}-{c.name}-{m}" for c, m in EVERY])
def test_entropy_of_scaled_maps(case: ModelCase, mode: str, per_head: bool) -> None:
    """The first layer's map p becomes p^c, normalised again, whatever computed it."""
    model, arguments = case.build(mode)
    c = 1.7
    with torch.no_grad():
        p = case.maps(model, arguments)[0].double()
        plain = output_of(model(**arguments))
        report = rewrite_attention(model, Times(c, per_head))
        assert len(report.changes) == len(attention_modules(model))
        with AttentionEntropyReader(model) as reader:
            scaled = output_of(model(**arguments))
        p = torch.where(p > 0, p**c, 0.0)
        p = p / p.sum(-1, keepdim=True)
        expected = -(p * p.clamp(min=1e-300).log()).sum(-1)
        got = reader.layers[0].entropy.double().view_as(expected)
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
        assert scaled.isfinite().all()
        report.undo()
        report.undo()
        assert torch.equal(output_of(model(**arguments)), plain)
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert modes_entered() == 0


@pytest.mark.parametrize(("case", "mode"), EVERY, ids=[f"{c.library}-{c.name}-{m}" for c, m in EVERY])
def test_a_factor_of_one_changes_no_bit(case: ModelCase, mode: str) -> None:
    model, arguments = case.build(mode)
    with torch.no_grad():
        plain = output_of(model(**arguments))
        rewrite_attention(model, Times(1.0))
        same = output_of(model(**arguments))
    if case.library == "torch":  # its fused evaluation path is off
        torch.testing.assert_close(same, plain)
    else:
        assert torch.equal(same, plain)


FUSED = [(c, m) for c, m in EVERY if m in ("fused", "train", "eval", "weights", "no weights")]


@pytest.mark.parametrize(("case", "mode"), FUSED, ids=[f"{c.library}-{c.name}-{m}" for c, m in FUSED])
def test_replaced_attention_is_reached(case: ModelCase, mode: str) -> None:
    model, arguments = case.build(mode)
    chosen = None if case.name != "cait_xxs24_224" else "blocks_token_only.*"  # talking heads form their map
    seen = []
    with torch.no_grad():
        rewrite_attention(model, Uniform(), chosen)
        original = Uniform.attend

        def watched(self: Uniform, call: AttentionCall, *args: Any, **options: Any) -> Tensor:
            seen.append(call.name)
            return original(self, call, *args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Uniform, "attend", watched)
            assert output_of(model(**arguments)).isfinite().all()
    assert set(seen) == set(
        attention_modules(model) if chosen is None else ("blocks_token_only.0.attn", "blocks_token_only.1.attn")
    )


def test_replaced_attention_refuses_a_map_by_name() -> None:
    t = pytest.importorskip("transformers")
    config = t.ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        attn_implementation="eager",
    )
    model = t.ViTModel(config)
    rewrite_attention(model, Uniform())
    with pytest.raises(ValueError, match=r"Uniform needs query and key, and layers.0.attention \(ViTAttention\) forms"):
        model(pixel_values=torch.randn(1, 3, 32, 32))
    assert modes_entered() == 0


@pytest.mark.parametrize("mode", ["none", "nonreentrant", "reentrant"])
def test_gradient_checkpointing_recomputes_the_rewritten(mode: str) -> None:
    torch.manual_seed(0)
    model = Stack(mode).double().train()
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    rewrite_attention(model, Times(2.5))
    model(x).square().sum().backward()
    got = [p.grad for p in model.parameters()]
    y = x.detach()
    for layer in model.layers:
        y = layer.expected(y, 2.5)
    expected = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)
    assert modes_entered() == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_no_mode(error: type[BaseException]) -> None:
    model = Stack()
    rewrite_attention(model, Times(2.0))
    model.layers[1].fail = error
    with pytest.raises(error):
        model(torch.randn(1, 3, 8))
    assert modes_entered() == 0


@pytest.mark.parametrize("compiled_before", [False, True])
def test_compiles_without_a_graph_break(compiled_before: bool) -> None:
    torch._dynamo.reset()
    model, x = Stack().eval(), torch.randn(2, 5, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if compiled_before:
        report = rewrite_attention(compiled, Times(3.0))
    else:
        report = rewrite_attention(model, Times(3.0))
    expected = model.layers[1].expected(model.layers[0].expected(x, 3.0), 3.0)
    torch.testing.assert_close(compiled(x), expected)
    out = compiled(x)
    out.sum().backward()
    torch.testing.assert_close(out, expected)
    report.undo()
    plain = model.layers[1].expected(model.layers[0].expected(x, 1.0), 1.0)
    torch.testing.assert_close(compiled(x), plain)
    torch._dynamo.reset()


def test_compiled_first_and_changed_later() -> None:
    torch._dynamo.reset()
    model, x = Stack().eval(), torch.randn(2, 5, 8)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    rewrite_attention(model, Times(3.0))
    torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


def test_autocast_keeps_its_precision() -> None:
    model, x = Stack().eval(), torch.randn(2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(x)
        rewrite_attention(model, Times(1.0))
        assert torch.equal(model(x), plain)
    restore_attention(model)
    rewrite_attention(model, Times(2.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            model(x), model.layers[1].expected(model.layers[0].expected(x, 2.0), 2.0), rtol=0.02, atol=0.03
        )


def test_copies_keep_working_and_are_their_own() -> None:
    model, x = Stack(), torch.randn(1, 5, 8)
    report = rewrite_attention(model, Times(2.0))
    expected = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(1.5)
        torch.testing.assert_close(twin(x), twin.layers[1].expected(twin.layers[0].expected(x, 2.0), 2.0))
        assert torch.equal(model(x), expected)
        restored = restore_attention(twin)
        assert restored == ["layers.0", "layers.1"]
        torch.testing.assert_close(twin(x), twin.layers[1].expected(twin.layers[0].expected(x, 1.0), 1.0))
    assert list(model.state_dict()) == list(Stack().state_dict())
    report.undo()


def test_methods_combine_and_come_off_in_any_order() -> None:
    class Other(Times):
        method = "Other"

    model, x = Stack(), torch.randn(1, 5, 8)
    plain = model(x)
    first, second = rewrite_attention(model, Times(2.0)), rewrite_attention(model, Other(3.0))
    torch.testing.assert_close(model(x), model.layers[1].expected(model.layers[0].expected(x, 6.0), 6.0))
    first.undo()
    torch.testing.assert_close(model(x), model.layers[1].expected(model.layers[0].expected(x, 3.0), 3.0))
    second.undo()
    assert torch.equal(model(x), plain)


def test_twice_is_once() -> None:
    model, x = Stack(), torch.randn(1, 5, 8)
    rewrite_attention(model, Times(2.0), "layers.0")
    again = rewrite_attention(model, Times(2.0))
    assert [c.module for c in again.changes] == ["layers.1"]
    assert [r.module for r in again.refused] == ["layers.0"]
    assert "already" in again.refused[0].reason
    assert rewrite_attention(model, Times(2.0)).changes == []
    torch.testing.assert_close(model(x), model.layers[1].expected(model.layers[0].expected(x, 2.0), 2.0))
    with pytest.raises(ValueError, match=r"Uniform can change none of the 2.*\n  layers.0: rewritten by Times"):
        rewrite_attention(model, Uniform())


def test_one_put_on_top_by_somebody_else_survives() -> None:
    model, x = DotProduct(), torch.randn(1, 5, 8)
    plain = model(x)
    report = rewrite_attention(model, Times(2.0))
    inner = model.forward
    model.forward = lambda y: 2 * inner(y)  # as accelerate's hooks do
    report.undo()
    torch.testing.assert_close(model(x), 2 * plain)


def test_self_and_cross_attention_are_told_apart() -> None:
    layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True).eval()
    times = Times(2.0)
    rewrite_attention(layer, times)
    layer(torch.randn(1, 4, 8), torch.randn(1, 4, 8))
    assert [(name, kind) for name, kind, _, _ in times.calls] == [("self_attn", "self"), ("multihead_attn", "cross")]
    t = pytest.importorskip("transformers")
    config = t.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = t.T5Model(config).eval()
    times = Times(2.0)
    rewrite_attention(model, times)
    ids = torch.randint(0, 50, (1, 6))
    model(input_ids=ids, decoder_input_ids=ids)
    assert [kind for _, kind, _, _ in times.calls] == ["self", "self", "cross"]


@pytest.mark.parametrize("masked", ["none", "padding", "mask", "3d", "float"])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("separate", [False, True])
def test_multi_head_attention_equals_scaled_weights(masked: str, batched: bool, separate: bool) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"kdim": 6, "vdim": 5} if separate else {}
    module = nn.MultiheadAttention(8, 2, batch_first=True, **sizes).eval()
    q = torch.randn(2, 4, 8)
    k, v = (torch.randn(2, 7, 6), torch.randn(2, 7, 5)) if separate else (torch.randn(2, 7, 8),) * 2
    masks: dict[str, Any] = {
        "none": {},
        "padding": {"key_padding_mask": torch.arange(7) >= torch.tensor([7, 4])[:, None]},
        "mask": {"attn_mask": torch.ones(4, 7, dtype=torch.bool).triu(3)},
        "3d": {"attn_mask": torch.rand(4, 4, 7) > 0.8},
        "float": {"attn_mask": torch.randn(4, 7)},
    }[masked]
    if not batched:
        q, k, v = q[0], k[0], v[0]
        masks = {n: m[0] if n == "key_padding_mask" else m[:2] if m.dim() == 3 else m for n, m in masks.items()}
    _, p = module(q, k, v, average_attn_weights=False, **masks)
    values = module.v_proj_weight if separate else module.in_proj_weight[16:]
    values = (v @ values.T + module.in_proj_bias[16:]).unflatten(-1, (2, 4)).transpose(-3, -2)
    p = p**2 / (p**2).sum(-1, keepdim=True)
    expected = module.out_proj((p @ values).transpose(-3, -2).flatten(-2))
    rewrite_attention(module, Times(2.0))
    out, weights = module(q, k, v, **masks)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights, p.mean(-3))
    assert module(q, k, v, need_weights=False, **masks)[1] is None
    _, each = module(q, k, v, average_attn_weights=False, **masks)
    torch.testing.assert_close(each, p)


def test_multi_head_attention_with_keys_that_are_no_tokens_is_refused() -> None:
    module = nn.MultiheadAttention(8, 2, add_zero_attn=True)
    rewrite_attention(module, Times(2.0))
    x = torch.randn(3, 1, 8)
    with pytest.raises(ValueError, match=r"Times, MultiheadAttention: .*add_zero_attn"):
        module(x, x, x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_evaluates_padded_batches_and_gets_its_fast_path_back() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.arange(5) >= torch.tensor([5, 3])[:, None]
    twin = copy.deepcopy(encoder)
    with torch.no_grad():
        for layer in twin.layers:
            layer.self_attn.in_proj_weight[:8] *= 2.0
            layer.self_attn.in_proj_bias[:8] *= 2.0
        plain = encoder(x, src_key_padding_mask=padding)
        report = rewrite_attention(encoder, Times(2.0))
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                got = encoder(x, src_key_padding_mask=padding)
            torch.testing.assert_close(got[~padding], twin(x, src_key_padding_mask=padding)[~padding])
        report.undo()
        assert encoder.use_nested_tensor
        assert not any(m._forward_pre_hooks for m in encoder.modules())
        assert torch.equal(encoder(x, src_key_padding_mask=padding), plain)


def test_nothing_to_attach_to() -> None:
    with pytest.raises(ValueError, match=r"Times found no attention in Sequential.*\n.*classes Linear, Sequential"):
        rewrite_attention(nn.Sequential(nn.Linear(2, 2)), Times(2.0))
    with pytest.raises(ValueError, match=r"Times\(modules=.*matched 0 of"):
        rewrite_attention(Stack(), Times(2.0), "layer.*.attn")


def test_a_module_that_computes_no_attention_says_so_in_its_first_forward() -> None:
    model = nn.Sequential(nn.Linear(8, 8), DotProduct())
    rewrite_attention(model, Times(2.0), ["0", "1"])
    with pytest.raises(ValueError, match=r"Times changes the attention of 0 \(Linear\), and none ran"):
        model(torch.randn(1, 3, 8))


def test_patterns_reach_what_they_contain_once() -> None:
    model = nn.Sequential(Stack(), Stack())
    times = Times(2.0)
    report = rewrite_attention(model, times, ["0", "0.layers.*"])
    assert [c.module for c in report.changes] == ["0.layers.0", "0.layers.1"]
    model(torch.randn(1, 3, 8))
    assert len(times.calls) == 2


def test_a_wrong_number_of_heads_is_an_error() -> None:
    class Three(Times):
        def factor(self, call: AttentionCall) -> Tensor:
            return torch.ones(3, 1)

    model = DotProduct()
    rewrite_attention(model, Three(1.0))
    with pytest.raises(ValueError, match=r"Times has a factor for each of 3 heads, and DotProduct computes .* with 2"):
        model(torch.randn(1, 3, 8))


@pytest.mark.parametrize("kind", ["bool", "min"])
def test_masked_keys_stay_masked(kind: str) -> None:
    class Masked(nn.Module):
        def forward(self, q: Tensor, mask: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q, mask)

    module, q = Masked(), torch.randn(1, 2, 4, 3)
    allowed = torch.ones(4, 4, dtype=torch.bool).tril()
    mask = allowed if kind == "bool" else torch.zeros(4, 4).masked_fill(~allowed, torch.finfo(torch.float32).min)
    for factor in (0.3, 4.0):
        report = rewrite_attention(module, Times(factor))
        s = (factor * q @ q.mT / 3**0.5).masked_fill(~allowed, -torch.inf)
        torch.testing.assert_close(module(q, mask), s.softmax(-1) @ q)
        report.undo()


def test_the_signature_is_the_modules() -> None:
    model = DotProduct()
    before = inspect.signature(model.forward)
    rewrite_attention(model, Times(2.0))
    assert inspect.signature(model.forward) == before
