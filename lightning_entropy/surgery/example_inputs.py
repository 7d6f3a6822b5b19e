"""Inputs on which a model can be run once, when nobody gave any: from what the model says of itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]


class Example(NamedTuple):
    """A call: of the submodule ``name`` (empty for the model itself)."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def as_example(value: Any) -> Example:
    """What a user passes: a tensor, a tuple of positional arguments, or a mapping of keyword arguments."""
    if isinstance(value, Mapping):
        return Example("", (), dict(value))
    if isinstance(value, tuple | list):
        return Example("", tuple(value), {})
    return Example("", (value,), {})


def runnable(model: nn.Module) -> bool:
    """Whether a model has weights that can be computed with: no meta tensors, none that wait for a first input."""
    tensors = [*model.parameters(), *model.buffers()]
    return not any(isinstance(t, UninitializedTensorMixin) or t.is_meta for t in tensors)


def example_inputs(model: nn.Module) -> Iterator[Example]:
    """Calls to try in turn; most models need the first."""
    yield from _of(model, "")
    for name, child in model.named_children():
        if any(True for _ in child.parameters()):
            yield from _declared(child, name)
    wrapped = [(n, c) for n, c in model.named_children() if any(True for _ in c.parameters())]
    if len(wrapped) == 1:
        yield from _guessed(wrapped[0][1], wrapped[0][0])


def _of(model: nn.Module, name: str) -> Iterator[Example]:
    yield from _declared(model, name)
    yield from _guessed(model, name)


def _place(model: nn.Module) -> dict[str, Any]:
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    return {} if like is None else {"device": like.device, "dtype": like.dtype}


def _noise(model: nn.Module, *shape: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    # The device and dtype are said, since this may run inside contexts that change both defaults.
    return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32).to(**_place(model))


def _tokens(model: nn.Module, vocabulary: int, length: int) -> Tensor:
    ids = torch.arange(2, 2 + 3 * length, 3, device="cpu")[None] % max(vocabulary, 1)
    return ids.to(device=_place(model).get("device", "cpu"))


def _declared(model: nn.Module, name: str) -> Iterator[Example]:
    """From an example array (Lightning), a pretrained configuration (timm) or a config (transformers)."""
    array = getattr(model, "example_input_array", None)
    if array is not None:
        yield as_example(array)._replace(name=name)
    settings = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(settings, Mapping) and settings.get("input_size"):
        size = tuple(settings["input_size"])
        embed = getattr(model, "patch_embed", None)
        grid = getattr(embed, "img_size", None)
        channels = getattr(model, "in_chans", None) or size[0]
        if isinstance(grid, tuple):
            yield Example(name, (_noise(model, 1, channels, *grid),), {})
        yield Example(name, (_noise(model, 1, *size),), {})
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "model_type"):
        yield from _transformers(model, config, name)


def _transformers(model: nn.Module, config: Any, name: str) -> Iterator[Example]:
    main = getattr(model, "main_input_name", "input_ids")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None) or 32
    ids = _tokens(model, vocabulary, 6)
    image = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", None)
    size = (image, image) if isinstance(image, int) else tuple(image) if image else (224, 224)
    channels = getattr(config, "num_channels", 3)
    pixels = _noise(model, 1, channels, *size)
    if main == "pixel_values":
        yield Example(name, (), {"pixel_values": pixels})
        yield Example(name, (), {"pixel_values": pixels, "input_ids": ids})
    elif main == "input_values":
        yield Example(name, (), {"input_values": _noise(model, 1, 4000)})
    elif main == "input_features":
        mels = getattr(config, "num_mel_bins", 80)
        length = 2 * getattr(config, "max_source_positions", 100)
        features = {"input_features": _noise(model, 1, mels, length)}
        yield Example(name, (), {**features, "decoder_input_ids": ids})
        yield Example(name, (), features)
    elif getattr(config, "vision_config", None) is not None:
        yield Example(name, (), {"input_ids": ids, "pixel_values": pixels})
    if getattr(config, "is_encoder_decoder", False):
        yield Example(name, (), {"input_ids": ids, "decoder_input_ids": ids})
    yield Example(name, (), {"input_ids": ids})


def _guessed(model: nn.Module, name: str) -> Iterator[Example]:
    """From the first layer that has weights and says how wide its input is."""
    if isinstance(model, nn.Transformer | nn.TransformerDecoder | nn.TransformerDecoderLayer):
        width = next(m.embed_dim for m in model.modules() if isinstance(m, nn.MultiheadAttention))
        yield Example(name, (_noise(model, 4, 4, width), _noise(model, 4, 4, width)), {})
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            axes = {"Conv1d": 1, "Conv2d": 2, "Conv3d": 3}[_convolution(module)]
            if axes == 2:
                image = getattr(model, "image_size", None)
                sides = [image] if isinstance(image, int) else [64, 224, 299, 32, 28, 8]
                for side in sides:
                    yield Example(name, (_noise(model, 2, module.in_channels, side, side),), {})
            else:
                yield Example(name, (_noise(model, 2, module.in_channels, *[32] * axes),), {})
            return
        if isinstance(module, nn.Embedding):
            yield Example(name, (_tokens(model, module.num_embeddings, 6),), {})
            return
        if isinstance(module, nn.MultiheadAttention):
            yield Example(name, (_noise(model, 4, 4, module.embed_dim),), {})
            return
        if isinstance(module, nn.Linear):
            yield Example(name, (_noise(model, 2, module.in_features),), {})
            yield Example(name, (_noise(model, 1, 4, module.in_features),), {})
            return
        if isinstance(module, nn.RNNBase):
            yield Example(name, (_noise(model, 2, 4, module.input_size),), {})
            return


def _convolution(module: nn.Module) -> str:
    return next(base.__name__ for base in type(module).__mro__ if base in (nn.Conv1d, nn.Conv2d, nn.Conv3d))


__all__ = ["Example", "as_example", "example_inputs", "runnable"]
