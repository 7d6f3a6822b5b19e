"""What the import contracts in pyproject.toml cannot see, since optional libraries are imported inside functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lightning_entropy"
MODULES = sorted(PACKAGE.rglob("*.py"))
OPTIONAL = {"h5py", "openslide", "peft", "sklearn", "tifffile", "timm", "torchmil", "torchvision", "transformers"}
LONGEST = 450


def imported_with_the_module(tree: ast.Module) -> set[str]:
    """Packages that importing the module imports: statements at its top, those for type checkers apart."""
    found: set[str] = set()
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending.extend(node.orelse)
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ClassDef)):
            pending.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_libraries_are_imported_when_they_are_used(path: Path) -> None:
    found = imported_with_the_module(ast.parse(path.read_text(encoding="utf-8")))
    assert not found & OPTIONAL, f"{path.name} imports {sorted(found & OPTIONAL)} at its top: use extras.require"


def test_the_reader_of_imports_sees_what_it_should() -> None:
    code = "\n".join(
        [
            "import h5py.h5",
            "if TYPE_CHECKING:",
            "    import timm",
            "try:",
            "    from peft import x",
            "except ImportError:",
            "    pass",
            "def f():",
            "    import torchmil",
        ]
    )
    assert imported_with_the_module(ast.parse(code)) == {"h5py", "peft"}


def test_no_file_outgrows_its_subject() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


def test_files_are_named_after_what_they_hold() -> None:
    vague = {"utils", "util", "helpers", "helper", "misc", "common", "manager"}
    assert not [path for path in MODULES if vague & set(path.stem.split("_"))]
