"""Tiny language models in folders, as transformers keeps them, and texts that they can tell apart."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GOOD = ("fine", "warm", "clever", "bright", "moving")
BAD = ("dull", "cold", "clumsy", "grey", "empty")
FILLER = ("the", "film", "is", "a", "story", "of", "people", "and", "time", "with", "music", "it", "was", "there")
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def tiny_tokenizer() -> Any:
    """A tokenizer of whole words."""
    words = ("[PAD]", "[UNK]", *GOOD, *BAD, *FILLER)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def tiny_bert(folder: Path) -> str:
    """A folder with a random BERT and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    BertModel(BertConfig(vocab_size=len(tokenizer), hidden_dropout_prob=0.0, **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_llama(folder: Path) -> str:
    """A folder with a random Llama and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def sentence(generator: random.Random, *, good: bool, length: int = 8) -> str:
    """Words without meaning, and two that tell the class."""
    words = [generator.choice(FILLER) for _ in range(length)]
    for place in generator.sample(range(length), 2):
        words[place] = generator.choice(GOOD if good else BAD)
    return " ".join(words)


def write_reviews(path: Path, *, count: int = 120, columns: tuple[str, str] = ("text", "label")) -> Path:
    """A CSV file of sentences of two classes."""
    generator = random.Random(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for i in range(count):
            writer.writerow([sentence(generator, good=i % 2 == 0), "good" if i % 2 == 0 else "bad"])
    return path


def write_lines(path: Path, *, count: int = 40, length: int = 24) -> Path:
    """A text file of long lines."""
    generator = random.Random(1)
    lines = [sentence(generator, good=i % 3 == 0, length=length) for i in range(count)]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path
