"""What the entropy of attention costs beside the attention itself, forward and backward, time and peak memory.

Each row is ``scaled_dot_product_attention`` plus its entropy, both backpropagated, relative to the attention alone
(measured in turn with it, so that a machine whose speed drifts favours neither). Peak memory is the largest sum of live
tensor storage, from the allocator's own record.

A second table has the error in nats of each way and dtype against float64, with unit-variance queries and keys that
share an offset.

    python benchmarks/attention_entropy.py [--lengths 256 1024 4096 8192] [--device cpu] [--repeats 5]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lightning_entropy.functional import attention_entropy, sampled_mean

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).sum()


def with_entropy(backend: str) -> Loss:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(q, k, v) + attention_entropy(q, k, backend=backend).mean()

    return loss


def sampled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    h = attention_entropy(q, k, queries=min(64, q.shape[-2]))
    return plain(q, k, v) + sampled_mean(h, q.shape[-2])[0].mean()


WAYS: dict[str, Loss] = {
    "two_call": with_entropy("two_call"),
    "blockwise": with_entropy("blockwise"),
    "sampled, 64 rows": sampled,
    "dense": with_entropy("dense"),
}


def seconds(loss: Loss, tensors: list[Tensor]) -> float:
    for t in tensors:
        t.grad = None
    if tensors[0].is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss(*tensors).backward()
    if tensors[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


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
    print(f"\n{'dtype':16s} {'backend':10s} {'largest error':>14s} {'mean error':>12s}   (nats, N = 1,024)")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low_q, low_k = q.to(dtype), k.to(dtype)
        exact = attention_entropy(low_q.double(), low_k.double(), backend="dense")
        for backend in ("two_call", "blockwise", "dense"):
            off = (attention_entropy(low_q, low_k, backend=backend) - exact).abs()
            print(f"{str(dtype)[6:]:16s} {backend:10s} {off.max().item():14.2e} {off.mean().item():12.2e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; B1 H4 D64 float32, forward + backward"
    )
    print(f"{'N':>6s}  {'':18s} {'time x SDPA':>12s} {'min':>7s} {'max':>7s} {'peak MB':>9s} {'x SDPA':>7s}")
    for n in options.lengths:
        torch.manual_seed(0)
        tensors = [torch.randn(1, 4, n, 64, device=options.device, requires_grad=True) for _ in range(3)]
        seconds(plain, tensors)
        alone = peak(plain, tensors)
        print(f"{n:6d}  {'SDPA':18s} {'1':>12s} {'':7s} {'':7s} {alone:9.1f} {'1':>7s}")
        for name, loss in WAYS.items():
            seconds(loss, tensors)
            ratios = []
            for _ in range(options.repeats):
                base = seconds(plain, tensors)
                ratios.append(seconds(loss, tensors) / base)
            memory = peak(loss, tensors)
            print(
                f"{n:6d}  {name:18s} {statistics.median(ratios):12.2f} {min(ratios):7.2f} {max(ratios):7.2f} "
                f"{memory:9.1f} {memory / alone:7.2f}"
            )
    errors(options.device)


if __name__ == "__main__":
    main()
