"""``lightning-entropy heatmap``: from a checkpoint and features to attention on the slide.

The map is that of the whole bag in evaluation mode, without gradient, from the logits that the model
computed. For each slide it writes a PNG a scale, a GeoJSON for QuPath, an h5 with ``attention`` beside
``coords``, and a JSON of the numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_entropy.recipes.attention_figure import SCALES
from lightning_entropy.recipes.attention_map import AttentionMap, write_png
from lightning_entropy.recipes.slide_features import FeatureFile, find_features, read_features
from lightning_entropy.recipes.slide_view import SlideView
from lightning_entropy.recipes.trained_attention import (
    TrainedClassifier,
    attention_map,
    load_classifier,
)

__all__ = ["AttentionMap", "add_arguments", "attention_map", "load_classifier", "run", "write_png"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``lightning-entropy heatmap``."""
    parser.add_argument("--checkpoint", required=True, type=Path, help="checkpoint of a MILClassifier")
    parser.add_argument(
        "--features", required=True, nargs="+", type=Path, help="feature files with coords, or folders of them"
    )
    parser.add_argument(
        "--slide", type=Path, help="the slide, or the folder of slides that are named as the features; may be absent"
    )
    parser.add_argument("--output", type=Path, default=Path("heatmaps"), help="folder to write into (%(default)s)")
    parser.add_argument("--scale", nargs="+", choices=SCALES, default=list(SCALES), help="one PNG each (%(default)s)")
    parser.add_argument("--branch", default="mean", help="mean, or the number of a branch (%(default)s)")
    parser.add_argument("--patch-size", type=int, help="side of a tile in level-0 pixels, if the features do not say")
    parser.add_argument("--mpp", type=float, help="micrometres a level-0 pixel, if the slide does not say")
    parser.add_argument("--compare", type=Path, help="a second checkpoint, drawn beside with the same colours")
    parser.add_argument("--region", choices=("slide", "tiles"), default="slide", help="what to draw (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")


def run(namespace: argparse.Namespace) -> list[Path]:
    """Draw and write the maps, print a table of them and where they are.

    Args:
        namespace: parsed with the arguments of `add_arguments`.

    Returns:
        The files that were written.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: with every slide that could not be drawn and why; the others are written.
    """
    from rich.console import Console
    from rich.progress import track

    device = namespace.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    files = find_features(namespace.features)
    if namespace.slide is not None and not namespace.slide.exists():
        raise FileNotFoundError(f"slide {namespace.slide} does not exist")
    if namespace.slide is not None and namespace.slide.is_file() and len(files) > 1:
        raise ValueError(f"--slide {namespace.slide} is one slide and there are {len(files)}: pass their folder")
    paths = [namespace.checkpoint] + ([] if namespace.compare is None else [namespace.compare])
    models = {title: load_classifier(path, device=device) for title, path in _titles(paths).items()}

    console = Console()
    written: list[Path] = []
    rows: list[tuple[str, AttentionMap]] = []
    problems: list[str] = []
    for file in track(files, "heatmaps", console=console, disable=len(files) == 1, transient=True):
        try:
            paths_of_slide, maps = _draw(file, models, namespace)
        except ValueError as error:
            problems.append(f"{file.slide}: {error}")
            continue
        written.extend(paths_of_slide)
        rows.extend(maps.items())
    if rows:
        _print_table(console, rows)
        console.print(f"{len(written)} files in {namespace.output.resolve()}", highlight=False, soft_wrap=True)
        for path in written[:12]:
            console.print(f"  {path.name}", highlight=False, soft_wrap=True)
        if len(written) > 12:
            console.print(f"  ... and {len(written) - 12} more")
    if problems:
        raise ValueError(f"{len(problems)} of {len(files)} slides could not be drawn:\n  " + "\n  ".join(problems))
    return written


def _titles(paths: list[Path]) -> dict[str, Path]:
    """A short name for each checkpoint: its own, or as much of the path as tells two apart."""
    resolved = [path.resolve() for path in paths]
    if len(resolved) == 2 and resolved[0] == resolved[1]:
        raise ValueError(f"--compare is the same checkpoint: {paths[0]}")
    for length in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.with_suffix("").parts[-length:]) for path in resolved]
        if len(set(names)) == len(names):
            return dict(zip(names, paths))
    raise ValueError(f"checkpoints {' and '.join(map(str, paths))} differ in their suffix only: rename one")


def _slide_of(file: FeatureFile, given: Path | None) -> Path | None:
    """The slide of a feature file: the one given, or the one of that name in the folder given."""
    if given is None or given.is_file():
        return given
    known = [path for path in sorted(given.iterdir()) if path.is_file() and path.stem == file.slide]
    named = given / file.slide
    if named.is_file():
        return named
    if len(known) > 1:
        raise ValueError(f"several slides of that name in {given}: {', '.join(path.name for path in known)}")
    return known[0] if known else None


def _draw(
    file: FeatureFile, models: Mapping[str, TrainedClassifier], namespace: argparse.Namespace
) -> tuple[list[Path], dict[str, AttentionMap]]:
    image = _slide_of(file, namespace.slide)
    if image is None:
        return _write(file, models, namespace, None)
    with SlideView(image) as slide:
        return _write(file, models, namespace, slide)


def _write(
    file: FeatureFile, models: Mapping[str, TrainedClassifier], namespace: argparse.Namespace, slide: SlideView | None
) -> tuple[list[Path], dict[str, AttentionMap]]:
    mpp = namespace.mpp if namespace.mpp is not None or slide is None else slide.mpp
    tiles = read_features(
        file,
        patch_size=namespace.patch_size,
        mpp=mpp,
        level_downsamples=None if slide is None else slide.level_downsamples,
    )
    maps = {
        title: attention_map(trained, tiles, slide=file.slide, branch=namespace.branch)
        for title, trained in models.items()
    }
    stem = namespace.output / f"{file.slide.replace('/', '_')}.attention"
    written = [
        write_png(maps, f"{stem}.{scale}.png", scale=scale, slide=slide, region=namespace.region, mpp=mpp)
        for scale in namespace.scale
    ]
    for number, one in enumerate(maps.values()):
        base = f"{stem}" if number == 0 else f"{stem}.compare"
        origin = (0, 0) if slide is None else slide.bounds[:2]
        written.append(one.to_geojson(f"{base}.geojson", origin=origin))
        written.append(one.to_h5(f"{base}.h5"))
        one.to_json(f"{base}.json")
        written.append(Path(f"{base}.json"))
    return written, maps


def _print_table(console: Any, rows: list[tuple[str, AttentionMap]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("slide", overflow="fold")
    table.add_column("checkpoint", overflow="fold")
    for name in ("tiles", "entropy", "H/log N", "effective", "top 10", "class"):
        table.add_column(name, justify="right", no_wrap=True)
    for title, one in rows:
        probabilities = one.attributes["probabilities"]
        best = int(np.argmax(probabilities))
        table.add_row(
            one.slide,
            title,
            str(len(one)),
            f"{one.entropy:.2f}",
            f"{one.normalized_entropy:.2f}",
            f"{one.effective_number:.1f}",
            f"{one.top_mass(10):.0%}",
            f"{best}: {probabilities[best]:.0%}",
        )
    console.print(table)
    sources = dict.fromkeys(f"{one.patch_size_level0} ({one.attributes['patch_size_source']})" for _, one in rows)
    console.print(f"tile size in level-0 pixels: {'; '.join(sources)}", highlight=False)
