"""Configuration values and files that nobody would write: each works, or is refused in words.

Allowed are ValueError, TypeError, OSError, ImportError of a missing extra, and Lightning's MisconfigurationException;
the message has more than 20 characters and names the argument, or the file. Any other exception is a fault.
"""

from __future__ import annotations

import inspect
import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import save_file

import lightning_entropy
from lightning_entropy.data import LocalizationSet, SlideBags
from lightning_entropy.files import read_stored
from lightning_entropy.finetuning import diagnose_layers
from lightning_entropy.observe.weight_files import file_weights
from lightning_entropy.recipes.run_record import read_record
from lightning_entropy.recipes.variants import read_yaml
from lightning_entropy.surgery.selection import Refusal, ScoredWeight, Selection
from lightning_entropy.training.layer_report import LayerDiagnosis
from tests.data.bag_folders import arrays, table, write
from tests.finetuning.diagnosed_models import batches, loss, model

ALLOWED = (ValueError, TypeError, OSError, ImportError, MisconfigurationException)
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, -7, 10**30, 0.0, 0.5, -0.5, 1.0, 1.5, 1e-300, 1e300,
    float("nan"), float("inf"), float("-inf"), 1j, "", " ", "x", "auto", "constant", "cosine", "mean", "none", "*", "[",
    "blocks.*", "a" * 5000, "\x00", "é\u202e", "../..", "/", "package:", "timm:", "embedded:", "embedded:nothing",
    b"bytes", [], [None], ["x"], [1, 2], [0.5, float("nan")], [[1]], (), (3, 64, 64), {}, {"x": 1}, {1: 2}, {"x": None},
    {"class_path": "os.system"}, set(), object(), int, len, Path("absent"), torch.zeros(2),
    np.float64("nan"), np.int64(3),
]  # fmt: skip
CLASSES = {
    name: getattr(lightning_entropy, name)
    for name in lightning_entropy.__all__
    if inspect.isclass(getattr(lightning_entropy, name))
}
REQUIRED: dict[str, dict[str, Any]] = {
    "BackgroundActivationSuppression": {"split": "layer4"},
    "AttentionEntropyScaling": {"base_tokens": 16},
    "ForegroundGenerator": {"channels": 8, "classes": 3},
    "TextStream": {"train": "absent.txt"},
}


def explained(error: BaseException, names: list[str]) -> bool:
    text = str(error)
    return len(text) > 20 and (not names or any(name in text for name in names))


def arguments(factory: Any) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [name for name, p in inspect.signature(factory).parameters.items() if p.kind in kinds]
    return [name for name in names if name != "device"]  # torch's own, with torch's own answers


def construct(name: str, values: dict[str, Any]) -> str | None:
    """None where it worked or was refused in words; what is wrong otherwise."""
    factory = CLASSES[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = factory(**{**REQUIRED.get(name, {}), **values})
            repr(made)
    except ALLOWED as error:
        # ``weight`` may be spoken of as "the weight", and an argument's content by itself: one of them is there.
        known = [*values, *(word for key in values for word in key.split("_") if len(word) > 3)]
        known += [repr(v)[:40] for v in values.values()]
        return None if explained(error, known) else f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def shown(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r:.60}" for key, value in values.items())


@pytest.mark.parametrize("name", CLASSES)
def test_one_strange_value(name: str) -> None:
    """Every argument of every public class with every value: about 12,000 cases."""
    found = []
    for key in arguments(CLASSES[name]):
        for value in VALUES:
            wrong = construct(name, {key: value})
            if wrong is not None:
                found.append(f"{name}({shown({key: value})}): {wrong}")
    assert not found, f"{len(found)} of {len(arguments(CLASSES[name])) * len(VALUES)}\n" + "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_several_strange_values(name: str) -> None:
    """Two to four arguments at once."""
    draw, keys, found = random.Random(name), arguments(CLASSES[name]), []
    for _ in range(100):
        chosen = draw.sample(keys, min(len(keys), draw.randint(2, 4)))
        values = {key: draw.choice(VALUES) for key in chosen}
        wrong = construct(name, values)
        if wrong is not None:
            found.append(f"{name}({shown(values)}): {wrong}")
    assert not found, "\n".join(found)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Bytes cut, flipped, doubled, left out, or replaced by others."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8])):
        at = draw.randrange(len(data) + 1) if draw.random() < 0.5 else draw.randrange(min(len(data), 200) + 1)
        size = draw.choice([1, 1, 4, 64])
        kind = draw.randrange(6)
        if kind == 0:
            del data[at:]
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            data[at:at] = data[at : at + size]
        elif kind == 3:
            del data[at : at + size]
        elif kind == 4:
            data[at : at + size] = bytes(draw.randrange(256) for _ in range(size))
        else:
            words = [b"\x00", b"-1", b"nan", b"1e999", b"\xff\xfe", b",", b"\n", b'"', b"{", b"[", b"null", b"9" * 30]
            data[at:at] = draw.choice(words)
    return bytes(data)


def bags(folder: Path, layout: str) -> None:
    slides = arrays(6)
    write(folder / "bags", layout, slides)
    table(folder / "slides.csv", list(slides))


def open_bags(folder: Path) -> None:
    found = SlideBags(str(folder / "bags"), str(folder / "slides.csv"))
    found.setup("fit")
    next(iter(found.train_dataloader()))


def selection(folder: Path) -> None:
    rows = [ScoredWeight("a.weight", "a", 1.0, 0.0, True, 1.0, (4, 4), 16, True)]
    Selection(by="condition_number", rows=rows, budget=1, skipped=[Refusal("b", "head")]).save(
        folder / "selection.json"
    )


def localization(folder: Path) -> None:
    from PIL import Image

    for number, split in enumerate(("train", "val", "test")):
        (folder / "set" / split).mkdir(parents=True)
        names = [f"{split}{i}.png" for i in range(2)]
        for i, name in enumerate(names):
            Image.new("RGB", (16, 12), (40 * number, 100 * i, 50)).save(folder / "set" / name)
        for kind, lines in {
            "image_ids": names,
            "class_labels": [f"{n},{i}" for i, n in enumerate(names)],
            "image_sizes": [f"{n},16,12" for n in names],
            "localization": [f"{n},1,1,9,9" for n in names],
        }.items():
            (folder / "set" / split / f"{kind}.txt").write_text("\n".join(lines) + "\n")


def open_localization(folder: Path) -> None:
    found = LocalizationSet(str(folder / "set"), image_size=16, batch_size=2)
    found.setup("fit")
    next(iter(found.train_dataloader()))
    next(iter(found.val_dataloader()))


def report(folder: Path) -> None:
    """The file that diagnose_layers writes, of a small model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it finds nothing in this one
        diagnose_layers(model(), batches(1), loss=loss).save(folder / "report.json")


Make, Read = Callable[[Path], None], Callable[[Path], object]
FILES: dict[str, tuple[Make, str, Read]] = {
    "table": (lambda f: bags(f, "npy"), "slides.csv", open_bags),
    "npy": (lambda f: bags(f, "npy"), "bags/s2.npy", open_bags),
    "npz": (lambda f: bags(f, "npz"), "bags/s2.npz", open_bags),
    "pt": (lambda f: bags(f, "pt"), "bags/s2.pt", open_bags),
    "h5": (lambda f: bags(f, "h5"), "bags/s2.h5", open_bags),
    "selection": (selection, "selection.json", lambda f: Selection.load(f / "selection.json")),
    "labels": (localization, "set/train/class_labels.txt", open_localization),
    "boxes": (localization, "set/val/localization.txt", open_localization),
    "sizes": (localization, "set/val/image_sizes.txt", open_localization),
    "ids": (localization, "set/train/image_ids.txt", open_localization),
    "picture": (localization, "set/train0.png", open_localization),
    "safetensors": (
        lambda f: save_file({"a.weight": torch.randn(6, 6), "b": torch.ones(3)}, f / "model.safetensors"),
        "model.safetensors",
        lambda f: ([w.read() for w in file_weights(f / "model.safetensors")], read_stored(f / "model.safetensors")),
    ),
    "checkpoint": (
        lambda f: torch.save({"state_dict": {"a": torch.ones(4)}, "callbacks": {}}, f / "last.ckpt"),
        "last.ckpt",
        lambda f: read_stored(f / "last.ckpt"),
    ),
    "record": (
        lambda f: (f / "run.json").write_text(json.dumps({"fingerprint": "x", "metrics": {"a": 1}, "config": {}})),  # type: ignore[dict-item]
        "run.json",
        lambda f: read_record(f / "run.json"),
    ),
    "yaml": (
        lambda f: (f / "recipe.yaml").write_text("trainer:\n  max_epochs: 3\nmodel: {hidden: 4}\n"),  # type: ignore[dict-item]
        "recipe.yaml",
        lambda f: read_yaml(f / "recipe.yaml"),
    ),
    "report": (report, "report.json", lambda f: LayerDiagnosis.load(f / "report.json")),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    lightning_entropy.set_verbosity("error")
    yield
    lightning_entropy.set_verbosity("info")


def damage(kind: str, folder: Path, times: int) -> None:
    make, name, read = FILES[kind]
    folder.mkdir()
    make(folder)
    original = (folder / name).read_bytes()
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)
    draw, found = random.Random(kind), []
    for _ in range(times):
        content = mutated(original, draw)
        for extra in set(folder.rglob("*")) - {folder / p.relative_to(kept) for p in kept.rglob("*")}:
            extra.unlink()  # what was remembered of the last one
        (folder / name).write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(folder)
        except ALLOWED as error:
            if not explained(error, [Path(name).stem, str(folder), "val_fraction", "test_fraction"]):
                found.append(f"{type(error).__name__}: {error} for {content[:80]!r}")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error} for {content[:80]!r}")
    assert not found, f"{len(found)} of {times}\n" + "\n".join(dict.fromkeys(text[:600] for text in found))


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file(kind: str, tmp_path: Path) -> None:
    damage(kind, tmp_path / "data", 25)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_many_times(kind: str, tmp_path: Path) -> None:
    damage(kind, tmp_path / "data", 300)
