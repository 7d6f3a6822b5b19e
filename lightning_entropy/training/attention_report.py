"""What the attention of a model is like at one moment: every head's entropy, and which heads are out of order."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_entropy.observe import LayerEntropy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTITIES = ("entropy", "normalized", "sink", "rest")
Heads = dict[str, Tensor]
"""Layer name -> ``(4, heads)``, the rows as :data:`QUANTITIES` names them."""


@dataclass(frozen=True)
class HeadLimits:
    """Where a head's attention is called collapsed, overloaded, or a sink.

    Args:
        collapse: normalised entropy below this is collapsed, unless the head is a sink whose rest is not below it.
        overload: normalised entropy above this is overloaded: close to uniform. None calls no head overloaded.
        sink: a head that gives one key more than this share of all its attention is a sink.

    Raises:
        ValueError: if a limit is out of range.
    """

    collapse: float = 0.05
    overload: float | None = 0.95
    sink: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.collapse < 1:
            raise ValueError(f"collapse must be a normalised entropy in [0, 1), got {self.collapse}")
        if self.overload is not None and not self.collapse < self.overload <= 1:
            raise ValueError(f"overload must be a normalised entropy in ({self.collapse}, 1], got {self.overload}")
        if not 0 < self.sink < 1:
            raise ValueError(f"sink must be a share of the attention in (0, 1), got {self.sink}")

    def sinks(self, values: Tensor) -> Tensor:
        """Which heads put most of their attention on one key, and spread the rest: ``(heads,)`` bool."""
        _, _, mass, rest = values
        return (mass > self.sink) & (rest >= self.collapse)

    def collapsed(self, values: Tensor) -> Tensor:
        """Which heads have collapsed: ``(heads,)`` bool. Sinks have not."""
        return (values[1] < self.collapse) & ~self.sinks(values)

    def overloaded(self, values: Tensor) -> Tensor:
        """Which heads are close to uniform: ``(heads,)`` bool."""
        return values[1] > (math.inf if self.overload is None else self.overload)


@torch.no_grad()
def heads_of(layers: Iterable[LayerEntropy], root: str = "model") -> Heads:
    """Every head's numbers, mean over the calls of its module, on the CPU.

    Args:
        layers: what a reader with ``sinks=True`` has read.
        root: the name of attention that ran in the module itself, outside every submodule.
    """
    calls: dict[tuple[str, int], list[Tensor]] = {}
    for layer in layers:
        mean = layer.per_head()
        unknown = torch.full_like(mean, torch.nan)
        sink, rest = (unknown if x is None else x.to(mean) for x in (layer.sink, layer.rest))
        values = torch.stack([layer.per_head(normalize=False), mean, sink, rest])
        calls.setdefault((layer.module or root, len(mean)), []).append(values.float())
    names = [name for name, _ in calls]
    means = [torch.stack(values).nanmean(0) for values in calls.values()]
    if not means:
        return {}
    flat = torch.cat(means, 1).cpu().split([m.shape[1] for m in means], 1)  # one wait for the GPU
    # a module with two attentions of unlike heads has two entries
    labels = [name if names.count(name) == 1 else f"{name} ({heads} heads)" for name, heads in calls]
    return {label: values.clone() for label, values in zip(labels, flat)}


def mean_over_ranks(heads: Heads) -> Heads:
    """The mean of what the ranks have read, each layer over those that have it. Every rank must call it."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return heads
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, heads)
    return mean_of_readings(gathered)


def mean_of_readings(readings: Iterable[Heads]) -> Heads:
    """The mean of several readings, each layer over those that have it."""
    found: dict[str, list[Tensor]] = {}
    for heads in readings:
        for name, values in heads.items():
            found.setdefault(name, []).append(values)
    return {name: torch.stack(v).nanmean(0) for name, v in found.items() if len({x.shape for x in v}) == 1}


@dataclass(frozen=True)
class AttentionEntropyReport:
    """Entropy of every attention head of a model, on one batch.

    ``str(report)`` is a table; :meth:`plot` draws layers x heads.

    Attributes:
        heads: layer name -> ``(4, heads)``: entropy in nats, entropy divided by the log of the row's allowed keys, the
            share of the attention that goes to the most attended key, and the normalised entropy beside that key.
        step: the optimizer step it belongs to.
        limits: what is called collapsed, overloaded and a sink.
    """

    heads: Heads
    step: int = 0
    limits: HeadLimits = field(default_factory=HeadLimits)

    def _chosen(self, kind: str) -> list[tuple[str, int]]:
        choose = getattr(self.limits, kind)
        return [(name, int(i)) for name, values in self.heads.items() for i in choose(values).nonzero().flatten()]

    @property
    def collapsed(self) -> list[tuple[str, int]]:
        """Layer and head of every collapsed head; attention sinks are none."""
        return self._chosen("collapsed")

    @property
    def overloaded(self) -> list[tuple[str, int]]:
        """Layer and head of every head that is close to uniform."""
        return self._chosen("overloaded")

    @property
    def sinks(self) -> list[tuple[str, int]]:
        """Layer and head of every attention sink."""
        return self._chosen("sinks")

    def scalars(self, *, normalize: bool = True, log_heads: bool = False) -> dict[str, float]:
        """What a logger gets: mean and min over heads, the fractions, each layer's mean, and the heads on request.

        Args:
            normalize: fractions of the largest entropy; False gives nats.
            log_heads: add ``<layer>/head_<i>``.
        """
        rows = {name: values[1 if normalize else 0] for name, values in self.heads.items()}
        every = torch.cat(list(rows.values()))
        every = every[every.isfinite()]
        out = {"mean": float(every.mean()), "min": float(every.min()) if len(every) else math.nan}
        read = sum(int(values[1].isfinite().sum()) for values in self.heads.values())
        for name, kind in (("collapsed", "collapsed"), ("overloaded", "overloaded"), ("sink", "sinks")):
            out[f"{name}_fraction"] = len(self._chosen(kind)) / max(read, 1)
        out.update({name: float(values.nanmean()) for name, values in rows.items()})
        if log_heads:
            out.update({f"{name}/head_{i}": float(v) for name, values in rows.items() for i, v in enumerate(values)})
        return out

    def rows(self) -> list[dict[str, Any]]:
        """One row a head: step, layer, head, entropy, normalized, sink, rest."""
        return [
            {"step": self.step, "layer": name, "head": i, **dict(zip(QUANTITIES, values[:, i].tolist()))}
            for name, values in self.heads.items()
            for i in range(values.shape[1])
        ]

    def table(self) -> str:
        """A row a layer, and the counts."""
        width = max(len("layer"), *(len(name) for name in self.heads))
        lines = [f"{'layer':<{width}}  heads   mean    min    max  {'sinks':<12}{'collapsed':<12}overloaded"]
        for name, values in self.heads.items():
            e = values[1][values[1].isfinite()]
            numbers = [f"{f(e):6.3f}" if len(e) else "     -" for f in (torch.mean, torch.min, torch.max)]
            marks = [_numbers(getattr(self.limits, kind)(values)) for kind in ("sinks", "collapsed", "overloaded")]
            lines.append(
                f"{name:<{width}}  {values.shape[1]:5d} {' '.join(numbers)}  {marks[0]:<12}{marks[1]:<12}{marks[2]}"
            )
        count = sum(values.shape[1] for values in self.heads.values())
        lines.append(
            f"layers: {len(self.heads)}, heads: {count}, collapsed: {len(self.collapsed)}, "
            f"sinks: {len(self.sinks)}, overloaded: {len(self.overloaded)}"
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> str:
        """The report as JSON: step, limits, collapsed, overloaded, sinks, and one entry a head; null for NaN."""
        limits = {"collapse": self.limits.collapse, "overload": self.limits.overload, "sink": self.limits.sink}
        chosen = {kind: [list(head) for head in self._chosen(kind)] for kind in ("collapsed", "overloaded", "sinks")}
        heads = [{k: None if v != v else v for k, v in row.items()} for row in self.rows()]
        return json.dumps({"step": self.step, "limits": limits, **chosen, "heads": heads}, indent=2)

    def plot(self) -> Figure:
        """Layers x heads, sinks and collapsed heads marked."""
        return draw([self])


def draw(reports: list[AttentionEntropyReport]) -> Figure:
    """Layers x heads at a few of the moments, and each layer's mean over all of them."""
    from lightning_entropy.training.layer_head_figure import layer_head_figure

    def marks(kind: str) -> Mapping[int, Mapping[str, list[bool]]]:
        return {r.step: {n: getattr(r.limits, kind)(v).tolist() for n, v in r.heads.items()} for r in reports}

    return layer_head_figure(
        {r.step: {name: values[1].tolist() for name, values in r.heads.items()} for r in reports},
        label="attention entropy / log(keys)",
        marks={"attention sink": marks("sinks"), "collapsed": marks("collapsed")},
    )


def _numbers(chosen: Tensor) -> str:
    heads = chosen.nonzero().flatten().tolist()
    if len(heads) > 2 and len(heads) == len(chosen):
        return "all"
    shown = " ".join(str(i) for i in heads[:5]) + (" ..." if len(heads) > 5 else "")
    return shown or "-"


__all__ = [
    "QUANTITIES",
    "AttentionEntropyReport",
    "HeadLimits",
    "Heads",
    "draw",
    "heads_of",
    "mean_of_readings",
    "mean_over_ranks",
]
