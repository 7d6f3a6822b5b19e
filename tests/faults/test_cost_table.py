"""The command that measures: its rows, its table, and the page it writes."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from benchmarks import __main__ as command

ROW = {"method": "AEM", "quantity": "step", "unit": "s", "ours": 1.02, "peer_name": "plain", "peer": 1.0, "ratio": 1.02}


@pytest.mark.parametrize("name", command.NAMES)
def test_every_benchmark_gives_rows(name: str) -> None:
    tree = ast.parse((command.ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8"))
    found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert [a.arg for a in found["table_rows"].args.kwonlyargs] == ["quick"]


def test_table_and_page(tmp_path: Path) -> None:
    about = command.machine()
    assert about["packages"]["torch"]
    results = [
        {"name": "a", "seconds": 1.0, "load": 0.5, "failed": None, "rows": [{**ROW, "target": 1.05}]},
        {"name": "b", "seconds": 1.0, "load": 2.5, "failed": None, "rows": [{**ROW, "target": 1.01}]},
        {"name": "c", "seconds": 1.0, "load": None, "failed": "ImportError: no cv2", "rows": []},
    ]
    text = command.table(results, about, quick=False)
    assert "<= 1.05: met" in text
    assert "<= 1.01: NOT met" in text
    assert "- `c`: ImportError: no cv2" in text
    assert "Load at the start of each benchmark: 0.5 to 2.5" in text
    assert "met" not in command.table(results, about, quick=True)
    page = tmp_path / "cost.md"
    command.write(page, text)
    page.write_text(page.read_text().replace("# What it costs\n", "# What it costs\n\nMine.\n"))
    command.write(page, "new\n")
    assert page.read_text() == f"# What it costs\n\nMine.\n\n{command.BEGIN}\nnew\n{command.END}\n"
    page.write_text("without marks")
    with pytest.raises(SystemExit, match="lacks the lines"):
        command.write(page, "new\n")


def test_a_benchmark_that_fails_is_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    for name in ("__init__.py", "broken.py"):
        (tmp_path / "benchmarks" / name).write_text("")
    source = (command.ROOT / "benchmarks" / "__main__.py").read_text(encoding="utf-8")
    (tmp_path / "benchmarks" / "__main__.py").write_text(source)
    monkeypatch.setattr(command, "ROOT", tmp_path)
    found = command.run("broken", quick=True)
    assert "table_rows" in found["failed"]
    assert found["rows"] == []
    json.dumps(found)
