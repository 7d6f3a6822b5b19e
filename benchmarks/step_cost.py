"""What each method costs beside the plain training step: every case of tests/cases.py, time and live memory.

Two Trainers take turns, a block of steps each, in one process; time is the processor's on one thread, the ratio is
taken block by block. Memory is the largest sum of live tensors over a training step, from the allocator's own record.
The models are tiny, so the ratios are mostly those of Python and of the extra passes: a bound from above. The costs
on models of real size are the other benchmarks'.

    python -m benchmarks --only step_cost
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.profiler import ProfilerActivity, profile

from lightning_entropy import set_verbosity
from tests.cases import CASES, Case
from tests.suite.running import loader, trainer


class Clock(Callback):
    """Processor seconds of each training step; of one of them the peak of live tensors instead."""

    def __init__(self, *, memory: bool) -> None:
        self.seconds: list[float] = []
        self.memory, self.peak = memory, 0

    def on_train_batch_start(self, *args: object) -> None:
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True) if self.memory else None
        if self.profiler is not None:
            self.profiler.__enter__()
        self.start = time.process_time()

    def on_train_batch_end(self, *args: object) -> None:
        self.seconds.append(time.process_time() - self.start)
        if self.profiler is not None:
            self.profiler.__exit__(None, None, None)
            self.peak = max(self.peak, largest_sum(self.profiler))


def largest_sum(record: profile) -> int:
    """The largest running sum of the allocations and releases of a profile, in bytes."""
    live = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def block(case: Case, *, on: bool, steps: int, memory: bool = False) -> Clock:
    """One short fit."""
    torch.manual_seed(0)
    clock = Clock(memory=memory)
    with tempfile.TemporaryDirectory() as folder:
        # The clock is outermost: it starts before the callback under test and ends after it.
        run = trainer([clock, *([case.build()] if on else [])], Path(folder), max_epochs=1)
        batches = case.batches()
        run.fit(case.module(), loader((batches * steps)[:steps]))
    return clock


def table_rows(*, quick: bool) -> list[dict[str, Any]]:
    """The rows of ``python -m benchmarks``."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    set_verbosity("warning")
    torch.set_num_threads(1)
    blocks, steps = (1, 4) if quick else (8, 22)
    found = []
    for case in CASES:
        block(case, on=True, steps=2)
        times: dict[bool, list[float]] = {False: [], True: []}
        for i in range(blocks):
            for on in (False, True) if i % 2 == 0 else (True, False):
                times[on].append(statistics.median(block(case, on=on, steps=steps).seconds[2:]))
        both = {"method": case.name, "peer_name": "plain step", "target": None}
        medians = {"ours": 1000 * statistics.median(times[True]), "peer": 1000 * statistics.median(times[False])}
        ratio = statistics.median(a / b for a, b in zip(times[True], times[False]))
        found.append(
            {**both, "quantity": "training step of the suite's model", "unit": "ms", **medians, "ratio": ratio}
        )
        peaks = [block(case, on=on, steps=3, memory=True).peak / 1e6 for on in (True, False)]
        sizes = {"ours": peaks[0], "peer": peaks[1], "ratio": peaks[0] / peaks[1] if peaks[1] > 0 else None}
        found.append({**both, "quantity": "live tensors of a step of the suite's model", "unit": "MB", **sizes})
    return found
