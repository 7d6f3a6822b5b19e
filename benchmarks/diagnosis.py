"""What a layer diagnosis costs beside the plain forward and backward on the same data: time and peak memory.

A BERT of base size (12 layers of width 768, random weights) with a classification head, in evaluation mode, on 256
sequences of 128 tokens. Plain and diagnosed passes take turns in one process; on a CPU processor time is taken, since
other processes disturb it less than the wall clock. Peak memory is that of a process of its own for each: the resident
set, or on a GPU the allocator's. The last batches are padded, so that masks are at work.

    python benchmarks/diagnosis.py [--sequences 256] [--tokens 128] [--batch 8] [--pairs 3] [--device cpu]
    python benchmarks/diagnosis.py --sequences 32 --batch 8 --queries 16
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import statistics
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lightning_entropy import set_verbosity
from lightning_entropy.finetuning import diagnose_layers

Batch = dict[str, Tensor]


def build(options: argparse.Namespace) -> tuple[nn.Module, list[Batch]]:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=options.layers, num_labels=2, attn_implementation=options.attention
    )
    model = transformers.BertForSequenceClassification(config).eval().to(options.device)
    batches = []
    for start in range(0, options.sequences, options.batch):
        size = min(options.batch, options.sequences - start)
        lengths = torch.full((size,), options.tokens)
        if start + options.batch >= options.sequences:
            lengths[::2] = max(options.tokens // 2, 1)
        mask = (torch.arange(options.tokens) < lengths[:, None]).long()
        ids = torch.randint(0, config.vocab_size, (size, options.tokens))
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 2, (size,))})
    return model, [{k: v.to(options.device) for k, v in batch.items()} for batch in batches]


def plain(model: nn.Module, batches: list[Batch]) -> None:
    """The gradient of all data, as training with accumulation computes it."""
    for batch in batches:
        model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)


def diagnosed(model: nn.Module, batches: list[Batch], queries: int | None) -> None:
    diagnose_layers(model, batches, queries=queries, progress=False)


def seconds(function: Any, device: str) -> float:
    clock = time.perf_counter if device == "cuda" else time.process_time
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def quiet() -> None:
    warnings.simplefilter("ignore")
    set_verbosity("warning")


def peak(options: argparse.Namespace, which: str, answer: Any) -> None:
    """In a process of its own: peak memory in MB."""
    quiet()
    torch.set_num_threads(options.threads)
    model, batches = build(options)
    batches = batches[:2] + batches[-1:]
    if which == "plain":
        plain(model, batches)
    else:
        diagnosed(model, batches, options.queries)
    if options.device == "cuda":
        answer.put(torch.cuda.max_memory_allocated() / 1e6)
    else:
        answer.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--queries", type=int, default=None, help="query rows of each attention; default: all")
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(arguments)


def measured(options: argparse.Namespace) -> tuple[dict[str, float], dict[str, list[float]], list[float]]:
    """Peak memory of a fresh process each way, seconds, and their ratios pair by pair."""
    quiet()
    torch.set_num_threads(options.threads)

    context = multiprocessing.get_context("spawn")
    memory = {}
    for which in ("plain", "diagnosed"):
        answer: Any = context.Queue()
        process = context.Process(target=peak, args=(options, which, answer))
        process.start()
        memory[which] = answer.get()
        process.join()

    model, batches = build(options)
    plain(model, batches[:1])
    diagnosed(model, batches[:1], options.queries)
    times: dict[str, list[float]] = {"plain": [], "diagnosed": []}
    for i in range(options.pairs):
        passes = [
            ("plain", lambda: plain(model, batches)),
            ("diagnosed", lambda: diagnosed(model, batches, options.queries)),
        ]
        for name, function in passes if i % 2 == 0 else passes[::-1]:
            times[name].append(seconds(function, options.device))
    return memory, times, [b / a for a, b in zip(times["plain"], times["diagnosed"])]


def table_rows(*, quick: bool) -> list[dict[str, Any]]:
    """The rows of ``python -m benchmarks``."""
    options = options_of(["--sequences=8", "--tokens=16", "--layers=2", "--pairs=2"] if quick else [])
    memory, times, ratios = measured(options)
    seconds_of = {name: statistics.median(values) for name, values in times.items()}
    both = {"method": "layer diagnosis", "peer_name": "forward and backward alone"}
    what = f"BERT of {options.layers} layers, {options.sequences} sequences of {options.tokens} tokens"
    time_of = {"quantity": what, "unit": "s", "ours": seconds_of["diagnosed"], "peer": seconds_of["plain"]}
    peaks = {"quantity": f"peak of the process, {what}", "unit": "MB"}
    sizes = {"ours": memory["diagnosed"], "peer": memory["plain"], "ratio": memory["diagnosed"] / memory["plain"]}
    return [
        {**both, **time_of, "ratio": statistics.median(ratios), "target": 1.5},
        {**both, **peaks, **sizes, "target": 1.2},
    ]


def main() -> None:
    options = options_of()
    memory, times, ratios = measured(options)

    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    rows = "all query rows" if options.queries is None else f"{options.queries} query rows"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {options.attention} attention")
    data = f"{options.sequences} sequences of {options.tokens} tokens, batch {options.batch}"
    print(f"BERT of {options.layers} layers, {data}, {rows}")
    print(f"{'':22s} {'median':>9s} {'min':>9s} {'max':>9s}")
    for name, values in (*times.items(), ("ratio", ratios)):
        unit = "" if name == "ratio" else " (s)"
        print(f"{name + unit:22s} {statistics.median(values):9.3f} {min(values):9.3f} {max(values):9.3f}")
    print(f"peak memory (MB)       {memory['plain']:9.0f} plain, {memory['diagnosed']:.0f} diagnosed")
    share = memory["diagnosed"] / memory["plain"]
    print(f"time {statistics.median(ratios):.3f} x (limit 1.5), memory {share:.3f} x (limit 1.2)")


if __name__ == "__main__":
    main()
