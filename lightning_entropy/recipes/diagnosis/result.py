"""What a diagnosis found, in the order in which a user should look at it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_entropy.training.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """Something to look at, and what addresses it.

    Args:
        what: was found, in a sentence with its numbers.
        advice: the method of this library that addresses it, and why.
        code: the line to add.
        severity: from 0 (good to know) to 1 (training suffers).
    """

    what: str
    advice: str
    code: str
    severity: float


@dataclass
class Section:
    """One measurement.

    Args:
        title: of the section.
        text: how to read it.
        rows: a mapping a layer.
        figure: curves over depth.
        absent: why it was not measured; empty where it was.
        record: what the JSON file holds beside the rows.
    """

    title: str
    text: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    figure: Figure | None = None
    absent: str = ""
    record: dict[str, Any] | None = None


@dataclass
class ModelDiagnosis:
    """Findings, most severe first, and the measurements that they come from.

    Args:
        name: of the model.
        facts: what was run, in a few words each.
        findings: see :class:`Finding`.
        sections: see :class:`Section`, by their keys in the JSON file.
        version: of this package.
    """

    name: str
    facts: list[str]
    findings: list[Finding]
    measured: dict[str, Section]
    version: str

    @property
    def sections(self) -> list[Section]:
        """The measurements in order."""
        return list(self.measured.values())

    def __str__(self) -> str:
        """The first three findings, each with its remedy and the line of code."""
        if not self.findings:
            return "nothing stands out"
        lines = []
        for number, finding in enumerate(self.findings[:_SHOWN], start=1):
            lines.append(f"{number}. {finding.what}")
            lines.append(f"   -> {finding.code}    {finding.advice}")
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """Plain values, without NaN or infinity."""
        sections = {
            key: {"absent": s.absent}
            if s.absent
            else {"rows": s.rows, **(s.record or {})}  # a layer diagnosis has its own rows
            for key, s in self.measured.items()
        }
        return _finite(
            {
                "model": self.name,
                "lightning_entropy": self.version,
                "facts": self.facts,
                "findings": [asdict(finding) for finding in self.findings],
                **sections,
            }
        )

    def save(self, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write ``report.html`` and ``report.json``, each whole or not at all.

        Args:
            folder: made when it does not exist.

        Returns:
            The two files.
        """
        from lightning_entropy.recipes.diagnosis.page import html_page

        page, numbers = Path(folder) / "report.html", Path(folder) / "report.json"
        with atomic_write(page) as file:
            file.write_text(html_page(self), encoding="utf-8")
        with atomic_write(numbers) as file:
            file.write_text(json.dumps(self.record(), indent=2, allow_nan=False), encoding="utf-8")
        return page, numbers


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


__all__ = ["Finding", "ModelDiagnosis", "Section"]
