"""Exchanges activations, checks on a forward that nothing else changed, and names those that it did not reach."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_entropy.surgery.activation_families import out_of_place
from lightning_entropy.surgery.activation_sites import PLACED, ActivationSite
from lightning_entropy.surgery.call_settings import original_function
from lightning_entropy.surgery.rewritten_class import Edit, edits_of, rewritten_class

if TYPE_CHECKING:
    from lightning_entropy.surgery.activation_swap import Plan, Rule

_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
          "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks")  # fmt: skip


class SameActivation(nn.Module):
    """Computes what a site computed, without overwriting the input; stands there while the model is checked."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = [function]  # a list, so that a module in it is no submodule

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The site's function of its input."""
        return self.function[0](x, *args, **kwargs)


def same_activation(site: ActivationSite) -> SameActivation:
    """What a site computes now, not in place.

    Raises:
        Exception: whatever comes of reading the settings of a call; the site cannot be swapped then.
    """
    if site.call is not None and site.form != "repeat":
        return SameActivation(original_function(site.call, site.owner))
    if site.form == "attribute":
        return SameActivation(out_of_place(site.current))
    module = site.current
    if site.in_place:
        module = copy.copy(module)
        module.__dict__ = {**module.__dict__, "inplace": False}
    return SameActivation(_without_hooks(module))


def _without_hooks(module: nn.Module) -> Callable[..., Any]:
    return module.forward


@dataclass
class Placement:
    """New modules at sites, and how to take them away again."""

    sites: list[ActivationSite]
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def put(self, modules: list[nn.Module]) -> None:
        """Put one module at each site.

        Raises:
            ValueError: if a class cannot be rewritten; nothing is changed then.
        """
        edits: dict[int, tuple[nn.Module, set[Edit]]] = {}
        for site in self.sites:
            if site.call is not None:
                edits.setdefault(id(site.owner), (site.owner, set()))[1].add(site.edit())
        for owner, wanted in edits.values():
            rewritten_class(type(owner), edits_of(type(owner)) | wanted)
        for owner, wanted in edits.values():
            owner.__class__ = rewritten_class(type(owner), edits_of(type(owner)) | wanted)
            self._undo.append(lambda o=owner, w=wanted: _unedit(o, w))  # type: ignore[misc]
        for site, module in zip(self.sites, modules, strict=True):
            self._undo.append(_place(site, module))

    def also(self, undo: Callable[[], None]) -> None:
        """Have ``undo()`` called first by :meth:`take_away`."""
        self._undo.append(undo)

    def take_away(self) -> None:
        """Restore what was there; does nothing the second time."""
        while self._undo:
            self._undo.pop()()


def _unedit(owner: nn.Module, edits: set[Edit]) -> None:
    owner.__class__ = rewritten_class(type(owner), edits_of(type(owner)) - edits)


def _place(site: ActivationSite, module: nn.Module) -> Callable[[], None]:
    owner, attribute = site.owner, site.attribute
    if site.form == "module":
        before = owner._modules[attribute]
        owner._modules[attribute] = module
        return lambda: owner._modules.__setitem__(attribute, before)
    held = owner.__dict__.pop(attribute, None) if site.form == "attribute" else None
    owner._modules[attribute] = module

    def undo() -> None:
        owner._modules.pop(attribute, None)
        if held is not None:
            owner.__dict__[attribute] = held

    return undo


def fitted(module: nn.Module, site: ActivationSite, model: nn.Module) -> nn.Module:
    """A new activation with the device, dtype, mode and hooks of what it replaces.

    An activation that keeps its parameters in float32 says so in its ``_apply``.
    """
    tensors = (t for holder in (site.owner, model) for t in [*holder.parameters(), *holder.buffers()] if not t.is_meta)
    like = next((t for t in tensors if t.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)), None)
    if like is not None:
        module.to(device=like.device, dtype=like.dtype)
    old = site.current
    module.train(old.training if isinstance(old, nn.Module) else site.owner.training)
    if isinstance(old, nn.Module):
        for name in _HOOKS:
            # The same dictionary, so that a handle that the user holds still removes the hook.
            if getattr(old, name, None) and not getattr(module, name, None):
                module.__dict__[name] = getattr(old, name)
        if getattr(old, "_backward_hooks", None):
            module._is_full_backward_hook = old._is_full_backward_hook
    return module


def unfuse(model: nn.Module, owners: list[nn.Module]) -> Callable[[], None]:
    """Switch off the fused path of encoder layers among ``owners``, which would ignore a new activation.

    A layer remembers at its construction which activation it had, and an encoder whether it may pack padded batches
    for the fused path.
    """
    before: list[tuple[nn.Module, str, Any]] = []
    layers = {id(o): o for o in owners if isinstance(o, nn.TransformerEncoderLayer)}
    for layer in layers.values():
        before.append((layer, "activation_relu_or_gelu", layer.activation_relu_or_gelu))
        layer.activation_relu_or_gelu = 0
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(id(m) in layers for m in encoder.modules()):
            before.append((encoder, "use_nested_tensor", encoder.use_nested_tensor))
            encoder.use_nested_tensor = False

    def undo() -> None:
        for module, name, value in reversed(before):
            setattr(module, name, value)

    return undo


def mark(module: nn.Module, label: str) -> nn.Module:
    """Note on a new activation who put it there, so that a second swap knows it; copies carry it along."""
    module.__dict__[PLACED] = label
    return module


def scalar_count(modules: list[nn.Module]) -> int:
    """How many numbers the distinct parameters of modules hold."""
    parameters = {id(p): p for module in modules for p in module.parameters()}
    # Those without a size yet take it from the first input.
    return sum(p.numel() for p in parameters.values() if not isinstance(p, UninitializedParameter))


def carry_out(model: nn.Module, plan: Plan, rules: list[Rule], share: bool) -> tuple[list[nn.Module], Placement]:
    """Put the new activations in.

    Returns:
        The new module of each of ``plan.sites``, and what takes them away again.
    """
    made: list[nn.Module] = []
    shared: dict[int, nn.Module] = {}
    for site in plan.sites:
        module = shared.get(id(site.current)) if share and site.form == "module" else None
        if module is None:
            rule = rules[site.rule]
            module = mark(fitted(rule.make(), site, model), rule.label)
            if site.form == "module":
                shared[id(site.current)] = module
        made.append(module)
    placement = Placement(plan.sites)
    placement.put(made)
    placement.also(unfuse(model, [site.owner for site in plan.sites]))
    return made, placement


__all__ = ["carry_out", "Placement", "SameActivation", "fitted", "mark", "same_activation", "scalar_count", "unfuse"]
