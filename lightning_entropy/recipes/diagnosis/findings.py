"""From measurements to what a user should look at first. The thresholds are ours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from lightning_entropy.observe.massive_activations import LayerMagnitude
from lightning_entropy.recipes.diagnosis.result import Finding
from lightning_entropy.surgery.report import name_patterns
from lightning_entropy.training.attention_report import AttentionEntropyReport

STEEP = 3.0  # by how much a gradient may fall over the whole depth before it is told
DEAD = 0.7  # share of exact zeros in an activation's output
NARROW = 0.3  # spread of an activation's input below which it is nearly linear


def _some(names: Iterable[str], most: int = 3) -> str:
    found = name_patterns(names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def attention_findings(report: AttentionEntropyReport) -> list[Finding]:
    """Collapsed heads, and heads that attend to everything alike."""
    limits, heads = report.limits, report.heads
    total = sum(values.shape[1] for values in heads.values())
    found = []
    for kind, marks in (("collapsed", limits.collapsed), ("overloaded", limits.overloaded)):
        marked = {name: marks(values) for name, values in heads.items()}
        count = int(sum(m.sum() for m in marked.values()))
        if not count:
            continue
        layers = [name for name, m in marked.items() if bool(m.any())]
        values = [float(v) for name, m in marked.items() for v in heads[name][1][m]]
        mean = sum(values) / len(values)
        share = count / total
        where = f"{count} of {total} heads ({_some(layers)})"
        if kind == "collapsed":
            found.append(
                Finding(
                    f"Attention has collapsed in {where}: normalised entropy {mean:.2g}, sinks excluded",
                    "holds the entropy of every head above a floor; SigmaReparam() bounds it from below instead",
                    'AttentionEntropyRegularizer(objective="floor")',
                    0.25 + 0.75 * share,
                )
            )
        else:
            found.append(
                Finding(
                    f"Attention is close to uniform in {where}: normalised entropy {mean:.3f}",
                    "learns how sharp each head is; heads of an untrained model are uniform and need nothing",
                    "LearnableTemperature()",
                    0.1 + 0.4 * share,
                )
            )
    return found


def gradient_findings(layers: Sequence[str], gradients: Sequence[float], chosen: Sequence[str]) -> list[Finding]:
    """Gradients that fall on their way down, and the inflection layers.

    Args:
        layers: names in the order of depth.
        gradients: norms of the activation gradients, of the same order.
        chosen: the inflection layers.
    """
    usable = [(name, g) for name, g in zip(layers, gradients) if math.isfinite(g)]
    found = []
    if len(usable) > 1:
        top = usable[-1][1]
        name, least = min(usable, key=lambda pair: pair[1])
        if top > 0 and (least == 0 or top / least >= STEEP):
            drop = "to zero" if least == 0 else f"{top / least:.3g}x"
            severity = 1.0 if least == 0 else min(1.0, 0.4 + 0.15 * math.log10(top / least))
            where = f"; inflection layers: {_some(chosen)}" if chosen else ""
            found.append(
                Finding(
                    f"The gradient falls {drop} from {usable[-1][0]} to {name}{where}",
                    "puts LoRA where attention is saturated and the gradient is lost, and nowhere else"
                    if chosen
                    else "no layer is both saturated and steep; LoRA on the least specialised weights of all layers",
                    'InflectionLoRA(diagnosis="report.json")' if chosen else "KappaTune(mode='lora')",
                    severity if chosen else 0.6 * severity,
                )
            )
    return found


def activation_findings(rows: Sequence[dict[str, Any]]) -> list[Finding]:
    """Units that are off, and inputs so narrow that an activation is a line."""
    found = []
    dead = [row for row in rows if _number(row["atom_mass"]) >= DEAD]
    if dead:
        mean = sum(row["atom_mass"] for row in dead) / len(dead)
        kind = dead[0]["activation"]
        found.append(
            Finding(
                f"{mean:.0%} of the output is one value in {len(dead)} of {len(rows)} activations "
                f"({_some(row['site'] for row in dead)})",
                "gives units that are off a gradient around zero",
                f'ActivationSwap(old="{kind.lower()}", new="crrelu")',
                0.3 + 0.3 * mean,
            )
        )
    narrow = [row for row in rows if _number(row["input_std"], 1.0) < NARROW]
    if narrow:
        least = min(row["input_std"] for row in narrow)
        found.append(
            Finding(
                f"The input of {len(narrow)} of {len(rows)} activations has a standard deviation below {NARROW:g} "
                f"(down to {least:.2g}: {_some(row['site'] for row in narrow)}), where they are close to linear",
                "follows the spread while the model trains",
                "ActivationEntropyMonitor()",
                0.15 + 0.1 * len(narrow) / len(rows),
            )
        )
    return found


def _number(value: Any, otherwise: float = 0.0) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else otherwise


def magnitude_findings(magnitudes: Sequence[LayerMagnitude]) -> list[Finding]:
    """Massive activations (arXiv 2402.17762)."""
    massive = [m for m in magnitudes if m.massive]
    if not massive:
        return []
    worst = max(massive, key=lambda m: m.ratio)
    return [
        Finding(
            f"Massive activations in {_some(m.layer for m in massive)}: {worst.top:.3g} in channel {worst.channel} of "
            f"{worst.layer}, {worst.ratio:.3g} times the median",
            "tells the sinks that come with them from collapsed heads; keep these channels out of quantization",
            "AttentionEntropyMonitor()",
            0.35,
        )
    ]


def spectrum_findings(rows: Sequence[dict[str, Any]]) -> list[Finding]:
    """Weights that are singular, and what condition numbers would choose.

    Args:
        rows: ``name``, ``condition_number``, ``shape_normalized`` and ``parameters`` of each weight matrix.
    """
    singular = [row["name"] for row in rows if math.isinf(row["condition_number"])]
    found = []
    if singular:
        found.append(
            Finding(
                f"{len(singular)} of {len(rows)} weight matrices are rank-deficient ({_some(singular)})",
                "never selects them; a zero-initialised layer is meant to be so, a collapsed one is not",
                "spectral_report(model)",
                0.25,
            )
        )
    usable = sorted((r for r in rows if math.isfinite(r["condition_number"])), key=lambda r: r["shape_normalized"])
    if len(usable) > 1:
        kappas = [row["condition_number"] for row in usable]
        found.append(
            Finding(
                f"Condition numbers reach from {min(kappas):.3g} to {max(kappas):.3g}; per shape the least specialised "
                f"weights are {_some(row['name'] for row in usable[: max(1, len(usable) // 5)])}",
                "trains those and freezes the rest, when a pretrained model must not forget",
                'KappaTune(budget=0.2, normalize="shape", mode="lora")',
                0.05,
            )
        )
    return found


def most_severe_first(findings: Iterable[Finding]) -> list[Finding]:
    """The order in which they are told."""
    return sorted(findings, key=lambda finding: -finding.severity)


__all__ = [
    "activation_findings",
    "attention_findings",
    "gradient_findings",
    "magnitude_findings",
    "most_severe_first",
    "spectrum_findings",
]
