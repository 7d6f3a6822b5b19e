"""The graph of a model's forward around one of its modules: which values are computed from the module's input."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn


class CannotSplit(ValueError):
    """Why a classifier cannot be split where it was asked."""


class CannotRun(CannotSplit, RuntimeError):
    """No module that could be the classifier ran on images; what their forwards raised is in the message."""


class _Coarse(fx.Tracer):
    """Follows the forwards of the modules that hold the named ones, and takes every other module as one step."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        parts = [name.split(".") for name in names]
        self.holders = {".".join(p[:i]) for p in parts for i in range(len(p))}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.holders


class RunGraph(fx.Interpreter):
    """Runs a graph and keeps the value of each node."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(fx.GraphModule(module, graph))
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run and keep."""
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


def coarse_graph(model: nn.Module, names: list[str]) -> fx.Graph:
    """Trace a model's forward, with every module that does not hold one of ``names`` as one step.

    Args:
        model: has a ``forward`` of its own.
        names: dotted names inside it.

    Raises:
        CannotSplit: if the forward cannot be traced, with torch's reason.
    """
    defaults = {
        name: p.default
        for name, p in inspect.signature(type(model).forward).parameters.items()
        if p.default is not inspect.Parameter.empty
    }
    try:
        return _Coarse(names).trace(model, concrete_args=defaults or None)
    except Exception as error:
        raise CannotSplit(
            f"the forward of {type(model).__name__} cannot be traced by torch.fx ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'})"
        ) from error


def call_of(graph: fx.Graph, name: str) -> fx.Node:
    """The one call of a module.

    Raises:
        CannotSplit: if it is called never, or several times.
    """
    calls = [n for n in graph.nodes if n.op == "call_module" and n.target == name]
    if len(calls) != 1:
        times = f"{len(calls)} times" if calls else "never"
        raise CannotSplit(f"{name} runs {times} in one forward, and must run once")
    return calls[0]


def first_input(node: fx.Node) -> fx.Node:
    """The tensor that a module is called on."""
    value = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    if not isinstance(value, fx.Node):
        raise CannotSplit(f"{node.target} is not called on one tensor")
    return value


def computed_from(start: fx.Node) -> set[fx.Node]:
    """A value and everything computed from it."""
    found, pending = {start}, [start]
    while pending:
        for user in pending.pop().users:
            if user not in found:
                found.add(user)
                pending.append(user)
    return found


def cut(graph: fx.Graph, starts: list[fx.Node], end: fx.Node, model: nn.Module) -> fx.GraphModule:
    """The part of a graph that computes ``end`` from ``starts``, as a module that shares the model's modules.

    Raises:
        CannotSplit: if another value enters it, as a skip connection across the cut does.
    """
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {node: part.placeholder(f"input_{i}") for i, node in enumerate(starts)}
    needed = _needed(end, set(starts))
    for node in graph.nodes:
        if node not in needed or node in copies:
            continue
        if node.op == "placeholder":
            raise CannotSplit(
                f"a value from before the split enters {_first_use(needed, starts)} behind it (a skip connection "
                "across the split). Split before the block that the connection spans"
            )
        copies[node] = part.node_copy(node, lambda n: copies[n])
    part.output(copies[end])
    return fx.GraphModule(model, part)


def _needed(end: fx.Node, starts: set[fx.Node]) -> set[fx.Node]:
    found, pending = {end}, [end]
    while pending:
        node = pending.pop()
        if node in starts:
            continue
        for source in node.all_input_nodes:
            if source not in found:
                found.add(source)
                pending.append(source)
    return found


def _first_use(needed: set[fx.Node], starts: list[fx.Node]) -> str:
    behind = set().union(*(computed_from(start) for start in starts))
    for node in starts[0].graph.nodes:
        if node not in needed or node not in behind or node in starts:
            continue
        foreign = [n for n in node.all_input_nodes if n not in behind and n.op != "get_attr"]
        if foreign:
            return str(node.target)
    return "the computation"


def boundary(end: fx.Node, start: fx.Node) -> list[fx.Node]:
    """The calls of modules (or ``start``) from whose results ``end`` follows by functions alone."""
    found: list[fx.Node] = []
    pending, seen = [end], {end}
    while pending:
        node = pending.pop()
        if node.op == "call_module" or node is start:
            found.append(node)
            continue
        for source in node.all_input_nodes:
            if source not in seen and source.op != "get_attr":
                seen.add(source)
                pending.append(source)
    return found


def eagerly(function: Callable[[], Any]) -> Any:
    """Call a function without gradient and without compiling what is compiled."""
    stance = getattr(torch.compiler, "set_stance", None)
    with torch.no_grad():
        if stance is None:
            return function()
        with stance("force_eager"):
            return function()


__all__ = [
    "CannotRun",
    "CannotSplit",
    "RunGraph",
    "boundary",
    "call_of",
    "coarse_graph",
    "computed_from",
    "cut",
    "eagerly",
    "first_input",
]
