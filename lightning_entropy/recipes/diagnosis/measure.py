"""Everything that a diagnosis measures, section by section; what cannot be measured says why."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import nn

from lightning_entropy import __version__
from lightning_entropy.observe import ActivationReader, ActivationReport, AttentionEntropyReader
from lightning_entropy.observe.massive_activations import MagnitudeReader
from lightning_entropy.observe.numbered_layers import numbered_blocks
from lightning_entropy.observe.spectral_report import spectral_report
from lightning_entropy.recipes.diagnosis import findings as judge
from lightning_entropy.recipes.diagnosis.magnitude_figure import magnitude_figure
from lightning_entropy.recipes.diagnosis.result import Finding, ModelDiagnosis, Section
from lightning_entropy.recipes.diagnosis.subject import Subject
from lightning_entropy.training.attention_report import AttentionEntropyReport, heads_of, mean_of_readings
from lightning_entropy.training.layer_diagnosis import diagnose_layers
from lightning_entropy.training.probe import undisturbed
from lightning_entropy.verbosity import announce

Measured = tuple[Section, list[Finding]]
_SAMPLES = 20_000


def measure(subject: Subject, batches: list[Any], *, loaded: str = "", data: str = "") -> ModelDiagnosis:
    """Read attention, gradients, activations, magnitudes and spectra of a model on some batches.

    The model is afterwards as it was before.

    Args:
        subject: the model.
        batches: what it is run on.
        loaded: which weights were loaded, in words.
        data: what the batches are, in words.
    """
    parts: dict[str, tuple[str, Callable[[Subject, list[Any]], Measured]]] = {
        "attention_entropy": ("Attention entropy", _attention),
        "layer_diagnosis": ("Attention and gradient flow by layer", _layers),
        "activations": ("Activations", _activations),
        "massive_activations": ("Massive activations", _magnitudes),
        "condition_numbers": ("Condition numbers of the weights", _spectra),
    }
    measured: dict[str, Section] = {}
    found: list[Finding] = []
    for key, (title, part) in parts.items():
        announce(f"diagnose: {title.lower()}")
        try:
            measured[key], told = part(subject, batches)
        except ValueError as error:  # what this package says where a model has nothing to read
            measured[key], told = Section(title, "", absent=str(error)), []
        found += told
    count = sum(p.numel() for p in subject.module.parameters())
    facts = [
        type(subject.module).__name__,
        f"{count:,} parameters",
        loaded or "weights as built",
        f"{len(batches)} batches of {data}" if data else f"{len(batches)} batches",
        f"loss: {subject.objective}",
    ]
    return ModelDiagnosis(subject.name, facts, judge.most_severe_first(found), measured, __version__)


def _attention(subject: Subject, batches: list[Any]) -> Measured:
    reader = AttentionEntropyReader(subject.module, gradient=False, sinks=True, owner="diagnose")
    readings = []
    with undisturbed(subject.module):
        for batch in batches:
            with reader:
                subject.forward(batch)
                readings.append(heads_of(reader.layers, type(subject.module).__name__))
            reader.clear()
    report = AttentionEntropyReport(mean_of_readings(readings))
    section = Section(
        "Attention entropy",
        "Entropy of every head, divided by that of uniform attention: 0 attends to one key, 1 to all alike. A head "
        "that gives most of its attention to one key and spreads the rest is a sink, and not collapsed.",
        rows=report.rows(),
        figure=report.plot(),
    )
    return section, judge.attention_findings(report)


def _layers(subject: Subject, batches: list[Any]) -> Measured:
    found = diagnose_layers(subject.module, batches, loss=subject.loss, progress=False)
    rows = [asdict(row) for row in found.rows]
    for row in rows:
        row["attention"] = ", ".join(row["attention"])
    section = Section(
        "Attention and gradient flow by layer",
        " ".join(
            [
                "The gradient is that of the loss by the layer's output, invariant to batch size and padding. "
                "Inflection layers have low attention entropy where the gradient is small or falls steeply.",
                str(found) + ".",
                *found.verdict,
                *found.notes,
            ]
        ),
        rows=rows,
        figure=found.plot(),
        record=found.record(),
    )
    told = judge.gradient_findings(found.layers, [row.gradient for row in found.rows], found.chosen)
    return section, told


def _activations(subject: Subject, batches: list[Any]) -> Measured:
    reader = ActivationReader(subject.module, samples=_SAMPLES, owner="diagnose")
    with undisturbed(subject.module), reader:
        for batch in batches:
            reader.start()
            subject.forward(batch)
            reader.stop()
    report = ActivationReport.of(reader.samples, reader.sites)
    section = Section(
        "Activations",
        "Spread of each activation's input, entropy of its output in nats, and its atom mass: the share of the output "
        "that is exactly one value, for ReLU the share of units that are off.",
        rows=report.rows,
        figure=report.plot(),
    )
    return section, judge.activation_findings(report.rows)


def layers_to_read(module: nn.Module) -> dict[str, nn.Module]:
    """The numbered blocks of a model; without any, its direct children, and theirs where there is one alone.

    Args:
        module: any module.
    """
    names = numbered_blocks(module)
    if names:
        return {name: module.get_submodule(name) for name in names}
    prefix = ""
    while len(children := dict(module.named_children())) == 1:
        name, module = next(iter(children.items()))
        prefix += f"{name}."
    return {prefix + name: child for name, child in children.items()}


def _magnitudes(subject: Subject, batches: list[Any]) -> Measured:
    layers = layers_to_read(subject.module)
    reader = MagnitudeReader(layers)
    with undisturbed(subject.module), reader:
        for batch in batches:
            subject.forward(batch)
    magnitudes = reader.magnitudes()
    if not magnitudes:
        raise ValueError(
            f"none of the {len(layers)} layers of {type(subject.module).__name__} gave a tensor of numbers"
        )
    rows = [{**m._asdict(), "ratio": m.ratio, "massive": m.massive} for m in magnitudes]
    section = Section(
        "Massive activations",
        "Largest against median absolute value of each layer's output. Above 100 and 1,000 times the median it is "
        "called massive (Sun et al., arXiv 2402.17762).",
        rows=rows,
        figure=magnitude_figure(magnitudes),
    )
    return section, judge.magnitude_findings(magnitudes)


def _spectra(subject: Subject, batches: list[Any]) -> Measured:
    report = spectral_report(subject.module, progress=False)
    keys = ("name", "shape", "kappa", "kappa_error", "shape_kappa", "resolvable_kappa", "stable_rank", "effective_rank",
            "deficit_per_dimension", "parameters")  # fmt: skip
    rows = []
    for row in report.rows:
        values = asdict(row)
        shown = {key: values[key] for key in keys}
        rows.append({**shown, "shape": " x ".join(map(str, row.shape))})
    skipped = f" {len(report.skipped)} weights have no row." if report.skipped else ""
    section = Section(
        "Condition numbers of the weights",
        "kappa is the largest over the smallest singular value. It ranks by shape before anything else: a square "
        "matrix of independent numbers has a large one. shape_kappa is divided by what such numbers of that shape have."
        + skipped,
        rows=rows,
        figure=report.plot() if rows else None,
        record={"skipped": dict(report.skipped)},
    )
    judged = [
        {
            "name": row.name,
            "condition_number": row.kappa,
            "shape_normalized": row.shape_kappa if math.isfinite(row.kappa) else math.inf,
            "parameters": row.parameters,
        }
        for row in report.rows
    ]
    return section, judge.spectrum_findings(judged)


__all__ = ["layers_to_read", "measure"]
