"""Which site computed which activation that ran, and what to say of those that no site computed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lightning_entropy.surgery.activation_families import family_of_class, is_gate
from lightning_entropy.surgery.activation_sites import PLACED, ActivationSite
from lightning_entropy.surgery.activation_trace import ActivationTrace, TracedActivation
from lightning_entropy.surgery.call_sites import function_node


@dataclass
class Leftover:
    """Activations that ran outside every site, at one place.

    Attributes:
        name: dotted name of the module in whose forward they ran.
        family: of the activation.
        old: as the dispatcher or the module's class names it.
        where: a description of the place, for a reason.
        operations: how many ran.
        order: of the first.
        gate: whether its output was multiplied with another branch.
    """

    name: str
    family: str
    old: str
    where: str
    operations: int
    order: int
    gate: bool = False


class Located:
    """The activations of a trace by site.

    Args:
        trace: what ran.
        sites: where activations are known to be.
        model: the model that ran.
    """

    def __init__(self, trace: ActivationTrace, sites: Iterable[ActivationSite], model: nn.Module) -> None:
        self.names = {id(m): n for n, m in model.named_modules()}
        self.operations: dict[int, int] = {}
        self.rest: list[TracedActivation] = []
        self._calls: dict[int, set[int]] = {}
        self._modules: dict[int, list[ActivationSite]] = {}
        self._lines: dict[tuple[int, int], list[ActivationSite]] = {}
        self._held: dict[int, list[ActivationSite]] = {}
        self.sites = list(sites)
        self._first: dict[int, int] = {}
        self._gates: set[int] = set()
        for site in self.sites:
            if site.form == "module":
                self._modules.setdefault(id(site.current), []).append(site)
            elif site.form == "attribute":
                self._held.setdefault(id(site.owner), []).append(site)
            elif site.call is not None:
                self._lines.setdefault((id(site.owner), site.call.position.line), []).append(site)
        for traced in trace.activations:
            found = self._site(traced)
            if found is None:
                self.rest.append(traced)
            else:
                self._count(found, traced)

    def note(self) -> dict[int, int]:
        """Write calls, order and gates into the sites; returns how many operations each ran, by its identity."""
        for site in self.sites:
            site.calls = len(self._calls.get(id(site), ()))
            site.gate = id(site) in self._gates
        ran = sorted((s for s in self.sites if id(s) in self._first), key=lambda s: self._first[id(s)])
        for rank, site in enumerate(ran):
            site.order = rank
        return self.operations

    def _count(self, found: tuple[ActivationSite, int | None], traced: TracedActivation) -> None:
        site, invocation = found
        self.operations[id(site)] = self.operations.get(id(site), 0) + 1
        calls = self._calls.setdefault(id(site), set())
        calls.add(-len(calls) - 1 if invocation is None else invocation)
        self._first.setdefault(id(site), traced.order)
        if traced.gate:
            self._gates.add(id(site))

    def _site(self, traced: TracedActivation) -> tuple[ActivationSite, int | None] | None:
        for position, (module, invocation) in enumerate(traced.running):
            slots = self._modules.get(id(module))
            if slots:
                parents = [m for m, _ in traced.running[:position]]
                return self._slot(slots, module, invocation, parents, traced), invocation
        for caller in traced.callers:
            for site in self._lines.get((id(caller.owner), caller.end[0]), []):
                if site.form == "repeat":
                    continue
                assert site.call is not None
                same_line = caller.end[1] is None and site.family == traced.family
                if same_line or caller.end[1] == site.call.position.column:
                    return site, None
        if traced.running:
            for site in self._held.get(id(traced.running[-1][0]), []):
                if site.family == traced.family:
                    return site, None
        return None

    def _slot(
        self,
        slots: list[ActivationSite],
        module: nn.Module,
        invocation: int,
        parents: list[nn.Module],
        traced: TracedActivation,
    ) -> ActivationSite:
        for caller in traced.callers:
            for site in self._lines.get((id(caller.owner), caller.end[0]), []):
                assert site.call is not None
                if (
                    site.form == "repeat"
                    and site.current is module
                    and (caller.end[1] is None or caller.end[1] == site.call.position.column)
                ):
                    return site
        mine = [s for s in slots if parents and s.owner is parents[-1]] or slots
        if len(mine) == 1:
            return mine[0]
        # One object in several slots of one container: its calls go round them in their order.
        seen = next((s for s in mine if invocation in self._calls.get(id(s), ())), None)
        return seen or min(mine, key=lambda s: len(self._calls.get(id(s), ())))


def leftovers(located: Located, skip: type[nn.Module]) -> list[Leftover]:
    """What ran outside every site, a record for each place.

    Args:
        located: a trace by site.
        skip: activations inside modules of this class are the swapped ones.
    """
    groups: dict[tuple[str, str, str], Leftover] = {}
    for traced in located.rest:
        if any(isinstance(module, skip) or PLACED in module.__dict__ for module, _ in traced.running):
            continue
        name, old, where = _described(traced, located.names)
        key = (name, old, where)
        if key in groups:
            groups[key].operations += 1
            groups[key].gate = groups[key].gate or traced.gate
        else:
            groups[key] = Leftover(name, traced.family, old, where, 1, traced.order, traced.gate)
    return list(groups.values())


def _described(traced: TracedActivation, names: dict[int, str]) -> tuple[str, str, str]:
    known = [(m, names[id(m)]) for m, _ in traced.running if id(m) in names]
    name = known[-1][1] if known else ""
    operation = traced.operation.rstrip("_")
    if traced.running:
        innermost = traced.running[-1][0]
        kind = type(innermost).__name__
        if isinstance(innermost, torch.jit.ScriptModule) or any(
            isinstance(m, torch.jit.ScriptModule) for m, _ in traced.running
        ):
            return name, operation, "it is inside scripted code, which cannot be changed"
        if id(innermost) not in names:
            return name, kind, f"a {kind} that is no submodule (it is held in a list or by a function) computes it"
        if isinstance(innermost, nn.RNNBase):
            return name, operation, f"it is part of {kind}"
        if type(innermost).__module__.split(".")[0] in ("torch", "timm", "transformers", "torchvision") and (
            family_of_class(type(innermost)) is not None
        ):
            return name, kind, ""
    if traced.operation.startswith("_transformer"):
        return name, operation, "it is inside the fused encoder layer"
    caller = traced.callers[0] if traced.callers else None
    if caller is None:
        return name, operation, "it is called from compiled code"
    place = f"{os.path.basename(caller.code.co_filename)}:{caller.line}"
    if caller.owner is None:
        return name, operation, f"the function {caller.code.co_name} calls it ({place}), which is no method of a module"
    if caller.code.co_name.startswith("<"):
        return name, operation, f"a {caller.code.co_name[1:-1]} calls it ({place})"
    if function_node(caller.code) is None:
        return name, operation, f"the source of {caller.code.co_name}, which calls it ({place}), is not at hand"
    return name, operation, f"{caller.code.co_name} calls it under a name that is bound when it runs ({place})"


def why_kept(leftover: Leftover) -> str:
    """Why an activation that nobody asked for stays."""
    if leftover.family == "glu":
        return "a gated linear unit"
    if is_gate(leftover.family):
        return "a gate; taken only if named by old="
    if leftover.gate:
        return "scales another branch; taken only if named by old="
    return "not among old="


__all__ = ["Leftover", "Located", "leftovers", "why_kept"]
