"""Texts as tokens: a padded batch, and datasets that tokenize a text when it is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_entropy.data.source_items import SourceItems
from lightning_entropy.data.text_source import TextSource


class Tokens(TypedDict):
    """Texts, padded at their ends to the longest of the batch.

    Keys:
        input_ids: ``(B, T)`` int64.
        attention_mask: ``(B, T)`` int64, 1 where there is a token.
    """

    input_ids: Tensor
    attention_mask: Tensor


class TextBatch(Tokens):
    """A batch of labelled texts.

    Keys:
        input_ids: ``(B, T)`` int64.
        attention_mask: ``(B, T)`` int64, 1 where there is a token.
        label: ``(B,)`` int64.
        name: names of the texts.
    """

    label: Tensor
    name: list[str]


class TextPairs(TypedDict):
    """A batch of texts that belong together, for retrieval.

    Keys:
        first: beginnings.
        second: what follows each of them.
    """

    first: Tokens
    second: Tokens


class PadTexts:
    """Collates tokenized texts.

    Args:
        pad: id of the token that pads.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def tokens(self, texts: Sequence[Sequence[int]]) -> Tokens:
        """A padded batch of token numbers."""
        longest = max(len(text) for text in texts)
        ids = torch.full((len(texts), longest), self.pad)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.as_tensor(text)
            mask[row, : len(text)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def labelled(self, items: Sequence[dict[str, Any]]) -> TextBatch:
        """A batch of items of :class:`TextDataset`."""
        return {
            **self.tokens([item["ids"] for item in items]),
            "label": torch.tensor([item["label"] for item in items]),
            "name": [item["name"] for item in items],
        }

    def pairs(self, items: Sequence[tuple[list[int], list[int]]]) -> TextPairs:
        """A batch of items of :class:`HalvesDataset`."""
        return {"first": self.tokens([a for a, _ in items]), "second": self.tokens([b for _, b in items])}


def token_ids(tokenizer: Any, text: str, max_length: int) -> list[int]:
    """Numbers of the tokens of a text, with the model's special ones, cut at ``max_length``."""
    return list(tokenizer(text, truncation=True, max_length=max_length)["input_ids"])


class TextDataset(SourceItems[TextSource]):
    """Some of the texts of a source.

    Args:
        source: where they are.
        indices: which.
        tokenizer: of transformers.
        max_length: longest text, in tokens.
    """

    def __init__(self, source: TextSource, *, indices: Sequence[int], tokenizer: Any, max_length: int) -> None:
        super().__init__(source, indices=indices)
        self.tokenizer, self.max_length = tokenizer, max_length

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """Read one text; ``key`` is its position, or ``(epoch, position)`` as ``EpochSampler`` gives it."""
        index = self.indices[key[1] if isinstance(key, tuple) else key]
        ids = token_ids(self.tokenizer, self.source.texts[index], self.max_length)
        return {"ids": ids, "label": self.source.labels[index], "name": self.source.names[index]}


class HalvesDataset(Dataset[Any]):
    """The words of a text up to a number, and as many that follow: pairs that belong together without any label.

    Args:
        texts: the texts; those with fewer than ``2 * words`` words are left out.
        tokenizer: of transformers.
        words: of each half.
        count: how many pairs.
        seed: of their drawing.
        max_length: longest half, in tokens.

    Raises:
        ValueError: if fewer than ``count`` texts are long enough.
    """

    def __init__(
        self, texts: Sequence[str], *, tokenizer: Any, words: int, count: int, seed: int, max_length: int
    ) -> None:
        split = [text.split() for text in texts]
        long = [i for i, text in enumerate(split) if len(text) >= 2 * words]
        if len(long) < count:
            raise ValueError(
                f"{count} texts of {2 * words} words are wanted, and {len(long)} of {len(texts)} have as many"
            )
        order = torch.randperm(len(long), generator=torch.Generator().manual_seed(seed))[:count].tolist()
        self.indices = [long[i] for i in order]
        self.halves = [
            (
                token_ids(tokenizer, " ".join(split[i][:words]), max_length),
                token_ids(tokenizer, " ".join(split[i][words : 2 * words]), max_length),
            )
            for i in self.indices
        ]
        # Texts of about equal length beside each other: batches have less padding, and a score no order.
        self.halves.sort(key=lambda pair: max(map(len, pair)))

    def __len__(self) -> int:
        return len(self.halves)

    def __getitem__(self, position: int) -> tuple[list[int], list[int]]:
        """The two halves of a text, as token numbers."""
        return self.halves[position]


__all__ = ["HalvesDataset", "PadTexts", "TextBatch", "TextDataset", "TextPairs", "Tokens", "token_ids"]
