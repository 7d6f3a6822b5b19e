"""The table of methods, from the front matter of their cards.

``python docs/overview.py`` writes it into ``docs/methods/index.md`` and between the markers of ``README.md``;
``--check`` writes nothing and fails where a file is not current.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

DOCS = Path(__file__).resolve().parent
CARDS = DOCS / "methods"
FIELDS = ("title", "line", "kind", "callback", "function", "paper", "helps", "hurts")
BEGIN, END = "<!-- methods: written by docs/overview.py -->", "<!-- end of methods -->"
HEAD = """# Methods

A method is a paper: one file of the package, one card here. A card says what the method computes, how it is used as a
function, in a Trainer, in YAML and on the command line, which values to start from, and what was measured, whether it
came out well or not. This page is written by `python docs/overview.py` from the cards.

"""


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the head of a card.

    Raises:
        ValueError: if it is not there or lacks a field.
    """
    parts = card.read_text(encoding="utf-8").split("---\n", 2)
    if len(parts) != 3 or parts[0]:
        raise ValueError(f"{card} must begin with front matter between two lines of ---")
    found = yaml.safe_load(parts[1])
    missing = [name for name in FIELDS if not found.get(name)]
    if missing:
        raise ValueError(f"{card}: front matter lacks {', '.join(missing)}")
    return found


def table(prefix: str) -> str:
    """The table of all cards; ``prefix`` leads from the page to the folder of the cards."""
    lines = ["| method | what it does | helps | hurts | used as |", "|---|---|---|---|---|"]
    for card in sorted(CARDS.glob("*.md")):
        if card.name == "index.md":
            continue
        method = front_matter(card)
        name = method["callback"].rpartition(".")[2]
        lines.append(
            f"| [{method['title']}]({prefix}{card.name}) ([paper]({method['paper']})) | {method['line']} "
            f"| {method['helps']} | {method['hurts']} | `{name}` ({method['kind']}), "
            f"`{method['function'].removeprefix('lightning_entropy.')}` |"
        )
    return "\n".join(lines)


def pages() -> dict[Path, str]:
    """What each file should hold."""
    readme = DOCS.parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise ValueError(f"{readme} lacks the lines {BEGIN} and {END}")
    return {
        CARDS / "index.md": f"{HEAD}{table('')}\n",
        readme: f"{before}{BEGIN}\n{table('docs/methods/')}\n{END}{after}",
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a file is not current")
    check = parser.parse_args(arguments).check
    stale = []
    for path, text in pages().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path)
            if not check:
                path.write_text(text, encoding="utf-8")
    for path in stale:
        print(f"{'not current' if check else 'written'}: {path.relative_to(DOCS.parent)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
