"""What the documentation shows runs.

The ``python`` blocks of a file share one namespace and run in order in a folder of their own; ``console``
blocks after a line ``<!-- run -->`` run in that folder too, between them. ``yaml`` blocks must name classes
and arguments that exist.
"""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from lightning_entropy.recipes.catalog import RECIPES
from lightning_entropy.training.lightning import Trainer

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(<!-- run -->\n)?```(python|yaml|console)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CLI = "import sys; from lightning_entropy.cli import main; sys.exit(main(sys.argv[1:]))"


class Block(NamedTuple):
    kind: str
    text: str
    line: int
    run: bool


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(m[2], m[3], text.count("\n", 0, m.start(3)) + 1, m[1] is not None) for m in FENCE.finditer(text)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def runs(page: Path) -> bool:
    return any(block.kind == "python" or block.run for block in blocks(page))


@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)], ids=name)
def test_python_and_marked_console_blocks_run(page: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__snippet__"}
    for block in blocks(page):
        if block.kind == "python":
            # Blank lines first, so that a traceback has the line of the page.
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            exec(code, namespace)
        elif block.run:
            for command in re.findall(r"^\$ (.*)$", block.text, re.MULTILINE):
                words = shlex.split(command)
                assert words[0] == "lightning-entropy", f"{name(page)}:{block.line} runs {words[0]}"
                result = subprocess.run([sys.executable, "-c", CLI, *words[1:]], capture_output=True, text=True)
                assert result.returncode == 0, f"{name(page)}:{block.line}: {command}\n{result.stderr[-3000:]}"


def entries(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping inside a configuration that names a class of this package."""
    if isinstance(value, dict):
        if str(value.get("class_path", "")).startswith("lightning_entropy."):
            yield value
        for inner in value.values():
            yield from entries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from entries(inner)


def load(path: str) -> Any:
    module, _, attribute = path.rpartition(".")
    return getattr(import_module(module), attribute)


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.kind == "yaml" for b in blocks(page))], ids=name)
def test_yaml_blocks_name_classes_and_arguments_that_exist(page: Path) -> None:
    for block in blocks(page):
        if block.kind != "yaml":
            continue
        config = yaml.safe_load(block.text)
        for entry in entries(config):
            load(entry["class_path"])(**entry.get("init_args", {}))
        trainer = set(config.get("trainer", {})) - set(inspect.signature(Trainer.__init__).parameters)
        assert not trainer, f"{name(page)}:{block.line}: trainer has no {sorted(trainer)}"
        # A model and its data are those of one recipe.
        unknown = [
            [
                f"{section}.{key}"
                for section, path in (("model", recipe.model), ("data", recipe.data))
                for key in set(config.get(section, {})) - set(inspect.signature(load(path).__init__).parameters)
            ]
            for recipe in RECIPES
        ]
        assert [] in unknown, f"{name(page)}:{block.line}: no recipe takes all of it, the first has no {unknown[0]}"


def test_every_command_shown_exists() -> None:
    from lightning_entropy.cli import COMMANDS

    for page in PAGES:
        for block in blocks(page):
            for command in re.findall(r"^\$ lightning-entropy (\S+)", block.text, re.MULTILINE):
                assert command in COMMANDS, f"{name(page)}:{block.line}: {command}"


def test_every_relative_link_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{name(page)}: {target}"
