"""The weights of chosen layers as a selection: what a fine-tuning trains, and what it could have trained."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from lightning_entropy.observe.stored_weights import fingerprint_of, weight_digest
from lightning_entropy.surgery.layer_weights import layer_weights
from lightning_entropy.surgery.report import Refusal
from lightning_entropy.surgery.selection import ScoredWeight, Selection
from lightning_entropy.surgery.trainable import plain_name
from lightning_entropy.training.layer_report import LayerDiagnosis

SCORES = {"inflection_index": "index", "gradient_decay": "decay"}


def select_layers(
    module: nn.Module,
    layers: list[str],
    diagnosis: LayerDiagnosis | None,
    *,
    by: str,
    projections: str | list[str] | None,
    exclude: Iterable[str],
    owner: str,
) -> Selection:
    """A selection of weights by the layers that they are in.

    Args:
        module: that is trained.
        layers: names of the chosen ones, in the order of the model.
        diagnosis: with all layers; None where there was none.
        by: what chose them: one of ``SCORES``, by which all layers are scored, or another word.
        projections: of :func:`~lightning_entropy.surgery.layer_weights.layer_weights`; None: every parameter of the
            layers from the lowest chosen one up, for training them wholly.
        exclude: names of modules of which nothing is taken.
        owner: who asks, for messages.

    Raises:
        ValueError: if a chosen layer has no such weight.
    """
    left_out = tuple(exclude)
    if projections is None:
        return _wholly(module, layers, diagnosis, by, left_out)
    rows = {} if diagnosis is None else {row.layer: row for row in diagnosis.rows}
    sites = {layer: list(rows[layer].attention) if layer in rows else [] for layer in [*rows, *layers]}
    found = layer_weights(module, sites, projections, exclude=left_out, owner=owner)
    scored, skipped, digests = [], [], {}
    for layer, weights in found.items():
        taken = layer in layers
        if taken and not weights:
            raise ValueError(_nothing_in(module, layer, projections, owner))
        score = float(taken)
        if by in SCORES and layer in rows:
            score = getattr(rows[layer], SCORES[by])
        for weight in weights:
            if weight.refusal is not None:
                skipped.append(Refusal(weight.module, weight.refusal))
                continue
            digests[weight.name] = weight_digest(weight.read())
            scored.append(_scored(weight.name, weight.module, score, weight.shape, layer, taken))
    if not any(row.chosen for row in scored):
        reasons = "; ".join(f"{r.module}: {r.reason}" for r in skipped[:5])
        raise ValueError(f"{owner} can adapt none of the {len(skipped)} weights of {', '.join(layers)} ({reasons})")
    scored.sort(key=lambda row: (not row.chosen, -row.score))
    budget = sum(row.chosen for row in scored)
    return Selection(by, scored, None, budget, True, skipped, fingerprint_of(digests))


def _nothing_in(module: nn.Module, layer: str, projections: str | list[str], owner: str) -> str:
    what = {"attention": "weights of attention projections", "attention+mlp": "linear weights"}
    wanted = what.get(projections) if isinstance(projections, str) else None
    known = [w.name for w in layer_weights(module, {layer: []}, "attention+mlp", owner=owner)[layer]]
    return (
        f"{owner}: {layer} has no {wanted or f'weights named by {projections!r}'}. Its weights: "
        f"{', '.join(known[:12]) or 'none'}. Pass projections='attention+mlp' or shell patterns over their names."
    )


def _wholly(
    module: nn.Module, layers: list[str], diagnosis: LayerDiagnosis | None, by: str, exclude: tuple[str, ...]
) -> Selection:
    every = layers if diagnosis is None else diagnosis.layers
    lowest = min((every.index(layer) for layer in layers if layer in every), default=0)
    path = list(dict.fromkeys([*every[lowest:], *layers]))
    scored = []
    for name, parameter in module.named_parameters():
        holder = plain_name(name).rpartition(".")[0]
        layer = next((x for x in path if f"{holder}.".startswith(f"{x}.")), None)
        if layer is None or any(f"{holder}.".startswith(f"{x}.") for x in exclude):
            continue
        if parameter.is_floating_point() and ".lora_" not in f".{name}":
            scored.append(_scored(plain_name(name), holder, 1.0, tuple(parameter.shape), layer, True))
    return Selection(f"{by}_and_above", scored, None, len(scored), True)


def _scored(name: str, module: str, score: float, shape: tuple[int, ...], layer: str, chosen: bool) -> ScoredWeight:
    score = score if math.isfinite(score) else 0.0
    return ScoredWeight(name, module, score, 0.0, True, score, shape, math.prod(shape), chosen, layer)


__all__ = ["SCORES", "select_layers"]
