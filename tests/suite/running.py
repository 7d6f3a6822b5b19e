"""Running a case in a Trainer, and looking at what it left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Batches(DataLoader):
    """The batches in their order, as they are; goes on within an epoch when Lightning restores it."""

    def __init__(self, batches: list) -> None:
        super().__init__(batches, batch_size=None, shuffle=False)
        self.batches, self.done = batches, 0  # the former for Lightning, which builds it anew to predict

    def __iter__(self):
        start, self.done = self.done % len(self), 0
        for i, batch in enumerate(super().__iter__()):
            if i >= start:
                self.done = i + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


def loader(batches: list) -> DataLoader:
    """A loader whose state survives a crash."""
    return Batches(batches)


def trainer(callbacks: list, folder: Path, **options: Any) -> Trainer:
    """A quiet Trainer on one CPU."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return Trainer(callbacks=callbacks, **{**defaults, **options})


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters and buffers."""
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two states are bitwise equal."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def traces(module: nn.Module) -> dict[str, Any]:
    """Everything that a method could leave on a module or in the process."""
    return {
        "hooks": {
            name: [len(getattr(m, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
            for name, m in module.named_modules()
        },
        "attributes": {name: sorted(vars(m)) for name, m in module.named_modules()},
        "modes": torch._C._len_torch_function_stack(),
        "keys": sorted(module.state_dict()),
    }


class Gradients(Callback):
    """Writes the gradients of each optimizer step, on rank zero."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_rank == 0 and trainer.global_step == 0:
            torch.save({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}, self.path)


def first_gradients(module: LightningModule, callbacks: list, batches: list, folder: Path, **options: Any) -> dict:
    """The gradients of the first optimizer step."""
    path = folder / f"gradients-{len(list(folder.glob('gradients-*')))}.pt"
    run = trainer([*callbacks, Gradients(path)], folder, max_epochs=1, **options)
    run.fit(module, DataLoader(batches, batch_size=None))  # a plain loader, to which DDP can give its sampler
    return torch.load(path, weights_only=True)
