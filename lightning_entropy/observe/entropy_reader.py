"""Reads the entropy of every attention of an unmodified transformer, without its maps where the model forms none.

One mechanism for every architecture; the output is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_entropy.observe import attention_entropy as kinds
from lightning_entropy.observe.attention_entropy import AttentionRead, LayerEntropy, project_multi_head
from lightning_entropy.observe.interception import MHA, SDPA, SOFTMAX, Handles, keep_padded
from lightning_entropy.observe.selection import as_patterns, match_modules

_KINDS: dict[Any, str] = {
    SDPA: kinds.DOT_PRODUCT,
    MHA: kinds.MULTI_HEAD,
    **dict.fromkeys(SOFTMAX, kinds.SOFTMAX),
}


class _Noted(NamedTuple):
    kind: str
    site: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: bool


class _Watch(TorchFunctionMode):
    """Notes the attention operations that run while it is entered, at ``site`` or wherever the stack says."""

    def __init__(self, note: Callable[..., None], stack: list[str], site: str | None = None) -> None:
        super().__init__()
        self.note, self.stack, self.site = note, stack, site

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _KINDS:
            running = self.stack[-1] if self.stack else ""
            if self.site is None or self.site == running:  # of nested watches the innermost notes
                self.note(_KINDS[func], running, args, kwargs)
        return out


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP keeps the module's parameters in pieces between its forwards."""
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in module.modules()):
        return True
    return any(type(p).__name__ == "DTensor" for p in module.parameters())


class AttentionEntropyReader:
    """Reads the entropy of every attention that a module computes.

    Use it as a context for one or more forwards, or attach it once and :meth:`start` and :meth:`stop` it around each
    step. Where gradients are enabled the entropies carry their graph; they are computed when :attr:`layers` is asked
    for, outside the forward, so that gradient checkpointing and ``torch.compile`` see the model as it is. Without
    gradients they are computed as the forward goes, and no query or key is kept.

    Under gradient checkpointing each attention is read once: what is recomputed during a backward pass is not read
    again. With ``use_reentrant=True`` the entropies have values and no gradient.

    Args:
        module: any module; it gets hooks, which :meth:`detach` (or leaving the context) removes.
        modules: shell patterns over dotted names of the modules whose attention is read, with all that they contain;
            None reads all.
        queries: read this many query rows of each attention, drawn at random, the same in every call: an unbiased
            estimate at a fraction of the cost. None reads all rows.
        gradient: False computes the entropies as the forward goes, without a graph, also where gradients are enabled.
        sinks: tell attention sinks too, from up to 64 query rows (``sink`` and ``rest`` of a :class:`LayerEntropy`).
        owner: the name that messages carry.

    Raises:
        ValueError: if a pattern matches no module; on leaving the context, if no attention ran.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> with AttentionEntropyReader(layer) as reader:
        ...     _ = layer(torch.zeros(1, 5, 8))
        >>> reader.layers[0].per_head()
        tensor([1.0000, 1.0000], grad_fn=<NanmeanBackward0>)
    """

    def __init__(
        self,
        module: nn.Module,
        modules: str | Iterable[str] | None = None,
        *,
        queries: int | None = None,
        gradient: bool = True,
        sinks: bool = False,
        owner: str = "AttentionEntropyReader",
    ) -> None:
        if queries is not None and queries < 1:
            raise ValueError(f"queries must be at least 1, got {queries}")
        self.module = module
        self.owner = owner
        self.patterns = as_patterns(modules)
        self.queries = queries
        self.gradient = gradient
        self.sinks = sinks
        self.recording = False
        self._roots: list[str] | None = None
        self._sites: list[str] = []
        if self.patterns is not None:
            found = match_modules(module, self.patterns, owner)
            self._roots = [name for matched in found.values() for name in matched]
        self._noted: list[_Noted] = []
        self._layers: list[LayerEntropy] = []
        self._read = AttentionRead(queries, sinks)
        self._stack: list[str] = []
        self._entered: list[_Watch] = []
        self._everywhere = _Watch(self._note, self._stack)
        self._handles = Handles()
        self._attached = False
        self._whole = True
        self._compiled = self._sharded = False

    def _wanted(self, site: str) -> bool:
        if self._roots is None:
            return True
        return any(site == root or not root or site.startswith(f"{root}.") for root in self._roots)

    def _note(self, kind: str, site: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._wanted(site):
            return
        grad = self.gradient and torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            self._compiled = True
            self._noted.append(_Noted(kind, site, args, kwargs, grad))
            return
        if torch._C._current_graph_task_id() != -1:
            return  # a backward pass recomputes a checkpointed forward
        if self._sharded and kind == kinds.MULTI_HEAD:  # its weights are gone when the forward is over
            projected = project_multi_head(args, kwargs)
            if projected is None:
                return
            kind, args, kwargs = kinds.PROJECTED, projected, {}
        self._noted.append(_Noted(kind, site, args, kwargs, grad))
        if not grad:
            self._realize()

    def _realize(self) -> None:
        noted, self._noted[:] = list(self._noted), []
        with torch._C.DisableTorchFunction():  # what a reading computes is no attention of the module, to any reader
            for call in noted:
                with torch.set_grad_enabled(call.grad):
                    entry = self._read(call.kind, call.site, call.args, call.kwargs)
                if entry is not None:
                    self._layers.append(entry)

    @property
    def layers(self) -> list[LayerEntropy]:
        """One entry for each attention that ran since :meth:`start`, in the order of the forward."""
        self._realize()
        if self._layers and self._attached and self._whole and not self.recording:
            self._narrow(list(dict.fromkeys(layer.module for layer in self._layers)))
        return list(self._layers)

    @property
    def has_read(self) -> bool:
        """Whether an attention ran since :meth:`start`; a softmax that is none may count until it is looked at."""
        return bool(self._noted or self._layers)

    def attach(self) -> None:
        """Install the hooks, where attention was found before if it was. Does nothing when they are installed."""
        if self._attached:
            return
        self._attached = self._whole = True
        self._sharded = is_sharded(self.module)
        if self._sites:
            self._narrow(self._sites)
            return
        keep_padded(self._handles, self.module, lambda: self.recording)
        for name, module in self.module.named_modules():

            def enter(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                if self.recording:
                    self._stack.append(name)

            def leave(_: nn.Module, args: Any, output: Any) -> None:
                if self.recording and self._stack:
                    self._stack.pop()

            self._handles.before(module, enter)
            self._handles.after(module, leave)

    def _narrow(self, sites: list[str]) -> None:
        """Watch only the modules that compute attention, and others of their classes, from now on.

        A mode that sees every operation of a step costs some microseconds for each; attention that runs outside every
        module needs it.
        """
        if "" in sites or self._compiled:
            return  # compiled code holds no mode; what makes it read is that one is entered where it is called
        self._sites = sites
        self._handles.remove()
        self._whole = False
        keep_padded(self._handles, self.module, lambda: self.recording)
        classes = tuple({type(self.module.get_submodule(site)) for site in sites})
        for name, module in self.module.named_modules():
            if not isinstance(module, classes) or not self._wanted(name):
                continue
            watch = _Watch(self._note, self._stack, site=name)

            def enter(_: nn.Module, args: Any, kwargs: Any, watch: _Watch = watch) -> None:
                if self.recording:
                    self._stack.append(str(watch.site))
                    watch.__enter__()
                    self._entered.append(watch)

            def leave(_: nn.Module, args: Any, output: Any, watch: _Watch = watch) -> None:
                if self._entered and self._entered[-1] is watch:
                    self._stack.pop()
                    self._entered.pop()
                    watch.__exit__(None, None, None)

            self._handles.before(module, enter)
            self._handles.after(module, leave)

    def start(self, batch: Any = None) -> None:
        """Forget what was read, and read from here on. The batch is not looked at."""
        self.stop()
        self.clear()
        self.recording = True
        if self._whole:
            self._everywhere.__enter__()
            self._entered.append(self._everywhere)

    def stop(self) -> None:
        """Read no further; what was read stays."""
        self.recording = False
        self._stack.clear()
        while self._entered:
            self._entered.pop().__exit__(None, None, None)

    def clear(self) -> None:
        """Drop what was read, and the graph that it holds."""
        self._noted.clear()
        self._layers.clear()
        self._read = AttentionRead(self.queries, self.sinks)

    def detach(self) -> None:
        """Remove every hook and what was read. Safe at any moment and any number of times."""
        self.stop()
        self.clear()
        self._handles.remove()
        self._attached = False

    def __enter__(self) -> AttentionEntropyReader:
        self.attach()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._handles.remove()
        self._attached = False
        if kind is None and not self.layers:
            raise self.nothing_read()

    def nothing_read(self) -> ValueError:
        """The error for a module in which no attention ran."""
        where = "" if self.patterns is None else f" in the modules that {self.patterns} match"
        return ValueError(
            f"{self.owner}: no attention between tokens ran in {type(self.module).__name__}{where}. It reads "
            "scaled_dot_product_attention, multi_head_attention_forward (nn.MultiheadAttention), and softmax over "
            "the last axis of (batch, heads, queries, keys)."
        )


__all__ = ["AttentionEntropyReader"]
