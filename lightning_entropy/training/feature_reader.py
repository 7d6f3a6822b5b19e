"""The pooled hidden states of a model's last layer and the targets of its loss, read while both pass by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_entropy.functional.linear_probe import LinearProbe, linear_probe

_CLASSES = (F.cross_entropy, F.nll_loss)
_NUMBERS = (
    F.binary_cross_entropy_with_logits,
    F.binary_cross_entropy,
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
)
_MOST = 512  # rows, of which a few hundred permutations take about a second
_LEAST = 100  # with 64 sentences MiniLM's features, which tell their sentiment, pass for weak every second time


class FeatureReader(TorchFunctionMode):
    """Keeps, of each sample, its target and two poolings of the last layer: the mean over tokens and the first token.

    Targets are those that ``torch.nn.functional`` losses are given inside the context, if there is one a sample. Models
    read the mean or the first token, and which of the two a model reads nobody says.

    Args:
        most: samples that are kept.
        least: samples below which nothing is said: a test on few finds nothing in good features either.
    """

    def __init__(self, most: int = _MOST, least: int = _LEAST) -> None:
        super().__init__()
        self.most, self.least = most, least
        self._passing: dict[str, list[Tensor]] = {}
        self._targets: list[Tensor] = []
        self._rows: list[tuple[list[Tensor], Tensor]] = []
        self._why = "no loss of torch.nn.functional was given one target a sample"

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, and keep the targets if it is a loss."""
        kwargs = kwargs or {}
        if func in _CLASSES or func in _NUMBERS:
            target = args[1] if len(args) > 1 else kwargs.get("target")
            if isinstance(target, Tensor):
                with torch._C.DisableTorchFunction():
                    self._targets.append(target.detach())
        return func(*args, **kwargs)

    def see(self, name: str, hidden: Tensor, mask: Tensor | None) -> None:
        """The output of a layer, and which of its tokens exist."""
        x = hidden.detach()
        if x.dim() > 3:  # a grid of tokens, features last
            x = x.flatten(1, -2)
            mask = None
        if x.dim() == 3:
            if mask is None or mask.shape != x.shape[:2]:
                pooled = [x.mean(1), x[:, 0]]
            else:
                exists = mask.to(x)[..., None]
                pooled = [(x * exists).sum(1) / exists.sum(1).clamp(min=1), x[:, 0]]
        else:
            pooled = [x]
        self._passing[name] = pooled

    def take(self, layers: list[str], samples: int) -> None:
        """Keep what one batch showed.

        Args:
            layers: names; the last one that was seen counts.
            samples: in the batch.
        """
        pooled = next((self._passing[name] for name in reversed(layers) if name in self._passing), None)
        targets = [t for t in self._targets if len(t.shape) and len(t) == samples]
        targets = [t for t in targets if t.dim() == 1 or (t.dim() == 2 and t.is_floating_point())]
        self._passing, self._targets = {}, []
        held = sum(len(t) for _, t in self._rows)
        if pooled is None or not targets or held >= self.most:
            return
        if any(p.dim() != 2 or len(p) != samples for p in pooled):
            self._why = "the last layer's output is not (samples, tokens, features)"
            return
        room = self.most - held
        self._rows.append(([p[:room].float().cpu() for p in pooled], targets[0][:room].cpu()))

    def probe(self) -> LinearProbe | str:
        """What the better of the two poolings predicts, its p-value doubled; or why that cannot be told."""
        if not self._rows:
            return self._why
        kinds = {(len(pooled), t.dtype, t.shape[1:]) for pooled, t in self._rows}
        if len(kinds) > 1:
            return "the batches have unlike targets"
        targets = torch.cat([t for _, t in self._rows])
        if not targets.is_floating_point() and targets.dim() == 1:
            known = targets >= 0  # ignored ones are negative
        else:
            known = torch.ones(len(targets), dtype=torch.bool)
        if int(known.sum()) < self.least:
            return f"the batches have {int(known.sum())} samples with a target, and {self.least} are needed (batches=)"
        found = []
        try:
            for i in range(len(self._rows[0][0])):
                features = torch.cat([pooled[i] for pooled, _ in self._rows])
                found.append(linear_probe(features[known], targets[known]))
        except ValueError as error:
            return str(error)
        best = min(found, key=lambda probe: (probe.p_value, -probe.r2))
        return best._replace(p_value=min(1.0, best.p_value * len(found)))


__all__ = ["FeatureReader"]
