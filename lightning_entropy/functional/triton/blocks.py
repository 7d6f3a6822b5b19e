"""Block sizes of the kernels of attention with entropy."""

from __future__ import annotations

from typing import NamedTuple


class Blocks(NamedTuple):
    """Queries and keys per tile (0 keys: has none), warps of a program, stages of its software pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


# What is tried first, by bytes of a number and padded width: compiled for sm_80 and sm_90, these spill few registers or
# none (float32 heads of 256 do). Their speed has not been measured on a GPU.
_FIRST: dict[tuple[int, int], dict[str, Blocks]] = {
    (2, 64): {
        "forward": Blocks(128, 64, 4, 3),
        "query_gradient": Blocks(128, 64, 8, 2),
        "key_gradient": Blocks(64, 128, 8, 2),
    },
    (2, 128): {
        "forward": Blocks(128, 64, 8, 3),
        "query_gradient": Blocks(128, 64, 8, 2),
        "key_gradient": Blocks(32, 128, 8, 2),
    },
    (2, 256): {
        "forward": Blocks(64, 64, 8, 2),
        "query_gradient": Blocks(64, 32, 8, 2),
        "key_gradient": Blocks(32, 64, 8, 2),
    },
    (4, 64): {
        "forward": Blocks(64, 32, 8, 2),
        "query_gradient": Blocks(64, 32, 8, 2),
        "key_gradient": Blocks(32, 32, 4, 2),
    },
    (4, 128): {
        "forward": Blocks(32, 32, 8, 2),
        "query_gradient": Blocks(32, 32, 4, 2),
        "key_gradient": Blocks(32, 32, 8, 2),
    },
    (4, 256): {
        "forward": Blocks(32, 16, 8, 1),
        "query_gradient": Blocks(16, 16, 4, 1),
        "key_gradient": Blocks(16, 16, 4, 1),
    },
}
_SMALLER = (Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 1), Blocks(16, 16, 4, 1))


def candidates(kernel: str, width: int, itemsize: int) -> list[Blocks]:
    """Block sizes in the order in which they are tried: the first that the GPU's shared memory holds is used.

    Fixed, not tuned by timing: a run that is resumed on the same GPU uses the same blocks and gives the same bits.

    Args:
        kernel: ``"forward"``, ``"query_gradient"`` or ``"key_gradient"``.
        width: the larger of the padded widths of keys and values.
        itemsize: bytes of a number.
    """
    bucket = 64 if width <= 64 else 128 if width <= 128 else 256
    first = _FIRST[itemsize, bucket][kernel]
    size = first.queries * first.keys
    return [first, *(b for b in _SMALLER if (b.queries * b.keys, b.stages) < (size, first.stages))]
