"""Checkpoints of earlier runs: ``best`` and ``last`` as a new process finds them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning_entropy.files import read_stored

ALIASES = ("best", "last")


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A Trainer's checkpoint as a dictionary.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or is no checkpoint.
    """
    state = read_stored(path)
    if not isinstance(state, dict) or not isinstance(state.get("state_dict"), dict):
        found = sorted(map(str, state))[:10] if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{os.fspath(path)} is no checkpoint of a Trainer: it holds {found}, expected a state_dict")
    return state


def latest_checkpoint(root: str | os.PathLike[str], which: str) -> Path:
    """The best or the last checkpoint of the newest run under a folder.

    Runs are recognised by the ``last.ckpt`` that ``ModelCheckpoint(save_last=True)`` writes; the best one is
    what that file says it was.

    Args:
        root: folder of the runs, searched in depth.
        which: ``"best"`` or ``"last"``.

    Raises:
        FileNotFoundError: if no run is found, or its best checkpoint is gone.
        ValueError: if ``best`` is wanted and the ``last.ckpt`` that would tell cannot be read.
    """
    found = sorted(Path(root).glob("**/last*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"--ckpt_path {which}: no last.ckpt under {Path(root).resolve()}; fit first, or give the path of a file"
        )
    last = found[-1]
    if which == "last":
        return last
    state = read_checkpoint(last)
    for name, callback in state.get("callbacks", {}).items():
        best = Path(callback.get("best_model_path") or last) if name.startswith("ModelCheckpoint") else last
        if best.name == last.name:
            continue  # the callback that writes last.ckpt
        beside = last.parent / best.name  # the folder may have been moved since
        for candidate in (beside, best):
            if candidate.is_file():
                return candidate
        raise FileNotFoundError(f"--ckpt_path best: {last} says it is {best}, and that file is gone")
    raise FileNotFoundError(f"--ckpt_path best: {last} knows no best checkpoint; use last")


def checkpoint_folder(checkpoint: str | os.PathLike[str]) -> str:
    """The folder of a checkpoint, spelled as the callbacks in it spell it.

    ``ModelCheckpoint`` takes up its record of the best epochs only if its folder is the same string as
    before.

    Args:
        checkpoint: a file that a Trainer wrote.

    Raises:
        ValueError: if it is none, or cut off.
    """
    folder = Path(checkpoint).parent
    state = read_checkpoint(checkpoint)
    for callback in state.get("callbacks", {}).values():
        before = callback.get("dirpath") if isinstance(callback, dict) else None
        if before and Path(before).resolve() == folder.resolve():
            return str(before)
    return str(folder)


__all__ = ["ALIASES", "checkpoint_folder", "latest_checkpoint", "read_checkpoint"]
