"""Files that are either whole or absent, and files of weights that are read without running what they carry."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file so that a reader meets the old one or the new one, never a part.

    Args:
        path: the file to write; its folder is made when it does not exist.

    Yields:
        A path in the same folder with the same suffix, to be written by the caller. It replaces ``path`` when the
        block ends, and is removed when the block raises.

    Raises:
        OSError: naming ``path``, if it cannot be written: a full disk says no file by itself.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    except OSError as error:
        if error.errno is not None and error.filename in (None, name):
            error.filename = os.fspath(target)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def read_stored(path: str | os.PathLike[str]) -> Any:
    """What a Trainer, ``torch.save`` or safetensors wrote, on the CPU: tensors and plain containers only.

    Args:
        path: the file; one whose name ends in ``.safetensors`` is read as such.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is cut off, damaged, or holds what only running its code would give.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"checkpoint {source} does not exist")
    try:
        if source.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(source)
        import torch

        return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # neither library has one class for what a damaged or foreign file raises
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"checkpoint {source} cannot be read with weights_only=True: {first_line} "
            f"(it has {source.stat().st_size:,} bytes; a file that was cut off is of no use: take an earlier one)"
        ) from error


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file in UTF-8, whole or not at all, and return its path."""
    target = Path(path)
    with atomic_write(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


def read_record(path: str | os.PathLike[str], parse: Callable[[Any], Result], *, kind: str, writer: str) -> Result:
    """What ``parse`` makes of the content of a JSON file.

    Args:
        path: the file.
        parse: takes what the JSON holds.
        kind: what it should be, for the error.
        writer: the call that writes such files, for the error.

    Raises:
        ValueError: if it is no JSON or ``parse`` cannot read it, naming the file.
    """
    try:
        return parse(json.loads(Path(path).read_text(encoding="utf-8")))
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # JSON and UTF-8 errors are ValueErrors
        said = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        raise ValueError(f"{os.fspath(path)} holds no {kind}: {said}. {writer} writes the files to load.") from error


__all__ = ["atomic_write", "read_record", "read_stored", "write_text"]
