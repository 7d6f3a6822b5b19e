"""What a diagnosis of layers found: a row a layer, which ones are inflection layers, and why, in words."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_entropy.files import read_record, write_text
from lightning_entropy.functional.inflection import InflectionRule, inflection_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAN = math.nan
_VERSION = 1


@dataclass(frozen=True)
class LayerRow:
    """One layer.

    Attributes:
        layer: its dotted name.
        attention: names of the modules in it that computed attention.
        entropy: attention entropy divided by the log of each row's allowed keys, mean over samples, heads and tokens
            that exist; NaN without attention.
        entropy_nats: the same mean of the entropy itself.
        lowest_head: the least of the heads' normalised entropies.
        gradient: activation-gradient norm G at the layer's output.
        input_gradient: G at its input.
        relative_gradient: ``gradient`` divided by the size of the output error; NaN where that was not seen.
        decay: by how many nats the gradient falls on its way back through the layer; negative where it grows.
        parameter_gradient: norm of the loss's gradient in the layer's trainable parameters; 0 without any.
        parameters: how many numbers in it are trainable.
        delta_cka: 1 - CKA against the other moment; NaN without one.
        retained_variance: share of the variance that the shared PCA basis of ``delta_cka`` holds.
        index: SKI.
        chosen: whether it is an inflection layer.
        why: that, in words.
    """

    layer: str
    attention: tuple[str, ...] = ()
    entropy: float = NAN
    entropy_nats: float = NAN
    lowest_head: float = NAN
    gradient: float = NAN
    input_gradient: float = NAN
    relative_gradient: float = NAN
    decay: float = NAN
    parameter_gradient: float = 0.0
    parameters: int = 0
    delta_cka: float = NAN
    retained_variance: float = NAN
    index: float = NAN
    chosen: bool = False
    why: str = ""


@dataclass(frozen=True)
class LayerDiagnosis:
    """The layers of a model from input to output, and which of them are inflection layers.

    Printed it is one line; :meth:`table` has a row a layer and :meth:`explain` a sentence. JSON is its only file
    format.

    Attributes:
        rows: a row a layer, in the order of the forward.
        rule: how layers were chosen.
        model: class of the model.
        loss: mean loss.
        output_error: mean size of the error at the loss's input, ``|p - y|`` for cross-entropy; NaN where not seen.
        samples: how many samples were read, over all processes.
        batches: in how many batches.
        queries: how many query rows of each attention were read; None for all.
        notes: what to know of the measurement, in sentences.
        verdict: what to know of the choice, in sentences; why no layer was chosen, where none was.
        representations: layer -> hidden states of the same tokens, kept on request for a later comparison; not saved.
        checksum: of the batches, to tell whether two diagnoses saw the same.
    """

    rows: tuple[LayerRow, ...]
    rule: InflectionRule = field(default_factory=InflectionRule)
    model: str = "model"
    loss: float = NAN
    output_error: float = NAN
    samples: int = 0
    batches: int = 0
    queries: int | None = None
    notes: tuple[str, ...] = ()
    verdict: tuple[str, ...] = ()
    representations: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)
    checksum: float = NAN

    @property
    def chosen(self) -> list[str]:
        """Names of the inflection layers, in the order of the forward; empty where there is none."""
        return [row.layer for row in self.rows if row.chosen]

    @property
    def layers(self) -> list[str]:
        """Names of all layers."""
        return [row.layer for row in self.rows]

    def choose(self, rule: InflectionRule | str | None = None, **settings: Any) -> LayerDiagnosis:
        """The same measurements with layers chosen anew.

        Args:
            rule: an :class:`InflectionRule` or the name of one; None keeps this diagnosis' own.
            **settings: entries of the rule to change, such as ``alpha=1.0``.

        Raises:
            ValueError: as :func:`lightning_entropy.functional.inflection_layers` does.
        """
        start = rule if isinstance(rule, InflectionRule) else self.rule
        if isinstance(rule, str):
            settings = {"rule": rule, **settings}
        rule = start._replace(**settings).check()
        found = inflection_layers(
            torch.tensor([r.entropy for r in self.rows], dtype=torch.float64),
            torch.tensor([r.gradient for r in self.rows], dtype=torch.float64).nan_to_num(nan=0.0),
            torch.tensor([r.decay for r in self.rows], dtype=torch.float64),
            rule=rule,
        )
        rows = []
        for i, row in enumerate(self.rows):
            row = replace(row, index=float(found.index[i]), chosen=i in found.layers)
            rows.append(replace(row, why=self._why(row, bool(found.low_entropy[i]), bool(found.steep_decay[i]), rule)))
        return replace(self, rows=tuple(rows), rule=rule, verdict=tuple(found.notes))

    def _why(self, row: LayerRow, low: bool, steep: bool, rule: InflectionRule) -> str:
        parts = []
        known = [r.entropy for r in self.rows if math.isfinite(r.entropy)]
        if math.isfinite(row.entropy):
            how = "low" if low else "not low"
            parts.append(f"attention entropy {row.entropy:.2f} of 1, {how} (median of the layers {median(known):.2f})")
        else:
            parts.append("no attention")
        if row.gradient == 0:
            parts.append("no gradient reaches its output")
        elif row.input_gradient == 0:
            parts.append("no gradient passes through it")
        elif math.isfinite(row.decay):
            verb = "falls" if row.decay >= 0 else "grows"
            steepness = ", steeply" if steep else ""
            parts.append(
                f"the gradient {verb} by {math.exp(abs(row.decay)):.2f}x on its way back through it{steepness}"
            )
        if row.parameters and row.parameter_gradient == 0:
            parts.append("its trainable parameters get no gradient")
        if rule.rule == "ski":
            parts.append(f"index {row.index:.2f}")
        return f"{'Chosen' if row.chosen else 'Not chosen'}: {'; '.join(parts)}."

    def explain(self) -> str:
        """A sentence a layer, and the notes."""
        lines = [f"{row.layer}: {row.why}" for row in self.rows]
        return "\n".join([*lines, *self.verdict, *self.notes])

    def table(self) -> str:
        """A row a layer, the chosen ones marked."""
        width = max(len("layer"), *(len(row.layer) for row in self.rows))
        compared = any(math.isfinite(row.delta_cka) for row in self.rows)
        head = f"{'':2s}{'layer':<{width}}  entropy    nats   gradient  relative   decay  parameters     SKI"
        lines = [head + ("  dCKA  retained" if compared else "")]
        for row in self.rows:
            line = (
                f"{'* ' if row.chosen else '  '}{row.layer:<{width}}  {row.entropy:7.3f} {row.entropy_nats:7.3f}  "
                f"{row.gradient:9.2e} {row.relative_gradient:9.2e} {row.decay:+7.2f}  {row.parameter_gradient:10.2e}  "
                f"{row.index:6.2f}"
            )
            lines.append(line + (f" {row.delta_cka:5.3f}  {row.retained_variance:8.3f}" if compared else ""))
        lines.append(str(self))
        return "\n".join([*lines, *self.verdict, *self.notes]).replace(" nan", "   -")

    def __str__(self) -> str:
        found = ", ".join(self.chosen) or "none"
        return (
            f"{self.model}: {len(self.chosen)} of {len(self.rows)} layers are inflection layers ({found}) by the rule "
            f"{self.rule.rule!r}; {self.samples:,} samples, loss {self.loss:.4g}, output error {self.output_error:.3g}"
        )

    def plot(self) -> Figure:
        """The curves over depth with the chosen layers marked; pyplot does not know the figure."""
        from lightning_entropy.training.depth_figure import diagnosis_figure

        return diagnosis_figure(self)

    def record(self) -> dict[str, Any]:
        """Everything but the representations in plain values; NaN is None. What checkpoints and JSON hold."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values.pop("representations")
        values |= {"rows": [asdict(row) for row in self.rows], "rule": self.rule._asdict()}
        plain: dict[str, Any] = _plain(values)
        return {"kind": "layer_diagnosis", "version": _VERSION, "chosen": self.chosen, **plain}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> LayerDiagnosis:
        """A diagnosis from what :meth:`record` gave.

        Raises:
            ValueError: if it is the record of something else.
        """
        if record.get("kind") != "layer_diagnosis" or record.get("version") != _VERSION:
            raise ValueError(
                f"not a layer diagnosis of version {_VERSION}: kind {record.get('kind')!r}, version "
                f"{record.get('version')!r}; make it with diagnose_layers(...).save(path)"
            )
        rows = []
        for given in record["rows"]:
            row: dict[str, Any] = {k: NAN if v is None else v for k, v in given.items()}
            rows.append(LayerRow(**{**row, "attention": tuple(row["attention"])}))
        named = {f.name for f in fields(cls)} - {"rows", "rule", "notes", "verdict", "representations", "queries"}
        values: dict[str, Any] = {name: NAN if record[name] is None else record[name] for name in named}
        return cls(
            rows=tuple(rows),
            rule=InflectionRule(**record["rule"]),
            notes=tuple(record["notes"]),
            verdict=tuple(record["verdict"]),
            queries=record["queries"],
            **values,
        )

    def to_json(self) -> str:
        """The diagnosis as JSON."""
        return json.dumps(self.record(), indent=2)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as JSON, whole or not at all."""
        return write_text(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerDiagnosis:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file holds something else.
        """
        return read_record(path, cls._of_report, kind="layer diagnosis", writer="LayerDiagnosis.save")

    @classmethod
    def _of_report(cls, record: dict[str, Any]) -> LayerDiagnosis:
        return cls.from_record(record.get("layer_diagnosis", record))  # that of a whole report too


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


__all__ = ["LayerDiagnosis", "LayerRow"]
