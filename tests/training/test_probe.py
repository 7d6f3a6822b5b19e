"""A probe leaves modes, buffers and random states as they were, and finds out how to run the module."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_entropy.training.probe import fits_a_checkpoint, keep_batch, run_probe, undisturbed
from tests.suite.running import trainer


class Counting(nn.Module):
    """Counts its calls in a buffer, in place and by assignment, draws random numbers, and freezes a part."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.BatchNorm1d(3).eval()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3))

    def train(self, mode: bool = True) -> Counting:
        raise AssertionError("train() and eval() may do more than set a flag")

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.mean(0)
        return self.frozen(self.norm(x)) + torch.rand(()) + random.random()


def test_everything_is_as_before() -> None:
    module = Counting()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    states = torch.get_rng_state(), random.getstate()
    buffer = module.last
    with undisturbed(module):
        assert not module.norm.training
        assert not torch.is_grad_enabled()
        module(torch.randn(4, 3))
    assert module.training
    assert module.norm.training
    assert not module.frozen.training
    assert module.last is buffer
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]

    def fails() -> None:
        with undisturbed(module):
            module.calls += 1
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        fails()
    assert module.calls == 0
    assert module.norm.training


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []


class TakesOne(Module):
    def forward(self, x: Tensor) -> None:
        self.seen.append(x)


class TakesNames(Module):
    def forward(self, ids: Tensor, mask: Tensor | None = None) -> None:
        self.seen.append((ids, mask))


class TakesAll(Module):
    def forward(self, **kwargs: Any) -> None:
        self.seen.append(sorted(kwargs))


class Predicts(TakesOne):
    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append("predict")


def run(module: LightningModule, batch: Any, tmp_path: Path, forward: Any = None) -> list:
    run_probe(trainer([], tmp_path), module, batch, forward, "Monitor")
    return module.seen


def test_the_modules_own_way(tmp_path: Path) -> None:
    x, y = torch.ones(1), torch.zeros(1)
    assert run(TakesOne(), x, tmp_path) == [x]
    assert run(TakesOne(), [x, y], tmp_path) == [x]
    assert run(TakesNames(), {"ids": x, "mask": y, "label": y}, tmp_path) == [(x, y)]
    assert run(TakesAll(), {"ids": x, "label": y}, tmp_path) == [["ids", "label"]]
    assert run(Predicts(), x, tmp_path) == ["predict"]
    assert run(Predicts(), x, tmp_path, lambda module, batch: module.seen.append("given")) == ["given"]


def test_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"Module defines neither forward nor .* Pass probe_forward="):
        run(Module(), torch.ones(1), tmp_path)
    module = TakesNames()
    module.forward = lambda *a: a[0].shape  # type: ignore[method-assign]
    with pytest.raises(
        MisconfigurationException, match=r"called with dict; it takes ids, mask\): .* Pass probe_forward="
    ):
        run(module, {"x": torch.ones(1)}, tmp_path)


def test_kept_batches_are_copies_and_small_plain_ones_travel() -> None:
    x = torch.ones(2)
    kept = keep_batch({"x": x, "names": ["a"]})
    x += 1
    assert kept["x"].tolist() == [1, 1]
    assert fits_a_checkpoint({"x": x, "more": [x, (1, None, "a", 2.0)]})
    assert not fits_a_checkpoint(torch.zeros(5 * 2**20))
    assert not fits_a_checkpoint({"x": object()})
