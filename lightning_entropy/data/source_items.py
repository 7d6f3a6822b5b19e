"""A dataset of some of the items of a source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

from torch.utils.data import Dataset


class HasLabels(Protocol):
    """A source whose items have labels and names."""

    @property
    def labels(self) -> Sequence[Any]:
        """A label, or several, for every item."""

    @property
    def names(self) -> Sequence[str]:
        """A name for every item."""


Source = TypeVar("Source", bound=HasLabels)


class SourceItems(Dataset[Any], Generic[Source]):
    """Some of the items of a source; a subclass reads one in ``__getitem__``.

    Args:
        source: where they are read from.
        indices: which.
    """

    def __init__(self, source: Source, *, indices: Sequence[int]) -> None:
        self.source = source
        self.indices = list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> list[Any]:
        """Their classes."""
        return [self.source.labels[i] for i in self.indices]

    @property
    def names(self) -> list[str]:
        """Their names."""
        return [self.source.names[i] for i in self.indices]


__all__ = ["SourceItems"]
