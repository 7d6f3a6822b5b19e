"""Reads the attention that an unmodified module computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_entropy.observe.interception import Call, Handles, Interceptor, keep_padded
from lightning_entropy.observe.records import AttentionRecord
from lightning_entropy.observe.selection import Site, as_patterns, choose, instance_counts, match_modules

AttentionFunction = Callable[[dict[str, Any], Any], Any]


class AttentionReader:
    """Reads every attention distribution over instances that a module computes, without changing its output.

    The first forward is observed whole: every softmax and attention operation is noted together with the module that
    ran it, and those over the instances of the bag are chosen. After that only the chosen modules are observed.
    Records keep their autograd graph, so a loss on them reaches the scorer.

    Use it as a context for one or more forwards::

        with AttentionReader(model) as reader:
            model(features)
        reader.records[0].weights()

    Args:
        module: any module; it is not modified beyond hooks, which :meth:`detach` removes.
        modules: shell patterns over dotted module names, a list of them, None (automatic), or a function
            ``(outputs, batch)`` that returns logits with the instances on the last axis, an
            :class:`AttentionRecord`, or a list of either; ``outputs`` maps the names of the module itself (``""``)
            and of its direct children to their last outputs.
        owner: the name that messages carry.

    Raises:
        ValueError: if a pattern matches no module.
    """

    def __init__(
        self,
        module: nn.Module,
        modules: str | Iterable[str] | AttentionFunction | None = None,
        *,
        owner: str = "AttentionReader",
    ) -> None:
        self.module = module
        self.owner = owner
        self.function: AttentionFunction | None = None
        self.patterns: list[str] | None = None
        if callable(modules):
            self.function = modules
        else:
            self.patterns = as_patterns(modules)
        if self.patterns is not None:
            match_modules(module, self.patterns, owner)
        self.sites: list[Site] | None = None
        self.recording = False
        self.batch: Any = None
        self._calls: list[Call] = []
        self._counts: set[int] = set()
        self._stack: list[str] = []
        self._outputs: dict[str, Any] = {}
        self._handles = Handles()
        self._everywhere = Interceptor(self._calls, stack=self._stack)
        self._entered: list[Interceptor] = []
        self._attached = False

    def attach(self) -> None:
        """Install the hooks. Does nothing when they are installed."""
        if self._attached:
            return
        self._attached = True
        self.sites = None
        keep_padded(self._handles, self.module, lambda: self.recording)
        names = dict(self.module.named_modules())
        if self.function is not None:
            names = {name: m for name, m in names.items() if "." not in name}
        for name, module in names.items():
            self._observe(name, module)

    def _observe(self, name: str, module: nn.Module) -> None:
        """Follow which module runs, and keep the sizes that enter the root."""

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.recording:
                self._stack.append(name)
                self._everywhere.ordinals.pop(name, None)  # operations are counted within one forward
                if not name:
                    self._counts |= instance_counts(args, kwargs)

        def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self.recording and self._stack:
                self._stack.pop()
                if self.function is not None:
                    self._outputs[name] = output

        self._handles.before(module, enter)
        self._handles.after(module, leave)

    def _narrow(self, sites: list[Site]) -> None:
        """Observe the chosen modules alone from now on.

        Attention that is computed in the step itself, outside every forward, keeps the whole observed: only the names
        of the running modules tell it from theirs.
        """
        if any(not site.module for site in sites):
            return
        self._handles.remove()
        keep_padded(self._handles, self.module, lambda: self.recording)
        for name in dict.fromkeys(site.module for site in sites):
            mode = Interceptor(self._calls, site=name)

            def enter(_: nn.Module, args: Any, kwargs: Any, mode: Interceptor = mode) -> None:
                if self.recording:
                    mode.restart()
                    mode.__enter__()
                    self._entered.append(mode)

            def leave(_: nn.Module, args: Any, output: Any, mode: Interceptor = mode) -> None:
                if self._entered and self._entered[-1] is mode:
                    self._entered.pop()
                    mode.__exit__(None, None, None)

            module = self.module.get_submodule(name)
            self._handles.before(module, enter)
            self._handles.after(module, leave)

    @property
    def _whole(self) -> bool:
        return self.function is None and (self.sites is None or any(not s.module for s in self.sites))

    def start(self, batch: Any = None) -> None:
        """Forget earlier records and read from here on.

        Args:
            batch: what the step works on; its tensors tell how many instances a bag has.
        """
        self.stop()
        self.clear()
        self.batch = batch
        self._counts = instance_counts(batch)
        self.recording = True
        if self._whole:
            self._everywhere.restart()
            self._everywhere.__enter__()
            self._entered.append(self._everywhere)

    def stop(self) -> None:
        """Read no further; records stay. A recomputation during backward is not read twice."""
        self.recording = False
        self._stack.clear()
        while self._entered:
            self._entered.pop().__exit__(None, None, None)

    def clear(self) -> None:
        """Drop the records, and with them the graph that they hold."""
        self._calls.clear()
        self._outputs.clear()

    def detach(self) -> None:
        """Remove every hook and record. Safe at any moment and any number of times."""
        self.stop()
        self.clear()
        self.batch = None
        self._handles.remove()
        self._attached = False

    def __enter__(self) -> AttentionReader:
        self.attach()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        try:
            if kind is None and self.function is None and self.sites is None and self._calls:
                self._select()
        finally:
            self._handles.remove()
            self._attached = False

    def _select(self) -> None:
        if not self._calls and self._counts == set():
            return
        self.sites = choose(self.module, self._calls, self._counts, self.patterns, self.owner)
        if self._attached:
            self._narrow(self.sites)

    @property
    def has_read(self) -> bool:
        """Whether anything was recorded since :meth:`start`."""
        return bool(self._calls or self._outputs)

    @property
    def only_single_instances(self) -> bool:
        """Whether nothing could be chosen yet because the step had bags of one instance only."""
        return self.sites is None and self.function is None and not self._counts

    @property
    def records(self) -> list[AttentionRecord]:
        """One record for each attention that ran since :meth:`start`.

        Raises:
            ValueError: if the module has no attention over instances, or the match is ambiguous; the message is an
                inventory of what it computes.
        """
        if self.function is not None:
            return _as_records(self.function(dict(self._outputs), self.batch), self.owner)
        if self.sites is None:
            if self.only_single_instances:
                return []
            self._select()
        sites = self.sites or []
        return [
            AttentionRecord.from_logits(call.logits, call.dim, module=call.site, source=call.source)
            for call in self._calls
            if call.logits is not None and any(site.takes(call) for site in sites)
        ]


def _as_records(value: Any, owner: str) -> list[AttentionRecord]:
    if isinstance(value, AttentionRecord):
        return [value]
    if isinstance(value, Tensor):
        return [AttentionRecord.from_logits(value)]
    if isinstance(value, list | tuple):
        return [record for entry in value for record in _as_records(entry, owner)]
    raise TypeError(
        f"{owner}: the attention function must return logits, an AttentionRecord, or a list of these, got "
        f"{type(value).__name__}"
    )


def read_attention(
    module: nn.Module,
    *args: Any,
    modules: str | Iterable[str] | AttentionFunction | None = None,
    **kwargs: Any,
) -> tuple[Any, list[AttentionRecord]]:
    """Run a module once, without gradient, and read its attention.

    Args:
        module: any module; its mode (train or eval) is left as it is.
        *args: passed to the module.
        modules: see :class:`AttentionReader`.
        **kwargs: passed to the module.

    Returns:
        The module's output, and the records.

    Raises:
        ValueError: if the module has no attention over instances (see :class:`AttentionReader`).
    """
    with torch.no_grad(), AttentionReader(module, modules, owner="read_attention") as reader:
        output = module(*args, **kwargs)
    return output, reader.records
