"""The package as it is published: sdist and wheel are built, and the wheel works alone, away from the checkout."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Run by an interpreter whose only lightning_entropy is the wheel.
SMOKE = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import lightning_entropy
assert Path(lightning_entropy.__file__).is_relative_to(sys.prefix), lightning_entropy.__file__
assert lightning_entropy.__version__ == sys.argv[1]
for name in lightning_entropy.__all__:
    getattr(lightning_entropy, name)

from lightning_entropy.data import slide_region
from lightning_entropy.recipes.catalog import RECIPES
region = slide_region()
assert region.svs.is_file() and region.features.is_file()
for recipe in RECIPES:
    assert recipe.path.is_file(), recipe.path

import torch
import lightning as L
from lightning_entropy import AttentionEntropyMaximization, MILClassifier, SlideBags
trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                    enable_progress_bar=False, callbacks=[AttentionEntropyMaximization()])
trainer.fit(MILClassifier(hidden=16), SlideBags("embedded:slide"))
assert torch.isfinite(trainer.callback_metrics["aem/loss"])
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of the checkout and the wheel that is built from that sdist."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.mark.slow
def test_sdist_and_wheel_hold_what_they_should(built: Path) -> None:
    (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("README.md", "CHANGELOG.md", "LICENSE", "Makefile", "mkdocs.yml", "tests/cases.py", "docs/index.md"):
        assert name in inside, name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_entropy").rglob("*") if path.is_file()}
    own = {name for name in own if "__pycache__" not in name}
    assert own <= names, f"not in the wheel: {sorted(own - names)[:5]}"
    assert {name for name in names if not name.startswith("lightning_entropy-")} <= own
    for found in (inside, names):
        assert not [name for name in found if "__pycache__" in name or name.endswith(".pyc")]
    size = sum(path.stat().st_size for path in (sdist, wheel))
    assert size < 40e6, f"{size / 1e6:.1f} MB"


@pytest.mark.slow
def test_the_wheel_works_alone(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    home = tmp_path / "environment"
    venv.EnvBuilder(system_site_packages=False, with_pip=False, symlinks=True).create(home)
    python = home / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    install = ("-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel)
    run(sys.executable, *install, cwd=tmp_path)
    # Dependencies come from this environment, behind the wheel, without its editable install of the checkout: a path
    # that is appended like this is no site folder, whose .pth files would be read.
    here = [path for path in sys.path if path.endswith("-packages")]
    (packages / "dependencies.pth").write_text("\n".join(here) + "\n")
    version = wheel.name.split("-")[1]
    run(python, "-c", SMOKE, version, cwd=tmp_path)
    listed = run(home / "bin" / "lightning-entropy", "recipes", cwd=tmp_path)
    assert "mil_digits" in listed
    assert "features: embedded:digits100" in run(
        home / "bin" / "lightning-entropy", "recipes", "--show", "mil", cwd=tmp_path
    )
