"""Where the activations of a model are: submodules, attributes that hold functions, and calls in methods."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_entropy.surgery.activation_families import family_of_callable, family_of_class, known_families
from lightning_entropy.surgery.call_sites import CallSite, Position, call_sites
from lightning_entropy.surgery.old_activation import OldActivation
from lightning_entropy.surgery.report import name_patterns
from lightning_entropy.surgery.rewritten_class import Edit, edit, edits_of, original_class

PLACED = "_placed_by_swap"


@dataclass(eq=False)
class ActivationSite:
    """A place where an activation is computed.

    Attributes:
        names: dotted names; several if the module that holds it is reachable by several paths.
        owner: the module that holds it.
        attribute: under which name a new activation is put there.
        form: ``"module"``, ``"attribute"`` (a function held by the owner), ``"function"`` or ``"method"`` (a call in
            one of its methods), ``"repeat"`` (a further call of a submodule, at another line).
        family: of the activation.
        old: what it is, as a reader would name it.
        current: the module or function that is there.
        call: the call expression, for the last three forms.
        problem: why it cannot be swapped.
        calls: how often it ran in the dry run; None without one.
        order: rank of its first use in the dry run.
        gate: whether its output was multiplied with another branch.
    """

    names: list[str]
    owner: nn.Module
    attribute: str
    form: str
    family: str
    old: str
    current: Any
    call: CallSite | None = None
    problem: str | None = None
    calls: int | None = None
    order: int | None = None
    gate: bool = False
    rule: int = 0
    positions: list[Position] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def in_place(self) -> bool:
        """Whether it overwrites its input."""
        if self.call is not None and self.form != "repeat":
            return self.call.in_place
        return bool(getattr(self.current, "inplace", False)) or getattr(self.current, "__name__", "").endswith("_")

    def edit(self) -> Edit:
        """The change of the owner's class that sends the call to the new activation."""
        assert self.call is not None
        return edit(type(self.owner), self.call.position, self.attribute)


def _owned(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Every slot of a submodule: path of the owner, the owner, the attribute, the module."""
    for path, owner in model.named_modules(remove_duplicate=False):
        for key, module in owner._modules.items():
            if module is not None:
                yield path, owner, key, module


def _dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


class SiteFinder:
    """Finds the activations of a model that a list of rules takes.

    Args:
        model: the model.
        rules: in order of precedence.
        placed: what marks a module that an equal swap has put there, for each rule.
    """

    def __init__(self, model: nn.Module, rules: list[OldActivation], placed: list[str]) -> None:
        self.model, self.rules, self.placed = model, rules, placed
        self.sites: list[ActivationSite] = []
        self.done: list[str] = []  # placed by an equal swap before
        self.scripted: dict[str, nn.Module] = {}
        self._taken: dict[int, set[str]] = {}
        self._inside: set[int] = set()  # modules that are, or are inside, an activation

    def find(self) -> list[ActivationSite]:
        """All sites, submodules first, then attributes and calls."""
        self._modules()
        paths: dict[int, tuple[nn.Module, list[str]]] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            paths.setdefault(id(module), (module, []))[1].append(path)
        for module, names in paths.values():
            if id(module) not in self._inside and not _is_scripted(module):
                self._attributes(module, names)
                self._calls(module, names)
        return self.sites

    def _rule(self, test: Callable[[OldActivation], bool]) -> int | None:
        return next((i for i, rule in enumerate(self.rules) if test(rule)), None)

    def _modules(self) -> None:
        slots: dict[tuple[int, str], ActivationSite] = {}
        for path, owner, key, module in _owned(self.model):
            name = _dotted(path, key)
            if id(owner) in self._inside:
                self._inside.add(id(module))
                continue
            if _is_scripted(module) and not _is_scripted(owner):
                self.scripted[name] = module
            if _is_scripted(module) or _is_scripted(owner):
                continue
            rule = self._rule(lambda r, m=module: r.takes_module(m))  # type: ignore[misc]
            family = family_of_class(type(module))
            mark = module.__dict__.get(PLACED)
            if mark is not None and (rule is None or mark == self.placed[rule]) and mark in self.placed:
                self.done.append(name)
                self._inside.add(id(module))
                continue
            if rule is None:
                if family is not None or mark is not None:
                    self._inside.add(id(module))
                continue
            self._inside.add(id(module))
            slot = (id(owner), key)
            if slot in slots:
                slots[slot].names.append(name)
                continue
            slots[slot] = ActivationSite(
                [name], owner, key, "module", family or type(module).__name__, type(module).__name__, module, rule=rule
            )
            self.sites.append(slots[slot])

    def _attributes(self, module: nn.Module, paths: list[str]) -> None:
        for key, value in list(module.__dict__.items()):
            family = None if isinstance(value, nn.Module | type) else family_of_callable(value)
            if family is None:
                continue
            rule = self._rule(lambda r, v=value, f=family: r.takes_function(v, f))  # type: ignore[misc]
            if rule is None:
                continue
            plain = value.func if isinstance(value, functools.partial) else value
            label = f"{getattr(plain, '__name__', str(plain))} (held as a function)"
            names = [_dotted(path, key) for path in paths]
            self.sites.append(ActivationSite(names, module, key, "attribute", family, label, value, rule=rule))

    def _calls(self, module: nn.Module, paths: list[str]) -> None:
        kind = original_class(type(module))
        if family_of_class(kind) is not None:
            return
        rewritten = {(e.method, e.column, e.line) for e in edits_of(type(module))}
        repeats: dict[int, list[CallSite]] = {}
        for call in call_sites(kind):
            if rewritten:
                own = edit(type(module), call.position, "")
                if (own.method, own.column, own.line) in rewritten:
                    continue
            if call.form == "module":
                target = _attribute(module, call.attribute)
                if isinstance(target, nn.Module):
                    repeats.setdefault(id(target), []).append(call)
                continue
            rule = self._rule(lambda r, c=call: r.takes_function(c.function, c.family))  # type: ignore[misc]
            if rule is None:
                continue
            attribute = self._free_name(module, call.family)
            problem = call.problem
            if problem is None and type(module).__name__ == "GraphModuleImpl":
                problem = "its forward is generated by torch.fx; swap before tracing"
            self.sites.append(
                ActivationSite(
                    [_dotted(path, attribute) for path in paths], module, attribute, call.form, call.family,
                    call.label, call.function, call=call, problem=problem, rule=rule,
                )
            )  # fmt: skip
        self._repeats(module, paths, repeats)

    def _repeats(self, module: nn.Module, paths: list[str], repeats: dict[int, list[CallSite]]) -> None:
        by_module = {id(s.current): s for s in self.sites if s.form == "module"}
        for identity, calls in repeats.items():
            first = by_module.get(identity)
            if first is None:
                continue
            first.positions.append(calls[0].position)
            for call in calls[1:]:
                attribute = self._free_name(module, call.attribute.rpartition(".")[2])
                self.sites.append(
                    ActivationSite(
                        [_dotted(path, attribute) for path in paths], module, attribute, "repeat", first.family,
                        first.old, first.current, call=call, rule=first.rule,
                    )
                )  # fmt: skip

    def _free_name(self, module: nn.Module, wanted: str) -> str:
        taken = self._taken.setdefault(id(module), set())
        number, name = 1, wanted
        while name in taken or hasattr(module, name):
            number += 1
            name = f"{wanted}_{number}"
        taken.add(name)
        return name


def _attribute(module: nn.Module, dotted: str) -> Any:
    value: Any = module
    for part in dotted.split("."):
        value = value._modules.get(part)  # no attribute lookup: properties of a LightningModule may raise
        if value is None:
            return None
    return value


def _is_scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def inventory(model: nn.Module) -> str:
    """The activations of a model by family, for messages."""
    finder = SiteFinder(model, [OldActivation(None), *(OldActivation(f) for f in known_families())], [""] * 99)
    counts: dict[str, list[str]] = {}
    for site in finder.find():
        counts.setdefault(site.old, []).append(site.name)
    if not counts:
        return "It has no activation that is known: no module of torch, timm or transformers, and no call of one."
    lines = [f"  {old}: {len(names)} ({', '.join(name_patterns(names)[:4])})" for old, names in counts.items()]
    return "Its activations:\n" + "\n".join(lines)


__all__ = ["PLACED", "ActivationSite", "SiteFinder", "inventory"]
