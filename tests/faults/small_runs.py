"""Small runs of the command line and of a comparison, to be disturbed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_entropy.cli import main
from lightning_entropy.recipes import Comparison, compare
from lightning_entropy.recipes.checkpoints import latest_checkpoint

FEW: dict[str, Any] = {"train_bags": 6, "val_bags": 4, "test_bags": 6, "bag_size": 12, "witness_rate": 0.3}
OPTIONS = [
    "--data.options={train_bags: 6, val_bags: 4, test_bags: 6, bag_size: 12, witness_rate: 0.3}",
    "--model.hidden=4",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


def command(name: str, *more: str, root: str | Path = "run", epochs: int = 3) -> int:
    options = [f"--trainer.default_root_dir={root}", f"--trainer.max_epochs={epochs}", *OPTIONS]
    return main([name, "--recipe", "mil_digits", *options, *more])


def comparison(output: Path, **options: Any) -> Comparison:
    overrides = {"trainer.max_epochs": 2, "data.options": FEW, "model.hidden": 4}
    settings: dict[str, Any] = {"vary": {"aem": ["off", "constant"]}, "seeds": 2, "overrides": overrides}
    return compare("mil_digits", output=output, **{**settings, "show": False, **options})


def state(root: str, which: str = "last") -> dict[str, Any]:
    return torch.load(latest_checkpoint(root, which), weights_only=True)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """The process can write no file beyond a size: what a full disk is to the one who writes, without one."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
