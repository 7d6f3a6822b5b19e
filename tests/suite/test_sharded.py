"""FSDP2: parameters sharded over two CPU processes by ``fully_shard`` in the user's ``configure_model``."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything

from tests.cases import CASES, Case
from tests.suite.running import first_gradients

SHARDED = """
import sys
from pathlib import Path
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from tests.cases import CASES
from tests.suite.running import trainer
from torch.utils.data import DataLoader

torch.set_num_threads(1)
case = next(c for c in CASES if c.name == sys.argv[1])
Base = case.module

class Sharded(Base):
    def configure_model(self):
        if not getattr(self, "sharded", False):
            self.sharded = True
            mesh = self.device_mesh["data_parallel"]
            for part in (self.pool, self.head):
                fully_shard(part, mesh=mesh)
            fully_shard(self, mesh=mesh)

class Whole(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        found = {n: p.grad.full_tensor() for n, p in pl_module.named_parameters()}
        if trainer.global_rank == 0 and trainer.global_step == 0:
            torch.save(found, Path(sys.argv[2]) / "sharded.pt")

seed_everything(3, verbose=False)
module = Sharded(dropout=0.0).double()
strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
run = trainer([case.steady(), Whole()], Path(sys.argv[2]), max_epochs=1, devices=2, strategy=strategy)
run.fit(module, DataLoader(case.batches(count=2, batch_size=2, dtype=torch.float64), batch_size=None))
"""


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_sharded_gives_the_gradient_of_one_process(case: Case, tmp_path: Path, record_property: Any) -> None:
    root = Path(__file__).resolve().parents[2]
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "MASTER_PORT": str(port), "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-W", "ignore", str(script), case.name, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if case.sharded is not None:
        record_property("refused", case.sharded)
        assert done.returncode != 0
        assert case.sharded in done.stderr
        return
    assert done.returncode == 0, done.stderr[-3000:]
    batches = case.batches(count=2, batch_size=2, dtype=torch.float64)
    joint = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
    seed_everything(3, verbose=False)
    whole = first_gradients(case.module(dropout=0.0).double(), [case.steady()], [joint], tmp_path)
    sharded = torch.load(tmp_path / "sharded.pt", weights_only=True)
    for name, gradient in whole.items():
        torch.testing.assert_close(sharded[name], gradient, rtol=1e-6, atol=1e-9, msg=name)
