"""CRReLU on a CPU as one compiled loop forward and one backward, for float32 and bfloat16.

The loops are in ``crrelu_loops.cpp``, which includes no header of torch and compiles in about a second. It is compiled
once a process, when it is first needed, for the processor that it then runs on, in a folder that is removed again:
nothing is cached that another machine could load. Without a compiler, on Windows, or with
``LIGHTNING_ENTROPY_COMPILE=0`` in the environment, the chunked form is used instead.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from lightning_entropy.functional.crrelu_layout import Layout

DTYPES = (torch.float32, torch.bfloat16)
_THREAD_SHARE = 32768  # numbers that a thread is worth starting for, as in torch
_loading = threading.Lock()


def refusal(dtype: torch.dtype) -> str | None:
    """Why the compiled loops cannot be had, or None where they can; compiles them at the first call.

    Args:
        dtype: of the activation's input.

    Example:
        >>> refusal(torch.float64)
        'float64 is not computed by the compiled loops (float32 and bfloat16 are)'
    """
    if dtype not in DTYPES:
        return f"{str(dtype)[6:]} is not computed by the compiled loops (float32 and bfloat16 are)"
    return _library()[1]


def forward(x: Tensor, y: Tensor, parameters: Tensor, layout: Layout) -> None:
    """Write CRReLU of ``x`` into ``y``.

    Args:
        x: flat, contiguous, float32 or bfloat16.
        y: like ``x``.
        parameters: eps and, unless the layout is plain, mu, sigma and 1 / sigma of each channel,
            ``(1 or 4, channels)``, float32, contiguous.
        layout: how the channels lie in ``x``.
    """
    function = getattr(_loaded(), f"crrelu_forward_{str(x.dtype)[6:]}")
    function(_at(x), _at(y), _at(parameters), *_sizes(x, layout))


def backward(x: Tensor, grad: Tensor, grad_x: Tensor, parameters: Tensor, layout: Layout) -> Tensor:
    """Write the gradient of ``x`` into ``grad_x`` and return the gradient of eps, ``(channels,)``, float32.

    Args:
        x: as in :func:`forward`.
        grad: gradient of the output, like ``x``.
        grad_x: like ``x``.
        parameters: as in :func:`forward`.
        layout: as in :func:`forward`.
    """
    library = _loaded()
    if layout.inner == 1 and layout.channels > 1:
        shape: tuple[int, ...] = (-(-layout.outer // library.crrelu_block_rows()), layout.channels)
        axes: tuple[int, ...] = (0,)
    else:
        shape = (layout.outer, layout.channels, -(-layout.inner // library.crrelu_block()))
        axes = (0, 2)
    sums = torch.empty(shape, dtype=torch.float32)
    function = getattr(library, f"crrelu_backward_{str(x.dtype)[6:]}")
    function(_at(x), _at(grad), _at(grad_x), _at(sums), _at(parameters), *_sizes(x, layout))
    return sums.sum(axes, dtype=torch.float64).float()


def _at(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _sizes(x: Tensor, layout: Layout) -> tuple[ctypes.c_int64 | ctypes.c_int, ...]:
    columns = layout.inner == 1 and layout.channels > 1
    rows = layout.outer if columns else layout.outer * layout.channels
    threads = max(1, min(torch.get_num_threads(), x.numel() // _THREAD_SHARE))
    integers = (ctypes.c_int(v) for v in (columns, layout.plain, threads))
    return ctypes.c_int64(rows), ctypes.c_int64(layout.channels), ctypes.c_int64(layout.inner), *integers


def _loaded() -> ctypes.CDLL:
    library, reason = _library()
    if library is None:
        raise RuntimeError(f"the compiled loops of CRReLU are not available: {reason}")
    return library


def _library() -> tuple[ctypes.CDLL | None, str | None]:
    with _loading:
        return _compile()


@functools.cache
def _compile() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or the reason why there is none; tried once a process."""
    if os.environ.get("LIGHTNING_ENTROPY_COMPILE") == "0":
        return None, "LIGHTNING_ENTROPY_COMPILE=0 is set"
    if sys.platform == "win32":
        return None, "they are not compiled on Windows"
    compiler = next((c for c in (os.environ.get("CXX"), "g++", "clang++", "c++") if c and shutil.which(c)), None)
    if compiler is None:
        return None, "no C++ compiler was found (g++, clang++, c++ or the variable CXX)"
    with tempfile.TemporaryDirectory(prefix="lightning_entropy_") as folder:
        source, target = Path(folder, "crrelu_loops.cpp"), Path(folder, "crrelu_loops.so")
        source.write_bytes(files("lightning_entropy.functional").joinpath("crrelu_loops.cpp").read_bytes())
        output = ""
        for flags in _flag_sets():
            command = [compiler, "-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
            result = subprocess.run(
                [*command, str(source), "-o", str(target), *flags], capture_output=True, text=True, timeout=120
            )
            output = output or result.stderr
            if result.returncode == 0:
                return _declared(ctypes.CDLL(str(target))), None  # what is mapped outlives its file
    warnings.warn(
        f"CRReLU: {compiler} could not compile its loops, the slower chunked form is used. Set "
        f"LIGHTNING_ENTROPY_COMPILE=0 to silence this. It said: {output.strip()[-500:]}",
        stacklevel=2,
    )
    return None, f"{compiler} failed"


def _flag_sets() -> list[list[str]]:
    """From the fastest to what every compiler takes. OpenMP is the library that torch has loaded, so that both share
    one pool of threads.
    """
    ours = sorted(Path(torch.__file__).parent.joinpath("lib").glob("libgomp*.so*"))
    pool = ["-fopenmp", "-Wl,--as-needed", *map(str, ours[:1])]
    alone = ["-fopenmp-simd"]
    return [["-march=native", *pool], ["-mcpu=native", *pool], ["-march=native", *alone], ["-mcpu=native", *alone], []]


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.crrelu_block.restype = ctypes.c_int64
    library.crrelu_block_rows.restype = ctypes.c_int64
    for dtype in DTYPES:
        for name in ("forward", "backward"):
            getattr(library, f"crrelu_{name}_{str(dtype)[6:]}").restype = None
    return library
