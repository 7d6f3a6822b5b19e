"""``lightning-entropy diagnose``: one command from a model to a report."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lightning_entropy.recipes.diagnosis.batches import open_batches
from lightning_entropy.recipes.diagnosis.in_trainer import diagnose_module
from lightning_entropy.recipes.diagnosis.measure import measure
from lightning_entropy.recipes.diagnosis.result import ModelDiagnosis
from lightning_entropy.recipes.diagnosis.subject import KINDS, load_weights, open_subject
from lightning_entropy.training.diagnostic_backward import on_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--model", required=True, metavar="MODEL", help=f"one of {', '.join(KINDS)}")
    parser.add_argument("--checkpoint", help="weights: a Trainer's checkpoint, a state dict, or .safetensors")
    parser.add_argument(
        "--data",
        help="random (default for library models), embedded:digits, a folder of images, a .txt or .csv of text; for a "
        "LightningModule the dotted path of a LightningDataModule (default: its own train_dataloader)",
    )
    parser.add_argument("--pretrained", action="store_true", help="load the library's weights (may download)")
    parser.add_argument("--classes", type=int, help="classes of the head of a library model")
    parser.add_argument("--arguments", default="{}", help="arguments of a LightningModule, as JSON")
    parser.add_argument("--batches", type=int, default=8, help="batches to read (default: 8)")
    parser.add_argument("--batch-size", type=int, default=8, help="of a library model (default: 8)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence (default: 64)")
    parser.add_argument("--accelerator", default="auto", help="cpu, gpu or auto (default)")
    parser.add_argument("--seed", type=int, default=0, help="of weights that are not loaded, and of noise")
    parser.add_argument("--output", default=".", help="folder of report.html and report.json (default: here)")


def run(options: argparse.Namespace) -> ModelDiagnosis:
    """Diagnose, write the report, print the first findings.

    Args:
        options: from :func:`add_arguments`.

    Raises:
        ValueError: if an option is wrong, or model and data do not go together.
        FileNotFoundError: if the checkpoint does not exist.
    """
    if options.batches < 1 or options.batch_size < 1:
        raise ValueError(f"--batches and --batch-size must be at least 1, got {options.batches}, {options.batch_size}")
    from lightning_entropy.training.lightning import seed_everything

    seed_everything(options.seed, verbose=False)
    if options.model.partition(":")[0] in ("timm", "transformers"):
        diagnosis = _of_library_model(options)
    else:
        diagnosis = _of_module(options)
    page, numbers = diagnosis.save(options.output)
    print(diagnosis)
    print(f"{page}  {numbers}")
    return diagnosis


def _of_library_model(options: argparse.Namespace) -> ModelDiagnosis:
    subject = open_subject(options.model, pretrained=options.pretrained, classes=options.classes, length=options.length)
    folder = Path(options.model.partition(":")[2]).is_dir()
    loaded = "pretrained weights" if options.pretrained or folder else ""
    if options.checkpoint:
        loaded = load_weights(subject.module, options.checkpoint)
    data = options.data or "random"
    batches = open_batches(subject, data, count=options.batches, size=options.batch_size, seed=options.seed)
    device = _device(options.accelerator)
    subject.module.to(device)
    told = f"{options.batch_size} {'images' if subject.takes == 'images' else 'sequences'} ({data})"
    return measure(subject, [on_device(batch, device) for batch in batches], loaded=loaded, data=told)


def _of_module(options: argparse.Namespace) -> ModelDiagnosis:
    if options.pretrained or options.classes is not None:
        raise ValueError("--pretrained and --classes are for models of timm and transformers; use --arguments")
    try:
        arguments = json.loads(options.arguments)
    except json.JSONDecodeError as error:
        raise ValueError(f"--arguments is no JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"--arguments must be a JSON object, got {options.arguments!r}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does: the user's module is a file in this folder
    result: dict[str, Any] = {}
    _, loaded = diagnose_module(
        options.model,
        lambda subject, batches: result.update(found=measure(subject, batches, data="its training data")),
        data=options.data,
        arguments=arguments,
        batches=options.batches,
        checkpoint=options.checkpoint,
        accelerator=options.accelerator,
    )
    diagnosis: ModelDiagnosis = result["found"]
    if loaded:
        diagnosis.facts[2] = loaded
    return diagnosis


def _device(accelerator: str) -> Any:
    import torch

    if accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available()):
        return torch.device("cuda")
    return torch.device("cpu" if accelerator == "auto" else accelerator)


__all__ = ["add_arguments", "run"]
