"""Every activation that runs in a forward, seen at the dispatcher: with the module and the line that called it.

The dispatcher sees what Python hides: activations inside scripted code, recurrent layers and the fused encoder layer.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import CodeType, FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_entropy.surgery.activation_families import OPERATIONS, is_gate

_TORCH = os.path.dirname(torch.__file__) + os.sep
_MULTIPLY = {"mul", "mul_"}
_SEEN_THROUGH = {"view", "_unsafe_view", "reshape", "expand", "unsqueeze", "squeeze", "permute", "transpose", "t",
                 "_to_copy", "clone", "alias", "slice", "split", "chunk"}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Caller:
    """A frame of Python code that led to an operation.

    Attributes:
        code: of the function.
        end: where the call expression ends, ``(line, column)``; the column is None before Python 3.11.
        line: where it starts.
        owner: the first argument of the function, if it is a module.
    """

    code: CodeType
    end: tuple[int, int | None]
    line: int
    owner: nn.Module | None


@dataclass(eq=False)
class TracedActivation:
    """One activation that ran.

    Attributes:
        operation: the dispatcher's name, for example ``relu_``.
        family: as in ``activation_families``.
        order: 0 for the first of the forward.
        running: modules that were running, outermost first, each with the number of its call.
        callers: Python frames outside torch, innermost first.
        gate: whether its output was multiplied with another tensor that is no parameter.
    """

    operation: str
    family: str
    order: int
    running: tuple[tuple[nn.Module, int], ...]
    callers: tuple[Caller, ...]
    gate: bool = False
    output: Any = field(default=None, repr=False)


class ActivationTrace(TorchDispatchMode):
    """Records the activations that run inside its ``with`` block.

    Attributes:
        activations: in the order in which they ran.
        calls: how often each module ran, by identity.

    Example:
        >>> with ActivationTrace() as trace:
        ...     _ = nn.Sequential(nn.Linear(2, 2), nn.ReLU())(torch.zeros(1, 2))
        >>> [a.family for a in trace.activations]
        ['relu']
    """

    def __init__(self) -> None:
        super().__init__()
        self.activations: list[TracedActivation] = []
        self.calls: dict[int, int] = {}
        self._running: list[tuple[nn.Module, int]] = []
        self._produced: dict[int, TracedActivation] = {}
        self._count = 0
        self._hooks: list[Any] = []

    def __enter__(self) -> ActivationTrace:
        self._hooks = [
            _module.register_module_forward_pre_hook(self._enter_module),
            _module.register_module_forward_hook(self._leave_module, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, where)
        for hook in self._hooks:
            hook.remove()
        self._produced.clear()
        for activation in self.activations:
            activation.output = None

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        self._count += 1
        self.calls[id(module)] = self.calls.get(id(module), 0) + 1
        self._running.append((module, self._count))

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        # An exception may have skipped inner modules' hooks.
        while self._running and self._running.pop()[0] is not module:
            pass

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else ""
        if packet in _MULTIPLY:
            self._multiplied(args)
        name = packet if packet in OPERATIONS else packet.rstrip("_")
        # Those that write to a given tensor or belong to the backward pass have other names.
        if name in OPERATIONS:
            traced = TracedActivation(
                packet, OPERATIONS[name], len(self.activations), tuple(self._running), _callers(sys._getframe(1))
            )
            self.activations.append(traced)
            self._note(out, traced)
        elif packet in _SEEN_THROUGH and args and isinstance(args[0], Tensor):
            source = self._produced.get(id(args[0]))
            if source is not None:
                self._note(out, source)
        return out

    def _note(self, out: Any, traced: TracedActivation) -> None:
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                # Kept alive, so that an identity is not used twice.
                traced.output = (traced.output, tensor)
                self._produced[id(tensor)] = traced

    def _multiplied(self, args: tuple[Any, ...]) -> None:
        if len(args) < 2 or not all(isinstance(a, Tensor) for a in args[:2]) or args[0] is args[1]:
            return
        for mine, other in ((args[0], args[1]), (args[1], args[0])):
            traced, source = self._produced.get(id(mine)), self._produced.get(id(other))
            if traced is None or traced is source or isinstance(other, nn.Parameter) or other.dim() == 0:
                continue
            # Of a large and a small factor the small one is the gate, and a sigmoid's output is one beside any other.
            if is_gate(traced.family) or (
                mine.numel() <= other.numel() and (source is None or not is_gate(source.family))
            ):
                traced.gate = True


def _callers(frame: FrameType | None) -> tuple[Caller, ...]:
    found: list[Caller] = []
    while frame is not None and len(found) < 40:
        code = frame.f_code
        if not code.co_filename.startswith(_TORCH):
            line, end = _call_of(frame)
            found.append(Caller(code, end, line, _owner(frame)))
        frame = frame.f_back
    return tuple(found)


def _call_of(frame: FrameType) -> tuple[int, tuple[int, int | None]]:
    """Where the running call of a frame starts, and where it ends (the column is known from Python 3.11 on)."""
    line = frame.f_lineno
    if not hasattr(frame.f_code, "co_positions") or frame.f_lasti < 0:
        return line, (line, None)
    start, last, _, column = list(frame.f_code.co_positions())[frame.f_lasti // 2]
    return start or line, (last or line, column)


def _owner(frame: FrameType) -> nn.Module | None:
    names = frame.f_code.co_varnames
    local = frame.f_locals
    for name in ([names[0]] if frame.f_code.co_argcount else []) + ["self"]:
        value = local.get(name)
        if isinstance(value, nn.Module):
            return value
    return None


def run_traced(model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[ActivationTrace, Any]:
    """Run a model once, without gradient and in evaluation mode, and leave it as it was.

    Training flags, buffers and the state of random generators are put back. Fused encoder layers run unfused, since
    they would hide their activation, and compiled modules run eagerly.

    Args:
        model: any module.
        arguments: positional arguments of its forward.
        keywords: its keyword arguments.

    Returns:
        The trace and the output.
    """
    training = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    fused = torch.backends.mha.get_fastpath_enabled()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.no_grad())
        stance: Callable[..., Any] | None = getattr(torch.compiler, "set_stance", None)
        if stance is not None:
            stack.enter_context(stance("force_eager"))
        torch.manual_seed(0)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            for module, _ in training:
                module.training = False
            with ActivationTrace() as trace:
                output = model(*arguments, **keywords)
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for module, flag in training:
                module.training = flag
            for buffer, kept in buffers:
                if buffer.shape == kept.shape and not torch.equal(buffer, kept):
                    buffer.copy_(kept)
    return trace, output


def output_tensors(value: Any) -> list[Tensor]:
    """The tensors in an output, whatever holds them."""
    found: list[Tensor] = []
    pending, seen = [value], set()
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, list | tuple):
            pending.extend(item)
        elif hasattr(item, "__dict__") and not isinstance(item, nn.Module | type):
            pending.extend(vars(item).values())
    return found


def same_output(a: Any, b: Any) -> bool:
    """Whether two outputs are equal to the bit; NaN equals NaN."""
    left, right = output_tensors(a), output_tensors(b)
    return len(left) == len(right) and all(
        x.shape == y.shape and x.dtype == y.dtype and _equal(x, y) for x, y in zip(left, right)
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.is_nested or b.is_nested:
        return all(_equal(x, y) for x, y in zip(a.unbind(), b.unbind(), strict=True))
    if torch.equal(a, b):
        return True
    return a.is_floating_point() and bool(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


__all__ = ["ActivationTrace", "Caller", "TracedActivation", "output_tensors", "run_traced", "same_output"]
