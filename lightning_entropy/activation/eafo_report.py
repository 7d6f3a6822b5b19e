"""EAFO on one's own network: what each activation gets, and what a step against its entropy would do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_entropy.activation.eafo import eafo
from lightning_entropy.functional.empirical_density import EmpiricalDensity
from lightning_entropy.observe.activation_report import ActivationReport, measure_site, undo_rounding
from lightning_entropy.observe.activations import ActivationReader


def _call(model: nn.Module, inputs: Any) -> None:
    if isinstance(inputs, Mapping):
        model(**inputs)
    elif isinstance(inputs, tuple):
        model(*inputs)
    else:
        model(inputs)


def _step(activation: nn.Module, density: EmpiricalDensity, metric: str | None, project_gain: bool) -> dict[str, Any]:
    """What EAFO says of one activation; why, where it says nothing."""
    row: dict[str, Any] = {"metric": "", "step": math.nan, "predicted_dH": math.nan, "measured_dH": math.nan,
                           "measured_dH_standardized": math.nan, "note": ""}  # fmt: skip
    reason = ""
    for rule in ("inverse", "score") if metric is None else (metric,):
        try:
            report = eafo(activation, density, metric=rule, project_gain=project_gain).report
        except ValueError as error:
            reason = str(error).split(";")[0].split(". ")[0]
            continue
        assert report is not None
        row |= {key: getattr(report, key) for key in row if key != "note"}
        return row
    return {**row, "note": reason}


def eafo_report(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    modules: str | Iterable[str] | None = None,
    metric: str | None = None,
    project_gain: bool = False,
    samples: int = 50_000,
) -> ActivationReport:
    """Measure the activations of a model on one batch, and what EAFO would do to each.

    The model runs once, in evaluation mode without gradients, and is left as it was. Each activation's input density
    is fitted by score matching; the step is automatic.

    Args:
        model: any module.
        inputs: what the model takes: a tensor, a tuple of positional or a mapping of keyword arguments. Give it a few
            thousand values for each activation, or more.
        modules: shell patterns over dotted names; None takes every activation module.
        metric: see :func:`eafo`; None takes ``"inverse"``, and ``"score"`` where the activation is not monotone.
        project_gain: see :func:`eafo`.
        samples: values of each activation that are looked at.

    Returns:
        :class:`lightning_entropy.observe.ActivationReport`, with the columns ``metric``, ``step``, ``predicted_dH``,
        ``measured_dH``, ``measured_dH_standardized`` (nats) and ``note`` beside the others.

    Raises:
        ValueError: if there is no activation module, a pattern matches none, or none ran.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.Softplus())
        >>> report = eafo_report(model, torch.randn(200, 8))
        >>> report.rows[0]["measured_dH"] < 0
        True
    """
    training = [(m, m.training) for m in model.modules()]
    reader = ActivationReader(model, modules, samples=samples, owner="eafo_report")
    try:
        for m, _ in training:
            m.training = False
        with torch.no_grad(), reader:
            _call(model, inputs)
    finally:
        for m, mode in training:
            m.training = mode
    rows = []
    for sample in reader.samples:
        activation = reader.sites[sample.site]
        x, _ = undo_rounding(sample)
        x = x[torch.isfinite(x)].flatten()
        found: dict[str, Any] = {"note": f"{len(x)} values are too few"}
        if len(x) >= 100:
            found = _step(activation, EmpiricalDensity.fit(x), metric, project_gain)
        rows.append({**measure_site(sample, activation), **found})
    return ActivationReport(rows)


__all__ = ["eafo_report"]
