"""What the package says: one logger, on rank zero, at a level that the user sets."""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger("lightning_entropy")
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def _rank() -> int:
    # Processes that were spawned have no variable of their own; torch is asked only where it is loaded.
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    for name in _RANK_VARIABLES:
        value = os.environ.get(name)
        if value is not None:
            return int(value)
    return 0


def set_verbosity(level: str) -> None:
    """Set which messages the package prints.

    Args:
        level: ``"debug"``, ``"info"`` (default: what a method attached to), ``"warning"`` or ``"error"``.

    Raises:
        ValueError: if ``level`` is none of these.
    """
    if level not in _LEVELS:
        raise ValueError(f"level must be one of {', '.join(_LEVELS)}, got {level!r}")
    logger.setLevel(_LEVELS[level])


def announce(text: str) -> None:
    """Say something to the user, on rank zero only."""
    if _rank() == 0:
        logger.info(text)


if not logger.handlers:
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(_handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
