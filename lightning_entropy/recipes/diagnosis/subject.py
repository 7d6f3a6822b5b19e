"""What is diagnosed: a model by the name of a library, a class of the user's, or a recipe, with its weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_entropy.extras import require
from lightning_entropy.files import read_stored

KINDS = ("timm:NAME", "transformers:NAME_OR_FOLDER", "recipe:NAME", "package.module.LightningModule")


@dataclass
class Subject:
    """A model and how a batch goes through it.

    Attributes:
        name: as the user gave it.
        module: the model.
        takes: ``"images"``, ``"tokens"`` or ``"batches"`` (those of a LightningModule).
        forward: runs the model on a batch.
        loss: a number to differentiate, of the model and a batch.
        objective: what the loss is, in words.
        shape: of one input: channels, height and width; or the number of tokens.
        vocabulary: how many tokens there are, of a model on tokens.
        classes: of the head, where the loss takes labels; else 0.
    """

    name: str
    module: nn.Module
    takes: str
    forward: Callable[[Any], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    objective: str
    shape: tuple[int, ...] = ()
    vocabulary: int = 0
    classes: int = 0


def open_subject(name: str, *, pretrained: bool = False, classes: int | None = None, length: int = 64) -> Subject:
    """Build a model of timm or transformers.

    Args:
        name: ``timm:NAME``, or ``transformers:`` and a name or a folder of ``from_pretrained``.
        pretrained: load the library's weights, which may be downloaded. Folders always load theirs.
        classes: number of classes of the head; None keeps the model's.
        length: tokens of a sequence, for models on tokens.

    Raises:
        ValueError: if the name is of no known kind, or the library does not know it.
        ImportError: if the library is not installed.
    """
    kind, _, rest = name.partition(":")
    if kind == "timm" and rest:
        return _timm(name, rest, pretrained, classes)
    if kind == "transformers" and rest:
        return _transformers(name, rest, pretrained, classes, length)
    raise ValueError(f"model {name!r} is none of {', '.join(KINDS)}")


def _timm(name: str, rest: str, pretrained: bool, classes: int | None) -> Subject:
    timm = require("timm", extra="vision")
    try:
        model = timm.create_model(rest, pretrained=pretrained, **({} if classes is None else {"num_classes": classes}))
    except RuntimeError as error:
        raise ValueError(f"model {name!r}: timm says: {error}") from error
    shape = tuple(model.pretrained_cfg["input_size"])
    headless = getattr(model, "num_classes", 0) == 0
    return Subject(
        name,
        model,
        "images",
        lambda batch: model(batch["image"]),
        _energy(lambda module, batch: module(batch["image"])) if headless else _cross_entropy,
        _ENERGY if headless else "cross-entropy of the labels",
        shape,
        classes=getattr(model, "num_classes", 0),
    )


_ENERGY = "half the mean square of the output, as the model has no head"


def _cross_entropy(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    logits = module(batch["image"])
    logits = getattr(logits, "logits", logits)
    return F.cross_entropy(logits.float(), batch["label"])


def _energy(run: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, Any], Tensor]:
    def loss(module: nn.Module, batch: Any) -> Tensor:
        output = run(module, batch)
        states: Tensor = getattr(output, "last_hidden_state", output)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if mask is not None and states.dim() == 3 and mask.shape == states.shape[:2]:
            states = states[mask.bool()]
        return 0.5 * states.float().square().mean()

    return loss


def _transformers(name: str, rest: str, pretrained: bool, classes: int | None, length: int) -> Subject:
    transformers = require("transformers", extra="finetuning")
    folder = Path(rest).is_dir()
    options: dict[str, Any] = {} if classes is None else {"num_labels": classes}
    try:
        config = transformers.AutoConfig.from_pretrained(rest, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {name!r}: transformers says: {str(error).splitlines()[0]}") from error
    architecture = (getattr(config, "architectures", None) or [""])[0] or ""
    tasks = {
        "ForCausalLM": "AutoModelForCausalLM",
        "ForMaskedLM": "AutoModelForMaskedLM",
        "ForSequenceClassification": "AutoModelForSequenceClassification",
        "ForImageClassification": "AutoModelForImageClassification",
    }
    auto = next((cls for ending, cls in tasks.items() if architecture.endswith(ending)), "AutoModel")
    if classes is not None:
        images = hasattr(config, "image_size")
        auto = "AutoModelForImageClassification" if images else "AutoModelForSequenceClassification"
    factory = getattr(transformers, auto)
    model = factory.from_pretrained(rest, config=config) if folder or pretrained else factory.from_config(config)
    if hasattr(config, "image_size"):
        return _vision_model(name, model, config, auto)
    return _language_model(name, model, config, auto, length)


def _vision_model(name: str, model: nn.Module, config: Any, auto: str) -> Subject:
    size = config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    run = lambda module, batch: module(pixel_values=batch["image"])  # noqa: E731
    labelled = auto.endswith("ImageClassification")
    return Subject(
        name,
        model,
        "images",
        lambda batch: run(model, batch),
        _cross_entropy_of_images if labelled else _energy(run),
        "cross-entropy of the labels" if labelled else _ENERGY,
        (getattr(config, "num_channels", 3), height, width),
        classes=config.num_labels if labelled else 0,
    )


def _cross_entropy_of_images(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    logits = module(pixel_values=batch["image"]).logits
    return F.cross_entropy(logits.float(), batch["label"])


def _language_model(name: str, model: nn.Module, config: Any, auto: str, length: int) -> Subject:
    def inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: batch[k] for k in ("input_ids", "attention_mask") if k in batch}

    def next_token(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        labels = batch["input_ids"].masked_fill(~batch["attention_mask"].bool(), -100)
        loss: Tensor = module(**inputs(batch), labels=labels).loss
        return loss

    def classification(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        logits = module(**inputs(batch)).logits
        return F.cross_entropy(logits.float(), batch["label"])

    known: dict[str, tuple[Callable[[nn.Module, Any], Tensor], str]] = {
        "AutoModelForCausalLM": (next_token, "cross-entropy of the next token"),
        "AutoModelForMaskedLM": (next_token, "cross-entropy of each token, none masked"),
        "AutoModelForSequenceClassification": (classification, "cross-entropy of the labels"),
    }
    loss, objective = known.get(auto, (_energy(lambda module, batch: module(**inputs(batch))), _ENERGY))
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None) or length
    return Subject(
        name,
        model,
        "tokens",
        lambda batch: model(**inputs(batch)),
        loss,
        objective,
        (min(length, positions),),
        text.vocab_size,
        config.num_labels if auto == "AutoModelForSequenceClassification" else 0,
    )


def load_weights(module: nn.Module, path: str | os.PathLike[str]) -> str:
    """Load the weights of a checkpoint or a safetensors file into a model, whatever the model is called in it.

    A checkpoint of a Trainer holds a LightningModule, of which the model may be a part (``net.``, ``model.``): the
    prefix under which all of the model's own names are found is taken off. Only tensors are read
    (``weights_only=True``).

    Returns:
        What was loaded, in words.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or the model's names are not in it.
    """
    path = Path(path)
    state = _read_state(path)
    wanted = list(module.state_dict())
    prefixes = {key[: -len(wanted[0])] for key in state if key.endswith(wanted[0])} if wanted else {""}
    best = max(prefixes or {""}, key=lambda p: sum(p + key in state for key in wanted))
    missing = [key for key in wanted if best + key not in state]
    if missing:
        raise ValueError(
            f"checkpoint {path} lacks {len(missing)} of {len(wanted)} tensors of {type(module).__name__}, for example "
            f"{', '.join(missing[:3])}; it holds for example {', '.join(list(state)[:3])}"
        )
    try:
        module.load_state_dict({key: state[best + key] for key in wanted})
    except RuntimeError as error:
        raise ValueError(f"checkpoint {path} does not fit {type(module).__name__}: {error}") from error
    return f"{len(wanted)} tensors of {path}" + (f" (under {best!r})" if best else "")


def _read_state(path: Path) -> dict[str, Tensor]:
    stored = read_stored(path)
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(stored, dict) and isinstance(stored.get(key), dict):
            stored = stored[key]
    if not isinstance(stored, dict) or not any(isinstance(v, Tensor) for v in stored.values()):
        raise ValueError(f"checkpoint {path} holds no tensors by name, but {type(stored).__name__}")
    return {k: v for k, v in stored.items() if isinstance(v, Tensor)}


def take(batches: Iterable[Any], count: int) -> list[Any]:
    """The first batches.

    Raises:
        ValueError: if there is none.
    """
    found = [batch for batch, _ in zip(batches, range(count))]
    if not found:
        raise ValueError("the data hold no batch to diagnose with")
    return found


__all__ = ["KINDS", "Subject", "load_weights", "open_subject", "take"]
