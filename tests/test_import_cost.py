"""What ``import lightning_entropy`` loads; what it costs is printed by benchmarks/import_cost.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

DOMAIN = {"timm", "transformers", "peft", "torchmil", "torchvision", "h5py", "openslide", "tifffile", "sklearn"}


def loaded_by(code: str, cwd: Path) -> set[str]:
    """Top-level packages in a fresh interpreter after ``code``."""
    report = "import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], check=True, capture_output=True, text=True, cwd=cwd
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def of_lightning(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    return loaded_by("import lightning.pytorch", tmp_path_factory.mktemp("lightning"))


def test_the_package_alone_loads_neither_lightning_nor_torch(tmp_path: Path) -> None:
    found = loaded_by("import lightning_entropy", tmp_path)
    assert not found & (DOMAIN | {"lightning", "pytorch_lightning", "torch", "torchmetrics", "matplotlib"})


@pytest.mark.parametrize("name", ["AttentionEntropyMaximization", "MILClassifier", "SlideBags"])
def test_a_public_class_loads_no_domain_library(name: str, of_lightning: set[str], tmp_path: Path) -> None:
    found = loaded_by(f"import lightning_entropy\nlightning_entropy.{name}", tmp_path)
    assert not (found - of_lightning) & DOMAIN


def test_the_functions_need_no_lightning(tmp_path: Path) -> None:
    found = loaded_by("from lightning_entropy import functional\nfunctional.aem_loss", tmp_path)
    assert not found & (DOMAIN | {"lightning", "pytorch_lightning", "torchmetrics"})


def test_observing_needs_no_lightning(tmp_path: Path) -> None:
    found = loaded_by("from lightning_entropy.observe import AttentionReader", tmp_path)
    assert not found & (DOMAIN | {"lightning", "pytorch_lightning"})
