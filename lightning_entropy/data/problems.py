"""Everything that is wrong with the input, in words, and reported together."""

from __future__ import annotations

_SHOWN = 20


class BagFileError(ValueError):
    """A feature file that cannot be used; the message says why, without naming the file."""


class Problems:
    """Findings about a table and its files, raised as one error.

    Args:
        about: what was read, for the first line of the error.
    """

    def __init__(self, about: str) -> None:
        self.about = about
        self.found: list[str] = []

    def add(self, text: str) -> None:
        """Note one finding, which names its file and row."""
        self.found.append(text)

    def __len__(self) -> int:
        return len(self.found)

    def raise_any(self) -> None:
        """Raise what was found.

        Raises:
            ValueError: with the number of findings and the first twenty of them.
        """
        if not self.found:
            return
        count = len(self.found)
        lines = [f"{self.about}: {count} problem{'s' if count > 1 else ''}", *self.found[:_SHOWN]]
        if count > _SHOWN:
            lines.append(f"... and {count - _SHOWN} more")
        raise ValueError("\n  ".join(lines))


__all__ = ["BagFileError", "Problems"]
