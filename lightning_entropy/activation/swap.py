"""Exchanges the activations of any model, completely, or says which ones it did not reach.

One line, in place, reversible. Where an activation is a submodule, the submodule is exchanged; where a method calls a
function (``F.relu(x)``, ``x.relu_()``) or calls one submodule at several lines, the method is compiled again with that
call sent to a submodule of its own. A forward is run before and after, with equal activations in place of the new ones:
the output must be the same to the bit, and every activation that the dispatcher sees must be swapped or named.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_entropy.activation.swap_rules import activation_rules, class_name
from lightning_entropy.observe.selection import as_patterns
from lightning_entropy.surgery.activation_audit import why_kept
from lightning_entropy.surgery.activation_sites import ActivationSite, inventory
from lightning_entropy.surgery.activation_surgery import carry_out, scalar_count
from lightning_entropy.surgery.activation_swap import OWNER, Plan, Rule, plan_swap
from lightning_entropy.surgery.activation_trace import run_traced
from lightning_entropy.surgery.example_inputs import as_example
from lightning_entropy.surgery.optimizer_groups import extend_optimizer, optimizers_of
from lightning_entropy.surgery.report import Change
from lightning_entropy.surgery.swap_report import NotSwapped, Swapped, SwapReport
from lightning_entropy.surgery.transformers_config import follow_in_config, is_pretrained_model


def swap_activations(
    model: nn.Module,
    *,
    old: Any = None,
    new: Any = "crrelu",
    modules: str | Iterable[str] | None = None,
    share: bool = False,
    example: Any = True,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
) -> SwapReport:
    """Exchange activations of a model, in place.

    Reached are submodules of every kind (timm's norm-act layers, transformers' ``ACT2FN`` instances, gated MLPs),
    functions held as attributes (``nn.TransformerEncoderLayer``, whose fused evaluation path is switched off),
    and calls in methods. Each call gets a module and so parameters of its own, also where one module object stands
    at several places or is called at several lines. What is called by functions that are no methods, inside scripted
    code or recurrent layers, or overwrites an input that is used again, is left and named in ``report.refused``.
    Device, training mode and hooks carry over.

    Args:
        model: any module; changed in place. A compiled model is unwrapped.
        old: a family (``"gelu"``: all its variants and calls) or class name, a module class, a module or factory of one
            (equal settings only), a function, or a tuple of them. None takes every activation but gates
            (sigmoid, tanh, and whatever multiplies another branch).
        new: a name, a module class, a module (copied), a factory or a function; a tuple goes with a tuple ``old``.
        modules: shell patterns over dotted names of activations, or of modules that contain them; None takes all.
        share: True keeps one activation (and one set of parameters) where one module object serves several places.
        example: what the model is called on once for the check: a tensor, a tuple of arguments or a mapping. True
            finds one (timm, transformers, ``example_input_array``, or a guess), False changes the model unchecked.
        optimizer: optimizers that exist already; the new parameters join them, without weight decay.

    Returns:
        The report; ``undo()`` restores the model to the bit.

    Raises:
        ValueError: if nothing is swapped (with an inventory), or a pattern or name matches nothing.
        TypeError: if ``old`` or ``new`` is none of the above.
        RuntimeError: if the model is scripted, or an optimizer that is not passed holds the model's parameters: the
            new ones would get gradients and never move.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
        >>> report = swap_activations(model, old="relu", new=nn.PReLU)
        >>> print(report)
        PReLU: 2 of 2 ReLU swapped (*), +2 parameters; nothing refused
        >>> report.undo()
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, torch.jit.ScriptModule):
        raise RuntimeError(f"{OWNER}: {model.original_name} is scripted; swap its activations before torch.jit.script")
    patterns = as_patterns(modules)
    rules = activation_rules(old, new)
    optimizers = _optimizers(model, optimizer)
    call = example if isinstance(example, bool) else as_example(example)
    plan = plan_swap(model, rules, patterns=patterns, share=share, example=call)
    report = SwapReport(", ".join(dict.fromkeys(class_name(r.label) for r in rules)), note=plan.note)
    _name_the_rest(report, plan, rules)
    if not plan.sites and not plan.done:
        raise ValueError(_nothing(model, rules, report))
    made, placement = carry_out(model, plan, rules, share)
    report.on_undo(placement.take_away)
    _give_sizes(model, plan, made, report)
    _name_the_swapped(report, plan, made)
    try:
        if report.parameters() and optimizer is None:
            _refuse_optimizers(model)
        for each in optimizers:
            report.on_undo(extend_optimizer(each, report.parameters()))
    except BaseException:
        report.undo()
        raise
    if is_pretrained_model(model) and made:
        _write_config(model, report, rules)
    return report


def _give_sizes(model: nn.Module, plan: Plan, made: list[nn.Module], report: SwapReport) -> None:
    """Parameters that take their size from the first input get it from the example."""
    if any(isinstance(p, UninitializedParameter) for m in made for p in m.parameters()) and plan.call is not None:
        target = model.get_submodule(plan.call.name) if plan.call.name else model
        run_traced(target, plan.call.args, plan.call.kwargs)
    if any(isinstance(p, UninitializedParameter) for m in made for p in m.parameters()):
        told = "run the model once before its optimizer is made: some parameters take their size from the input"
        report.note = f"{report.note}; {told}" if report.note else told


def _write_config(model: nn.Module, report: SwapReport, rules: list[Rule]) -> None:
    """Have ``save_pretrained`` and ``from_pretrained`` agree, or say that they do not."""
    restore = None
    labels = {rule.label for rule in rules}
    if len(labels) == 1 and all(s.calls is None or s.calls for s in report.swapped):
        name = report.method.lower()
        restore = follow_in_config(model, name, rules[0].make, [s.name for s in report.swapped])
    if restore is not None:
        report.on_undo(restore)
        return
    told = (
        "the configuration does not say which activations these are: from_pretrained builds the plain model, to be "
        "swapped likewise before load_state_dict"
    )
    report.note = f"{report.note}; {told}" if report.note else told


def _optimizers(model: nn.Module, given: Any) -> list[torch.optim.Optimizer]:
    if given is None:
        return []
    found = [given] if isinstance(given, torch.optim.Optimizer) else list(given)
    for each in found:
        if not isinstance(each, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or several, got {type(each).__name__}")
    return found


def _refuse_optimizers(model: nn.Module) -> None:
    found = optimizers_of(model)
    if found:
        raise RuntimeError(
            f"{OWNER}: {', '.join(type(o).__name__ for o in found)} holds parameters of {type(model).__name__} already "
            "and would never move the new ones. Swap before the optimizer is made, or pass optimizer=."
        )


def _name_the_swapped(report: SwapReport, plan: Plan, made: list[nn.Module]) -> None:
    counted: set[int] = set()
    records = []
    for site, module in zip(plan.sites, made, strict=True):
        parameters = 0 if id(module) in counted else scalar_count([module])
        counted.add(id(module))
        records.append(
            Swapped(
                site.name, f"{site.old} swapped", old=site.old, new=type(module).__name__, parameters=parameters,
                order=site.order, calls=site.calls, operations=plan.operations.get(id(site), 0),
                also=tuple(site.names[1:]), note=_note(site),
            )
        )  # fmt: skip
    late = len(records)
    pairs = sorted(zip(records, made, strict=True), key=lambda p: late if p[0].order is None else p[0].order)
    report.swapped = [record for record, _ in pairs]
    report.changes = list[Change](report.swapped)
    report._made = [module for _, module in pairs]
    report.added_parameters = scalar_count(made)


def _note(site: ActivationSite) -> str:
    notes = []
    if site.calls == 0:
        notes.append("did not run in the evaluation forward")
    elif site.calls is not None and site.calls > 1:
        notes.append(f"runs {site.calls} times in a forward with the same parameters")
    if site.gate:
        notes.append("scales another branch")
    return "; ".join(notes)


def _name_the_rest(report: SwapReport, plan: Plan, rules: list[Rule]) -> None:
    operations = plan.operations
    for site, reason in plan.refused:
        report.refused.append(NotSwapped(site.name, reason, site.old, site.order, operations.get(id(site), 0)))
    for site, reason in plan.kept:
        report.kept.append(NotSwapped(site.name, reason, site.old, site.order, operations.get(id(site), 0)))
    for name, module in plan.scripted.items():
        kind = getattr(module, "original_name", type(module).__name__)
        report.refused.append(NotSwapped(name, "it is scripted, and scripted code cannot be changed", kind))
    for rest in plan.leftover:
        meant = any(
            rule.old.takes_function(None, rest.family) and not (rule.old.spec is None and rest.gate) for rule in rules
        )
        if rest.family == "fused encoder layer" or (meant and rest.where):
            where = rest.where
            report.refused.append(NotSwapped(rest.name, where, rest.old, rest.order, rest.operations))
        else:
            report.kept.append(NotSwapped(rest.name, why_kept(rest), rest.old, rest.order, rest.operations))
    report.already = list(plan.done)


def _nothing(model: nn.Module, rules: list[Rule], report: SwapReport) -> str:
    wanted = ", ".join(str(rule.old) for rule in rules)
    lines = [f"{OWNER} swapped nothing in {type(model).__name__}: no {wanted} that it can exchange."]
    others = [*report.refused, *report.kept][:12]
    lines += [f"  {getattr(r, 'old', '')} at {r.module or 'the model itself'}: {r.reason}" for r in others]
    lines += [inventory(model), "Pass old= with one of these names or classes."]
    return "\n".join(lines)


__all__ = ["swap_activations"]
