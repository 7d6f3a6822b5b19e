"""Compile CRReLU's kernels for a GPU that need not be there: ``compile_crrelu.py 90`` prints the names that compiled.

The interpreter accepts much that the compiler refuses; this finds it without a GPU.
"""

from __future__ import annotations

import sys
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from lightning_entropy.functional.triton import crrelu_kernels as kernels

FLOATS = ("sums", "parameters")
TENSORS = ("x", "y", "grad", "grad_x")
# triton makes a constant of an argument that is 1, which the code must stand too
ONES = dict.fromkeys(("n", "rows", "channels", "inner"), 1)


def compile_for(capability: int, kernel: Any, dtype: str, constants: dict[str, Any]) -> None:
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = f"*{dtype}" if name in TENSORS else "*fp32" if name in FLOATS else "i32"
    at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compile_kernel(ASTSource(kernel, signature, at), target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})


def main() -> None:
    capability = int(sys.argv[1])
    for name, kernel, options in (
        ("forward", kernels.forward_kernel, {"BLOCK": 1024}),
        ("backward_rows", kernels.backward_rows_kernel, {"BLOCK": 1024}),
        ("backward_columns", kernels.backward_columns_kernel, {"ROWS": 16, "COLUMNS": 64, "PROGRAM_ROWS": 512}),
    ):
        for dtype in ("fp32", "bf16"):
            for plain in (True, False):
                compile_for(capability, kernel, dtype, {**options, "PLAIN": plain, "ONE": False})
        compile_for(capability, kernel, "bf16", {**options, **ONES, "PLAIN": True, "ONE": True})
        print(name)


if __name__ == "__main__":
    main()
