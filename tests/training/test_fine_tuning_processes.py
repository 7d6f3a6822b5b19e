"""Two gloo processes: one choice for both, no unused parameters, adapters that come home merged."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from tests.suite.running import trainer
from tests.training.fine_tuning_modules import Classifier, LargestGradients, data

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from tests.suite.running import trainer
from tests.training.fine_tuning_modules import Classifier, LargestGradients, data

torch.set_num_threads(1)
folder, mode = Path(sys.argv[1]), sys.argv[2]

class Witness(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 0:
            rank = trainer.global_rank
            found = {n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}
            torch.save(found, folder / f"g{rank}.pt")

    def on_train_end(self, trainer, pl_module):
        rank = trainer.global_rank
        torch.save(pl_module.state_dict(), folder / f"w{rank}.pt")
        (folder / f"names{rank}.json").write_text(json.dumps([callback.chosen.selection.names, callback.chosen_times]))

import os
rank = int(os.environ.get("LOCAL_RANK", 0))
seed_everything(3, verbose=False)
module = Classifier(seed=rank, dropout=0.0)  # ranks that would choose otherwise
callback = LargestGradients(2, mode=mode, rank=2)
strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=False)
run = trainer([callback, Witness()], folder, devices=2, strategy=strategy, max_epochs=2)
run.fit(module, torch.utils.data.DataLoader(list(data())[:2], batch_size=None))
"""


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_rank_zero_chooses_for_both(mode: str, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "MASTER_PORT": str(port), "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path), mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    names = [(tmp_path / f"names{rank}.json").read_text() for rank in (0, 1)]
    assert names[0].replace(" 1]", " 0]") == names[1]  # chosen once, on rank zero
    for kind in "gw":
        zero, one = (torch.load(tmp_path / f"{kind}{rank}.pt", weights_only=True) for rank in (0, 1))
        assert zero.keys() == one.keys()
        for name, value in zero.items():
            if "accuracy" not in name:
                torch.testing.assert_close(one[name], value, msg=name)
    # unlike batches on each: the gradient of one process that has both
    seed_everything(3, verbose=False)
    module = Classifier(seed=0, dropout=0.0)
    seen: dict[str, torch.Tensor] = {}

    class Keep(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            if trainer.global_step == 0:
                seen.update({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})

    batches = list(data())
    joint = [[torch.cat([batches[0][i], batches[1][i]]) for i in (0, 1)]]
    callback = LargestGradients(2, mode=mode, rank=2)
    trainer([callback, Keep()], tmp_path, max_epochs=1).fit(module, DataLoader(joint, batch_size=None))
    gradients = torch.load(tmp_path / "g0.pt", weights_only=True)
    assert gradients.keys() == seen.keys()
    for name, value in seen.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_a_spawned_fit_gives_back_the_merged_weights(tmp_path: Path) -> None:
    seed_everything(3, verbose=False)
    module = Classifier(dropout=0.0)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    callback = LargestGradients(2, mode="lora", rank=2, selection=None)
    strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo")
    trainer([callback], tmp_path, devices=2, strategy=strategy).fit(module, data())
    after = module.state_dict()
    assert after.keys() == before.keys()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {"head.weight", "head.bias"} < moved
    assert len([name for name in moved if name.startswith("network.")]) == 2
