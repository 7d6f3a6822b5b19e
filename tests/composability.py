"""What works with what, as a table: runs the generated suite and prints its cells.

    python -m tests.composability --table              # every cell; a quarter of an hour on two cores
    python -m tests.composability --table -k pairs     # arguments that are not ours go to pytest
    python -m tests.composability --write docs/composability.md

A cell is green where all of its tests passed, ``refused`` where the combination cannot work and a test saw it refused
at start with the reason that the case declares, and red where a test failed. The exit code is 1 where one is red.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from lightning_entropy.files import atomic_write

SUITE = Path(__file__).parent / "suite"
WORDS = {"fp16": "fp16", "bf16": "bf16", "yaml": "YAML"}
MARKS = {"green": "✓", "refused": "refused", "red": "✗ RED", "": ""}
START, END = "<!-- composability: generated -->", "<!-- end -->"


def methods() -> list[str]:
    """Names of the cases; imported late, since pytest wants to be first."""
    from tests.cases import CASES

    return [case.name for case in CASES]


class Cells:
    """Collects the outcome of every cell while pytest runs, also from the processes of xdist."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], set[str]] = defaultdict(set)
        self.reasons: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note one phase of one test."""
        if report.when != "call" and report.outcome == "passed":
            return
        cell = cell_of(report.nodeid)
        refused = dict(report.user_properties).get("refused")
        self.outcomes[cell].add(("refused" if refused else "green") if report.passed else "red")
        if refused:
            self.reasons[cell] = str(refused)

    def state(self, row: str, column: str) -> str:
        """``green``, ``refused``, ``red``, or empty where there is no such cell."""
        seen = self.outcomes.get((row, column), set())
        return next((state for state in ("red", "refused", "green") if state in seen), "")

    def counts(self) -> dict[str, int]:
        """Cells by state."""
        states = [self.state(*cell) for cell in self.outcomes]
        return {state: states.count(state) for state in ("green", "refused", "red")}


def cell_of(nodeid: str) -> tuple[str, str]:
    """Row and column of a test: an axis and a method, or two methods."""
    function, _, parameters = nodeid.rpartition("::")[2].partition("[")
    parameters = parameters.rstrip("]")
    if function == "test_pairs":
        first, second = parameters.split("+")
        return first, second
    case = next(
        name for name in sorted(methods(), key=len, reverse=True) if re.search(rf"(^|-){name}($|-)", parameters)
    )
    words = function.removeprefix("test_").split("_")
    axis = " ".join(WORDS.get(word, word) for word in words)
    rest = re.sub(rf"(^|-){case}($|-)", "-", parameters).strip("-").split("-")[0]
    return f"{axis}: {rest}" if rest else axis, case


def table(rows: list[str], columns: list[str], cells: Cells) -> str:
    """A table in Markdown."""
    lines = ["| | " + " | ".join(column.replace("_", " ") for column in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for row in rows:
        marks = [MARKS[cells.state(row, column)] for column in columns]
        lines.append(f"| {row.replace('_', ' ')} | " + " | ".join(marks) + " |")
    return "\n".join(lines)


def report(cells: Cells) -> str:
    """Both tables, the reasons for which combinations are refused, and the counts."""
    names = methods()
    axes = sorted({row for row, _ in cells.outcomes if row not in names})
    parts = []
    if axes:
        parts.append("### Every method in every Trainer\n\n" + table(axes, names, cells))
    if any(row in names for row, _ in cells.outcomes):
        parts.append("### Every pair of methods\n\n" + table(names[:-1], names[1:], cells))
    if cells.reasons:
        said = [f"- {row}, {column}: “{text}”" for (row, column), text in sorted(cells.reasons.items())]
        parts.append(
            "### Why it is refused\n\nPart of the message that the combination gives at start:\n\n" + "\n".join(said)
        )
    counts = cells.counts()
    parts.append(
        f"{sum(counts.values())} cells: {counts['green']} green, {counts['refused']} refused with the reason, "
        f"{counts['red']} red."
    )
    return "\n\n".join(parts).replace("_", "\\_") + "\n"


def main() -> int:
    """Run the suite and print or write its table."""
    parser = argparse.ArgumentParser(prog="python -m tests.composability", description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="print the table")
    parser.add_argument("--write", type=Path, help="replace the table in this Markdown file")
    options, rest = parser.parse_known_args()
    cells = Cells()
    code = pytest.main([str(SUITE), "-q", "--show-capture=no", "-p", "no:cacheprovider", *rest], plugins=[cells])
    if not cells.outcomes:
        return int(code)
    text = report(cells)
    if options.table:
        sys.stdout.write(text)
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        before, _, remainder = page.partition(START)
        after = remainder.partition(END)[2]
        if not remainder:
            parser.error(f"{options.write} has no line {START}")
        with atomic_write(options.write) as temporary:
            temporary.write_text(f"{before}{START}\n\n{text}\n{END}{after}", encoding="utf-8")
    return 1 if cells.counts()["red"] else 0


if __name__ == "__main__":
    sys.exit(main())
