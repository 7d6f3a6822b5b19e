"""Whether a split says what the model says, and the reason where it does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_entropy.surgery.coarse_trace import CannotSplit
from lightning_entropy.surgery.split_backbone import SplitBackbone
from lightning_entropy.surgery.split_reader import SplitReader

# Relative to the largest number; a few hundred roundings of a deep tail.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


def check_pool(split: SplitBackbone, value: Tensor, given: Tensor, calls: list[str]) -> None:
    """Refuse a classifier that is not given the mean of the last map.

    Args:
        split: the split.
        value: the last map, as it is laid out.
        given: what the classifier was given.
        calls: the modules that ran, in order.

    Raises:
        CannotSplit: with what it is given instead.
    """
    if split.classifies_positions:
        return
    maps = split.map_layout.to_map(value)
    candidates = {
        "": maps.mean((2, 3), keepdim=True),
        "the largest value of each channel (max pooling), which does not commute with a linear layer": maps.amax(
            (2, 3), keepdim=True
        ),
    }
    if split.map_layout.prefix:
        token = value[:, 0, :, None, None]
        candidates["a class token, which has seen the foreground and has no map"] = token
    for what, pooled in candidates.items():
        z = split.normalized(pooled, pooled).flatten(1)
        if z.numel() == given.numel() and close(z, given.reshape(z.shape)):
            if not what:
                return
            raise CannotSplit(f"{split.classifier} is given {what}. Use average pooling (timm: global_pool='avg')")
    last = [name for name in split.anchors if name]
    between = calls[calls.index(last[-1]) + 1 : calls.index(split.classifier)] if last else []
    named = f" ({', '.join(between)})" if between else ""
    raise CannotSplit(
        f"{split.classifier} is not given the mean of the last map: what lies between the two{named} does not commute "
        "with a mean over positions. Put an average pool and one linear layer there"
    )


def check_split(split: SplitBackbone, example: Tensor) -> None:
    """Run the model once and compare: the tail with what it computed, and the class map with its logits.

    Raises:
        CannotSplit: if they differ.
    """
    said: list[Tensor] = []
    layer = split.model.get_submodule(split.classifier)
    handle = layer.register_forward_hook(lambda module, args, output: said.append(output))
    try:
        with SplitReader(split, always=True) as reader:
            output = split.model(example)
    finally:
        handle.remove()
    seen = reader.passes[0]
    live = reader.last_map(seen)
    again = split.last_map(seen.features, frozen=True)
    if again.shape != live.shape or not close(again, live):
        raise CannotSplit(f"the modules behind {split.split}, run once more, do not give the map that they gave")
    logits = split.class_map(live).mean((2, 3))
    wanted = logits_of(output)
    if not split.classifies_positions and not close(logits, said[-1].reshape(logits.shape)):
        raise CannotSplit(f"the mean of the class map differs from what {split.classifier} returned")
    if wanted is not None and wanted.shape == logits.shape and not _same_scores(logits, wanted):
        raise CannotSplit(
            f"the mean of the class map is not what the model returns: something follows {split.classifier}. Let the "
            "model return logits"
        )


def logits_of(output: Any) -> Tensor | None:
    """The first tensor of what a classifier returns; None if there is none."""
    if isinstance(output, Tensor):
        return output
    for value in (getattr(output, "logits", None), output[0] if isinstance(output, tuple | list) and output else None):
        if isinstance(value, Tensor):
            return value
    return None


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree to the rounding of their dtype."""
    scale = max(float(b.abs().max()), 1e-30)
    return bool(torch.isfinite(a).all()) and float((a - b).abs().max()) <= _TOLERANCE.get(a.dtype, 1e-3) * scale


def _same_scores(logits: Tensor, returned: Tensor) -> bool:
    return close(logits, returned) or close(logits.log_softmax(1), returned)


__all__ = ["check_pool", "check_split", "close", "logits_of"]
