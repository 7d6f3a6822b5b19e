"""The versions that are supported, each in an environment of its own: ``nox`` runs all, ``nox -s NAME`` one.

    pipx run nox -l                        # what there is
    pipx run nox -s "lightning(oldest)"    # one
    pipx run nox -- tests/suite            # other tests than the slice below

What each environment gave is in docs/versions.md. An interpreter that is not on the machine is skipped by nox; with
``--download-python auto`` nox fetches it by uv.
"""

from __future__ import annotations

import nox

nox.options.error_on_missing_interpreters = False
nox.options.default_venv_backend = "uv|venv"

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
DEFAULT = "3.11"
# The lower bounds of pyproject.toml, and the newest that pip finds; torchvision goes with its torch.
LIGHTNING = {
    "oldest": ["lightning==2.4.0", "torchmetrics==1.4.0", "jsonargparse[signatures]==4.35.0"],
    "newest": ["--upgrade", "lightning", "torchmetrics", "jsonargparse[signatures]"],
}
TORCH = {
    "oldest": ["torch==2.4.0", "torchvision==0.19.0", "numpy<2.2"],
    "newest": ["--upgrade", "torch", "torchvision"],
}
# A slice that meets every room: the generated suite, the command line, checkpoints, surgery, data, and the formulas.
SLICE = [
    "tests/suite/test_methods.py",
    "tests/test_cli.py",
    "tests/training/test_lightning.py",
    "tests/training/test_surgery.py",
    "tests/attention/test_aem.py",
    "tests/data/test_bad_input.py",
    "tests/functional/test_entropy.py",
    "tests/functional/test_bas.py",
]


def _test(session: nox.Session, *packages: str) -> None:
    session.install("-e", ".[mil,vision,demo]", "pytest>=8", "hypothesis>=6.100")
    if packages:
        session.install(*packages)

    chosen = session.posargs or SLICE
    # A release that is not the developer's may warn of what the others do not: that is no failure of the version.
    session.run("python", "-m", "pytest", "-q", "-m", "not slow", "-W", "default", *chosen)


@nox.session(python=PYTHONS)
def python(session: nox.Session) -> None:
    """Each interpreter, with what pip chooses."""
    _test(session)


@nox.session(python=DEFAULT)
@nox.parametrize("version", [nox.param(name, id=name) for name in LIGHTNING])
def lightning(session: nox.Session, version: str) -> None:
    """The oldest and the newest Lightning."""
    _test(session, *LIGHTNING[version])


@nox.session(python=DEFAULT)
@nox.parametrize("version", [nox.param(name, id=name) for name in TORCH])
def torch(session: nox.Session, version: str) -> None:
    """The oldest and the newest torch."""
    _test(session, *TORCH[version])


@nox.session(python=DEFAULT)
def oldest(session: nox.Session) -> None:
    """Every lower bound together."""
    _test(session, *LIGHTNING["oldest"], *TORCH["oldest"])


@nox.session(python=DEFAULT)
def pytorch_lightning(session: nox.Session) -> None:
    """The other distribution: ``pytorch_lightning`` without ``lightning``."""
    session.install("-e", ".[mil,vision,demo]", "pytest>=8", "hypothesis>=6.100", "pytorch-lightning>=2.4")
    session.run("python", "-m", "pip", "uninstall", "-y", "lightning", success_codes=[0])
    session.run("python", "-m", "pytest", "-q", "-W", "default", "tests/training/test_lightning.py")
