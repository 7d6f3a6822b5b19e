"""CRReLU on a GPU: one kernel forward and one backward. Importing this module imports no triton.

A program of the backward sums the gradient of eps over its own elements and stores one number (or one for each of its
columns); a second, small sum adds those in their order. Nothing is added atomically, so the result is the same every
time. eps is read from memory on the device: no step waits for the host.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from lightning_entropy.extras import require
from lightning_entropy.functional.crrelu_layout import Layout

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 1024  # elements of one step of a program
PARTIALS = 4096  # programs of a backward, and so numbers that are left to add
ROWS, COLUMNS = 16, 64  # tile of one step where the channels are the fastest dimension
PROGRAM_ROWS = 512  # rows that such a program walks over


def refusal(x: Tensor) -> str | None:
    """Why the kernels cannot compute CRReLU of a tensor, or None where they can.

    Args:
        x: the input of the activation.

    Example:
        >>> refusal(torch.empty(2, device="meta"))
        'the kernels run on CUDA, and the tensor is on meta'
    """
    if x.dtype not in DTYPES:
        names = ", ".join(str(dtype)[6:] for dtype in DTYPES)
        return f"{str(x.dtype)[6:]} is not computed by the kernels ({names} are)"
    if find_spec("triton") is None:
        return 'triton is not installed: pip install "lightning-entropy[triton]"'
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if x.device.type != "cuda":
        return f"the kernels run on CUDA, and the tensor is on {x.device.type}"
    if torch.version.hip is not None:
        return "the kernels have not been tried on ROCm"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(x.device) < (7, 0):
        return "the kernels need compute capability 7.0 (V100) or higher"
    return None


def forward(x: Tensor, y: Tensor, parameters: Tensor, layout: Layout) -> None:
    """Write CRReLU of ``x`` into ``y``.

    Args:
        x: flat, contiguous, float32, float16 or bfloat16.
        y: like ``x``.
        parameters: eps and, unless the layout is plain, mu, sigma and 1 / sigma of each channel,
            ``(1 or 4, channels)``, float32, contiguous.
        layout: how the channels lie in ``x``.
    """
    require("triton", extra="triton")
    from lightning_entropy.functional.triton.crrelu_kernels import forward_kernel

    with torch.cuda.device_of(x):
        forward_kernel[(-(-x.numel() // BLOCK),)](
            x, y, parameters, x.numel(), layout.channels, layout.inner,
            PLAIN=layout.plain, ONE=layout.channels == 1, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


def backward(x: Tensor, grad: Tensor, grad_x: Tensor, parameters: Tensor, layout: Layout) -> Tensor:
    """Write the gradient of ``x`` into ``grad_x`` and return the gradient of eps, ``(channels,)``, float32.

    Args:
        x: as in :func:`forward`.
        grad: gradient of the output, like ``x``.
        grad_x: like ``x``.
        parameters: as in :func:`forward`.
        layout: as in :func:`forward`.
    """
    require("triton", extra="triton")
    from lightning_entropy.functional.triton.crrelu_kernels import backward_columns_kernel, backward_rows_kernel

    tensors = (x, grad, grad_x)
    channels = layout.channels
    with torch.cuda.device_of(x):
        if layout.inner == 1 and channels > 1:
            tall = -(-layout.outer // PROGRAM_ROWS)
            sums = x.new_empty((tall, channels), dtype=torch.float32)
            backward_columns_kernel[(-(-channels // COLUMNS), tall)](
                *tensors, sums, parameters, layout.outer, channels,
                PLAIN=layout.plain, ROWS=ROWS, COLUMNS=COLUMNS, PROGRAM_ROWS=PROGRAM_ROWS, num_warps=4,
            )  # fmt: skip
            return sums.sum(0)
        rows = layout.outer * channels
        wide = min(-(-layout.inner // BLOCK), max(1, PARTIALS // rows))
        sums = x.new_empty((layout.outer, channels, wide), dtype=torch.float32)
        backward_rows_kernel[(wide, rows)](
            *tensors, sums, parameters, channels, layout.inner,
            PLAIN=layout.plain, BLOCK=BLOCK if layout.inner >= BLOCK else 128, num_warps=4,
        )  # fmt: skip
        return sums.sum((0, 2))
