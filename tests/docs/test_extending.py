"""The page "Adding a method", followed literally: its files are written as they stand there, its commands are run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r'^```python title="([^"]+)"\n(.*?)^```$', PAGE, re.DOTALL | re.MULTILINE))
COMMANDS = re.findall(r"^\$ PYTHONPATH=\S+ python -m pytest (.*)$", PAGE, re.MULTILINE)
# One test of each kind, and a pair; the whole suite on one more method is a matter of minutes.
SLICE = [
    "fits_twice",
    "nothing_is_left_behind",
    "exception and optimizer",
    "weight_zero",
    "resumed",
    "accumulation_gives",
    "two_instances",
    "yaml",
    "no_target",
    "aem+largest",
]


def run(folder: Path, arguments: list[str]) -> str:
    """Pytest in a process of its own, in the folder of the page's files."""
    settings = ["-q", "-n0", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder)]
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *settings, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-4000:]}\n{done.stderr[-1000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = tmp_path_factory.mktemp("page")
    for name, text in FILES.items():
        (written / name).parent.mkdir(exist_ok=True)
        (written / name).write_text(text, encoding="utf-8")
    return written


def test_the_page_names_its_files_and_commands() -> None:
    assert list(FILES) == [
        "my_method/largest_weight.py",
        "my_method/__init__.py",
        "my_tests/test_largest_weight.py",
        "my_tests/test_suite.py",
    ]
    assert COMMANDS == ["my_tests/test_largest_weight.py", 'my_tests/test_suite.py -k "largest_weight and not killed"']


def test_the_files_of_its_table_are_there() -> None:
    for name in (
        "lightning_entropy/attention/aem.py",
        "lightning_entropy/__init__.py",
        "tests/cases.py",
        "CHANGELOG.md",
    ):
        assert (ROOT / name).is_file()


def test_its_own_test(folder: Path) -> None:
    assert "4 passed" in run(folder, shlex.split(COMMANDS[0]))


def test_the_suite_for_a_slice(folder: Path) -> None:
    file, _, name = shlex.split(COMMANDS[1])
    chosen = f"{name} and ({' or '.join(f'({part})' for part in SLICE)})"
    assert re.search(r"^1\d passed", run(folder, [file, "-k", chosen]), re.MULTILINE)


@pytest.mark.slow
def test_the_whole_suite(folder: Path) -> None:
    run(folder, shlex.split(COMMANDS[1]))
