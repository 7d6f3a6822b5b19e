"""Scaling for another resolution: diffusers' models, vision transformers, and a Trainer that evaluates."""

from __future__ import annotations

import copy
import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_entropy.attention.entropy_scaling import AttentionEntropyScaling, scale_attention
from lightning_entropy.observe import AttentionEntropyReader
from lightning_entropy.surgery.attention_modules import attention_modules
from lightning_entropy.surgery.logit_variance import logit_variance


def unet(**options: Any) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        **options,
    ).eval()


def latents(size: int = 16, text: int = 7) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(2, 4, size, size, generator=g),
        "timestep": 3,
        "encoder_hidden_states": torch.randn(2, text, 12, generator=g),
    }


def by_hand(model: nn.Module, c: dict[str, float]) -> nn.Module:
    """The same function by larger queries: the projection of each self-attention times its factor."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, factor in c.items():
            attention = twin.get_submodule(name)
            attention.to_q.weight *= factor
            if attention.to_q.bias is not None:
                attention.to_q.bias *= factor
    return twin


@pytest.mark.parametrize("processor", ["AttnProcessor2_0", "AttnProcessor", "SlicedAttnProcessor", "fused"])
@pytest.mark.parametrize("mode", ["paper", "log", "absolute"])
def test_unet_of_text(processor: str, mode: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    from diffusers.models import attention_processor

    model, inputs = unet(), latents()
    if processor == "fused":
        model.fuse_qkv_projections()
    else:
        options = (2,) if processor == "SlicedAttnProcessor" else ()
        model.set_attn_processor(getattr(attention_processor, processor)(*options))
    with torch.no_grad():
        plain = model(**inputs).sample
        with scale_attention(model, base_size=8, mode=mode, variance=2.0) as report:
            scaled = model(**inputs).sample
        assert torch.equal(model(**inputs).sample, plain)
        outer, inner = 16 * 16, 8 * 8
        ratio = {n: math.log(n) / math.log(n / 4) for n in (outer, inner, 16)}
        tokens = {n: outer if n.startswith(("down_blocks.0", "up_blocks.1")) else inner for n in report.factors}
        formula = {
            "paper": lambda n: ratio[n] ** 0.5,
            "log": lambda n: ratio[n],
            "absolute": lambda n: (1 + 2 * math.log(4) / 2.0) ** 0.5,
        }[mode]
        expected = {name: formula(n) for name, n in tokens.items()}
        assert {n: c for n, (_, _, c) in report.factors.items()} == pytest.approx(expected)
        assert all(name.endswith("attn1") for name in report.factors)
        source = unet()
        torch.testing.assert_close(scaled, by_hand(source, expected)(**inputs).sample, rtol=1e-4, atol=1e-5)
    assert diffusers is not None
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_at_the_training_size_no_bit_changes() -> None:
    model, inputs = unet(), latents(8)
    with torch.no_grad():
        plain = model(**inputs).sample
        report = scale_attention(model, base_size=(8, 8))
        assert torch.equal(model(**inputs).sample, plain)
    assert {c for _, _, c in report.factors.values()} == {1.0}


def test_cross_attention_is_untouched_also_where_text_and_image_are_as_long() -> None:
    model, inputs = unet(), latents(16, text=256)
    cross = [n for n in attention_modules(model) if n.endswith("attn2")]
    kept: dict[str, Tensor] = {}
    for name in cross:
        model.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: kept.__setitem__(name, out))
    with torch.no_grad():
        with AttentionEntropyReader(model, cross[:1]) as reader:
            model(**inputs)
        before = reader.layers[0].entropy
        report = scale_attention(model, base_size=8)
        model(**inputs)
        assert set(report.factors).isdisjoint(cross)
        module = model.get_submodule(cross[0])
        hidden = torch.randn(2, 256, module.query_dim)
        with_scaling = module(hidden, encoder_hidden_states=inputs["encoder_hidden_states"])
        report.undo()
        assert torch.equal(module(hidden, encoder_hidden_states=inputs["encoder_hidden_states"]), with_scaling)
    assert before.isfinite().all()


def test_sizes_that_change_from_call_to_call() -> None:
    model = unet()
    report = scale_attention(model, base_size=8)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1"
    for size in (8, 16, 32, 4, 8):
        with torch.no_grad():
            model(**latents(size))
        tokens = (size / 2) ** 2
        assert report.factors[name][:2] == (tokens, 16.0)
        assert report.factors[name][2] == pytest.approx((math.log(tokens) / math.log(16)) ** 0.5)


def test_unconditional_unet_and_transformer() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    model = diffusers.UNet2DModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **sizes,
    ).eval()
    inputs: dict[str, Any] = {"sample": torch.randn(1, 3, 16, 16), "timestep": 3}
    with torch.no_grad():
        report = scale_attention(model, base_size=8)
        scaled = model(**inputs).sample
        factors = {n: c for n, (_, _, c) in report.factors.items()}
        report.undo()
        torch.testing.assert_close(scaled, by_hand(model, factors)(**inputs).sample, rtol=1e-4, atol=1e-5)
    assert set(factors) == set(attention_modules(model))
    dit = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        caption_channels=12,
        use_additional_conditions=False,
    ).eval()
    report = scale_attention(dit, base_size=8)
    with torch.no_grad():
        dit(torch.randn(1, 4, 16, 16), timestep=torch.tensor([3]), encoder_hidden_states=torch.randn(1, 5, 12))
    assert report.factors == {
        "transformer_blocks.0.attn1": (64.0, 16.0, pytest.approx((math.log(64) / math.log(16)) ** 0.5))
    }


def test_query_and_key_norms_do_not_cancel_the_factor() -> None:
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    module = Attention(query_dim=16, heads=2, dim_head=8, qk_norm="layer_norm").eval()
    x = torch.randn(1, 16, 16)
    with torch.no_grad():
        plain = module(x)
        with AttentionEntropyReader(module) as reader:
            module(x)
        with scale_attention(module, base_tokens=4), AttentionEntropyReader(module) as sharper:
            scaled = module(x)
    assert not torch.allclose(plain, scaled)
    assert (sharper.layers[0].entropy < reader.layers[0].entropy).all()


def test_joint_attention_of_text_and_image() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        out_channels=4,
    ).eval()
    with pytest.raises(ValueError, match=r"transformer_blocks.0.attn: text and image share its softmax"):
        scale_attention(model, base_size=8)
    report = scale_attention(model, base_tokens=16 + 5)
    with torch.no_grad():
        model(
            torch.randn(1, 4, 16, 16),
            encoder_hidden_states=torch.randn(1, 5, 12),
            pooled_projections=torch.randn(1, 12),
            timestep=torch.tensor([3]),
        )
    assert report.factors["transformer_blocks.0.attn"][:2] == (64 + 5, 21)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("fused", [True, False])
def test_vision_transformer_at_another_size(registers: int, fused: bool) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        depth=2,
        dynamic_img_size=True,
        reg_tokens=registers,
        num_classes=0,
    ).eval()
    for block in model.blocks:
        block.attn.fused_attn = fused
    prefix = 1 + registers
    n, t = 36 + prefix, 16 + prefix
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        plain = model(x)
        with scale_attention(model, base_size=32) as report:
            by_size = model(x)
            again = model(x)
        for factors in report.factors.values():
            assert factors == pytest.approx((n, t, (math.log(n) / math.log(t)) ** 0.5))
        with scale_attention(model, base_tokens=t):
            assert torch.equal(model(x), again)
        assert torch.equal(by_size, again)
        assert torch.equal(model(x), plain)


def test_transformers_vision_transformer_counts_its_class_token() -> None:
    t = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = t.ViTModel(t.ViTConfig(image_size=32, patch_size=8, **sizes)).eval()
    report = scale_attention(model, base_size=32)
    model(pixel_values=torch.randn(1, 3, 48, 48), interpolate_pos_encoding=True)
    assert report.factors["layers.0.attention"][:2] == (37, 17)


def test_windows_have_as_many_tokens_at_every_size() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"layers.0.blocks.0.attn: its windows \(window_size=.* at every size"):
        scale_attention(model, base_size=56)


def test_without_an_image_above_it_says_so() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    scale_attention(layer, base_size=4)
    with pytest.raises(ValueError, match=r"saw no \(batch, channels, height, width\) input above self_attn"):
        layer(torch.randn(1, 9, 8))


def test_compiled_and_copied() -> None:
    torch._dynamo.reset()
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, dynamic_img_size=True, num_classes=0
    ).eval()
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        plain = model(x)
        scale_attention(model, base_size=32)
        expected = model(x)
        assert not torch.equal(expected, plain)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
    torch._dynamo.reset()


def test_checkpointed_training_at_another_size() -> None:
    timm = pytest.importorskip("timm")
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, dynamic_img_size=True, num_classes=0
        )
        model.set_grad_checkpointing(checkpointing)
        scale_attention(model, base_size=32)
        model(torch.randn(1, 3, 48, 48)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_logit_variance() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(x)
        measured = {}
        for fused in (True, False):
            model.blocks[0].attn.fused_attn = fused
            measured[fused] = logit_variance(model, x)
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        q, k, _ = (
            model.blocks[0].attn.qkv(model.blocks[0].norm1(tokens)).unflatten(-1, (3, 3, 64)).permute(2, 0, 3, 1, 4)
        )
        s = (q @ k.mT / 8).double()
    expected = ((s - s.mean(-1, keepdim=True)) ** 2).mean()
    for fused in (True, False):
        assert measured[fused] == {"blocks.0.attn": pytest.approx(expected.item(), rel=1e-4)}
    model.blocks[0].attn.fused_attn = True
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("kind", ["causal", "bool", "float"])
def test_logit_variance_leaves_masked_keys_out(kind: str) -> None:
    class Masked(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            allowed = torch.ones(5, 5, dtype=torch.bool).tril()
            if kind == "causal":
                return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
            mask = allowed if kind == "bool" else torch.zeros(5, 5).masked_fill(~allowed, -torch.inf)
            return nn.functional.scaled_dot_product_attention(q, q, q, mask)

    q = torch.randn(1, 2, 5, 4)
    s = q[0] @ q[0].mT / 2
    rows = [s[h, i, : i + 1].var(unbiased=False) for h in range(2) for i in range(1, 5)]
    assert logit_variance(Masked(), q) == {"": pytest.approx(torch.stack(rows).mean().item(), rel=1e-4)}


class Pixels(L.LightningModule):
    """Evaluates at 48 pixels what was trained at 32; its own forward is never called."""

    def __init__(self) -> None:
        super().__init__()
        timm = pytest.importorskip("timm")
        torch.manual_seed(0)
        self.net = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, dynamic_img_size=True, num_classes=2
        )
        self.fail = False
        self.seen: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], index: int) -> Tensor:
        if self.fail:
            raise RuntimeError("on request")
        self.seen.append(float("forward" in self.net.blocks[0].attn.__dict__))
        return self.net(batch[0]).sum()

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def images(size: int) -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(2, 3, size, size)), batch_size=2)


def run(tmp_path: Any, *callbacks: Any) -> L.Trainer:
    return L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def test_in_a_trainer(tmp_path: Any, announced: list[str]) -> None:
    callback, module = AttentionEntropyScaling(base_size=32), Pixels()
    trainer = run(tmp_path, callback)
    trainer.validate(module, images(48), verbose=False)
    assert callback.report is not None
    assert callback.report.factors["net.blocks.0.attn"][:2] == (37, 17)
    assert "forward" not in module.net.blocks[0].attn.__dict__
    trainer.fit(module, images(32), images(48))
    trainer.test(module, images(48), verbose=False)
    trainer.predict(module, images(48))
    assert set(module.seen) == {1.0}
    assert "forward" not in module.net.__dict__
    assert len([line for line in announced if line.startswith("AttentionEntropyScaling")]) == 1
    module.fail = True
    with pytest.raises(RuntimeError, match="on request"):
        trainer.validate(module, images(48), verbose=False)
    assert "forward" not in module.net.blocks[0].attn.__dict__


def test_training_is_the_same_with_and_without(tmp_path: Any) -> None:
    weights = []
    for callbacks in ([], [AttentionEntropyScaling(base_size=16)]):
        module = Pixels()
        torch.manual_seed(1)
        run(tmp_path, *callbacks).fit(module, images(32), images(48))
        weights.append(module.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of base_tokens"),
        ({"base_tokens": 4, "base_size": 4}, "exactly one of base_tokens"),
        ({"base_tokens": 0}, "base_tokens must be at least 1, got 0"),
        ({"base_size": 0}, "base_size must be a positive number or two, got 0"),
        ({"base_size": [1, 2, 3]}, "base_size must be a positive number or two"),
        ({"base_size": 8, "mode": "exact"}, "mode must be one of"),
        ({"base_size": 8, "mode": "absolute"}, "needs variance="),
        ({"base_size": 8, "prefix_tokens": -1}, "prefix_tokens must not be negative"),
    ],
)
def test_refuses_arguments_at_once(arguments: dict[str, Any], message: str) -> None:
    for make in (AttentionEntropyScaling, lambda **a: scale_attention(nn.MultiheadAttention(4, 1), **a)):
        with pytest.raises(ValueError, match=message):
            make(**arguments)


def test_variance_by_module() -> None:
    module = nn.MultiheadAttention(4, 1)
    scale_attention(module, base_tokens=4, mode="absolute", variance={"other": 1.0})
    x = torch.randn(3, 1, 4)
    with pytest.raises(ValueError, match=r"variance=...\) has no entry for"):
        module(x, x, x)


def test_nothing_to_attach_to() -> None:
    with pytest.raises(ValueError, match="AttentionEntropyScaling found no attention in Linear"):
        scale_attention(nn.Linear(2, 2), base_size=4)
