"""The spectra of the weights of a model, a row a tensor, from the model or from its files."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_entropy.files import atomic_write
from lightning_entropy.observe.model_weights import model_weights
from lightning_entropy.observe.progress import Progress
from lightning_entropy.observe.selection import as_patterns
from lightning_entropy.observe.spectral_rows import SpectralRow, spectral_rows
from lightning_entropy.observe.stored_weights import StoredWeight, fingerprint_of, narrow
from lightning_entropy.observe.weight_files import file_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("whole", "blocks")
COLUMNS = tuple(f.name for f in fields(SpectralRow))
_SHOWN = {
    "name": "weight", "shape": "shape", "sigma_max": "s max", "sigma_min": "s min", "kappa": "kappa",
    "kappa_error": "error", "shape_kappa": "kappa/shape", "resolvable_kappa": "resolvable",
    "deficit": "deficit", "stable_rank": "stable rank", "effective_rank": "eff. rank", "log_volume": "log volume",
}  # fmt: skip

_NARROW = ("name", "shape", "kappa", "shape_kappa", "deficit", "stable_rank")
_WIDE = 150  # columns of a terminal that hold them all


@dataclass
class SpectralReport:
    """Spectra of weights. ``rich.print(report)`` shows a table as wide as the terminal, ``print(report)`` a plain one.

    Args:
        rows: one a weight, in the order of the model (of files: of the names).
        skipped: weights that have no row, by name, and why.
        parts: ``"whole"`` or ``"blocks"``: whether fused q, k and v were taken as three matrices.
        source: the class of the model, or the path.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 2)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        >>> round(spectral_report(model).rows[0].kappa, 6)
        3.0
    """

    rows: list[SpectralRow]
    skipped: dict[str, str] = field(default_factory=dict)
    parts: str = "whole"
    source: str = ""

    @property
    def fingerprint(self) -> str:
        """Of the weights that have a row; see :func:`~lightning_entropy.observe.weights_fingerprint`."""
        return fingerprint_of({row.name: row.digest for row in self.rows})

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[SpectralRow]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> SpectralRow:
        """The row of a parameter, by its name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name} has no row" + (f": {self.skipped[name]}" if name in self.skipped else ""))

    def table(self) -> str:
        """The report as text, columns aligned, and what was skipped."""
        cells = [list(_SHOWN.values()), *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(_SHOWN))]
        lines = [
            "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))) for line in cells
        ]
        return "\n".join([*lines, *(f"skipped {name}: {reason}" for name, reason in self.skipped.items())])

    def __str__(self) -> str:
        return self.table()

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.table import Table

        shown = list(_SHOWN) if options.max_width >= _WIDE else list(_NARROW)
        table = Table(title=f"{len(self.rows)} weights of {self.source}", caption="; ".join(self._grouped()) or None)
        for i, name in enumerate(shown):
            table.add_column(_SHOWN[name], justify="right" if i else "left", overflow="fold", no_wrap=i > 0)
        for row in self.rows:
            # A number that the stored precision cannot resolve is one of the rounding.
            style = "red" if math.isinf(row.kappa) else "yellow" if row.kappa > row.resolvable_kappa else None
            table.add_row(*_cells(row, shown), style=style)
        yield table

    def _grouped(self) -> list[str]:
        reasons: dict[str, int] = {}
        for reason in self.skipped.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        return [f"{count} skipped: {reason}" for reason, count in reasons.items()]

    def record(self) -> dict[str, Any]:
        """The report in plain values; numbers that are not finite as text."""
        return {
            "source": self.source,
            "parts": self.parts,
            "fingerprint": self.fingerprint,
            "rows": [{name: _plain(getattr(row, name)) for name in COLUMNS} for row in self.rows],
            "skipped": dict(self.skipped),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> SpectralReport:
        """The report of which :meth:`record` told.

        Raises:
            ValueError: if something is missing, naming it.
        """
        try:
            rows = [_row_of(row) for row in record["rows"]]
            return cls(rows, dict(record["skipped"]), record["parts"], record["source"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"this is not the record of a SpectralReport ({type(error).__name__}: {error}); "
                "SpectralReport.save writes one"
            ) from error

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.record(), indent=2, allow_nan=False)

    def to_csv(self) -> str:
        """The rows as CSV with a header; shapes as ``384x1536``."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in self.rows:
            values = (getattr(row, name) for name in COLUMNS)
            writer.writerow(["x".join(map(str, v)) if isinstance(v, tuple) else v for v in values])
        return text.getvalue()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a file, whole or not at all: ``.csv`` the rows, anything else JSON."""
        target = Path(path)
        text = self.to_csv() if target.suffix.lower() == ".csv" else self.to_json() + "\n"
        with atomic_write(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SpectralReport:
        """Read a JSON file that :meth:`save` wrote.

        Raises:
            ValueError: if it is no such file.
        """
        try:
            return cls.from_record(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{os.fspath(path)} is no saved SpectralReport: {error}") from error

    def plot(self) -> Figure:
        """Condition number, deficit and stable rank over the order of the model; without pyplot."""
        from lightning_entropy.observe.spectral_figure import spectral_figure

        return spectral_figure(self)


def _row_of(record: Mapping[str, Any]) -> SpectralRow:
    values: dict[str, Any] = {}
    for f in fields(SpectralRow):
        value, kind = record[f.name], str(f.type)
        values[f.name] = float(value) if kind == "float" else tuple(value) if kind.startswith("tuple") else value
    return SpectralRow(**values)


def _cells(row: SpectralRow, names: Iterable[str] = _SHOWN) -> list[str]:
    return [_cell(name, getattr(row, name)) for name in names]


def _cell(name: str, value: Any) -> str:
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    if name == "kappa_error":
        return f"{value:.0e}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def weights_of_source(
    source: nn.Module | str | os.PathLike[str], modules: str | Iterable[str] | None, owner: str
) -> list[StoredWeight]:
    """Weights of a model or of safetensors files, those that patterns name.

    Raises:
        ValueError: if there are none, or a pattern names none.
        TypeError: if ``source`` is neither a module nor a path.
    """
    if isinstance(source, nn.Module):
        found, what = model_weights(source), type(source).__name__
    elif isinstance(source, str | os.PathLike):
        found, what = file_weights(source), os.fspath(source)
    else:
        raise TypeError(f"{owner} takes a module or the path of safetensors files, got a {type(source).__name__}")
    patterns = as_patterns(modules)
    if patterns is not None and found:
        found = narrow(found, patterns, owner)
    if all(weight.refusal is not None for weight in found):
        reasons = "; ".join(f"{weight.name}: {weight.refusal}" for weight in found[:5])
        raise ValueError(
            f"{owner} found no weight of a linear layer, convolution, attention or stack of experts in {what}"
            + (f" that it can read ({reasons})." if reasons else ".")
        )
    return found


def spectral_report(
    model: nn.Module | str | os.PathLike[str],
    modules: str | Iterable[str] | None = None,
    *,
    parts: str = "whole",
    rtol: float = 1e-6,
    device: torch.device | str | None = None,
    progress: Progress = None,
) -> SpectralReport:
    """The spectrum of every weight of a model that is a linear map.

    Linear layers (``Conv1D`` of transformers too), convolutions as outputs by everything else, the projections of
    ``nn.MultiheadAttention`` and stacks of experts. Tied weights once; quantised ones by their unpacked numbers; of
    a model with adapters the base layer alone, under the name that it had.

    Args:
        model: any module; or a safetensors file, its index, or the folder of a model: then one tensor is in memory at a
            time, and the model never is.
        modules: shell patterns over names of parameters, of modules, or of modules that contain them; None takes all.
        parts: ``"blocks"`` takes fused q, k and v as three matrices, ``"whole"`` as one.
        rtol: relative error of kappa up to which the fast decomposition is accepted; beyond it a slower one is taken.
        device: where to compute; None: where each weight is.
        progress: True for a bar, None for a bar on a terminal, or ``function(done, total, name)``.

    Returns:
        The report.

    Raises:
        ValueError: if nothing can be read, or a pattern names nothing.

    Example:
        >>> report = spectral_report(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), modules="0")
        >>> [row.name for row in report]
        ['0.weight']
    """
    if parts not in PARTS:
        raise ValueError(f"parts must be 'whole' or 'blocks', got {parts!r}")
    weights = weights_of_source(model, modules, "spectral_report")
    rows: dict[str, SpectralRow] = {}
    skipped: dict[str, str] = {}
    for found in spectral_rows(weights, blocks=parts == "blocks", rtol=rtol, device=device, progress=progress):
        if isinstance(found, SpectralRow):
            rows[found.name] = found
        else:
            skipped[found[0].name] = found[1]
    kept = [rows[weight.name] for weight in weights if weight.name in rows]
    source = type(model).__name__ if isinstance(model, nn.Module) else os.fspath(model)
    return SpectralReport(kept, skipped, parts, source)


__all__ = ["COLUMNS", "PARTS", "SpectralReport", "spectral_report", "weights_of_source"]
