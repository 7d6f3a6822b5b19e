"""The entropy of every attention head of a model, without a Trainer."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_entropy.observe import AttentionEntropyReader
from lightning_entropy.training.attention_report import AttentionEntropyReport, HeadLimits, heads_of
from lightning_entropy.training.probe import undisturbed


def attention_entropy_report(
    model: nn.Module,
    *args: Any,
    modules: str | list[str] | None = None,
    queries: int | None = None,
    collapse: float = 0.05,
    overload: float | None = 0.95,
    sink: float = 0.5,
    **kwargs: Any,
) -> AttentionEntropyReport:
    """Run a model once, in evaluation mode without gradients, and report the entropy of every attention head.

    The model and all random states are afterwards as before.

    Args:
        model: any module.
        *args: passed to the model.
        modules: shell patterns over dotted names of the modules whose attention is read; None reads all.
        queries: read this many query rows of each attention; None reads all.
        collapse: a head whose normalised entropy is below this has collapsed, unless it is an attention sink.
        overload: a head above this is close to uniform; None calls none so.
        sink: a head that gives more than this share of its attention to one key is a sink.
        **kwargs: passed to the model. One that takes an argument of the names above is wrapped in a function's module.

    Returns:
        A report that prints as a table, with ``to_json()``, ``plot()`` and ``rows()``.

    Raises:
        ValueError: if no attention ran in the model, or a limit is out of range.

    Reference:
        The numbers are those of :class:`lightning_entropy.AttentionEntropyMonitor`.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> print(attention_entropy_report(layer, torch.zeros(1, 5, 8)))
        layer      heads   mean    min    max  sinks       collapsed   overloaded
        self_attn      2  1.000  1.000  1.000  -           -           0 1
        layers: 1, heads: 2, collapsed: 0, sinks: 0, overloaded: 2
    """
    limits = HeadLimits(collapse, overload, sink)
    reader = AttentionEntropyReader(
        model, modules, queries=queries, gradient=False, sinks=True, owner="attention_entropy_report"
    )
    with undisturbed(model), reader:
        model(*args, **kwargs)
    return AttentionEntropyReport(heads_of(reader.layers, type(model).__name__), limits=limits)


__all__ = ["attention_entropy_report"]
