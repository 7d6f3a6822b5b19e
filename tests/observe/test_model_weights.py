from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_entropy.observe.model_weights import model_fingerprint, model_weights
from lightning_entropy.observe.spectral_report import spectral_report
from lightning_entropy.observe.stored_weights import narrow, weights_fingerprint


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 10, 4))
        self.down_proj = nn.Parameter(torch.randn(3, 4, 5))
        self.position = nn.Parameter(torch.randn(1, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Attention(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.qkv(x)[..., :4])


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.attn = Attention()
        self.mha = nn.MultiheadAttention(8, 2)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.mixture = Experts()
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn(x))


def names(model: nn.Module) -> list[str]:
    return [weight.name for weight in model_weights(model) if weight.refusal is None]


def test_every_kind_of_linear_map_is_found_once() -> None:
    model = Everything()
    found = {weight.name: weight for weight in model_weights(model)}
    assert list(found) == [
        "attn.qkv.weight",
        "attn.proj.weight",
        "mha.in_proj_weight",
        "mha.out_proj.weight",
        "conv.weight",
        "mixture.gate_up_proj",
        "mixture.down_proj",
        "head.weight",
    ]
    assert found["head.weight"].tied == ("embed.weight",)
    assert found["attn.qkv.weight"].parts == found["mha.in_proj_weight"].parts == 3
    assert found["mixture.down_proj"].layout == "experts"
    assert found["mixture.down_proj"].matrices().shape == (3, 4, 5)


def test_an_embedding_and_what_is_packed_elsewhere_are_passed_over_by_name() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    packed = nn.Module()
    packed.register_buffer("qweight", torch.zeros(2, 3, dtype=torch.int32))
    model.append(packed)
    reasons = {weight.name: weight.refusal for weight in model_weights(model)}
    assert reasons["1.weight"] is None
    assert "looked up" in str(reasons["0.weight"])
    assert "packed" in str(reasons["2.qweight"])


def test_the_parts_of_fused_weights_are_the_separate_matrices() -> None:
    attention = Attention(6)
    weight = model_weights(attention)[0]
    q, k, v = attention.qkv.weight.detach().chunk(3)
    assert torch.equal(weight.matrices(blocks=True), torch.stack([q, k, v]))
    assert torch.equal(weight.matrices()[0], attention.qkv.weight)
    conv = nn.Conv2d(4, 6, 3, groups=2)
    halves = model_weights(conv)[0].matrices()
    assert torch.equal(halves, torch.stack([conv.weight[:3].flatten(1), conv.weight[3:].flatten(1)]).detach())


def test_conv1d_of_transformers_is_read_as_outputs_by_inputs() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    module = nn.Module()
    module.c_attn = pytorch_utils.Conv1D(12, 4)
    weight = model_weights(module)[0]
    assert weight.matrix_shape() == (12, 4)
    assert torch.equal(weight.matrices(blocks=True)[1], module.c_attn.weight.detach().mT[4:8])


def test_what_cannot_be_read_says_why() -> None:
    model = nn.ModuleDict(
        {
            "meta": nn.Linear(3, 2, device="meta"),
            "lazy": nn.LazyLinear(3),
            "normed": weight_norm(nn.Linear(3, 2)),
            "fine": nn.Linear(3, 2),
        }
    )
    reasons = {weight.name: weight.refusal for weight in model_weights(model)}
    assert reasons.pop("fine.weight") is None
    assert "meta device" in str(reasons["meta.weight"])
    assert "no shape yet" in str(reasons["lazy.weight"])
    assert "parametrised by _WeightNorm" in str(reasons["normed.weight"])
    with pytest.raises(ValueError, match=r"meta\.weight cannot be read"):
        next(w for w in model_weights(model) if w.name == "meta.weight").matrices()
    assert len(spectral_report(model)) == 1


def test_an_adapted_model_has_the_names_and_numbers_of_the_plain_one() -> None:
    peft = pytest.importorskip("peft")
    model = Everything()
    plain, fingerprint = names(model), model_fingerprint(model, names(model))
    config = peft.LoraConfig(
        target_modules=["qkv", "mha"],
        target_parameters=["mixture.down_proj"],
        modules_to_save=["attn.proj"],
        r=2,
        exclude_modules=["out_proj"],
    )
    adapted = peft.get_peft_model(model, config)
    assert names(adapted) == plain
    assert model_fingerprint(adapted, plain) == fingerprint
    inner = nn.Module()
    inner.net = adapted
    assert names(inner) == [f"net.{name}" for name in plain]
    assert next(w for w in model_weights(adapted) if w.name == "head.weight").tied == ("embed.weight",)


def test_the_fingerprint_tells_models_apart_and_orders_not() -> None:
    torch.manual_seed(0)
    model = Everything()
    weights = [weight for weight in model_weights(model) if weight.refusal is None]
    first = weights_fingerprint(weights)
    assert weights_fingerprint(reversed(weights)) == first
    assert model_fingerprint(model, [weight.name for weight in weights]) == first
    assert model_fingerprint(model, [*(w.name for w in weights), "absent.weight"]) is None
    with torch.no_grad():
        model.attn.proj.weight.mul_(1.001)
    assert weights_fingerprint(weights) != first
    assert weights_fingerprint(model_weights(nn.Linear(3, 2))) != weights_fingerprint(model_weights(nn.Linear(2, 3)))
    assert weights_fingerprint([]) == ""


def test_patterns_name_parameters_modules_and_what_contains_them() -> None:
    weights = model_weights(Everything())
    found = {pattern: [w.name for w in narrow(weights, [pattern], "f")] for pattern in ("attn", "*.down_proj", "m*")}
    assert found["attn"] == ["attn.qkv.weight", "attn.proj.weight"]
    assert found["*.down_proj"] == ["mixture.down_proj"]
    assert len(found["m*"]) == 4
    with pytest.raises(ValueError, match=r"f\(modules='atn.proj'\) names none of the 8 .*Closest names: attn\.proj"):
        narrow(weights, ["attn", "atn.proj"], "f")


class Packed(Tensor):
    """A tensor that shows one type, holds another and knows how to unpack itself."""

    @staticmethod
    def __new__(cls: type[Packed], qdata: Tensor, scale: Tensor) -> Packed:
        return Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, qdata: Tensor, scale: Tensor) -> None:
        self.qdata, self.scale = qdata, scale

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.qdata * self.scale

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Packed(args[0].qdata, args[0].scale)
        raise NotImplementedError(f"{function} of a packed tensor")


def test_a_tensor_that_unpacks_itself_is_read_unpacked() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=False)
    numbers = torch.randint(-127, 128, (4, 6), dtype=torch.int8)
    layer.weight = nn.Parameter(Packed(numbers, torch.full((4, 1), 0.5)), requires_grad=False)
    row = spectral_report(layer).rows[0]
    s = torch.linalg.svdvals(numbers.double() / 2)
    assert row.kappa == pytest.approx(float(s[0] / s[-1]), rel=1e-6)
    assert row.precision == "Packed, 8 bits"
    assert row.resolvable_kappa < 1e4


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4), ("int8", 8)])
def test_weights_of_bitsandbytes(kind: str, bits: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    dense = torch.randn(64, 64)
    if kind == "nf4":
        layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(dense.clone(), requires_grad=False, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(dense.clone(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    if kind == "int8":
        layer(torch.randn(2, 64))  # its numbers and scales move into the state at the first call
    weight = model_weights(layer)[0]
    assert (weight.bits, weight.shape) == (bits, (64, 64))
    error = (weight.read().float() - dense).norm() / dense.norm()
    assert float(error) < (0.15 if bits == 4 else 0.02)


def test_weights_of_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 64, bias=False))
    dense = layer[0].weight.detach().clone()
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    weight = model_weights(layer)[0]
    assert weight.bits == 8
    assert float((weight.read() - dense).norm() / dense.norm()) < 0.02
