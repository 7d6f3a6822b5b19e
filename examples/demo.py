"""What attention entropy maximization (AEM) does, measured here and now: ``make demo``, or ``python
examples/demo.py``.

1. Gated ABMIL without and with AEM, and mean pooling as a control, on bags of digit images whose key
instances are
   known: few bags, many instances, the regime in which attention memorises a handful of instances.
2. The same on real histology (UCSB, 58 images), cross-validated.
3. The attention of two of these models, with and without AEM, over a real slide region.

Everything is read from installed packages: no network, no other files. Run again, it repeats nothing that is
done.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from rich.console import Console

from lightning_entropy import AttentionEntropyMaximization, MILClassifier, SlideBags, cli
from lightning_entropy.data import slide_region
from lightning_entropy.recipes import Comparison, compare, joint_table
from lightning_entropy.recipes.run_record import quiet
from lightning_entropy.training.files import atomic_write
from lightning_entropy.training.lightning import Callback, Trainer, seed_everything

METHODS = ["off", "constant", "cosine", "top_k", "mean_pooling"]
HISTOLOGY_METHODS = ["off", "constant", "mean_pooling"]
READING = (
    'How to read it: mean ± standard deviation over runs; below it the difference to plain ABMIL ("off") on the same '
    "data and initial weights, in how many pairs it is better, and its 95 % interval. Entropy is that of the attention "
    'in nats, "effective N" its exponential: how many instances are attended to. "inst. AUC" and "coverage" say how '
    "well attention finds the key instances, which no model was told."
)


def train_on_slide(checkpoint: Path, callbacks: list[Callback], *, epochs: int) -> None:
    """Train on bags of the slide region's tiles and keep the weights."""
    if checkpoint.is_file():
        return
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(MILClassifier(hidden=64, lr=5e-4), datamodule=SlideBags("embedded:slide"))
    trainer.save_checkpoint(checkpoint)


def slide_maps(output: Path, *, epochs: int) -> None:
    """Train without and with AEM on tiles of the slide, and draw the attention of both over the whole
    region.
    """
    plain, aem = output / "slide" / "abmil.ckpt", output / "slide" / "abmil_with_aem.ckpt"
    plain.parent.mkdir(parents=True, exist_ok=True)
    with quiet():
        train_on_slide(plain, [], epochs=epochs)
        train_on_slide(aem, [AttentionEntropyMaximization(weight=0.1, schedule="cosine")], epochs=epochs)
    region = slide_region()
    files = ["--features", str(region.features), "--slide", str(region.svs), "--output", str(output / "slide")]
    if cli.main(["heatmap", "--checkpoint", str(plain), "--compare", str(aem), *files]):
        raise SystemExit("the attention map could not be drawn; the message above says why")


def write_results(output: Path, comparisons: dict[str, Comparison], seconds: dict[str, float]) -> Path:
    """Everything in numbers, in one file."""
    path = output / "demo.json"
    found = {name: comparison.to_dict() for name, comparison in comparisons.items()}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({"comparisons": found, "seconds": seconds}, indent=1) + "\n")
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_results"), help="where results go (%(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the digit bags (%(default)s)")
    parser.add_argument("--epochs", type=int, help="epochs of every training, to look at the program and no more")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    options = parser.parse_args(argv)
    output, console = options.output, Console()
    changes = {} if options.epochs is None else {"trainer.max_epochs": options.epochs}

    start = time.perf_counter()
    console.print("1. Bags of digits: 20 training bags of 150 images, a tenth of them key in positive bags")
    digits = compare(
        "mil_digits",
        vary={"aem": METHODS},
        seeds=options.seeds,
        select="last",
        overrides=changes,
        output=output / "digits",
        workers=options.workers,
    )
    after_digits = time.perf_counter()
    console.print("2. Breast histology (UCSB): 58 images, five folds")
    histology = compare(
        "mil_ucsb",
        vary={"aem": HISTOLOGY_METHODS},
        folds=5,
        seeds=1,
        select="last",
        overrides=changes,
        output=output / "ucsb",
        workers=options.workers,
    )
    after_histology = time.perf_counter()
    torch.set_num_threads(1)  # small bags: handing work to a second thread costs more than it brings
    console.print("3. A slide region: 183 tiles of 112 pixels, DINOv2 features")
    slide_maps(output, epochs=options.epochs or 15)
    end = time.perf_counter()

    comparisons = {f"digits, {options.seeds} seeds": digits, "UCSB, 5 folds": histology}
    title = "ABMIL (off), with AEM, and mean pooling"
    Console(width=max(console.width, 100)).print(joint_table(comparisons, title=title))
    console.print(READING, highlight=False)
    for name, comparison in comparisons.items():
        console.print(f"{name}: {comparison.method}", highlight=False)
    seconds = {
        "digits": round(after_digits - start, 1),
        "ucsb": round(after_histology - after_digits, 1),
        "slide": round(end - after_histology, 1),
    }
    results = write_results(output, comparisons, seconds)
    console.print(
        f"\nseconds: {seconds}\n"
        f"numbers of all:       {results}\n"
        f"table, runs, curves:  {output}/digits/ and {output}/ucsb/ "
        "(results.json, results.csv, curves.png, intervals.png, runs/)\n"
        f"attention maps:       {output}/slide/",
        highlight=False,
    )


if __name__ == "__main__":
    main()
