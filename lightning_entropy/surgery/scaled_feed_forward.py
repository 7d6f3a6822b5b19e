"""Learned scales of a feed-forward branch and of the residual stream around it (arXiv 2501.03489)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_entropy.surgery.feed_forward import (
    chosen_feed_forwards,
    first_tensor,
    require_changes,
    residual_branch,
)
from lightning_entropy.surgery.report import Change, Refusal, SurgeryReport

ALPHA, BETA = "ffn_alpha", "ffn_beta"


class _Stream:
    """The residual stream on its way around a branch; a copy carries nothing."""

    def __init__(self) -> None:
        self.x: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"x": None}


class _Keep:
    def __init__(self, stream: _Stream) -> None:
        self.stream = stream

    def __call__(self, module: nn.Module, args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        self.stream.x = first_tensor(args, arguments)


class _Scale:
    def __init__(self, stream: _Stream) -> None:
        self.stream = stream

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        x, self.stream.x = self.stream.x, None
        if x is None:
            raise RuntimeError(
                f"ScaledFFN: {type(module).__name__} ran without the module before it that is given the residual "
                "stream; it was replaced since, or the block calls them in another way. Undo, then scale last."
            )
        alpha, beta = getattr(module, ALPHA).to(output.dtype), getattr(module, BETA).to(x.dtype)
        # The block adds x itself, so that (beta - 1) x makes it beta x. At 1 and 1 it is y + 0.
        return output / alpha + ((beta - 1) * x).to(output.dtype)


def scale_ffn(model: nn.Module, *, modules: str | Iterable[str] | None = None) -> SurgeryReport:
    r"""Scale the branches of a residual block: :math:`X_{out} = \beta X + \frac{1}{\alpha} \mathrm{FFN}(X)`.

    The block is run once on random tokens to see which module is given :math:`X`, and which gives what is added to it;
    where no such sum is found, to the bit, the feed-forward is refused. ``ffn_alpha`` and ``ffn_beta`` are parameters
    of the module that ends the branch, and start at 1, where no bit of the output changes. Weight decay draws them to
    0, and alpha divides: give them none (the callback sees to it).

    Args:
        model: any module; changed in place.
        modules: shell patterns over dotted names of feed-forwards, or of modules that contain them; None takes all.

    Returns:
        The report; ``undo()`` removes hooks and parameters.

    Raises:
        ValueError: if there is no feed-forward, a pattern matches none, or all are refused.

    Reference:
        arXiv 2501.03489, scaled FFN.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True)
        >>> print(scale_ffn(layer))
        ScaledFFN: 1 of 1 feed-forward scaled (dropout2), +2 parameters; nothing refused
    """
    report = SurgeryReport("ScaledFFN")
    repeated = False
    for found in chosen_feed_forwards(model, modules, report.method):
        branch = residual_branch(model, found)
        if isinstance(branch, str):
            report.refused.append(Refusal(found.name, branch))
            continue
        end = branch.end
        if hasattr(end, ALPHA):
            repeated = True
            report.refused.append(Refusal(branch.end_name, "its branch is scaled already"))
            continue
        like = next(found.last.parameters())
        for name in (ALPHA, BETA):
            one = torch.ones((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
            end.register_parameter(name, nn.Parameter(one))
        stream = _Stream()
        keep = branch.source.register_forward_pre_hook(_Keep(stream), with_kwargs=True)
        scale = end.register_forward_hook(_Scale(stream))
        report.on_undo(_unscaled(end, keep.remove, scale.remove))
        report.added_parameters += 2
        report.changes.append(Change(branch.end_name, "feed-forward scaled"))
    return require_changes(report, repeated)


def _unscaled(end: nn.Module, *removals: Callable[[], None]) -> Callable[[], None]:
    def undo() -> None:
        for removal in removals:
            removal()
        delattr(end, ALPHA)
        delattr(end, BETA)

    return undo


def is_scaled(module: nn.Module) -> bool:
    """Whether a module holds a part of a scaled branch."""
    hooks = [h for m in module.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    return any(isinstance(hook, _Keep | _Scale) for hook in hooks)


__all__ = ["ALPHA", "BETA", "is_scaled", "scale_ffn"]
