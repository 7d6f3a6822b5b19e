"""The transformers whose attention entropy is checked, and how each library gives its own eager maps.

The table in docs/observe.md is printed from the same list (benchmarks/observed_models.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FUSED, EAGER = "fused", "eager"


@dataclass(frozen=True)
class ModelCase:
    """A transformer in one of its modes.

    ``build(mode)`` gives the model and the arguments of its forward; ``maps(model, arguments)`` the attention
    probabilities before dropout, as the library computes them in eager mode, in the order of the forward.
    """

    name: str
    library: str
    build: Callable[[str], tuple[nn.Module, dict[str, Any]]]
    maps: Callable[[nn.Module, dict[str, Any]], list[Tensor]]
    modes: tuple[str, ...] = (FUSED, EAGER)
    source: dict[str, str] = field(
        default_factory=lambda: {FUSED: "scaled_dot_product_attention", EAGER: "softmax"},
    )
    note: str = ""


def of_map(p: Tensor) -> Tensor:
    """The definition, in float64."""
    return -(p.double() * p.double().clamp(min=1e-300).log()).sum(-1)


# timm

TIMM: dict[str, tuple[dict[str, Any], int]] = {
    "vit_tiny_patch16_224": ({"img_size": 32, "patch_size": 8, "depth": 2}, 32),
    "deit3_small_patch16_224": ({"img_size": 32, "patch_size": 8, "depth": 2}, 32),
    "eva02_tiny_patch14_224": ({"img_size": 28, "patch_size": 7, "depth": 2}, 28),
    "beit_base_patch16_224": ({"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 2}, 32),
    "swin_tiny_patch4_window7_224": ({"img_size": 56, "depths": (1, 1, 1, 1)}, 56),
    "cait_xxs24_224": ({"img_size": 32, "patch_size": 8, "depth": 2}, 32),
    "maxvit_pico_rw_256": ({"img_size": 64}, 64),
}
TIMM_NOTES = {
    "eva02_tiny_patch14_224": "after rotary embedding",
    "beit_base_patch16_224": "relative position bias included",
    "swin_tiny_patch4_window7_224": "each window is a batch entry; bias and shift mask included",
    "cait_xxs24_224": "between its talking-heads projections; the class attention is fused",
    "maxvit_pico_rw_256": "windows and grids",
}


def _timm(name: str) -> Callable[[str], tuple[nn.Module, dict[str, Any]]]:
    def build(mode: str) -> tuple[nn.Module, dict[str, Any]]:
        timm = pytest.importorskip("timm")
        arguments, size = TIMM[name]
        torch.manual_seed(0)
        model = timm.create_model(name, **arguments).eval()
        for block in model.modules():
            if hasattr(block, "fused_attn"):
                block.fused_attn = mode == FUSED
        return model, {"x": torch.randn(2, 3, size, size)}

    return build


def _timm_maps(model: nn.Module, arguments: dict[str, Any]) -> list[Tensor]:
    maps: list[Tensor] = []
    blocks = [m for m in model.modules() if hasattr(m, "attn_drop")]
    fused = [getattr(block, "fused_attn", None) for block in blocks]
    handles = []
    for block in blocks:
        block.fused_attn = False
        if hasattr(block, "proj_l"):  # CaiT mixes the heads once more between its softmax and its dropout
            handles.append(block.proj_w.register_forward_pre_hook(lambda m, a: maps.append(a[0].permute(0, 3, 1, 2))))
        else:
            handles.append(block.attn_drop.register_forward_pre_hook(lambda m, a: maps.append(a[0])))
    model(**arguments)
    for handle in handles:
        handle.remove()
    for block, value in zip(blocks, fused):
        block.fused_attn = value
    return maps


# torchvision and plain torch


def _torchvision_vit(mode: str) -> tuple[nn.Module, dict[str, Any]]:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    return models.VisionTransformer(32, 8, 2, 2, 16, 32).eval(), {"x": torch.randn(2, 3, 32, 32)}


def _multi_head_maps(model: nn.Module, arguments: dict[str, Any]) -> list[Tensor]:
    maps: list[Tensor] = []
    handles = []
    for layer in [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]:

        def keep(m: nn.Module, args: Any, kwargs: Any, layer: nn.MultiheadAttention = layer) -> None:
            maps.append(layer.forward(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})[1])

        handles.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
    model(**arguments)
    for handle in handles:
        handle.remove()
    return maps


def _torchvision_swin(mode: str) -> tuple[nn.Module, dict[str, Any]]:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    return models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4]).eval(), {"x": torch.randn(2, 3, 64, 64)}


def _softmax_maps(model: nn.Module, arguments: dict[str, Any]) -> list[Tensor]:
    maps: list[Tensor] = []
    original = nn.functional.softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "softmax", lambda s, dim: maps.append(original(s, dim)) or maps[-1])
        model(**arguments)
    return maps


def _encoder_layer(mode: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).train(mode == "train")
    padding = torch.arange(9) >= torch.tensor([9, 5])[:, None]
    return layer, {"src": torch.randn(2, 9, 16), "src_key_padding_mask": padding}


def _multihead(mode: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(2, 9, 16)
    return layer, {"query": x, "key": x, "value": x, "need_weights": mode == "weights"}


def _multihead_maps(model: nn.Module, arguments: dict[str, Any]) -> list[Tensor]:
    return [model(**{**arguments, "need_weights": True}, average_attn_weights=False)[1]]


# transformers


def _transformers(name: str) -> Callable[[str], tuple[nn.Module, dict[str, Any]]]:
    def build(mode: str) -> tuple[nn.Module, dict[str, Any]]:
        t = pytest.importorskip("transformers")
        common: dict[str, Any] = {"attn_implementation": "sdpa" if mode == FUSED else "eager"}
        ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))
        padded = torch.ones(2, 12, dtype=torch.long)
        padded[1, 8:] = 0
        torch.manual_seed(0)
        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        if name == "BertModel":
            model = t.BertModel(t.BertConfig(vocab_size=50, **small, **common))
            return model.eval(), {"input_ids": ids, "attention_mask": padded}
        if name == "GPT2Model":
            config = t.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, **common)
            return t.GPT2Model(config).eval(), {"input_ids": ids}
        if name == "LlamaModel":
            config = t.LlamaConfig(vocab_size=50, num_key_value_heads=2, **small, **common)
            return t.LlamaModel(config).eval(), {"input_ids": ids}
        if name == "T5Model":
            config = t.T5Config(
                vocab_size=50,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
                **common,
            )
            inputs = {"input_ids": ids, "attention_mask": padded, "decoder_input_ids": ids[:, :5]}
            return t.T5Model(config).eval(), inputs
        config = t.ViTConfig(image_size=32, patch_size=8, **small, **common)
        return t.ViTModel(config).eval(), {"pixel_values": torch.randn(2, 3, 32, 32)}

    return build


def _transformers_maps(name: str) -> Callable[[nn.Module, dict[str, Any]], list[Tensor]]:
    def maps(model: nn.Module, arguments: dict[str, Any]) -> list[Tensor]:
        eager, _ = _transformers(name)(EAGER)
        eager.load_state_dict(model.state_dict())
        out = eager(**arguments, output_attentions=True)
        if name != "T5Model":
            return list(out.attentions)
        decoder = [m for pair in zip(out.decoder_attentions, out.cross_attentions) for m in pair]
        return [*out.encoder_attentions, *decoder]

    return maps


_MHA = "multi_head_attention"
MODELS = [
    *(ModelCase(name, "timm", _timm(name), _timm_maps, note=TIMM_NOTES.get(name, "")) for name in TIMM),
    ModelCase("VisionTransformer", "torchvision", _torchvision_vit, _multi_head_maps, (FUSED,), {FUSED: _MHA}),
    ModelCase(
        "SwinTransformer",
        "torchvision",
        _torchvision_swin,
        _softmax_maps,
        (EAGER,),
        note="bias and shift mask included",
    ),
    ModelCase("BertModel", "transformers", _transformers("BertModel"), _transformers_maps("BertModel")),
    ModelCase("ViTModel", "transformers", _transformers("ViTModel"), _transformers_maps("ViTModel")),
    ModelCase("GPT2Model", "transformers", _transformers("GPT2Model"), _transformers_maps("GPT2Model"), note="causal"),
    ModelCase(
        "LlamaModel",
        "transformers",
        _transformers("LlamaModel"),
        _transformers_maps("LlamaModel"),
        note="causal, grouped keys, after rotary embedding",
    ),
    ModelCase(
        "T5Model",
        "transformers",
        _transformers("T5Model"),
        _transformers_maps("T5Model"),
        note="relative position bias included; encoder, decoder and cross-attention",
    ),
    ModelCase(
        "TransformerEncoderLayer",
        "torch",
        _encoder_layer,
        _multi_head_maps,
        ("train", "eval"),
        {"train": _MHA, "eval": _MHA},
        note="the evaluation fast path is off while it is read",
    ),
    ModelCase(
        "MultiheadAttention",
        "torch",
        _multihead,
        _multihead_maps,
        ("weights", "no weights"),
        {"weights": _MHA, "no weights": _MHA},
    ),
]
EVERY = [(case, mode) for case in MODELS for mode in case.modes]
