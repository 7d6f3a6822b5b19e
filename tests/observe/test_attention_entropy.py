"""Entropy of whole transformers against their own eager maps; the output unchanged to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_entropy.observe import AttentionEntropyReader
from tests.observe.model_cases import EVERY, FUSED, ModelCase, of_map


def output_of(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def check_layers(reader: AttentionEntropyReader, maps: list[Tensor], source: str) -> None:
    assert len(reader.layers) == len(maps)
    # CaiT's talking heads are never fused, its class attention is
    assert {layer.source for layer in reader.layers} in ({source}, {source, "softmax"})
    for layer, p in zip(reader.layers, maps):
        expected = of_map(p)
        torch.testing.assert_close(layer.entropy.double().view_as(expected), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("case", "mode"), EVERY, ids=[f"{c.library}-{c.name}-{m}" for c, m in EVERY])
def test_equals_the_models_own_maps(case: ModelCase, mode: str) -> None:
    model, arguments = case.build(mode)
    with torch.no_grad():
        maps = case.maps(model, arguments)
        with AttentionEntropyReader(model) as reader:
            read = output_of(model(**arguments))
        plain = output_of(model(**arguments))
    if mode in ("eval", "no weights"):  # torch.nn's own fast path, off while it is read, is another kernel
        torch.testing.assert_close(plain, read)
    else:
        assert torch.equal(plain, read)
    check_layers(reader, maps, case.source[mode])
    assert hooks(model) == 0
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize(("case", "mode"), EVERY, ids=[f"{c.library}-{c.name}-{m}" for c, m in EVERY])
def test_attached_reader_narrows_and_reads_the_same(case: ModelCase, mode: str) -> None:
    model, arguments = case.build(mode)
    reader = AttentionEntropyReader(model)
    reader.attach()
    whole = hooks(model)
    results = []
    for _ in range(2):
        reader.start()
        out = output_of(model(**arguments))
        reader.stop()
        results.append(reader.layers)
    assert hooks(model) <= whole
    assert [layer.module for layer in results[0]] == [layer.module for layer in results[1]]
    for first, second in zip(*results):
        assert torch.equal(first.entropy, second.entropy)
        assert second.entropy.requires_grad
    out.sum().backward(retain_graph=True)
    torch.stack([layer.entropy.sum() for layer in results[1]]).sum().backward()
    reader.detach()
    assert hooks(model) == 0
    assert torch._C._len_torch_function_stack() == 0


def test_a_padded_row_without_a_key_is_zero_and_left_out() -> None:
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = t.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    model = t.LlamaModel(config).eval()
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :3] = 0  # padded on the left: those rows have no allowed key
    with torch.no_grad(), AttentionEntropyReader(model) as reader:
        model(input_ids=torch.randint(0, 50, (2, 6)), attention_mask=mask)
    (layer,) = reader.layers
    keys = layer.keys.expand_as(layer.entropy)
    assert keys[1, 0].tolist() == [0, 0, 0, 1, 2, 3]
    assert (layer.entropy[1, :, :3] == 0).all()
    assert layer.per_head().isfinite().all()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_padded_batch_in_an_evaluating_encoder() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 9, 16), torch.arange(9) >= torch.tensor([9, 5])[:, None]
    reader = AttentionEntropyReader(encoder)
    reader.attach()
    with torch.no_grad():
        plain = encoder(x, src_key_padding_mask=padding)
        for _ in range(2):
            reader.start()
            read = encoder(x, src_key_padding_mask=padding)
            reader.stop()
            assert [layer.module for layer in reader.layers] == ["layers.0.self_attn", "layers.1.self_attn"]
            torch.testing.assert_close(plain[~padding], read[~padding])
    assert encoder.use_nested_tensor
    reader.detach()
    with torch.no_grad():
        assert torch.equal(encoder(x, src_key_padding_mask=padding), plain)
    assert hooks(encoder) == 0


def test_gradient_is_that_of_the_map() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    with AttentionEntropyReader(layer) as reader:
        layer(x)
    weight = layer.self_attn.in_proj_weight
    (got,) = torch.autograd.grad(reader.layers[0].entropy.sum(), weight)
    p = layer.self_attn(x, x, x, need_weights=True, average_attn_weights=False)[1]
    (expected,) = torch.autograd.grad(-(p * p.log()).sum(), weight)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-10)


class Checkpointed(nn.Module):
    """Two attention layers, each recomputed in the backward pass."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.layers = nn.ModuleList(DotProduct() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.mode == "none" else checkpoint(layer, x, use_reentrant=self.mode == "reentrant")
        return x


class DotProduct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("attached", [False, True])
def test_gradient_checkpointing_is_read_once_with_the_right_gradient(attached: bool) -> None:
    gradients = {}
    for mode in ("none", "nonreentrant"):
        torch.manual_seed(0)
        model = Checkpointed(mode).double().train()
        x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
        reader = AttentionEntropyReader(model)
        reader.attach()
        for _ in range(2 if attached else 1):
            model.zero_grad()
            reader.start()
            out = model(x).square().mean()
            layers = reader.layers
            (out + torch.stack([layer.entropy.mean() for layer in layers]).sum()).backward()
            assert len(reader.layers) == 2  # still recording: what was recomputed is not read again
            reader.stop()
        gradients[mode] = [p.grad for p in model.parameters()]
        reader.detach()
    for a, b in zip(gradients["none"], gradients["nonreentrant"]):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_reentrant_checkpointing_has_values_and_no_gradient() -> None:
    torch.manual_seed(0)
    model = Checkpointed("reentrant").train()
    x = torch.randn(2, 7, 8, requires_grad=True)
    with AttentionEntropyReader(model) as reader:
        model(x).sum().backward()
    assert len(reader.layers) == 2
    assert not any(layer.entropy.requires_grad for layer in reader.layers)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_checkpointing_of_the_libraries(library: str) -> None:
    def prepare(on: bool) -> tuple[nn.Module, dict[str, Any]]:
        name = "vit_tiny_patch16_224" if library == "timm" else "GPT2Model"
        case = next(c for c, _ in EVERY if c.name == name)
        model, arguments = case.build(FUSED)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if on and library == "timm":
            model.set_grad_checkpointing()
        elif on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model, arguments

    results = []
    for on in (False, True):
        model, arguments = prepare(on)
        with AttentionEntropyReader(model) as reader:
            out = output_of(model(**arguments))
            loss = out.square().mean() + torch.stack([layer.per_head().mean() for layer in reader.layers]).mean()
            loss.backward()
            assert len(reader.layers) == 2
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "GPT2Model", "TransformerEncoderLayer"])
@pytest.mark.parametrize("grad", [True, False])
def test_compiled_models_are_read(name: str, grad: bool) -> None:
    case, mode = next((c, m) for c, m in EVERY if c.name == name)
    model, arguments = case.build(mode)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        maps = case.maps(copy.deepcopy(model), arguments)
    compiled(**arguments)  # compiled before anything was attached
    reader = AttentionEntropyReader(model)
    reader.attach()
    for _ in range(3):
        with torch.set_grad_enabled(grad):
            reader.start()
            compiled(**arguments)
            reader.stop()
        check_layers(reader, maps, case.source[mode])
        assert all(layer.entropy.requires_grad == grad for layer in reader.layers)
    reader.detach()
    compiled(**arguments)


def test_sampled_rows() -> None:
    case, mode = next((c, m) for c, m in EVERY if c.name == "GPT2Model")
    for mode in case.modes:
        model, arguments = case.build(mode)
        with torch.no_grad(), AttentionEntropyReader(model) as whole:
            model(**arguments)
        with torch.no_grad(), AttentionEntropyReader(model, queries=5) as sampled:
            model(**arguments)
        rows = torch.randperm(12, generator=torch.Generator().manual_seed(0))[:5]
        for a, b in zip(whole.layers, sampled.layers):
            assert b.rows == a.rows == 12
            torch.testing.assert_close(b.entropy, a.entropy[..., rows], atol=1e-5, rtol=0)
            expected = a.normalized()[..., rows]
            torch.testing.assert_close(b.normalized(), expected, atol=1e-5, rtol=0, equal_nan=True)
    with pytest.raises(ValueError, match="queries must be at least 1, got 0"):
        AttentionEntropyReader(model, queries=0)


def test_a_deep_copy_is_not_read() -> None:
    model = Checkpointed("none")
    reader = AttentionEntropyReader(model)
    reader.attach()
    twin = copy.deepcopy(model)
    reader.start()
    twin(torch.randn(1, 5, 8))
    reader.stop()
    assert {layer.module for layer in reader.layers} <= {""}  # computed outside every module that is watched
    reader.detach()


def test_normalised_by_the_keys_of_each_row() -> None:
    class Causal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    model = Causal()
    with AttentionEntropyReader(model) as reader:
        model(torch.zeros(1, 2, 6, 4))
    (layer,) = reader.layers
    assert layer.keys.tolist() == [1, 2, 3, 4, 5, 6]
    normalised = layer.normalized()
    assert normalised[..., 0].isnan().all()
    torch.testing.assert_close(normalised[..., 1:], torch.ones(1, 2, 5))
    torch.testing.assert_close(layer.per_head(), torch.ones(2))


def test_patterns_choose_and_absence_is_an_error() -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3, enable_nested_tensor=False
    )
    x = torch.randn(1, 5, 8)
    with AttentionEntropyReader(encoder, "layers.1*") as reader:
        encoder(x)
    assert [layer.module for layer in reader.layers] == ["layers.1.self_attn"]
    with (
        pytest.raises(ValueError, match="no attention between tokens ran in Linear"),
        AttentionEntropyReader(nn.Linear(8, 8)) as r,
    ):
        r.module(x)
    with pytest.raises(ValueError, match="matched 0 of"):
        AttentionEntropyReader(encoder, "blocks.*")
