"""Feed-forward branches of a model, and where the residual stream passes around them, found by running a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_entropy.observe.selection import as_patterns, match_modules
from lightning_entropy.observe.weight_matrices import is_conv1d
from lightning_entropy.surgery.attention_modules import attention_modules
from lightning_entropy.surgery.report import SurgeryReport


class FusedFeedForward(nn.Linear):
    """A feed-forward that was two linear layers without an activation between them."""


@dataclass(frozen=True)
class FeedForward:
    """A module whose own linear layers lead from a width back to it; ``last`` is the layer that ends the branch."""

    name: str
    module: nn.Module
    width: int
    layers: tuple[nn.Module, ...]

    @property
    def last(self) -> nn.Module:
        """The layer that ends the branch."""
        return self.layers[-1]


def _sizes(layer: nn.Module) -> tuple[int, int]:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return (weight.shape[0], weight.shape[1]) if is_conv1d(layer) else (weight.shape[1], weight.shape[0])


def feed_forwards(model: nn.Module) -> list[FeedForward]:
    """Modules with two or more linear layers of their own, from a width to another and back (gated ones included).

    Modules that compute attention are not meant, unless they are a whole layer such as ``nn.TransformerEncoderLayer``,
    whose linear layers are its own.
    """
    attention = set(map(id, attention_modules(model).values()))
    found = []
    for name, module in model.named_modules():
        if isinstance(module, FusedFeedForward):
            found.append(FeedForward(name, module, module.in_features, (module,)))
            continue
        if id(module) in attention:
            continue
        linear = [child for child in module.children() if isinstance(child, nn.Linear) or is_conv1d(child)]
        layers = [child for child in linear if not isinstance(child, FusedFeedForward)]  # that is one by itself
        if len(layers) < 2:
            continue
        (width, hidden), (back, end) = _sizes(layers[0]), _sizes(layers[-1])
        if width == end and hidden in (back, 2 * back):
            found.append(FeedForward(name, module, width, tuple(layers)))
    return found


def chosen_feed_forwards(model: nn.Module, modules: str | Iterable[str] | None, owner: str) -> list[FeedForward]:
    """The feed-forwards that patterns name, or all; an error where there is none."""
    found = feed_forwards(model)
    if not found:
        raise ValueError(
            f"{owner} found no feed-forward in {type(model).__name__}: a module with linear layers of its own from a "
            "width to another and back to it."
        )
    patterns = as_patterns(modules)
    if patterns is None:
        return found
    chosen: set[str] = set()
    for pattern, names in match_modules(model, patterns, owner).items():
        inside = {f.name for f in found if any(f.name == n or not n or f.name.startswith(n + ".") for n in names)}
        if not inside:
            raise ValueError(
                f"{owner}(modules={pattern!r}) matched {len(names)} modules in {type(model).__name__}, and none of "
                f"them is or holds a feed-forward. Feed-forwards: {', '.join(f.name for f in found[:20])}."
            )
        chosen |= inside
    return [f for f in found if f.name in chosen]


def require_changes(report: SurgeryReport, repeated: bool) -> SurgeryReport:
    """The report, or an error if everything was refused and nothing was changed by an earlier call."""
    if not report.changes and not repeated:
        lines = "\n".join(f"  {refusal.module}: {refusal.reason}" for refusal in report.refused)
        raise ValueError(f"{report.method} can change none of the {len(report.refused)} modules:\n{lines}")
    return report


@dataclass(frozen=True)
class Branch:
    """Where a feed-forward joins the residual stream: ``source`` is given x, and x + the output of ``end`` follows."""

    source: nn.Module
    end: nn.Module
    end_name: str


def residual_branch(model: nn.Module, found: FeedForward) -> Branch | str:
    """Run the block around a feed-forward on random tokens, and find the sum of the stream and the branch in it.

    The sum is taken for found only if it is equal to the bit. Evaluation mode, no gradient, no random state.

    Returns:
        The branch, or why there is none.
    """
    parts = found.name.split(".") if found.name else []
    own = found.module is not found.last and any(True for m in found.module.modules() if _is_attention(m))
    names = [".".join(parts[:i]) for i in range(len(parts), -1, -1)][0 if own else 1 :][:2]
    reasons: list[str] = []
    for name in names:
        for shape in ((2, 4), (2, 8, 8)):  # tokens, and a grid of them
            outcome = _search(model.get_submodule(name), name, found, shape)
            if isinstance(outcome, Branch):
                return outcome
            reasons.append(outcome)
    return reasons[0] if reasons else "it has no block around it"


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention)


def _search(block: nn.Module, name: str, found: FeedForward, shape: tuple[int, ...]) -> Branch | str:
    events: list[tuple[str, nn.Module, str, Tensor]] = []
    like = next(found.last.parameters())
    tokens = torch.randn(*shape, found.width, generator=torch.Generator().manual_seed(0)).to(like)
    with _evaluating(block), _recording(block, name, events), torch.no_grad():
        try:
            out = block(tokens)
        except Exception as error:  # a stranger's forward may want anything; what it said is the reason
            return f"its block {name or type(block).__name__} did not run on tokens alone ({type(error).__name__})"
    for tensor in out if isinstance(out, tuple) else (out,):
        if isinstance(tensor, Tensor):
            events.append(("in", block, name, tensor))
    ended = [i for i, (kind, module, _, _) in enumerate(events) if kind == "out" and module is found.last]
    started = [i for i, (kind, module, _, _) in enumerate(events) if kind == "in" and module is found.last]
    if len(ended) != 1:
        return f"its last layer ran {len(ended)} times in its block"
    before = [e for e in events[: started[0]] if e[0] == "in" and e[1] is not block]
    after = list(enumerate(events))[ended[0] :]
    for at, (kind, end, end_name, y) in reversed(after):
        if kind != "out" or end is block or y.shape != tokens.shape:
            continue
        if not bool(y.any()):
            return "its branch gives zeros, of which the sum cannot be told"
        sums = [tensor for other, (k, _, _, tensor) in after if other > at and k == "in" and tensor.shape == y.shape]
        for _, source, _, x in reversed(before):
            if x.shape == y.shape and any(torch.equal(x + y, total) for total in sums):
                return Branch(source, end, end_name)
    return "no sum of the residual stream and its output was found in its block"


@contextmanager
def _evaluating(block: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in block.modules()]
    block.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _recording(block: nn.Module, name: str, events: list[tuple[str, nn.Module, str, Tensor]]) -> Iterator[None]:
    def given(full: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
            tensor = first_tensor(args, arguments)
            if tensor is not None:
                events.append(("in", module, full, tensor.clone()))

        return hook

    def gave(full: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                events.append(("out", module, full, output.clone()))

        return hook

    handles = []
    for inner, module in block.named_modules():
        full = f"{name}.{inner}".strip(".")
        handles.append(module.register_forward_pre_hook(given(full), with_kwargs=True))
        handles.append(module.register_forward_hook(gave(full)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(args: tuple[Any, ...], arguments: dict[str, Any]) -> Tensor | None:
    """The first tensor that a module is called with."""
    return next((value for value in (*args, *arguments.values()) if isinstance(value, Tensor)), None)


__all__ = [
    "Branch",
    "FeedForward",
    "FusedFeedForward",
    "chosen_feed_forwards",
    "feed_forwards",
    "first_tensor",
    "require_changes",
    "residual_branch",
]
