"""Compile the kernels for a GPU that need not be there: ``compile_kernels.py 90`` prints the names that compiled.

The interpreter accepts much that the compiler refuses; this finds it without a GPU.
"""

from __future__ import annotations

import sys
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from lightning_entropy.functional.triton import backward, forward, launch

PER_ROW = ("entropy", "lse", "d_entropy", "d_lse", "delta")
TENSORS = ("query", "key", "value", "output", "d_output", "d_query", "d_key", "d_value")
# triton makes a constant of an argument that is 1, which the code must stand too
ONES = dict.fromkeys(("heads", "key_heads", "groups", "n_queries", "n_keys", "width", "stride_mk"), 1)
COMMON = {"PAD_VALUE": False, "VALUE_WIDTH": 64}
WIDE = {**COMMON, "PAD": True, "PRECISION": "exact", "WIDTH": 64, "CAUSAL": True, "SOFTCAP": False, "MASK": 0}


def compile_for(capability: int, kernel: Any, blocks: launch.Blocks, constants: dict[str, Any]) -> None:
    constants = {**constants, "BLOCK_Q": blocks.queries, "BLOCK_K": blocks.keys}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in PER_ROW:
            signature[name] = "*fp32"
        elif name in TENSORS:
            signature[name] = "*bf16"
        elif name == "mask":
            signature[name] = "*u8"
        else:
            signature[name] = "fp32" if name in ("scale", "to_base2", "to_tanh") else "i32"
    at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compile_kernel(
        ASTSource(kernel, signature, at),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": blocks.warps, "num_stages": blocks.stages},
    )


def main() -> None:
    capability = int(sys.argv[1])
    gradients = {"OUTPUT": True, "ENTROPY": True}
    for name, kernel, options in (
        ("forward", forward.forward_kernel, {"VALUE": True}),
        ("query_gradient", backward.query_gradient_kernel, gradients),
        ("key_gradient", backward.key_gradient_kernel, gradients),
    ):
        blocks = launch.candidates(name, 64, 2)[0]
        compile_for(capability, kernel, blocks, {**WIDE, **options})
        compile_for(
            capability, kernel, blocks, {**WIDE, **ONES, "SOFTCAP": True, "CAUSAL": False, "MASK": 2, **options}
        )
        compile_for(capability, kernel, blocks, {**WIDE, **ONES, "CAUSAL": False, **options})
        print(name)
    compile_for(capability, backward.delta_kernel, launch.Blocks(64, 0, 4, 1), {**COMMON, **gradients, "LSE": True})
    print("delta")


if __name__ == "__main__":
    main()
