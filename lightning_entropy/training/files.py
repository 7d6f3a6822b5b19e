"""Files that are either whole or absent; see :mod:`lightning_entropy.files`, where every room can reach it."""

from __future__ import annotations

from lightning_entropy.files import atomic_write

__all__ = ["atomic_write"]
