"""The diagnosis as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_entropy.recipes.diagnosis.result import ModelDiagnosis

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2328; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #d5dbe0; padding-bottom: .2rem; }
.facts { color: #59636b; margin: 0; }
ol.findings { padding: 0; list-style: none; counter-reset: finding; }
ol.findings li { border-left: 4px solid #b4540a; background: #fdf6ef; margin: .8rem 0; padding: .7rem 1rem; }
ol.findings li.note { border-color: #5b7f95; background: #f2f6f8; }
ol.findings strong::before { counter-increment: finding; content: counter(finding) ". "; }
code { background: #eef1f3; padding: .1rem .3rem; border-radius: 3px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { text-align: right; padding: .15rem .6rem; border-bottom: 1px solid #e6eaed; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; }
.absent { color: #59636b; font-style: italic; }
details { margin: .8rem 0; }
summary { cursor: pointer; }
"""


def inline_figure(figure: Figure, description: str) -> str:
    """A figure as an image within the page.

    Args:
        figure: drawn with matplotlib.
        description: what it shows, for those who do not see it.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


def html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of one kind as a table; the first column is the name."""
    if not rows:
        return ""
    columns = list(rows[0])
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(row.get(column)))}</td>" for column in columns) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def html_page(diagnosis: ModelDiagnosis) -> str:
    """The whole page.

    Args:
        diagnosis: what was found.
    """
    findings = "".join(
        f'<li class="{"" if finding.severity > 0.3 else "note"}"><strong>{html.escape(finding.what)}</strong><br>'
        f"{html.escape(finding.advice)}<br><code>{html.escape(finding.code)}</code></li>"
        for finding in diagnosis.findings
    )
    sections = []
    for section in diagnosis.sections:
        parts = [f"<h2>{html.escape(section.title)}</h2>", f"<p>{html.escape(section.text)}</p>"]
        if section.absent:
            parts.append(f'<p class="absent">Not measured: {html.escape(section.absent)}</p>')
        if section.figure is not None:
            parts.append(inline_figure(section.figure, section.title))
        if section.rows:
            parts.append(f"<details><summary>{len(section.rows)} rows</summary>{html_table(section.rows)}</details>")
        sections.append("".join(parts))
    facts = " &middot; ".join(html.escape(fact) for fact in diagnosis.facts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Diagnosis of {html.escape(diagnosis.name)}</title><style>{_STYLE}</style></head><body>"
        f'<h1>Diagnosis of {html.escape(diagnosis.name)}</h1><p class="facts">{facts}</p>'
        f'<h2>What to look at first</h2><ol class="findings">{findings}</ol>{"".join(sections)}'
        f'<p class="facts">lightning_entropy {html.escape(diagnosis.version)}</p></body></html>'
    )


__all__ = ["html_page", "html_table", "inline_figure"]
