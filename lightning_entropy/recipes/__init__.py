"""LightningModules with their configurations, comparisons of them, and what is drawn from them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_entropy.recipes.abmil import ABMIL
    from lightning_entropy.recipes.comparison import compare
    from lightning_entropy.recipes.comparison_result import Comparison, joint_table
    from lightning_entropy.recipes.mil import MILClassifier

_EXPORTS = {
    "ABMIL": "abmil",
    "Comparison": "comparison_result",
    "MILClassifier": "mil",
    "compare": "comparison",
    "joint_table": "comparison_result",
}

__all__ = ["ABMIL", "Comparison", "MILClassifier", "compare", "joint_table"]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
