"""Research on entropy in neural networks as parts for PyTorch Lightning.

Methods are exported here by name and imported when they are first used, so that ``import lightning_entropy``
loads neither Lightning nor any domain library.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from lightning_entropy.lazy import lazy_exports
from lightning_entropy.verbosity import set_verbosity

if TYPE_CHECKING:
    from lightning_entropy.attention import AttentionEntropyMaximization, AttentionEntropyRegularizer
    from lightning_entropy.data import SlideBags
    from lightning_entropy.recipes import MILClassifier

try:
    __version__ = version("lightning-entropy")
except PackageNotFoundError:  # a source tree that was put on the path without being installed
    __version__ = "0+unknown"

_EXPORTS = {
    "AttentionEntropyMaximization": "attention",
    "AttentionEntropyRegularizer": "attention",
    "MILClassifier": "recipes",
    "SlideBags": "data",
    **{room: room for room in ("attention", "data", "functional", "observe", "recipes", "training")},
}

__all__ = ["AttentionEntropyMaximization", "AttentionEntropyRegularizer", "MILClassifier", "SlideBags", "__version__", "set_verbosity"]

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
