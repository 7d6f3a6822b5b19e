"""Checkpoints that are cut off, of another configuration, or hostile."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lightning_entropy
from lightning_entropy.files import read_stored
from lightning_entropy.recipes.checkpoints import checkpoint_folder, latest_checkpoint, read_checkpoint
from lightning_entropy.recipes.diagnosis.subject import load_weights
from lightning_entropy.recipes.trained_attention import load_classifier
from lightning_entropy.recipes.variants import read_yaml
from lightning_entropy.surgery.selection import Selection
from lightning_entropy.training.hidden_rows import other_weights
from lightning_entropy.training.layer_report import LayerDiagnosis
from tests.faults.small_runs import command, contents

pytestmark = pytest.mark.filterwarnings("ignore:.*The dirpath has changed.*")
PACKAGE = Path(lightning_entropy.__file__).parent


class Danger:
    """Makes a folder when it is unpickled."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.where),)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch; not to be changed."""
    root = tmp_path_factory.mktemp("fitted")
    assert command("fit", root=root, epochs=1) == 0
    return root


@pytest.fixture
def run(fitted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(fitted, tmp_path / "copy")


def test_a_checkpoint_that_was_cut_off(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = latest_checkpoint(run, "last")
    last.write_bytes(last.read_bytes()[:-1000])
    before = contents(run)
    for name in ("test", "fit"):
        assert command(name, "--ckpt_path", str(last), root=run) == 2
        said = capsys.readouterr().err
        assert f"{last} cannot be read" in said
        assert "in its folder are" in said
        assert "best-epoch=0.ckpt" in said
    assert command("test", "--ckpt_path", "best", root=run) == 2
    assert "cut off" in capsys.readouterr().err
    assert {name: content for name, content in contents(run).items() if name in before} == before


def test_a_checkpoint_of_another_configuration(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With hyperparameters Lightning would take those of the checkpoint and not the ones given; without, it cannot."""
    last = latest_checkpoint(run, "last")
    stored = torch.load(last, weights_only=True)
    del stored["hyper_parameters"]
    torch.save(stored, last)
    assert command("test", "--ckpt_path", "last", "--model.hidden=5", root=run) == 2
    said = capsys.readouterr().err
    assert "written with another configuration" in said
    assert "size mismatch" in said
    assert "config.yaml" in said
    assert list(run.rglob("config.yaml"))  # where it says


READERS: dict[str, Callable[[Path], Any]] = {
    "read_stored": read_stored,
    "read_checkpoint": read_checkpoint,
    "checkpoint_folder": checkpoint_folder,
    "latest_checkpoint": lambda path: latest_checkpoint(path.parent, "best"),
    "load_classifier": load_classifier,
    "load_weights": lambda path: load_weights(nn.Linear(2, 2), path),
    "other_weights": lambda path: other_weights(nn.Linear(2, 2), path, owner="test"),
    "Selection": Selection.load,
    "LayerDiagnosis": LayerDiagnosis.load,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["hostile", "nested", "cut", "empty", "text"])
def test_no_reader_runs_what_a_file_carries(tmp_path: Path, reader: str, kind: str) -> None:
    path, trap = tmp_path / "last.ckpt", tmp_path / "was_here"
    if kind == "hostile":
        torch.save(Danger(trap), path)
    elif kind == "nested":
        torch.save({"state_dict": {"weight": torch.ones(2, 2)}, "callbacks": {"x": Danger(trap)}}, path)
    elif kind == "cut":
        torch.save({"state_dict": {"weight": torch.ones(200, 200)}}, path)
        path.write_bytes(path.read_bytes()[:20_000])
    else:
        path.write_text("" if kind == "empty" else "!!python/object/apply:os.mkdir ['was_here']")
    with pytest.raises(ValueError, match=r"last\.ckpt"):
        READERS[reader](path)
    assert not trap.exists()
    assert not Path("was_here").exists()


def test_safetensors_that_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(20, 20), "bias": torch.ones(20)}, path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load_weights(nn.Linear(20, 20), path)


def test_yaml_that_would_call(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: !!python/object/apply:os.mkdir ['{tmp_path / 'was_here'}']\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml"):
        read_yaml(path)
    assert not (tmp_path / "was_here").exists()


def test_names_in_a_selection_are_only_names(tmp_path: Path) -> None:
    record = json.loads(Selection(by="gradient", rows=[], budget=1).to_json())
    record["fingerprint"] = "__import__('os').mkdir('was_here')"
    path = tmp_path / "selection.json"
    path.write_text(json.dumps(record))
    assert Selection.load(path).fingerprint == record["fingerprint"]
    assert not Path("was_here").exists()


ALLOWED = {
    # Evaluates source text of the method that runs, read from its own class: nothing from a file.
    ("surgery/call_settings.py", "eval"),
    # Runs the method's own rewritten source.
    ("surgery/rewritten_class.py", "compile"),
    ("surgery/rewritten_class.py", "exec"),
}
UNSAFE = {"pickle", "cPickle", "dill", "marshal", "shelve", "cloudpickle", "joblib"}


def calls(tree: ast.AST) -> list[tuple[ast.Call, str]]:
    return [(node, ast.unparse(node.func)) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_the_package_has_no_unsafe_call() -> None:
    found: list[str] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name, tree = path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{name}: import {m}" for m in modules if m.partition(".")[0] in UNSAFE]
        for call, function in calls(tree):
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            if function in ("torch.load", "load_from_checkpoint") and keywords.get("weights_only") != "True":
                found.append(f"{name}:{call.lineno}: {function} without weights_only=True")
            if function.endswith("np.load") and keywords.get("allow_pickle") != "False":
                found.append(f"{name}:{call.lineno}: {function} without allow_pickle=False")
            if function in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen"):
                found.append(f"{name}:{call.lineno}: {function}")
            if keywords.get("shell") == "True" or keywords.get("trust_remote_code") == "True":
                found.append(f"{name}:{call.lineno}: {function} with a shell or remote code")
            if function in ("eval", "exec", "compile") and (name, function) not in ALLOWED:
                found.append(f"{name}:{call.lineno}: {function}")
    assert not found, "\n".join(found)
