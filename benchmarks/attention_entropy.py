"""What the entropy of attention costs beside the attention itself, forward and backward, time and peak memory.

Each row is ``scaled_dot_product_attention`` plus its entropy, both backpropagated, relative to the attention alone
(measured in turn with it, so that a machine whose speed drifts favours neither). Peak memory is the largest sum of live
tensor storage, from the allocator's own record.

On a GPU the baseline is flash attention in bfloat16, and the row ``triton`` is one kernel that returns output and
entropy together; the issue's target is 1.10 x flash. Those rows have not been run by the authors, who had no GPU.

A second table has the error in nats of each way and dtype against float64, with unit-variance queries and keys that
share an offset. Without a GPU the kernel is in it if TRITON_INTERPRET=1 is set, and is then triton's interpreter.

    python benchmarks/attention_entropy.py [--lengths 256 1024 4096 8192] [--repeats 5] [--causal]
    python benchmarks/attention_entropy.py --device cuda --batch 4 --heads 16 [--width 128]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from lightning_entropy.functional import attention_entropy, sampled_mean
from lightning_entropy.functional.triton import attention_with_entropy, available

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ways(causal: bool, device: str, dtype: torch.dtype) -> tuple[Loss, dict[str, Loss]]:
    """The attention alone, and the ways to have its entropy too."""
    flash = device == "cuda" and dtype in (torch.float16, torch.bfloat16)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else nullcontext():
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal).sum()

    def beside(backend: str) -> Loss:
        def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return plain(q, k, v) + attention_entropy(q, k, is_causal=causal, backend=backend).mean()

        return loss

    def sampled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        h = attention_entropy(q, k, is_causal=causal, queries=min(64, q.shape[-2]))
        return plain(q, k, v) + sampled_mean(h, q.shape[-2])[0].mean()

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        got = attention_with_entropy(q, k, v, is_causal=causal)
        return got.output.sum() + got.entropy.mean()

    def fused_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_with_entropy(q, k, v, is_causal=causal).output.sum()

    kernel: dict[str, Loss] = {
        "triton": fused,
        "triton, H watched": fused_without_gradient,
        "triton beside": beside("triton"),
    }
    plain_torch = {
        "two_call": beside("two_call"),
        "blockwise": beside("blockwise"),
        "sampled, 64 rows": sampled,
        "dense": beside("dense"),
    }
    return plain, {**(kernel if device == "cuda" and available() else {}), **plain_torch}


def seconds(loss: Loss, tensors: list[Tensor]) -> float:
    times = 10 if tensors[0].is_cuda else 1  # a GPU's kernels are short beside the clock's own noise
    if tensors[0].is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        for t in tensors:
            t.grad = None
        loss(*tensors).backward()
    if tensors[0].is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def peak(loss: Loss, tensors: list[Tensor]) -> float:
    """Largest live allocation during forward and backward beyond what was there before, in MB."""
    for t in tensors:
        t.grad = None
    if tensors[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(*tensors).backward()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        loss(*tensors).backward()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        largest = max(largest, live)
    return largest / 1e6


def errors(device: str) -> None:
    """Print largest and mean error by dtype and backend."""
    torch.manual_seed(0)
    q = torch.randn(1, 4, 1024, 64, device=device)
    k = torch.randn(1, 4, 1024, 64, device=device) + torch.randn(64, device=device)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    backends = ["two_call", "blockwise", "few_rows", "dense"]
    if available() and (device == "cuda" or interpreted):
        backends.insert(0, "triton")
    print(f"\n{'dtype':16s} {'backend':10s} {'largest error':>14s} {'mean error':>12s}   (nats, N = 1,024)")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low_q, low_k = q.to(dtype), k.to(dtype)
        exact = attention_entropy(low_q.double(), low_k.double(), backend="dense")
        for backend in backends:
            off = (attention_entropy(low_q, low_k, backend=backend) - exact).abs()
            print(f"{str(dtype)[6:]:16s} {backend:10s} {off.max().item():14.2e} {off.mean().item():12.2e}")
    if "triton" not in backends:
        print("triton is not in this table: it needs --device cuda, or TRITON_INTERPRET=1 for its interpreter")
    elif interpreted:
        print("triton here is its interpreter on the CPU: the arithmetic of the kernel, not that of a GPU")


def measure(options: Any, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Print time and peak memory by length and way, and return them as rows."""
    rows: list[dict[str, Any]] = []
    plain, others = ways(options.causal, device, dtype)
    for n in options.lengths:
        torch.manual_seed(0)
        shape = (options.batch, options.heads, n, options.width)
        tensors = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3)]
        seconds(plain, tensors)
        alone = peak(plain, tensors)
        baseline = "flash" if device == "cuda" and dtype != torch.float32 else "SDPA"
        print(f"{n:6d}  {baseline:18s} {'1':>12s} {'':7s} {'':7s} {alone:9.1f} {'1':>7s}")
        for name, loss in others.items():
            try:
                seconds(loss, tensors)
            except torch.OutOfMemoryError:
                print(f"{n:6d}  {name:18s} out of memory")
                continue
            bases, taken = [], []
            for _ in range(options.repeats):
                bases.append(seconds(plain, tensors))
                taken.append(seconds(loss, tensors))
            ratios = [a / b for a, b in zip(taken, bases)]
            memory = peak(loss, tensors)
            print(
                f"{n:6d}  {name:18s} {statistics.median(ratios):12.2f} {min(ratios):7.2f} {max(ratios):7.2f} "
                f"{memory:9.1f} {memory / alone:7.2f}"
            )
            both = {"method": f"attention entropy, {name}", "peer_name": f"{baseline} alone", "target": None}
            of = f"of attention and its entropy, {n} tokens"
            time_of = {"quantity": f"forward and backward {of}", "unit": "s"}
            times = {"ours": statistics.median(taken), "peer": statistics.median(bases)}
            rows.append({**both, **time_of, **times, "ratio": statistics.median(ratios)})
            peaks = {"quantity": f"live tensors at most, {of}", "unit": "MB", "ours": memory, "peer": alone}
            rows.append({**both, **peaks, "ratio": memory / alone})
    return rows


def table_rows(*, quick: bool) -> list[dict[str, Any]]:
    """The rows of ``python -m benchmarks``."""
    options = options_of(["--lengths", "128", "--repeats", "2"] if quick else ["--lengths", "512", "2048"])
    return measure(options, options.device, torch.float32)


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32, bfloat16 on a GPU"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--causal", action="store_true")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    return options


def main() -> None:
    options = options_of()
    cuda = options.device == "cuda"
    dtype = getattr(torch, options.dtype or ("bfloat16" if cuda else "float32"))
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    print(
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}; B{options.batch} H{options.heads} "
        f"D{options.width} {str(dtype)[6:]}{', causal' if options.causal else ''}, forward + backward"
    )
    print(f"{'N':>6s}  {'':18s} {'time, x':>12s} {'min':>7s} {'max':>7s} {'peak MB':>9s} {'x':>7s}")
    measure(options, options.device, dtype)
    if not cuda:
        print("GPU rows (triton beside flash) were not run: they need --device cuda")
    errors(options.device)


if __name__ == "__main__":
    main()
