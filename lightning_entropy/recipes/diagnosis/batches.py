"""What a diagnosed model is run on: noise, images, sentences, or a datamodule's training batches."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch

from lightning_entropy.recipes.diagnosis.subject import Subject


def random_batches(subject: Subject, *, count: int, size: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Batches of noise: normal pixels, or tokens drawn evenly, with random labels.

    The numbers then describe the weights, not the behaviour on data.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        label = torch.randint(0, max(1, subject.classes), (size,), generator=generator)
        if subject.takes == "images":
            batches.append({"image": torch.randn(size, *subject.shape, generator=generator), "label": label})
            continue
        tokens = torch.randint(0, subject.vocabulary, (size, *subject.shape), generator=generator)
        batches.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "label": label})
    return batches


def image_batches(subject: Subject, images: str, *, count: int, size: int) -> list[dict[str, torch.Tensor]]:
    """Batches of an embedded set or of a folder of images, brought to the model's size and channels.

    Raises:
        ValueError: if the model takes no square images.
    """
    from lightning_entropy.data import ImageSet

    if subject.takes != "images":
        raise ValueError(f"{subject.name} takes tokens; {images} holds images")
    channels, height, width = subject.shape
    if height != width:
        raise ValueError(f"{subject.name} takes images of {height} x {width}, and folders are read as squares")
    data = ImageSet(images, image_size=height, batch_size=size)
    data.setup()
    found = []
    batch: Any
    for batch, _ in zip(data.train_dataloader(), range(count)):
        pixels: torch.Tensor = batch["image"]
        if pixels.shape[1] != channels:
            pixels = pixels.mean(1, keepdim=True).expand(-1, channels, -1, -1).contiguous()
        found.append({"image": pixels, "label": batch["label"]})
    return found


def sentence_batches(subject: Subject, path: str, *, count: int, size: int) -> list[dict[str, torch.Tensor]]:
    """Batches of a text file (a sentence a line) or a CSV file with the column ``text`` and, maybe, ``label``.

    Raises:
        ValueError: if the model takes no tokens, comes without a tokenizer, or the file holds no text.
    """
    if subject.takes != "tokens":
        raise ValueError(f"{subject.name} takes images; {path} holds text")
    from lightning_entropy.extras import require

    source = subject.name.partition(":")[2]
    try:
        tokenizer = require("transformers", extra="finetuning").AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{subject.name} comes without a tokenizer: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts, labels = _sentences(Path(path), count * size)
    batches = []
    for start in range(0, len(texts), size):
        encoded = tokenizer(
            texts[start : start + size],
            padding=True,
            truncation=True,
            max_length=subject.shape[0],
            return_tensors="pt",
        )
        batch = {key: encoded[key] for key in ("input_ids", "attention_mask")}
        batches.append({**batch, "label": torch.tensor(labels[start : start + size])})
    return batches


def _sentences(path: Path, most: int) -> tuple[list[str], list[int]]:
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix != ".csv":
            texts = [line.strip() for line in file if line.strip()][:most]
            labels = [0] * len(texts)
        else:
            reader = csv.DictReader(file)
            if "text" not in (reader.fieldnames or []):
                raise ValueError(f"{path} has no column 'text'; it has {', '.join(reader.fieldnames or [])}")
            rows = [row for row, _ in zip(reader, range(most))]
            texts = [row["text"] for row in rows]
            names = sorted({row.get("label") or "" for row in rows})
            labels = [names.index(row.get("label") or "") for row in rows]
    if not texts:
        raise ValueError(f"{path} holds no text")
    return texts, labels


def open_batches(subject: Subject, data: str, *, count: int, size: int, seed: int = 0) -> list[Any]:
    """Batches for a model of timm or transformers.

    Args:
        subject: the model.
        data: ``random``, ``embedded:digits``, a folder of images, or a file of text (.txt, .csv).
        count: how many batches.
        size: inputs in a batch.
        seed: of the noise.

    Raises:
        ValueError: if ``data`` is none of these or does not go with the model.
    """
    if data == "random":
        return random_batches(subject, count=count, size=size, seed=seed)
    path = Path(data)
    if data.startswith("embedded:") or path.is_dir():
        batches = image_batches(subject, data, count=count, size=size)
    elif path.is_file() and path.suffix in (".txt", ".csv"):
        batches = sentence_batches(subject, data, count=count, size=size)
    else:
        raise ValueError(
            f"data {data!r} is neither random, embedded:digits, a folder of images, nor a .txt or .csv file"
        )
    most = max(int(batch["label"].max()) for batch in batches)
    if subject.classes and most >= subject.classes:
        raise ValueError(
            f"{data} has at least {most + 1} classes and {subject.name} has {subject.classes}: give --classes"
        )
    return batches


__all__ = ["image_batches", "open_batches", "random_batches", "sentence_batches"]
