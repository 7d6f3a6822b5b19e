"""Plans and checks the exchange of activations in a model, and carries it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lightning_entropy.observe.selection import match_modules
from lightning_entropy.surgery.activation_audit import Leftover, Located, leftovers
from lightning_entropy.surgery.activation_sites import ActivationSite, SiteFinder
from lightning_entropy.surgery.activation_surgery import (
    Placement,
    SameActivation,
    fitted,
    same_activation,
)
from lightning_entropy.surgery.activation_trace import ActivationTrace, run_traced, same_output
from lightning_entropy.surgery.example_inputs import Example, example_inputs, runnable
from lightning_entropy.surgery.old_activation import OldActivation
from lightning_entropy.surgery.rewritten_class import edits_of, rewritten_class

OWNER = "swap_activations"


@dataclass
class Rule:
    """Exchange ``old`` by what ``make()`` returns; ``label`` names what that is."""

    old: OldActivation
    make: Callable[[], nn.Module]
    label: str


@dataclass
class Plan:
    """What is to be done to a model, and what was learned from running it.

    Attributes:
        sites: to be swapped.
        refused: sites that were meant and cannot be swapped, with the reason.
        kept: sites that stay, with the reason: gates that were not named, and what ``modules`` leaves out.
        leftover: activations that ran outside every site.
        done: names of activations that an equal swap has placed before.
        scripted: scripted modules, which cannot be changed.
        operations: how many operations of the dispatcher each site ran, by its identity.
        checked: whether the model was run.
        note: why it was not, or what the check could not tell.
        call: on what it was run.
    """

    sites: list[ActivationSite]
    refused: list[tuple[ActivationSite, str]] = field(default_factory=list)
    kept: list[tuple[ActivationSite, str]] = field(default_factory=list)
    leftover: list[Leftover] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    scripted: dict[str, nn.Module] = field(default_factory=dict)
    operations: dict[int, int] = field(default_factory=dict)
    checked: bool = False
    note: str = ""
    call: Example | None = None


def plan_swap(
    model: nn.Module, rules: list[Rule], *, patterns: list[str] | None, share: bool, example: Example | bool
) -> Plan:
    """Find the sites, run the model on the example and see that nothing but the activations would change.

    Args:
        model: the model; it is as before when this returns.
        rules: what is exchanged, in order of precedence.
        patterns: shell patterns over names of sites, or of modules that contain them.
        share: keep one activation where one object serves several sites.
        example: a call; True finds one, False runs nothing.

    Raises:
        ValueError: if a pattern matches nothing.
    """
    finder = SiteFinder(model, [r.old for r in rules], [r.label for r in rules])
    found = finder.find()
    plan = Plan(list(found), done=finder.done, scripted=finder.scripted)
    plan.sites = _chosen(model, found, patterns, finder.done)
    outside = [s for s in found if s not in plan.sites]
    planner = _Planner(model, plan, rules, found, share)
    call = plan.call = planner.baseline(example)
    for site in [s for s in plan.sites if s.problem is not None]:
        planner.refuse(site, site.problem or "")
    plan.kept.extend((s, "outside modules=") for s in outside if s.form != "repeat")
    planner.merge_repeats()
    planner.leave_gates()
    planner.leave_unreadable()
    if call is not None:
        planner.check(call)
    return plan


def _chosen(
    model: nn.Module, sites: list[ActivationSite], patterns: list[str] | None, done: list[str]
) -> list[ActivationSite]:
    if patterns is None:
        return list(sites)
    names = {n for n, _ in model.named_modules(remove_duplicate=False)}
    names.update(n for s in sites for n in s.names)
    names.update(done)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            match_modules(model, [pattern], OWNER)  # raises with the nearest names
    return [s for s in sites if any(_is_inside(n, p) for n in s.names for p in patterns)]


def _is_inside(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:i]), pattern) for i in range(len(parts) + 1))


class _Planner:
    def __init__(
        self, model: nn.Module, plan: Plan, rules: list[Rule], found: list[ActivationSite], share: bool
    ) -> None:
        self.model, self.plan, self.rules, self.found, self.share = model, plan, rules, found, share
        self.output: Any = None
        self.stand_ins: list[nn.Module] = []

    def refuse(self, site: ActivationSite, reason: str) -> None:
        self.plan.sites.remove(site)
        self.plan.refused.append((site, reason))

    def baseline(self, example: Example | bool) -> Example | None:
        """Run the model as it is; None where it cannot be run."""
        plan = self.plan
        candidates = [example] if isinstance(example, Example) else example_inputs(self.model) if example else []
        if example is False:
            plan.note = "not run: example=False"
        elif not runnable(self.model):
            plan.note = "not run: its weights are not there yet"
            candidates = []
        else:
            plan.note = "not run: no input for it is known, pass example="
        for call in candidates:
            if call.name and not any(s.name.startswith(f"{call.name}.") for s in self.found):
                continue
            try:
                trace, self.output = self._run(call)
            except Exception:
                if isinstance(example, Example):
                    raise
                continue  # the next candidate; a model that none fits is reported as not run
            plan.operations = Located(trace, self.found, self.model).note()
            plan.checked, plan.note = True, f"only {call.name} was run" if call.name else ""
            self._forget_what_did_not_run(call, self.found)
            return call
        return None

    @staticmethod
    def _forget_what_did_not_run(call: Example, sites: list[ActivationSite]) -> None:
        for site in sites:
            if call.name and not any(name.startswith(f"{call.name}.") for name in site.names):
                site.calls = None

    def _run(self, call: Example) -> tuple[ActivationTrace, Any]:
        target = self.model.get_submodule(call.name) if call.name else self.model
        return run_traced(target, call.args, call.kwargs)

    def merge_repeats(self) -> None:
        """A further call of one module gets an activation of its own if it ran and nothing is to be shared."""
        by_module: dict[int, list[ActivationSite]] = {}
        for site in self.plan.sites:
            if site.form in ("module", "repeat"):
                by_module.setdefault(id(site.current), []).append(site)
        for sites in by_module.values():
            first = [s for s in sites if s.form == "module"]
            idle = [s for s in first if s.calls == 0]
            for site in [s for s in sites if s.form == "repeat"]:
                if not first or self.share or site.calls == 0:
                    self._merge(site, first[0] if first else None)
                elif idle:  # the line that comes first in the source did not run: its module serves this one
                    self._merge(site, idle.pop())

    def _merge(self, repeat: ActivationSite, into: ActivationSite | None) -> None:
        self.plan.sites.remove(repeat)
        if into is None or not repeat.calls:
            return
        into.calls = (into.calls or 0) + repeat.calls
        into.order = min(o for o in (into.order, repeat.order) if o is not None)
        into.gate = into.gate or repeat.gate
        operations = self.plan.operations
        operations[id(into)] = operations.get(id(into), 0) + operations.pop(id(repeat), 0)

    def leave_gates(self) -> None:
        """What scales another branch is only taken when it is named."""
        for site in [s for s in self.plan.sites if s.gate and self.rules[s.rule].old.spec is None]:
            self.plan.sites.remove(site)
            self.plan.kept.append((site, "scales another branch; taken only if named by old="))

    def leave_unreadable(self) -> None:
        """Calls whose settings or whose method's source cannot be read."""
        for site in list(self.plan.sites):
            try:
                same_activation(site)
                if site.call is not None:
                    kind = type(site.owner)
                    rewritten_class(kind, edits_of(kind) | {site.edit()})
            except Exception as error:
                self.refuse(site, f"its call cannot be rewritten: {error}")

    def check(self, call: Example) -> None:
        """See that rewriting changes no output, refuse the sites where it does, and list what ran elsewhere."""
        trace = self._tried(call, self.plan.sites)
        if trace is None:
            again = self._run(call)[1]
            if not same_output(self.output, again):
                self.plan.note = "its output differs from run to run, so in-place dependence was not checked"
                trace = self._tried(call, self.plan.sites, compare=False)
            else:
                self._keep_only(self._sound(call, [], list(self.plan.sites)))
                trace = self._tried(call, self.plan.sites)
        if trace is None:
            raise RuntimeError(
                f"{type(self.model).__name__} cannot be run with its activations exchanged for equal ones, although it "
                "runs without; pass modules= to narrow the swap, or example=False to do it unchecked"
            )
        self._recount(trace)
        self._forget_what_did_not_run(call, self.plan.sites)
        stays = [s for s in self.found if s not in self.plan.sites]
        self.plan.leftover = leftovers(Located(trace, stays, self.model), SameActivation)

    def _recount(self, trace: ActivationTrace) -> None:
        """Calls, order and operations of each site as the modules in their place had them: exact, whatever called."""
        operations: dict[int, int] = {}
        calls: dict[int, set[int]] = {}
        first: dict[int, int] = {}
        for traced in trace.activations:
            for module, invocation in traced.running:
                if isinstance(module, SameActivation):
                    operations[id(module)] = operations.get(id(module), 0) + 1
                    calls.setdefault(id(module), set()).add(invocation)
                    first.setdefault(id(module), traced.order)
                    break
        ranks = {order: rank for rank, order in enumerate(sorted(first.values()))}
        for site, module in zip(self.plan.sites, self.stand_ins, strict=True):
            key = id(module)
            site.calls = len(calls.get(key, ()))
            site.order = ranks[first[key]] if key in first else None
            self.plan.operations[id(site)] = operations.get(key, 0)

    def _sound(self, call: Example, good: list[ActivationSite], new: list[ActivationSite]) -> list[ActivationSite]:
        """The sites that change no output, by halving."""
        if not new or self._tried(call, good + new) is not None:
            return good + new
        if len(new) == 1:
            return good
        middle = len(new) // 2
        return self._sound(call, self._sound(call, good, new[:middle]), new[middle:])

    def _keep_only(self, good: list[ActivationSite]) -> None:
        for site in [s for s in self.plan.sites if s not in good]:
            way = "it does not overwrite its input" if site.in_place else "its call is rewritten"
            self.refuse(site, f"the output of the model differs when {way}")

    def _tried(self, call: Example, sites: list[ActivationSite], compare: bool = True) -> ActivationTrace | None:
        placement = Placement(sites)
        try:
            self.stand_ins = [fitted(same_activation(site), site, self.model) for site in sites]
            placement.put(self.stand_ins)
            trace, output = self._run(call)
        except Exception:
            if not compare:
                raise
            return None
        finally:
            placement.take_away()
        return trace if not compare or same_output(self.output, output) else None


__all__ = ["OWNER", "Plan", "Rule", "plan_swap"]
