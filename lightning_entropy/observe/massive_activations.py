"""Massive activations: values of a layer's output that are far above all others."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_entropy.observe.interception import Handles

_SAMPLE = 1 << 20  # values from which a median is taken


class LayerMagnitude(NamedTuple):
    """How large the values of a layer's output are.

    Attributes:
        layer: dotted name of the module.
        top: largest absolute value.
        median: median absolute value, mean over the forwards.
        channel: the last dimension's index at which the largest value was.
    """

    layer: str
    top: float
    median: float
    channel: int

    @property
    def ratio(self) -> float:
        """``top`` over ``median``; infinity where the median is 0 and the top is not."""
        return self.top / self.median if self.median else float("inf") if self.top else 1.0

    @property
    def massive(self) -> bool:
        """At least 100, and at least 1,000 times the median: the definition of Sun et al., arXiv 2402.17762."""
        return self.top >= 100 and self.ratio >= 1000


class MagnitudeReader:
    """Reads the largest and the median absolute value of the outputs of some layers.

    Use it as a context for one or more forwards; it leaves no hook.

    Args:
        layers: modules by their names. Of an output that is a list or a tuple the first tensor counts.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 3.0)
        >>> with MagnitudeReader({"layer": layer}) as reader:
        ...     _ = layer(torch.ones(1, 2))
        >>> reader.magnitudes()[0].top
        6.0
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = dict(layers)
        self._handles = Handles()
        self._read: dict[str, list[tuple[float, float, int]]] = {}

    def __enter__(self) -> MagnitudeReader:
        for name, module in self.layers.items():

            def after(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                self._note(name, output)

            self._handles.after(module, after)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handles.remove()

    @torch.no_grad()
    def _note(self, name: str, output: Any) -> None:
        while isinstance(output, list | tuple) and output:
            output = output[0]
        output = getattr(output, "last_hidden_state", output)
        if not isinstance(output, Tensor) or output.numel() == 0 or not output.is_floating_point():
            return
        values = output.detach().abs().flatten()
        at = int(values.argmax())
        step = max(1, values.numel() // _SAMPLE)
        median = float(values[::step].float().median())
        self._read.setdefault(name, []).append((float(values[at]), median, at % output.shape[-1]))

    def magnitudes(self) -> list[LayerMagnitude]:
        """A row for every layer that ran, in the order of ``layers``."""
        rows = []
        for name in self.layers:
            if name in self._read:
                read = self._read[name]
                top, _, channel = max(read)
                rows.append(LayerMagnitude(name, top, sum(m for _, m, _ in read) / len(read), channel))
        return rows


__all__ = ["LayerMagnitude", "MagnitudeReader"]
