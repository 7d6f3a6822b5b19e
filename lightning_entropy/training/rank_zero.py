"""A decision that rank zero makes and every rank hears of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_entropy.training.lightning import MisconfigurationException, Trainer, submodule


def decide_on_rank_zero(trainer: Trainer, decide: Callable[[], Any], *, owner: str) -> Any:
    """Call a function on rank zero and give its result to all, with random states as they were.

    Args:
        trainer: whose processes are connected (from ``setup`` on); every rank must call.
        decide: returns plain values.
        owner: for messages.

    Raises:
        Exception: what ``decide`` raised, on rank zero.
        MisconfigurationException: on the other ranks then, with the message.
    """
    told: dict[str, Any] = {}
    failed: Exception | None = None
    if trainer.is_global_zero:
        try:
            with submodule("utilities.seed").isolate_rng():
                told = {"result": decide()}
        except Exception as error:  # the others wait for a word
            told, failed = {"error": f"{type(error).__name__}: {error}"}, error
    told = trainer.strategy.broadcast(told)
    if failed is not None:
        raise failed
    if "error" in told:
        raise MisconfigurationException(f"{owner} failed on rank zero: {told['error']}")
    return told["result"]


__all__ = ["decide_on_rank_zero"]
