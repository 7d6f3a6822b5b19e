"""Reads the features at a split and the last map in the model's own forward."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_entropy.observe.interception import Handles
from lightning_entropy.surgery.split_backbone import SplitBackbone


@dataclass
class SplitPass:
    """What one forward left at the split.

    Args:
        features: what entered the split module, with its graph.
        autocast: the dtype that autocast had there; None where it was off.
        anchors: outputs of the modules that lead to the last map.
    """

    features: Tensor
    autocast: torch.dtype | None
    anchors: dict[str, Tensor] = field(default_factory=dict)

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast in which the forward ran."""
        on = self.autocast is not None
        return torch.autocast(self.features.device.type, dtype=self.autocast, enabled=on)


class SplitReader:
    """Reads what passes a split, without changing the model's output.

    Args:
        split: a split classifier.
        always: read forwards without gradient too.

    Example:
        >>> from lightning_entropy.surgery import split_backbone
        >>> layers = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> net = nn.Sequential(*layers)
        >>> halves = split_backbone(net, "1", classifier="4", example=torch.randn(1, 3, 8, 8))
        >>> with SplitReader(halves) as reader:
        ...     logits = net(torch.randn(2, 3, 8, 8))
        >>> torch.allclose(halves.logits(reader.last_map(reader.passes[0])), logits)
        True
    """

    def __init__(self, split: SplitBackbone, *, always: bool = False) -> None:
        self.split = split
        self.always = always
        self.passes: list[SplitPass] = []
        self.recording = False
        self._handles = Handles()

    def attach(self) -> None:
        """Install the hooks."""
        self._handles.remove()

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.recording and (self.always or torch.is_grad_enabled()):
                features = args[0] if args else next(iter(kwargs.values()))
                kind = features.device.type
                dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
                self.passes.append(SplitPass(features, dtype))

        self._handles.before(self.split.model.get_submodule(self.split.split), enter)
        for name in filter(None, self.split.anchors):

            def leave(module: nn.Module, args: tuple[Any, ...], output: Any, name: str = name) -> None:
                if self.recording and self.passes and (self.always or torch.is_grad_enabled()):
                    self.passes[-1].anchors[name] = output

            self._handles.after(self.split.model.get_submodule(name), leave)

    def last_map(self, seen: SplitPass) -> Tensor:
        """The last map ``(B, C, h, w)`` of a forward, with its graph."""
        given = [seen.anchors[name] if name else seen.features for name in self.split.anchors]
        if any(node.op in ("call_module", "call_function", "call_method") for node in self.split.finish.graph.nodes):
            given = [tensor.clone() for tensor in given]  # a function in place would change what the model keeps
        return self.split.map_layout.to_map(self.split.finish(*given))

    @property
    def has_read(self) -> bool:
        """Whether a forward with gradient passed the split since :meth:`start`."""
        return bool(self.passes)

    def start(self) -> None:
        """Forget what was read, and read from here on."""
        self.clear()
        self.recording = True

    def stop(self) -> None:
        """Read no further."""
        self.recording = False

    def clear(self) -> None:
        """Drop what was read, and the graph it holds."""
        self.passes = []

    def detach(self) -> None:
        """Remove the hooks."""
        self.stop()
        self.clear()
        self._handles.remove()

    def __enter__(self) -> SplitReader:
        self.attach()
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        passes = self.passes
        self.detach()
        self.passes = passes


__all__ = ["SplitPass", "SplitReader"]
