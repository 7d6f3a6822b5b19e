"""Two gloo processes: rank zero diagnoses, both adapt the same layers and are told the same readings."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader
from lightning_entropy import InflectionLoRA
from tests.finetuning.diagnosed_models import batches
from tests.finetuning.test_inflection_lora import User
from tests.suite.running import trainer

torch.set_num_threads(1)
folder, watched = Path(sys.argv[1]), sys.argv[2] == "watched"
rank = int(os.environ.get("LOCAL_RANK", 0))

class Witness(Callback):
    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), folder / f"{sys.argv[2]}-{trainer.global_rank}.pt")
        told = {"layers": callback.layers_taken, "readings": [r.record() for r in callback.readings],
                "made": callback.diagnosis_made.chosen, "probed": callback.features is not None,
                "metric": float(trainer.callback_metrics.get("inflection_lora/recovery", 0))}
        (folder / f"{sys.argv[2]}-{trainer.global_rank}.json").write_text(json.dumps(told))

seed_everything(3, verbose=False)
module = User(seed=rank)  # ranks that would choose otherwise
module.net.drop.p = 0.0
callback = InflectionLoRA(rule="intersection", rank=2, every_n_epochs=1 if watched else None)
strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=False)
run = trainer([callback, Witness()], folder, devices=2, strategy=strategy, max_epochs=2)
run.fit(module, DataLoader(batches(8), batch_size=None))
"""


def launch(folder: Path, mode: str) -> list[dict]:
    script = folder / "two.py"
    script.write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "MASTER_PORT": str(port), "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-W", "ignore", str(script), str(folder), mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{mode}-{rank}.json").read_text()) for rank in (0, 1)]


def test_both_have_what_rank_zero_found(tmp_path: Path) -> None:
    zero, one = launch(tmp_path, "watched")
    assert zero["layers"] == one["layers"] == ["net.blocks.2", "net.blocks.5"]
    assert zero["readings"] == one["readings"]
    assert [r["step"] for r in zero["readings"]] == [0, 4, 8]
    assert zero["metric"] == one["metric"] == pytest.approx(zero["readings"][-1]["recovery"])
    assert (zero["probed"], one["probed"]) == (True, False)
    assert zero["made"] == one["made"]
    launch(tmp_path, "plain")  # and looking again changed nothing
    states = [torch.load(tmp_path / f"{m}-{r}.pt", weights_only=True) for m in ("watched", "plain") for r in (0, 1)]
    for other in states[1:]:
        for name, value in states[0].items():
            if "accuracy" not in name:
                assert torch.equal(other[name], value), name
