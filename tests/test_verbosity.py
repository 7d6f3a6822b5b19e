from __future__ import annotations

import logging

import pytest
import torch

from lightning_entropy import set_verbosity
from lightning_entropy.verbosity import announce


@pytest.fixture
def lines():
    kept: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: kept.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lightning_entropy")
    logger.addHandler(handler)
    yield kept
    logger.removeHandler(handler)
    set_verbosity("info")


def test_levels(lines: list[str]) -> None:
    announce("one")
    set_verbosity("warning")
    announce("two")
    set_verbosity("debug")
    announce("three")
    assert lines == ["one", "three"]
    with pytest.raises(ValueError, match="level must be one of debug, info, warning, error, got 'loud'"):
        set_verbosity("loud")


def test_only_rank_zero_speaks(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    announce("from another rank")
    monkeypatch.setenv("RANK", "0")
    announce("from the first")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    announce("spawned, without a variable of its own")
    assert lines == ["from the first"]
