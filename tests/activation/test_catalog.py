from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from lightning_entropy.activation import ACTIVATIONS, CRReLU, find_activation


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_name_makes_a_new_module_that_runs_and_learns(name: str) -> None:
    logging.getLogger("transformers.activations").setLevel(logging.ERROR)
    act, other = ACTIVATIONS[name](), find_activation(name.upper())()
    assert type(act) is type(other)
    assert act is not other
    x = torch.randn(4, 8, requires_grad=True)
    y = act(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in act.parameters())
    assert {p.dtype for p in act.parameters()} <= {torch.float32}


def test_names_of_classes_and_other_names() -> None:
    assert find_activation("CRReLU") is CRReLU
    assert find_activation("LeakyReLU") is nn.LeakyReLU
    assert find_activation("swish") is nn.SiLU
    assert find_activation("gelu-tanh")().approximate == "tanh"
    assert find_activation("relu2") is ACTIVATIONS["squared_relu"]
    with pytest.raises(ValueError, match=r"'crelu' is no activation.*Closest: crrelu.*Known: celu, crrelu, elu"):
        find_activation("crelu")


@pytest.mark.parametrize(
    ("name", "value"), [("squared_relu", 4.0), ("star_relu", 4.0), ("quick_gelu", 1.93566), ("poly_relu", 14 / 3)]
)
def test_they_are_what_their_papers_define(name: str, value: float) -> None:
    assert ACTIVATIONS[name]()(torch.tensor([2.0])).item() == pytest.approx(value, abs=1e-4)


def test_a_library_that_is_absent_is_one_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "timm.models.metaformer", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-entropy\[vision\]"'):
        find_activation("star_relu")()
