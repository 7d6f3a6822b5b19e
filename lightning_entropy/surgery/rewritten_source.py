"""The text of a method whose calls go to submodules, for tracebacks, ``inspect`` and ``torch.jit.script``.

Without it these would show, and script, the method as its author wrote it.
"""

from __future__ import annotations

import ast
import itertools
import linecache
from typing import NamedTuple

_NUMBERS = itertools.count(1)


class Span(NamedTuple):
    """A stretch of a file, in characters."""

    start: int
    end: int


class SourceEdit(NamedTuple):
    """A call that is written anew.

    Attributes:
        call: the whole call expression.
        inside: what stands between its new parentheses.
        head: what is called, with an assignment before it where the result was dropped.
    """

    call: Span
    inside: Span
    head: str


class SourceFile:
    """A file's text, addressed as ``ast`` does: by line and by bytes in it."""

    def __init__(self, filename: str) -> None:
        self.filename = filename
        self.lines = linecache.getlines(filename)
        self.text = "".join(self.lines)
        self._starts = list(itertools.accumulate((len(line) for line in self.lines), initial=0))

    def span(self, first: ast.AST, last: ast.AST | None = None) -> Span:
        """From the start of one node to the end of another."""
        last = first if last is None else last
        start = self._at(getattr(first, "lineno", 1), getattr(first, "col_offset", 0))
        return Span(start, self._at(getattr(last, "end_lineno", 1), getattr(last, "end_col_offset", 0)))

    def _at(self, line: int, column: int) -> int:
        characters = self.lines[line - 1].encode()[:column].decode()
        return self._starts[line - 1] + len(characters)

    def rewritten(self, edits: list[SourceEdit]) -> str:
        """The text with calls written anew; every line stays on its line."""
        return self._render(Span(0, len(self.text)), sorted(edits))

    def _render(self, span: Span, edits: list[SourceEdit]) -> str:
        parts, position = [], span.start
        for edit in edits:
            if edit.call.start < position or edit.call.end > span.end:
                continue  # inside one that is written already, or around this stretch
            inner = [other for other in edits if other is not edit and _holds(edit.inside, other.call)]
            inside = self._render(edit.inside, inner)
            lost = self.text.count("\n", *edit.call) - self.text.count("\n", *edit.inside)
            parts += [self.text[position : edit.call.start], edit.head, "(", inside, "\n" * lost, ")"]
            position = edit.call.end
        parts.append(self.text[position : span.end])
        return "".join(parts)


def _holds(outer: Span, inner: Span) -> bool:
    return outer.start <= inner.start and inner.end <= outer.end


def remember(filename: str, text: str) -> str:
    """Keep a text for as long as the process lives, under a name that says where it comes from; returns the name."""
    name = f"{filename} <calls rewritten, {next(_NUMBERS)}>"
    # Without a time of change linecache does not look for a file of that name.
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    return name


__all__ = ["SourceEdit", "SourceFile", "Span", "remember"]
