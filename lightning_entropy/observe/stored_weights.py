"""Weights of linear maps wherever they are stored, in a model or in files: what is known before they are read."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

_SAMPLE = 4096
EXPERT_TENSORS = {"gate_up_proj", "down_proj", "gate_proj", "up_proj", "w1", "w2", "w3"}


@dataclass(frozen=True)
class StoredWeight:
    """A weight that is a linear map, or a stack of them. Its numbers are read when they are asked for, and not kept.

    Args:
        name: of the parameter, without the wrapping of adapters.
        module: dotted name of the module that holds it.
        shape: of the numbers, as the module stores them (of a packed weight: unpacked).
        layout: ``"linear"``; ``"conv"``: outputs by everything else; ``"experts"``: a matrix an expert.
        dtype: of the numbers that ``read`` gives.
        read: gives them, of ``shape``.
        bits: of a quantised weight, how many it has for a number; None for floating point.
        precision: how it is stored, in a word.
        parts: 3 where q, k and v are fused, 1 otherwise.
        transposed: the outputs are the second dimension (``Conv1D`` of transformers).
        groups: of a convolution: so many matrices along the outputs.
        tied: other names of the same parameter.
        holder: the module itself; None in a file.
        tensor: the name of the parameter in it.
        refusal: why it cannot be read as matrices; None where it can.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    read: Callable[[], Tensor]
    bits: int | None = None
    precision: str = ""
    parts: int = 1
    transposed: bool = False
    groups: int = 1
    tied: tuple[str, ...] = ()
    holder: nn.Module | None = None
    tensor: str = "weight"
    refusal: str | None = None

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def matrix_shape(self, *, blocks: bool = False) -> tuple[int, int]:
        """Rows and columns of one of the matrices that :meth:`matrices` gives."""
        if self.layout == "experts":
            return self.shape[-2], self.shape[-1]
        rows, columns = self.shape[0], math.prod(self.shape[1:])
        if self.transposed:
            rows, columns = columns, rows
        return rows // (self.groups * (self.parts if blocks else 1)), columns

    def matrices(self, *, blocks: bool = False) -> Tensor:
        """The numbers as a stack of matrices, ``(count, rows, columns)``.

        Args:
            blocks: fused q, k and v as three matrices.

        Raises:
            ValueError: if the weight cannot be read, with the reason.
        """
        if self.refusal is not None:
            raise ValueError(f"{self.name} cannot be read as a matrix: {self.refusal}")
        return self.as_matrices(self.read(), blocks=blocks)

    def as_matrices(self, value: Tensor, *, blocks: bool = False) -> Tensor:
        """The same from numbers that were read already."""
        value = value.detach()
        if self.layout == "experts":
            return value
        if self.transposed:
            value = value.mT
        count = self.groups * (self.parts if blocks else 1)
        return value.reshape(count, value.shape[0] // count, -1)


def narrow(
    weights: list[StoredWeight], patterns: Iterable[str], owner: str, *, argument: str = "modules"
) -> list[StoredWeight]:
    """The weights that patterns name.

    Args:
        weights: to choose from.
        patterns: shell patterns over names of parameters, of modules, or of modules that contain them.
        owner: who asks, for messages.
        argument: what the patterns were passed as, for messages.

    Raises:
        ValueError: if a pattern names none of them; the message has the nearest names.
    """
    taken: set[str] = set()
    for pattern in patterns:
        found = {weight.name for weight in weights if _named(weight, pattern)}
        if not found:
            names = list(dict.fromkeys(name for weight in weights for name in (weight.module, weight.name)))
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:10]
            raise ValueError(
                f"{owner}({argument}={pattern!r}) names none of the {len(weights)} weights of linear maps. "
                f"Closest names: {', '.join(close)}."
            )
        taken |= found
    return [weight for weight in weights if weight.name in taken]


def _named(weight: StoredWeight, pattern: str) -> bool:
    parts = weight.module.split(".")
    containing = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
    return fnmatchcase(weight.name, pattern) or any(fnmatchcase(name, pattern) for name in containing)


def weight_digest(value: Tensor) -> str:
    """A short text that is the same for the same numbers, on whatever device: of the type and up to 4,096 of them.

    The numbers are evenly spaced, so that another weight and one that was trained on are told apart; a change of one
    number need not be.

    Args:
        value: a weight.

    Returns:
        16 hexadecimal digits of a SHA-256.
    """
    flat = value.detach().reshape(-1)
    places = torch.linspace(0, max(flat.numel() - 1, 0), min(_SAMPLE, flat.numel()), dtype=torch.float64)
    sample = flat[places.round().long().to(flat.device)].cpu().contiguous()
    head = f"{tuple(value.shape)}|{sample.dtype}|".encode()
    return hashlib.sha256(head + sample.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def fingerprint_of(digests: Mapping[str, str]) -> str:
    """One text for several weights, from the digest of each by its name; in whatever order."""
    lines = "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16] if digests else ""


def weights_fingerprint(weights: Iterable[StoredWeight]) -> str:
    """The fingerprint of weights: names, shapes, types and samples of the numbers; see :func:`weight_digest`.

    Args:
        weights: those that can be read; each is read once.

    Returns:
        16 hexadecimal digits, or an empty text for no weights.
    """
    return fingerprint_of({weight.name: weight_digest(weight.read()) for weight in weights})


__all__ = ["EXPERT_TENSORS", "StoredWeight", "fingerprint_of", "narrow", "weight_digest", "weights_fingerprint"]
