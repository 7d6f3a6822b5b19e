"""Methods x folds x seeds: every run a file, the table computed from the files.

Each run has the data and the initial weights of its seed, whatever the variant, so that variants are compared
in pairs. A comparison that was stopped continues where it was: a run whose file is there is not repeated.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from lightning_entropy.data.embedded import EMBEDDED, is_generated
from lightning_entropy.recipes.catalog import Recipe, find_recipe
from lightning_entropy.recipes.comparison_result import Comparison
from lightning_entropy.recipes.run_record import fingerprint, read_record, train_and_test
from lightning_entropy.recipes.variants import changed, read_yaml, variants, with_seed
from lightning_entropy.training.figures import write_figure
from lightning_entropy.training.files import atomic_write
from lightning_entropy.verbosity import announce

Select = Literal["best", "last"]
GENERATED_IMAGES = ("embedded:objects",)  # drawn anew for every seed


class ComparisonStopped(RuntimeError):
    """A comparison that could not go on; what it had finished is kept, and the same call continues."""


class Job(NamedTuple):
    """One run: what it is called, what it trains, and where it is written."""

    recipe: Recipe
    variant: str
    fold: int | None
    seed: int
    config: dict[str, Any]
    select: Select
    path: Path

    @property
    def fingerprint(self) -> str:
        """What the run's result depends on."""
        return fingerprint({**self.config, "select": self.select})

    @property
    def name(self) -> str:
        """What the run is called on the screen."""
        fold = "" if self.fold is None else f", fold {self.fold}"
        return f"{self.variant}{fold}, seed {self.seed}"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-") or "run"


def plan_jobs(
    recipe: Recipe,
    *,
    vary: Mapping[str, Sequence[Any]],
    folds: int | None,
    seeds: Sequence[int],
    output: Path,
    overrides: Mapping[str, Any],
    select: Select,
) -> list[Job]:
    """Every run of a comparison, the variants of one fold and seed beside each other."""
    base = changed(read_yaml(recipe.path), overrides)
    named = variants(recipe, vary)
    slugs = [_slug(name) for name in named]
    if len(set(slugs)) < len(slugs):
        raise ValueError(f"variants {list(named)} cannot be told apart in file names {slugs}")
    jobs = []
    for seed in seeds:
        for fold in range(folds) if folds else [None]:
            for slug, (variant, changes) in zip(slugs, named.items()):
                settings: dict[str, Any] = {**with_seed(changes, seed), "seed_everything": seed, "data.seed": seed}
                if fold is not None:
                    settings |= {"data.fold": fold, "data.folds": folds}
                fold_part = "" if fold is None else f"-fold{fold}"
                path = output / "runs" / f"{slug}{fold_part}-seed{seed}.json"
                jobs.append(Job(recipe, variant, fold, seed, changed(base, settings), select, path))
    return jobs


def _differences(old: Any, new: Any, key: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
    elif old != new:
        yield f"{key}: {old!r} there, {new!r} now"


def _finished(jobs: Sequence[Job]) -> dict[Path, dict[str, Any]]:
    """Records that are there already.

    Raises:
        ValueError: if one was made with other settings.
    """
    found = {}
    for job in jobs:
        record = read_record(job.path)
        if record is None:
            continue
        if record["fingerprint"] != job.fingerprint:
            old = {**record["config"], "select": record.get("select")}
            what = "; ".join(_differences(old, {**job.config, "select": job.select})) or "the fingerprint alone"
            raise ValueError(
                f"{job.path} was made with other settings ({what}). Give another output folder, or remove the file."
            )
        found[job.path] = record
    return found


def run_job(job: Job) -> Path:
    """Train one run and write its file."""
    record = {
        "variant": job.variant,
        "fold": job.fold,
        "seed": job.seed,
        "fingerprint": job.fingerprint,
        "select": job.select,
        "config": job.config,
        **train_and_test(job.recipe, job.config, select=job.select),
    }
    with atomic_write(job.path) as temporary:
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return job.path


def _one_thread() -> None:
    torch.set_num_threads(1)


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that it can tidy up: its default would leave the workers running."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # the caller has his own way
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run_all(jobs: Sequence[Job], *, workers: int, done: Callable[[Job], None]) -> None:
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            run_job(job)
            done(job)
        return
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_one_thread) as pool:
        running = {pool.submit(run_job, job): job for job in jobs}
        try:
            for future in as_completed(running):
                future.result()
                done(running[future])
        except BrokenProcessPool as error:
            finished = sum(job.path.is_file() for job in jobs)
            raise ComparisonStopped(
                f"a worker process died, killed perhaps for want of memory ({len(jobs)} runs were to do, {finished} "
                "of them are finished and kept). The same command continues with the others; fewer workers need less "
                "memory"
            ) from error
        except KeyboardInterrupt:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()  # each stops after its step, and its unfinished run is not written
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _progress(total: int, finished: int, *, show: bool) -> Iterator[Callable[[Job], None]]:
    if not show:
        yield lambda job: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("comparing", total=total, completed=finished)
        yield lambda job: progress.update(task, advance=1, description=job.name)


def _independent(config: Mapping[str, Any]) -> bool:
    data = config.get("data", {})
    if data.get("images") in GENERATED_IMAGES:
        return True
    name = str(data.get("features", ""))
    kind = name.removeprefix("embedded:")
    return name.startswith("embedded:") and kind in EMBEDDED and is_generated(kind)


def _add_numbers_across(recipe: Recipe, records: Sequence[dict[str, Any]]) -> None:
    """Metrics of every run that its report can give only beside the others; they are in no run's file."""
    across = None if recipe.report is None else getattr(import_module(recipe.report), "across", None)
    if across is not None:
        for record, more in zip(records, across(records)):
            record["metrics"] = {**record["metrics"], **more}


def _write_report(recipe: Recipe, comparison: Comparison, folder: Path) -> None:
    """The figure that a recipe adds, and its numbers."""
    if recipe.report is None:
        return
    report = import_module(recipe.report)
    figure, numbers = (folder / name for name in recipe.report_files)
    write_figure(report.draw(comparison), figure)
    with atomic_write(numbers) as temporary:
        temporary.write_text(json.dumps(report.numbers(comparison), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def compare(
    recipe: str = "mil",
    *,
    vary: Mapping[str, Sequence[Any]],
    folds: int | None = None,
    seeds: int | Sequence[int] = 5,
    output: str | os.PathLike[str] = "comparison",
    overrides: Mapping[str, Any] | None = None,
    select: Select | None = None,
    workers: int = 1,
    show: bool = True,
) -> Comparison:
    """Train every variant on every fold with every seed and compare them in pairs.

    Writes ``runs/*.json`` (one a run: settings, test metrics, curves, seconds, versions), ``results.json``,
    ``results.csv``, ``intervals.png``, ``curves.png``, and the figure of a recipe that has one, with its numbers.
    Called again with the same arguments it trains only what is missing.

    Args:
        recipe: name of a packaged recipe, or a YAML file.
        vary: section of the recipe's variants file (``{"aem": ["off", "cosine"]}``) or dotted key
            (``{"model.lr": [1e-4, 1e-3]}``) -> values; several keys multiply. The first variant is the
            baseline.
        folds: number of folds; ``None`` keeps the split of the recipe.
        seeds: how many seeds (0, 1, ...), or which.
        output: folder for the results.
        overrides: dotted key -> value, for every run.
        select: test the ``"best"`` checkpoint of the recipe, or the ``"last"`` epoch; None for what the recipe says.
        workers: processes; each then computes with one thread.
        show: draw a progress bar.

    Returns:
        The comparison; ``print(comparison)`` is its table.

    Raises:
        ValueError: if a name is unknown, a number is out of its range, or a run's file was made with other
            settings.
        OSError: if the folder cannot be written, or the disk is full.
        ComparisonStopped: if a worker was killed.
        KeyboardInterrupt: after Ctrl-C or SIGTERM.
    """
    chosen = find_recipe(recipe)
    numbers = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise ValueError(f"seeds must be a positive number or different numbers >= 0, got {seeds!r}")
    if folds is not None and folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}; None keeps the split of the recipe")
    select = chosen.select if select is None else select
    if select not in ("best", "last"):
        raise ValueError(f"select must be 'best' or 'last', got {select!r}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    folder = Path(output)
    jobs = plan_jobs(
        chosen,
        vary=vary,
        folds=folds,
        seeds=numbers,
        output=folder,
        overrides=overrides or {},
        select=select,
    )
    finished = _finished(jobs)
    missing = [job for job in jobs if job.path not in finished]
    if finished:
        announce(f"compare: {len(finished)} of {len(jobs)} runs are in {folder / 'runs'} already")
    if missing:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder / "runs"):  # a folder that cannot be written is known before training
            pass
    with _stoppable(), _progress(len(jobs), len(finished), show=show) as done:
        _run_all(missing, workers=workers, done=done)
    records = []
    for job in jobs:
        record = read_record(job.path)
        if record is None:
            raise RuntimeError(f"{job.path} was written and cannot be read")
        records.append(record)
    _add_numbers_across(chosen, records)
    comparison = Comparison(
        recipe=chosen.name,
        runs=records,
        variants=list(dict.fromkeys(job.variant for job in jobs)),
        independent=_independent(jobs[0].config),
    )
    comparison.write(folder)
    _write_report(chosen, comparison, folder)
    return comparison


__all__ = ["Comparison", "ComparisonStopped", "Job", "compare", "plan_jobs", "run_job"]
