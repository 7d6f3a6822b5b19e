from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_entropy.activation import CRReLU, calibrate


class TwoInputs(nn.Module):
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.first = CRReLU(**arguments)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(6)
        self.second = CRReLU()
        self.unused = CRReLU()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.second(self.norm(self.dropout(self.first(x))) * scale)


def batches() -> list[Tensor]:
    return [torch.randn(n, 6) * torch.arange(1.0, 7) + torch.arange(6.0) for n in (50, 70, 1)]


@pytest.mark.parametrize("scope", ["site", "channel"])
def test_it_measures_what_enters(scope: str, announced: list[str]) -> None:
    model, given = TwoInputs(scope=scope), batches()
    state = {name: v.clone() for name, v in model.norm.state_dict().items()}
    result = calibrate(model, given)
    x = torch.cat(given).double()
    dims = [0] if scope == "channel" else [0, 1]
    torch.testing.assert_close(model.first.mu, x.mean(dims).float().reshape(-1))
    torch.testing.assert_close(model.first.sigma, x.std(dims, correction=0).float().reshape(-1))
    assert [site.module for site in result.sites] == ["first", "second"]
    assert result.sites[0].values == 121 * (1 if scope == "channel" else 6)
    assert result.not_run == ["unused"]
    assert model.unused.mu is None
    assert model.training
    assert model.dropout.training
    assert all(torch.equal(v, state[name]) for name, v in model.norm.state_dict().items())
    assert announced == [f"CRReLU: calibrated 2 sites, {announced[0].split('sites, ')[1]}"]
    assert announced[0].endswith("not run: unused")
    assert ("mean of 6 channels" in str(result)) == (scope == "channel")
    assert json.loads(result.to_json())["not_run"] == ["unused"]


def test_a_calibrated_bump_is_the_standard_one_of_the_standardised_input() -> None:
    act = CRReLU(0.4)
    x = torch.randn(2000) * 0.2 - 0.1
    calibrate(nn.Sequential(act), [x])
    assert act.sigma is not None
    assert act.mu is not None
    z = (x - act.mu) / act.sigma
    torch.testing.assert_close(act(x) - torch.relu(x), act.sigma * (CRReLU(0.4)(z) - torch.relu(z)), atol=1e-6, rtol=0)


def test_undo_and_again() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), CRReLU(0.3)), torch.randn(50, 4)
    before = model(x)
    result = calibrate(model, [x])
    assert not torch.equal(model(x), before)
    first = model(x)
    calibrate(model, [x])
    assert torch.equal(model(x), first)
    result.undo()
    assert torch.equal(model(x), before)
    assert [name for name in model.state_dict() if "1." in name] == ["1.eps"]


def test_batches_of_every_form() -> None:
    for batch, call in (
        ((torch.randn(9, 6), 2.0), None),
        ({"x": torch.randn(9, 6), "scale": 2.0}, None),
        ({"pixels": torch.randn(9, 6)}, lambda model, b: model(b["pixels"])),
    ):
        assert len(calibrate(TwoInputs(), [batch], call=call).sites) == 2
    assert len(calibrate(TwoInputs(), [torch.randn(9, 6)], modules="fir*").sites) == 1
    lazy = nn.Sequential(nn.Linear(4, 6), CRReLU(scope="channel"))
    assert len(calibrate(lazy, [torch.randn(9, 4)]).sites[0].mu) == 6


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU()), {}, r"no CRReLU in Sequential \(its leaves are GELU,"),
        (lambda: nn.Sequential(nn.Linear(4, 4), CRReLU()), {"modules": "0"}, "matched no CRReLU; there are 1"),
        (lambda: nn.Sequential(nn.Linear(4, 4), CRReLU()), {"modules": "3"}, "matched 0 of 2 modules"),
        (lambda: nn.Sequential(CRReLU()), {"batches": []}, "the batches reached none of 0"),
        (lambda: nn.Sequential(CRReLU()), {"batches": [torch.ones(3, 4)]}, "what enters 0 does not vary"),
    ],
)  # fmt: skip
def test_what_cannot_be_calibrated(model: Any, arguments: dict[str, Any], message: str) -> None:
    given = {"batches": [torch.randn(3, 4)], **arguments}
    with pytest.raises(ValueError, match=message):
        calibrate(model(), given.pop("batches"), **given)


def test_a_shared_eps_keeps_bumps_of_its_own() -> None:
    holder = CRReLU(scope="global")
    make = partial(CRReLU, scope="global", holder=holder)
    model = nn.Sequential(nn.Linear(4, 4), make(), nn.Linear(4, 4), make())
    calibrate(model, [torch.randn(40, 4)])
    assert model[1].eps is model[3].eps
    assert not torch.equal(model[1].sigma, model[3].sigma)
