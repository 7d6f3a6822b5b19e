"""Looking at every number once: what is not finite is found before training, and not looked for again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_entropy.data.bag_files import BagFile
from lightning_entropy.data.problems import BagFileError, Problems
from lightning_entropy.data.rows import stream
from lightning_entropy.training.files import atomic_write
from lightning_entropy.verbosity import announce

VERDICTS = "checked_bags.json"
# Exponent bits that are all set in an infinity or a NaN: one integer comparison, several times faster than
# isfinite on half precision.
_EXPONENTS = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F800000),
}


def not_finite(block: Tensor) -> Tensor | None:
    """Where a block is NaN or infinite, or None when it is finite throughout.

    Args:
        block: ``(rows, width)``.
    """
    if not block.is_floating_point():
        return None
    if block.dtype in _EXPONENTS:
        integer, mask = _EXPONENTS[block.dtype]
        bits = block.contiguous().view(integer).numpy()
        if not ((bits & np.array(mask, dtype=bits.dtype)) == mask).any():
            return None
    bad = ~torch.isfinite(block)
    return bad if bool(bad.any()) else None


def find_not_finite(bag: BagFile) -> str | None:
    """Describe the values of a bag that are not finite, or None.

    Raises:
        BagFileError: if the file cannot be read to its end.
    """
    rows: list[int] = []
    first: tuple[int, int, float] | None = None
    for start, block in stream(bag.features):
        bad = not_finite(block)
        if bad is None:
            continue
        if first is None:
            row, column = (int(i) for i in bad.nonzero()[0])
            first = (start + row, column, float(block[row, column]))
        rows += (start + bad.any(1).nonzero().flatten()).tolist()
    if first is None:
        return None
    row, column, value = first
    more = f" (and in {len(rows) - 1} more instances)" if len(rows) > 1 else ""
    return f"feature {column} of instance {row} is {value}{more}"


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def check_values(bags: Sequence[BagFile], *, where: Sequence[str], root: Path, problems: Problems) -> None:
    """Read all features and note those that are not finite.

    Files that were found to be good are remembered in ``checked_bags.json`` beside them, by size and time of
    change, so that the next run reads only what is new. Where the folder cannot be written the check is made
    every time.

    Args:
        bags: the bags.
        where: file and row of each, to begin a finding with.
        root: the folder of the files, or the one file of all bags.
        problems: findings are added here.
    """
    memory = root / VERDICTS if root.is_dir() else root.with_name(f"{root.name}.{VERDICTS}")
    base = root if root.is_dir() else root.parent
    good = _recall(memory)
    stamps = {bag.path: _stamp(bag.path) for bag in bags}
    open_questions = [i for i, bag in enumerate(bags) if good.get(_name(bag, base)) != stamps[bag.path]]
    if not open_questions:
        return
    size = sum(bags[i].features.count * bags[i].features.width for i in open_questions)
    announce(f"reading {len(open_questions)} bags once ({size:,} numbers) to find values that are not finite")
    failed: set[str] = set()
    for i in _progress(open_questions):
        try:
            finding = find_not_finite(bags[i])
        except (BagFileError, OSError, RuntimeError, ValueError) as error:
            finding = f"cannot be read to its end: {error}"
        name = _name(bags[i], base)
        if finding is None:
            good[name] = stamps[bags[i].path]
        else:
            failed.add(name)
            problems.add(f"{where[i]}: {finding}")
    for name in failed:
        good.pop(name, None)
    _remember(memory, good)


def _name(bag: BagFile, base: Path) -> str:
    """The file, and in a file of several bags the dataset: what a verdict is about."""
    key = getattr(bag.features, "key", None) or getattr(bag.features, "offset", 0)
    return f"{os.path.relpath(bag.path, base)}:{key}"


def _recall(memory: Path) -> dict[str, list[int]]:
    try:
        good = json.loads(memory.read_text(encoding="utf-8"))["finite"]
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # absent or of another version: everything is looked at anew
        return {}
    return dict(good) if isinstance(good, dict) else {}


def _remember(memory: Path, good: dict[str, list[int]]) -> None:
    content = {
        "about": "Features that lightning_entropy found finite: size and time of change. Safe to delete.",
        "finite": dict(sorted(good.items())),
    }
    try:
        with atomic_write(memory) as part:
            part.write_text(json.dumps(content, indent=0), encoding="utf-8")
    except OSError as error:
        announce(f"{memory} cannot be written ({error.strerror}): the values will be checked again next time")


def _progress(indices: list[int]) -> Sequence[int]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(  # type: ignore[return-value]
        indices, description="checking bags", console=console, transient=True, disable=not console.is_terminal
    )


__all__ = ["VERDICTS", "check_values", "find_not_finite", "not_finite"]
