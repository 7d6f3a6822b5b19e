r"""How the gradient flows back through the layers of a model: its norm where it enters and where it leaves each layer.

.. math:: G(h) = B \sqrt{\frac{1}{N} \sum_{\text{tokens}} \left\lVert \frac{\partial L}{\partial h_t} \right\rVert^2}

for a loss that is a mean over B samples, with N tokens that exist. So neither the batch size nor padding changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_LOSSES = {
    F.cross_entropy: 1,
    **dict.fromkeys(
        (
            F.binary_cross_entropy_with_logits,
            F.binary_cross_entropy,
            F.mse_loss,
            F.l1_loss,
            F.smooth_l1_loss,
            F.huber_loss,
            F.multi_margin_loss,
            F.multilabel_soft_margin_loss,
        )
    ),
}
_LOG_SOFTMAX = (F.log_softmax, torch.log_softmax, Tensor.log_softmax)


class FlowSums(NamedTuple):
    """Sums over batches of one layer: squared gradient norms and tokens, at its output and at its input."""

    output: Tensor
    output_tokens: Tensor
    input: Tensor
    input_tokens: Tensor


class _Seen:
    """One activation of one forward, and the square of its gradient once that is known."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.square: Tensor | float = 0.0


class OutputError(TorchFunctionMode):
    """Measures the size of the output error while it is entered: sum over rows of ``|dL/dz|`` at the loss's input z.

    For the mean cross-entropy of logits that is the mean of ``|p - y|`` over the rows. Seen are the losses of
    ``torch.nn.functional`` that take predictions first; where none runs, the input of ``log_softmax``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.direct: list[Tensor] = []
        self.through_log_softmax: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, and wait for the gradient of its input if it is a loss."""
        kwargs = kwargs or {}
        if func in _LOSSES or func in _LOG_SOFTMAX:
            z = args[0] if args else kwargs.get("input")
            if isinstance(z, Tensor) and z.requires_grad and torch._C._current_graph_task_id() == -1:
                with torch._C.DisableTorchFunction():
                    if func in _LOSSES:
                        self.watch(z, 0 if z.dim() < 2 else _LOSSES[func])
                    else:
                        dim = args[1] if len(args) > 1 else kwargs.get("dim")
                        self._watch(z, -1 if dim is None else dim, self.through_log_softmax)
        return func(*args, **kwargs)

    def watch(self, z: Tensor, dim: int | None = -1) -> None:
        """Count the gradient of ``z``, whose rows are along ``dim`` (None: all but the first dimension)."""
        self._watch(z, dim, self.direct)

    def _watch(self, z: Tensor, dim: int | None, into: list[Tensor]) -> None:
        def take(grad: Tensor) -> None:
            g = wide(grad.detach())
            if g.dim() < 2:
                into.append(g.abs().sum())
            else:
                into.append((g.flatten(1).norm(dim=1) if dim is None else g.norm(dim=dim)).sum())

        z.register_hook(take)

    def take(self) -> Tensor | None:
        """The error since the last call; None where no loss was seen."""
        found = self.direct or self.through_log_softmax
        total = torch.stack([x.reshape(()) for x in found]).sum() if found else None
        self.direct, self.through_log_softmax = [], []
        return total


def wide(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x if x.dtype == torch.float64 else x.float()


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor of a layer's output or inputs."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return next((found for entry in value if (found := first_tensor(entry)) is not None), None)
    return None


class GradientFlow:
    """Keeps the squared activation-gradient norms of layers over batches, in a few numbers a layer.

    Use it as a context around forwards and backwards; after each backward call :meth:`add`. Where the layers' input
    needs no gradient (a frozen model) it is made to, so that the norms are those of the same loss.

    Args:
        module: any module; it gets hooks, which leaving the context removes.
        layers: dotted names.
        on_output: called with a layer's name and its output, in the forward.

    Example:
        >>> chain = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(3)])
        >>> for layer in chain:
        ...     _ = nn.init.constant_(layer.weight, 0.5)
        >>> with GradientFlow(chain, ["1", "2"]) as flow:
        ...     chain(torch.ones(4, 1)).mean().backward()
        ...     flow.add(samples=4)
        >>> flow.norms()  # at the output and at the input of each
        {'1': (0.5, 0.25), '2': (1.0, 0.5)}
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Iterable[str],
        *,
        on_output: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        self.module, self.layers, self.on_output = module, list(layers), on_output
        self.valid: Mapping[tuple[int, int], Tensor | None] = {}
        self.sums: dict[str, FlowSums] = {}
        self._seen: list[tuple[str, int, _Seen]] = []
        self._last: tuple[Tensor, _Seen] | None = None
        self._handles: list[Any] = []
        self._opened: set[str] = set()

    def __enter__(self) -> GradientFlow:
        for name, layer in [(name, self.module.get_submodule(name)) for name in self.layers]:

            def enter(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> Any:
                return self._enter(name, args, kwargs)

            def leave(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
                self._leave(name, output)

            self._handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(layer.register_forward_hook(leave))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def _forget(self) -> None:
        self._seen.clear()
        self._opened.clear()
        self._last = None

    def _watch(self, x: Tensor) -> _Seen:
        seen = _Seen(x.shape)

        def take(grad: Tensor) -> None:
            seen.square = seen.square + self._square(grad.detach())

        x.register_hook(take)
        return seen

    def _enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        again = torch._C._current_graph_task_id() != -1  # a forward that checkpointing runs once more in the backward
        if not torch.is_grad_enabled() or (again and name not in self._opened):
            return None
        x = first_tensor(args)
        key = None
        if x is None:
            key = next((k for k, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point()), None)
            if key is None:
                return None
            x = kwargs[key]
        if not again and self._last is not None and self._last[0] is x:  # the output of the layer before
            self._seen.append((name, 1, self._last[1]))
            return None
        changed = None
        if not x.requires_grad:
            fresh = x.detach().requires_grad_()
            args = tuple(fresh if a is x else a for a in args)
            changed = (args, kwargs if key is None else {**kwargs, key: fresh})
            x = fresh
            self._opened.add(name)
        if again:  # the same operations as before, which were seen then
            return changed
        self._seen.append((name, 1, self._watch(x)))
        return changed

    def narrow(self, layers: Iterable[str]) -> None:
        """Look at these layers only from now on, and forget the sums of others."""
        self.layers = list(layers)
        self.sums = {name: sums for name, sums in self.sums.items() if name in self.layers}
        seen = [entry for entry in self._seen if entry[0] in self.layers]
        self.__exit__(None, None, None)
        self._seen = seen
        self.__enter__()

    def _leave(self, name: str, output: Any) -> None:
        x = first_tensor(output)
        if x is None or torch._C._current_graph_task_id() != -1:
            return
        if self.on_output is not None:
            self.on_output(name, x)
        if x.requires_grad and torch.is_grad_enabled():
            seen = self._watch(x)
            self._seen.append((name, 0, seen))
            self._last = (x, seen)

    def token_mask(self, shape: torch.Size) -> Tensor | None:
        """Which tokens of an activation exist, in the layout of its leading dimensions."""
        if len(shape) < 3:
            return None
        mask = self.valid.get((shape[0], shape[1]))
        if mask is not None:
            return mask
        mask = self.valid.get((shape[1], shape[0]))  # tokens first
        return None if mask is None else mask.T

    def _square(self, grad: Tensor) -> Tensor:
        dtype = grad.dtype if grad.dtype == torch.float64 else torch.float32
        norms = torch.linalg.vector_norm(grad, dim=-1 if grad.dim() else None, dtype=dtype)
        mask = self.token_mask(grad.shape)
        if mask is not None:
            norms = norms.masked_fill(~mask.to(norms.device).view(*mask.shape, *[1] * (norms.dim() - 2)), 0.0)
        squares = norms.square()
        return squares.sum(dtype=dtype if grad.device.type == "mps" else torch.float64)

    @torch.no_grad()
    def add(self, samples: float) -> None:
        """Add the last backward to the sums.

        Args:
            samples: B, by which the gradients are multiplied: the samples that the loss is a mean over.
        """
        for name, place, seen in self._seen:
            mask = self.token_mask(seen.shape)
            positions = max(1, seen.shape.numel() // (seen.shape[-1] if len(seen.shape) else 1))
            tokens = float(positions)
            if mask is not None:
                tokens = mask.sum() * (positions / mask.numel())  # type: ignore[assignment]
            zero = torch.zeros((), dtype=torch.float64)
            old = list(self.sums.get(name, FlowSums(zero, zero, zero, zero)))
            old[2 * place] = old[2 * place] + _double(seen.square) * samples**2
            old[2 * place + 1] = old[2 * place + 1] + _double(tokens)
            self.sums[name] = FlowSums(*old)
        self._forget()

    def norms(self) -> dict[str, tuple[float, float]]:
        """Layer -> G at its output and at its input; NaN where the layer did not run."""
        return {
            name: (norm_of(s.output, s.output_tokens), norm_of(s.input, s.input_tokens))
            for name, s in self.sums.items()
        }


def _double(value: Tensor | float) -> Tensor:
    """On the CPU is where the sums of several devices meet; a device's own stay there."""
    if isinstance(value, Tensor):
        return value if value.device.type == "mps" else value.double()
    return torch.tensor(value, dtype=torch.float64)


def norm_of(square: Tensor | float, tokens: Tensor | float) -> float:
    """The root of the mean square; NaN without a token."""
    count = float(tokens)
    return (float(square) / count) ** 0.5 if count > 0 else float("nan")


__all__ = ["FlowSums", "GradientFlow", "OutputError", "first_tensor", "norm_of"]
