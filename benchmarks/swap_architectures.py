"""The architectures of the swap-coverage table: random weights, small where the library lets one choose."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Architecture(NamedTuple):
    """How to build a model, and what to call it on (None: what ``swap_activations`` finds by itself)."""

    library: str
    name: str
    build: Callable[[], nn.Module]
    example: Callable[[], Any] | None = None


def _timm(name: str, **arguments: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **arguments)


def _torchvision(name: str, **arguments: Any) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, **arguments)


_SMALL = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _transformers(model: str, config: str, **settings: Any) -> nn.Module:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**settings))


class _Written(nn.Module):
    """A model as users write them: functions, methods, one module at several places, a loop, a helper function."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.act = nn.GELU()
        self.function = F.silu
        self.same = nn.Sequential(nn.Linear(8, 8), self.act, nn.Linear(8, 8), self.act)
        self.gate = nn.Linear(8, 8)

    def _inner(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + F.leaky_relu(layer(x), 0.2)
        x = self.same(self._inner(x)).relu_()
        x = self.function(x) + (lambda y: F.elu(y))(x)
        x = _outside(x)
        return self.act(self.act(x) + 1) * torch.sigmoid(self.gate(x))


def _outside(x: torch.Tensor) -> torch.Tensor:
    return F.mish(x)


def _image(side: int) -> Callable[[], Any]:
    return lambda: torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def _tokens(**more: Any) -> Callable[[], Any]:
    ids = torch.arange(3, 9)[None]
    return lambda: {"input_ids": ids, **dict.fromkeys(more, ids)}


TIMM = ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "tnt_s_legacy_patch16_224", "resnet18", "resnet50d",
        "skresnet18", "resnest14d", "convnext_atto", "convnextv2_atto", "efficientnet_b0", "tf_efficientnetv2_b0",
        "densenet121", "regnety_002", "mobilenetv3_small_050", "mobilevit_xxs", "mobilenetv4_conv_small",
        "swin_tiny_patch4_window7_224", "mixer_s32_224", "gmixer_12_224", "resmlp_12_224", "eva02_tiny_patch14_224",
        "xception41", "legacy_xception", "inception_v4", "vgg11_bn", "cait_xxs24_224", "poolformer_s12",
        "caformer_s18", "ghostnet_050", "levit_128s", "repvgg_a0", "dla34", "rexnet_100", "fastvit_t8",
        "efficientformer_l1", "visformer_tiny", "edgenext_xx_small", "maxvit_pico_rw_256", "sequencer2d_s",
        "pnasnet5large", "nasnetalarge", "hrnet_w18_small", "resnetv2_50", "nf_regnet_b0", "efficientvit_b0",
        "tinynet_e", "selecsls42b", "dpn48b"]  # fmt: skip
TORCHVISION = ["alexnet", "vgg11", "resnet18", "resnet50", "wide_resnet50_2", "densenet121", "googlenet",
               "inception_v3", "vit_b_32", "swin_t", "swin_v2_t", "convnext_tiny", "mobilenet_v2",
               "mobilenet_v3_small", "efficientnet_b0", "efficientnet_v2_s", "squeezenet1_1", "shufflenet_v2_x0_5",
               "mnasnet0_5", "regnet_y_400mf", "maxvit_t", "lraspp_mobilenet_v3_large", "deeplabv3_resnet50",
               "r3d_18"]  # fmt: skip
_TORCHVISION_EXAMPLES: dict[str, Callable[[], Any]] = {
    "inception_v3": _image(299),
    "maxvit_t": _image(224),
    "vit_b_32": _image(224),
    "r3d_18": lambda: torch.randn(1, 3, 8, 64, 64, generator=torch.Generator().manual_seed(0)),
}
_VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
           "image_size": 32, "patch_size": 8}  # fmt: skip
_LLAMA = {**_SMALL, "num_key_value_heads": 2}
_T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
       "decoder_start_token_id": 0}  # fmt: skip
TRANSFORMERS: list[tuple[str, str, dict[str, Any], Callable[[], Any] | None]] = [
    ("BertForMaskedLM", "BertConfig", _SMALL, None),
    ("BertModel", "BertConfig", _SMALL, None),
    ("RobertaForMaskedLM", "RobertaConfig", _SMALL, None),
    ("DistilBertForMaskedLM", "DistilBertConfig",
     {"vocab_size": 60, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}, None),
    ("AlbertModel", "AlbertConfig", {**_SMALL, "embedding_size": 8}, None),
    ("ElectraForPreTraining", "ElectraConfig", {**_SMALL, "embedding_size": 8}, None),
    ("DebertaV2Model", "DebertaV2Config", _SMALL, None),
    ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2}, None),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", _SMALL, None),
    ("BloomForCausalLM", "BloomConfig", {"vocab_size": 60, "hidden_size": 16, "n_layer": 2, "n_head": 2}, None),
    ("FalconForCausalLM", "FalconConfig",
     {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}, None),
    ("OPTForCausalLM", "OPTConfig",
     {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32,
      "word_embed_proj_dim": 16, "max_position_embeddings": 64}, None),
    ("LlamaForCausalLM", "LlamaConfig", _LLAMA, None),
    ("MistralForCausalLM", "MistralConfig", _LLAMA, None),
    ("MixtralForCausalLM", "MixtralConfig", {**_LLAMA, "num_local_experts": 4}, None),
    ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA, None),
    ("GemmaForCausalLM", "GemmaConfig", {**_LLAMA, "head_dim": 8}, None),
    ("PhiForCausalLM", "PhiConfig", _SMALL, None),
    ("T5ForConditionalGeneration", "T5Config", _T5, None),
    ("T5ForConditionalGeneration", "T5Config", {**_T5, "feed_forward_proj": "gated-gelu"}, None),
    ("BartForConditionalGeneration", "BartConfig",
     {"vocab_size": 60, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
      "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64},
     None),
    ("ViTForImageClassification", "ViTConfig", _VISION, None),
    ("BeitModel", "BeitConfig", _VISION, None),
    ("Dinov2Model", "Dinov2Config", {**_VISION, "use_swiglu_ffn": True}, None),
    ("CLIPModel", "CLIPConfig",
     {"text_config": {**_SMALL, "projection_dim": 16}, "vision_config": {**_VISION, "projection_dim": 16},
      "projection_dim": 16}, None),
    ("ConvNextModel", "ConvNextConfig", {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}, None),
    ("SegformerModel", "SegformerConfig",
     {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}, None),
    ("ResNetModel", "ResNetConfig",
     {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}, None),
    ("MobileNetV2Model", "MobileNetV2Config", {"depth_multiplier": 0.35, "image_size": 64}, None),
    ("Wav2Vec2Model", "Wav2Vec2Config",
     {**_SMALL, "conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_conv_pos_embeddings": 4,
      "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2}, None),
    ("WhisperForConditionalGeneration", "WhisperConfig",
     {"vocab_size": 60, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
      "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8,
      "max_source_positions": 20, "max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1,
      "eos_token_id": 2, "decoder_start_token_id": 1}, None),
]  # fmt: skip


def architectures() -> list[Architecture]:
    """All of them; the first of each library are the quickest."""
    found = [Architecture("timm", n, partial(_timm, n)) for n in TIMM]
    for name in TORCHVISION:
        more: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        if ("resnet50" in name and "deeplab" in name) or "lraspp" in name:
            more["weights_backbone"] = None
        example = _TORCHVISION_EXAMPLES.get(name, _image(64))
        found.append(Architecture("torchvision", name, partial(_torchvision, name, **more), example))
    for model, config, settings, example in TRANSFORMERS:
        proj = settings.get("feed_forward_proj")
        label = f"{model} ({proj})" if proj else model
        found.append(Architecture("transformers", label, partial(_transformers, model, config, **settings), example))
    layer = partial(nn.TransformerEncoderLayer, 16, 2, 32, batch_first=True)
    found += [
        Architecture("torch", "TransformerEncoder", lambda: nn.TransformerEncoder(layer(), 2)),
        Architecture("torch", "TransformerEncoder (gelu)", lambda: nn.TransformerEncoder(layer(activation="gelu"), 2)),
        Architecture("torch", "TransformerEncoder (module)",
                     lambda: nn.TransformerEncoder(layer(activation=nn.GELU()), 2)),
        Architecture("torch", "TransformerDecoder",
                     lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32), 2)),
        Architecture("torch", "Transformer", lambda: nn.Transformer(16, 2, 2, 2, 32)),
        Architecture("torch", "LSTM and ReLU", lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.LSTM(8, 8))),
        Architecture("torch", "RNN (relu)", lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(),
                                                                  nn.RNN(8, 8, nonlinearity="relu"))),
        Architecture("torch", "written by hand", _Written),
    ]  # fmt: skip
    return found


# A subset that takes seconds, for the tests.
QUICK = {"vit_tiny_patch16_224", "resnet18", "convnext_atto", "densenet121", "googlenet", "mobilenetv3_small_050",
         "BertForMaskedLM", "RobertaForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM", "MixtralForCausalLM",
         "T5ForConditionalGeneration (gated-gelu)", "TransformerEncoder", "RNN (relu)",
         "written by hand"}  # fmt: skip
