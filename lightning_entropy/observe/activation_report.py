"""What the activations of a model put out: spread of the input, entropies of the output, site by site."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_entropy.functional.activation_entropy import ActivationEntropy, activation_entropy
from lightning_entropy.functional.rounding import rounded_to, spread_rounding
from lightning_entropy.observe.activations import ActivationSample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    "site", "activation", "calls", "input_mean", "input_std", "input_entropy", "entropy", "standardized", "atom_mass",
    "mixed", "eps", "precision",
)  # fmt: skip
_HEADS = {"input_mean": "in mean", "input_std": "in std", "input_entropy": "in H", "entropy": "H",
          "standardized": "H std'd", "atom_mass": "atoms", "mixed": "H mixed",
          "predicted_dH": "dH predicted", "measured_dH": "dH", "measured_dH_standardized": "dH std'd"}  # fmt: skip


def learned_amount(module: nn.Module) -> float:
    """The learned amount of a correction: ``eps`` of CRReLU, ``step`` of an EAFO activation (means); else NaN."""
    for name in ("eps", "step"):
        value = getattr(module, name, None)
        if isinstance(value, nn.Parameter):
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value  # sharded
            return float(whole.detach().float().mean())
    return math.nan


@torch.no_grad()
def recompute(module: nn.Module, x: Tensor) -> Tensor:
    """The activation of ``x`` by a copy in evaluation mode, on the CPU, in the type of ``x``, not in place.

    Raises:
        ValueError: if the module is no activation of each element.
    """
    twin = copy.deepcopy(module).eval()
    for inner in twin.modules():
        for name, value in inner.named_parameters(recurse=False):
            if hasattr(value, "full_tensor"):
                setattr(inner, name, nn.Parameter(value.full_tensor()))
    y = twin.cpu().to(x.dtype)(x.clone())
    if not isinstance(y, Tensor) or y.shape != x.shape:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"{type(module).__name__} maps {tuple(x.shape)} to {got}: it is no activation of each element")
    return y


def undo_rounding(sample: ActivationSample) -> tuple[Tensor, str]:
    """The sample in float32 or wider on the CPU, ties of rounding spread, and what it was rounded to."""
    values = sample.values.detach().cpu()
    values = values if values.dtype == torch.float64 else values.float()
    narrow = rounded_to(sample.values.to(sample.dtype).cpu())
    return (values, _name(sample.dtype)) if narrow is None else (spread_rounding(values, narrow), _name(narrow))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _entropy(x: Tensor, method: str) -> ActivationEntropy:
    by_channel = x.dim() == 2
    finite = x[torch.isfinite(x).all(-1)] if by_channel else x[torch.isfinite(x)]
    if len(finite) < 16:
        return ActivationEntropy(*(torch.tensor(math.nan) for _ in ActivationEntropy._fields))
    h = activation_entropy(finite, method=method, channel_dim=1 if by_channel else None, rounding="keep")
    return ActivationEntropy(*(value.float().nanmean() for value in h))


def measure_site(
    sample: ActivationSample, module: nn.Module, *, per_channel: bool = False, method: str = "vasicek"
) -> dict[str, Any]:
    """One row of a report: input spread and entropies of a site, from a sample of its input.

    Args:
        sample: what a reader kept.
        module: the activation; computed again in float32 or wider.
        per_channel: entropy of each channel, then the mean, instead of the pooled values.
        method: see :func:`lightning_entropy.functional.spacing_entropy`.

    Returns:
        Values for :data:`COLUMNS`.
    """
    x, precision = undo_rounding(sample)
    y = recompute(module, x)
    if not per_channel:
        x, y = x.flatten(), y.flatten()
    before, after = _entropy(x, method), _entropy(y, method)
    return {
        "site": sample.site,
        "activation": type(module).__name__,
        "calls": sample.calls,
        "input_mean": float(x[torch.isfinite(x)].mean()),
        "input_std": float(before.std),
        "input_entropy": float(before.entropy),
        "entropy": float(after.entropy),
        "standardized": float(after.standardized),
        "atom_mass": float(after.atom_mass),
        "mixed": float(after.mixed),
        "eps": learned_amount(module),
        "precision": precision,
    }


class ActivationReport:
    """A table of activation sites in the order of the forward.

    Args:
        rows: one mapping a site, with :data:`COLUMNS` and any further columns.
        step: the training step, or None.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], *, step: int | None = None) -> None:
        self.rows = list(rows)
        self.step = step

    @classmethod
    def of(
        cls,
        samples: Sequence[ActivationSample],
        sites: dict[str, nn.Module],
        *,
        per_channel: bool = False,
        method: str = "vasicek",
        step: int | None = None,
    ) -> ActivationReport:
        """Measure every site that was read."""
        rows = [measure_site(s, sites[s.site], per_channel=per_channel, method=method) for s in samples]
        return cls(rows, step=step)

    def __len__(self) -> int:
        return len(self.rows)

    def table(self) -> str:
        """The report as text, columns aligned; columns without a value in any row are left out."""
        names = list(self.rows[0]) if self.rows else []
        kept = [n for n in names if any(not _empty(row.get(n)) for row in self.rows)]
        cells = [[_HEADS.get(n, n) for n in kept], *([_cell(row.get(n)) for n in kept] for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(kept))]
        left = {"site", "activation", "precision", "note"}
        lines = [
            "  ".join(c.ljust(w) if n in left else c.rjust(w) for c, w, n in zip(line, widths, kept)) for line in cells
        ]
        return "\n".join(line.rstrip() for line in lines)

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> str:
        """The report as JSON; numbers that are not finite as null."""
        rows = [
            {k: None if _empty(v) or v in (math.inf, -math.inf) else v for k, v in row.items()} for row in self.rows
        ]
        return json.dumps({"step": self.step, "sites": rows}, indent=2)

    def plot(self) -> Figure:
        """Entropies, atoms, input spread and learned amounts over depth, on a figure without pyplot."""
        from matplotlib.figure import Figure

        panels = [
            ("nats", ("entropy", "standardized")),
            ("atom mass", ("atom_mass",)),
            ("spread of the input", ("input_std",)),
            ("learned amount", ("eps",)),
        ]
        shown = [(label, keys) for label, keys in panels if any(not _empty(r.get(k)) for r in self.rows for k in keys)]
        figure = Figure(figsize=(max(5.0, 0.35 * len(self.rows) + 2), 1.7 * len(shown) + 1), layout="constrained")
        axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        depth = range(len(self.rows))
        for axis, (label, keys) in zip(axes, shown):
            for key in keys:
                axis.plot(depth, [row.get(key, math.nan) for row in self.rows], marker="o", markersize=3, label=key)
            axis.set_ylabel(label)
            if len(keys) > 1:
                axis.legend(fontsize="small")
        axes[-1].set_xticks(list(depth), [row["site"] for row in self.rows], rotation=90, fontsize="x-small")
        axes[0].set_title("Activations over depth" + ("" if self.step is None else f", step {self.step}"))
        return figure


def _empty(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _cell(value: Any) -> str:
    if _empty(value):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


__all__ = ["COLUMNS", "ActivationReport", "learned_amount", "measure_site", "recompute", "undo_rounding"]
