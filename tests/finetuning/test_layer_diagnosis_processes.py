"""Two gloo processes with unlike batches give the diagnosis of one; inside a DDP fit nothing is disturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from lightning_entropy import set_verbosity
from lightning_entropy.finetuning import LayerDiagnosis, diagnose_layers
from tests.finetuning.diagnosed_models import Encoder, batches, loss, saturate

DATA = {"count": 3, "dtype": torch.float64}


def build() -> Encoder:
    torch.manual_seed(0)
    return saturate(Encoder(depth=4, batch_norm=True).double(), (1,))


def shares() -> list[list[Any]]:
    """Unlike numbers of batches, of unlike sizes."""
    data = batches(**DATA)
    data[1] = {k: v[:5] for k, v in data[1].items()}
    return [data[:2], data[2:]]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    set_verbosity("error")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    net, other = build(), Encoder(depth=4, batch_norm=True).double()
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        other.blocks[2].out.weight.mul_(3)
    found = diagnose_layers(net, shares()[rank], loss=loss, compare_with=other, debiased=False, components=32)
    found.save(Path(folder) / f"{rank}.json")

    wrapped = DistributedDataParallel(net.eval())  # dropout draws nothing, so that both rounds are equal
    gradients = []
    for diagnosing in (False, True):
        net.zero_grad()
        if diagnosing:
            diagnose_layers(net, shares()[rank], loss=loss)
        loss(wrapped, shares()[rank][0]).backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    torch.save([torch.equal(a, b) for a, b in zip(*gradients)], Path(folder) / f"same-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_reduce_to_one(tmp_path: Path) -> None:
    mp.start_processes(work, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    first, second = (LayerDiagnosis.load(tmp_path / f"{rank}.json") for rank in range(2))
    assert first.record() | {"checksum": 0} == second.record() | {"checksum": 0}
    net = build()
    other = build()
    with torch.no_grad():
        other.blocks[2].out.weight.mul_(3)
    data = [batch for share in shares() for batch in share]
    alone = diagnose_layers(net, data, loss=loss, compare_with=other, debiased=False, components=32)
    assert (first.samples, first.batches) == (alone.samples, alone.batches) == (37, 3)
    assert first.loss == pytest.approx(alone.loss)
    assert first.output_error == pytest.approx(alone.output_error)
    for a, b in zip(first.rows, alone.rows):
        for name in ("entropy", "entropy_nats", "gradient", "decay", "parameter_gradient", "delta_cka", "index"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), abs=1e-9), (a.layer, name)
    assert first.chosen == alone.chosen
    for rank in range(2):
        assert all(torch.load(tmp_path / f"same-{rank}.pt"))
