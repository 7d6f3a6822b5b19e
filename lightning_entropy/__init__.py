"""Research on entropy in neural networks as parts for PyTorch Lightning.

Methods are exported here by name and imported when they are first used, so that ``import lightning_entropy``
loads neither Lightning nor any domain library.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from lightning_entropy.verbosity import set_verbosity

if TYPE_CHECKING:
    from lightning_entropy.attention import AttentionEntropyMaximization
    from lightning_entropy.data import SlideBags
    from lightning_entropy.recipes import MILClassifier

try:
    __version__ = version("lightning-entropy")
except PackageNotFoundError:  # a source tree that was put on the path without being installed
    __version__ = "0+unknown"

_EXPORTS = {
    "AttentionEntropyMaximization": "lightning_entropy.attention",
    "MILClassifier": "lightning_entropy.recipes",
    "SlideBags": "lightning_entropy.data",
}
_ROOMS = ("attention", "data", "functional", "observe", "recipes", "training")

__all__ = ["AttentionEntropyMaximization", "MILClassifier", "SlideBags", "__version__", "set_verbosity"]


def __getattr__(name: str) -> object:
    if name in _EXPORTS:
        value = getattr(import_module(_EXPORTS[name]), name)
    elif name in _ROOMS:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_ROOMS})
