"""Arguments of the wrong type are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from lightning_entropy import AttentionEntropyMaximization
from lightning_entropy.arguments import check_types


class Taker:
    def __init__(
        self,
        *,
        whole: int = 1,
        real: float | None = None,
        word: str | Path = "x",
        flag: bool = False,
        several: list[int] | int = 1,
        pair: tuple[int, str] = (1, "a"),
        named: dict[str, float | list[float]] | None = None,
        kind: Literal["a", "b"] = "a",
        module: str | torch.device = "cpu",
        anything: Any = None,
        **more: Any,
    ) -> None:
        check_types(Taker, locals())


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"whole": -3, "real": 2, "word": Path("x"), "flag": True, "several": (1, 2), "pair": [2, "b"]},
        {"real": float("nan"), "several": 5, "named": {"a": 1, "b": [0.5, 2]}, "kind": "b", "more": 1j},
        {"real": np.float64(0.5), "several": [], "named": {}, "module": torch.device("cpu"), "anything": 1j},
    ],
)
def test_what_fits(values: dict[str, Any]) -> None:
    Taker(**values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"whole": 1.0}, r"Taker\(whole=\.\.\.\) takes int, got the float 1\.0"),
        ({"whole": True}, "takes int, got the bool True"),
        ({"whole": None}, "takes int, got None"),
        ({"whole": np.int64(3)}, "takes int, got the int64"),
        ({"whole": 10**30}, "more than 64 bits"),
        ({"real": "1e-4"}, r"real=\.\.\.\) takes float \| None, got the str '1e-4'"),
        ({"real": True}, "got the bool True"),
        ({"word": 3}, "word="),
        ({"flag": 1}, "flag="),
        ({"several": ["a"]}, "several="),
        ({"pair": (1,)}, "pair="),
        ({"pair": ("a", 1)}, "pair="),
        ({"named": {1: 2.0}}, "named="),
        ({"named": {"a": ["b"]}}, "named="),
        ({"kind": ["a"]}, "kind="),
        ({"module": 3}, "module="),
        ({"word": torch.zeros(2)}, "word="),
        ({"real": "x" * 500}, r"x\.\.\."),
    ],
)
def test_what_does_not_fit(values: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        Taker(**values)


def test_in_a_method() -> None:
    with pytest.raises(TypeError, match=r"Maximization\(weight=\.\.\.\) takes float, got the str '0\.1'"):
        AttentionEntropyMaximization("0.1")  # type: ignore[arg-type]
