from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_entropy.surgery.layer_weights import layer_weights
from lightning_entropy.surgery.lora import inject_lora
from tests.finetuning.diagnosed_models import Encoder

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def names(model: nn.Module, layer: str, projections="attention", sites=(), **options) -> list[str]:
    found = layer_weights(model, {layer: sites}, projections, **options)[layer]
    return [w.name.removeprefix(f"{layer}.").removesuffix(".weight") for w in found]


def test_attention_of_other_libraries() -> None:
    t = pytest.importorskip("transformers")
    timm = pytest.importorskip("timm")
    bert = t.BertModel(t.BertConfig(vocab_size=50, **SIZES))
    inner = [f"attention.self.{part}" for part in ("query", "key", "value")]
    assert names(bert, "encoder.layer.1") == [*inner, "attention.output.dense"]
    assert names(bert, "encoder.layer.1", sites=["encoder.layer.1.attention.self"]) == [
        *inner,
        "attention.output.dense",
    ]
    every = names(bert, "encoder.layer.1", "attention+mlp")
    assert every == [*inner, "attention.output.dense", "intermediate.dense", "output.dense"]
    llama = t.LlamaModel(t.LlamaConfig(vocab_size=50, num_key_value_heads=1, **SIZES))
    assert names(llama, "layers.0") == [f"self_attn.{part}_proj" for part in "qkvo"]
    gpt = t.GPT2Model(t.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))
    assert names(gpt, "h.0") == ["attn.c_attn", "attn.c_proj"]
    t5 = t.T5EncoderModel(t.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    assert names(t5, "encoder.block.0") == [f"layer.0.SelfAttention.{part}" for part in "qkvo"]
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=2)
    assert names(vit, "blocks.0") == ["attn.qkv", "attn.proj"]
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1, 1, 1), num_classes=2)
    assert names(swin, "layers.1.blocks.0") == ["attn.qkv", "attn.proj"]


def test_attention_in_the_layers_own_forward() -> None:
    assert names(Encoder(depth=2), "blocks.1", sites=["blocks.1"]) == ["query", "key", "value", "out"]

    class Layer(nn.Module):
        """Everything in one module: a fused projection, an output, two linear layers."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj, self.up, self.down = (
                nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 32), nn.Linear(32, 8)
            )  # fmt: skip

    assert names(nn.Sequential(Layer()), "0", sites=["0"]) == ["qkv", "proj"]
    alone = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    assert names(alone, "attention", sites=["attention"]) == ["in_proj_weight", "out_proj"]


def test_patterns_exclusions_and_adapters() -> None:
    model = nn.Sequential(*[nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)])
    assert names(model, "1", ["*linear1", "0.*"]) == ["linear1"]
    assert names(model, "1", "attention+mlp", exclude=["1.self_attn"]) == ["linear1", "linear2"]
    with pytest.raises(ValueError, match="names none of the 8 weights"):
        names(model, "1", "*quer")
    assert names(nn.Sequential(nn.Linear(2, 2)), "0") == []
    inject_lora(model, ["0.linear1", "0.self_attn.in_proj_weight"], rank=1)
    assert names(model, "0", sites=["0.self_attn.base_layer"]) == ["self_attn.in_proj_weight", "self_attn.out_proj"]
    assert names(model, "0", "attention+mlp")[-2:] == ["linear1", "linear2"]
    assert torch.is_tensor(layer_weights(model, {"0": []})["0"][0].read())
