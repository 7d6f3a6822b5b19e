"""The package works with either distribution of Lightning; checked in fresh processes."""

from __future__ import annotations

import subprocess
import sys
import types
from importlib.util import find_spec

import pytest


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_lightning_is_taken_where_it_is_loaded() -> None:
    code = (
        "import lightning.pytorch; from lightning_entropy.training.lightning import DISTRIBUTION; print(DISTRIBUTION)"
    )
    assert run(code) == "lightning.pytorch"


def test_pytorch_lightning_is_taken_where_it_is_loaded() -> None:
    if find_spec("pytorch_lightning") is None:
        pytest.skip("pytorch_lightning is not installed")
    code = (
        "import pytorch_lightning as pl; from lightning_entropy import AttentionEntropyMaximization as A;"
        "print(issubclass(A, pl.Callback))"
    )
    assert run(code) == "True"


def test_neither_is_an_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_entropy.training import lightning as binding

    monkeypatch.setattr(binding, "sys", types.SimpleNamespace(modules={}))
    monkeypatch.setattr(binding, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install lightning"):
        binding._distribution()
    monkeypatch.setattr(binding, "find_spec", lambda name: object() if name == "pytorch_lightning" else None)
    assert binding._distribution() == "pytorch_lightning"


ALONE = """
import importlib.machinery, sys, warnings
warnings.simplefilter("ignore")
finder = importlib.machinery.PathFinder
original = finder.find_spec

def without_lightning(name, path=None, target=None):
    return None if name.split(".")[0] == "lightning" else original(name, path, target)

finder.find_spec = staticmethod(without_lightning)
from lightning_entropy.cli import main
code = main(["fit", "--recipe", "mil_digits", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3",
             "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"])
assert not code, code
assert not [m for m in sys.modules if m.split(".")[0] == "lightning"]
from lightning_entropy.training.lightning import DISTRIBUTION
print(DISTRIBUTION)
"""


def test_everything_works_where_only_pytorch_lightning_is_installed() -> None:
    if find_spec("pytorch_lightning") is None:
        pytest.skip("pytorch_lightning is not installed")
    pytest.importorskip("sklearn")
    assert run(ALONE).splitlines()[-1] == "pytorch_lightning"
