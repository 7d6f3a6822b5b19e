from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_entropy.observe.massive_activations import MagnitudeReader


class Spike(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x, None


def test_top_median_and_channel() -> None:
    layer = Spike()
    x = torch.ones(2, 5, 4) * 0.5
    x[1, 3, 2] = -600.0
    with MagnitudeReader({"layer": layer}) as reader:
        layer(x)
    (row,) = reader.magnitudes()
    assert (row.layer, row.top, row.median, row.channel) == ("layer", 600.0, 0.5, 2)
    assert row.ratio == 1200
    assert row.massive
    assert not layer._forward_hooks


def test_over_forwards_the_largest_and_the_mean_median() -> None:
    layer = nn.Identity()
    with MagnitudeReader({"layer": layer}) as reader:
        layer(torch.ones(3))
        layer(torch.full((3,), 5.0))
    (row,) = reader.magnitudes()
    assert (row.top, row.median) == (5.0, 3.0)


def test_zeros_and_what_is_no_tensor() -> None:
    layers = {"zeros": nn.Identity(), "words": nn.Identity(), "idle": nn.Identity()}
    with MagnitudeReader(layers) as reader:
        layers["zeros"](torch.zeros(2, 2))
        layers["words"]("text")
    (row,) = reader.magnitudes()
    assert (row.layer, row.ratio, row.massive) == ("zeros", 1.0, False)


def test_hooks_are_gone_after_an_exception() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), MagnitudeReader({"layer": layer}):
        layer(torch.zeros(3))
    assert not layer._forward_hooks
