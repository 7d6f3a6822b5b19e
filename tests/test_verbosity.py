from __future__ import annotations

import pytest
import torch

from lightning_entropy import set_verbosity
from lightning_entropy.verbosity import announce


def test_levels(announced: list[str]) -> None:
    announce("one")
    set_verbosity("warning")
    announce("two")
    set_verbosity("debug")
    announce("three")
    assert announced == ["one", "three"]
    with pytest.raises(ValueError, match="level must be one of debug, info, warning, error, got 'loud'"):
        set_verbosity("loud")


def test_only_rank_zero_speaks(announced: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    announce("from another rank")
    monkeypatch.setenv("RANK", "0")
    announce("from the first")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    announce("spawned, without a variable of its own")
    assert announced == ["from the first"]
