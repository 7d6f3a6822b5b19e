"""Hidden states of the same tokens at two moments: a bounded sample of rows, and where the other moment comes from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_entropy.files import read_stored


class RowSample:
    """A random sample of rows from a stream; equal streams give the same rows, whatever is in them.

    Args:
        limit: how many are kept at most.

    Example:
        >>> before, after = RowSample(3), RowSample(3)
        >>> for part in torch.arange(10.0)[:, None].split(4):
        ...     before.add(part), after.add(-part)
        (None, None)
        (None, None)
        (None, None)
        >>> bool((before.rows == -after.rows).all()), len(before.rows)
        (True, 3)
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.seen = 0
        self.rows = torch.zeros(0, 0)
        self._keys = torch.zeros(0)
        self._generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor) -> None:
        """Offer the rows of ``(rows, features)``."""
        keys = torch.rand(len(x), generator=self._generator)
        self.seen += len(x)
        every = torch.cat([self._keys, keys])
        kept = every.topk(min(self.limit, len(every))).indices.sort().values
        old, new = kept[kept < len(self._keys)], kept[kept >= len(self._keys)] - len(self._keys)
        rows = x.detach()[new.to(x.device)].cpu()
        self.rows = torch.cat([self.rows[old], rows]) if self.rows.shape[1] == x.shape[1] else rows
        self._keys = every[kept]


def tokens_of(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The hidden states of the tokens that exist, ``(tokens, features)``; ``mask`` is of the leading dimensions."""
    if mask is None or mask.shape != hidden.shape[: mask.dim()]:
        return hidden.detach().reshape(-1, hidden.shape[-1])
    return hidden.detach()[mask.to(hidden.device)].reshape(-1, hidden.shape[-1])


def other_weights(module: nn.Module, source: Any, owner: str) -> dict[str, Tensor]:
    """Weights of another moment, for every parameter and buffer of the module's state dict.

    Args:
        module: whose they are.
        source: a state dict, or the path of a checkpoint of Lightning, of ``torch.save(state_dict)`` or of safetensors.
        owner: the name in messages.

    Raises:
        ValueError: if the file cannot be read, names are missing or shapes differ.
        FileNotFoundError: if there is no such file.
    """
    state = source
    if isinstance(source, str | os.PathLike):
        state = read_stored(source)
        if not isinstance(state, Mapping):
            raise ValueError(f"{owner}: {os.fspath(source)} holds a {type(state).__name__}, not tensors by name")
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    if missing:
        raise ValueError(
            f"{owner}: compare_with lacks {len(missing)} of the {len(own)} tensors of {type(module).__name__}: "
            f"{', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}; it has {', '.join(list(state)[:4])} ..."
        )
    wrong = [name for name, value in own.items() if state[name].shape != value.shape]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{owner}: {name} is {tuple(own[name].shape)} in {type(module).__name__} and {tuple(state[name].shape)} in "
            "compare_with: both moments must be of one architecture"
        )
    return {name: state[name].to(own[name]) for name in own}


@contextmanager
def with_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The module with other weights; its own tensors are put back, not copied."""
    own = module.state_dict(keep_vars=True)
    kept = {name: value.data for name, value in own.items()}
    try:
        for name, value in own.items():
            value.data = weights[name]
        yield
    finally:
        for name, value in own.items():
            value.data = kept[name]


def checksum_of(batch: Any) -> float:
    """A number that two equal batches share."""
    if isinstance(batch, Tensor):
        return float(batch.detach().double().sum()) if batch.numel() else 0.0
    if isinstance(batch, Mapping) or (hasattr(batch, "keys") and hasattr(batch, "items")):
        batch = [v for _, v in batch.items()]
    return sum(checksum_of(v) for v in batch) if isinstance(batch, list | tuple) else 0.0


__all__ = ["RowSample", "checksum_of", "other_weights", "tokens_of", "with_weights"]
