"""Where an adapter of peft can go for a chosen weight, or why it cannot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_entropy.observe.weight_matrices import is_conv1d, parameter_names
from lightning_entropy.surgery.report import Refusal
from lightning_entropy.surgery.trainable import parameters_by_name, plain_name

_SEPARATE = {"q_proj_weight", "k_proj_weight", "v_proj_weight"}


@dataclass
class LoraTargets:
    """Modules and stacks that get adapters.

    Args:
        modules: by name, the weights in it that were chosen.
        stacks: names of parameters that are no module's weight: stacked experts.
        refused: what was chosen and cannot be adapted.
    """

    modules: dict[str, set[str]] = field(default_factory=dict)
    stacks: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)


def is_adapted(module: nn.Module) -> bool:
    """Whether a module carries an adapter of peft, told without importing peft."""
    return any(b.__name__ == "BaseTunerLayer" and b.__module__.startswith("peft.") for b in type(module).__mro__)


def lora_targets(model: nn.Module, names: Iterable[str], *, dropout: float) -> LoraTargets:
    """Resolve names to what peft can adapt.

    Args:
        model: without or with adapters on other modules.
        names: of parameters or of modules.
        dropout: of the adapters.

    Raises:
        ValueError: if a name is neither a parameter nor a module with a weight.
    """
    modules = {plain_name(name): (name, module) for name, module in model.named_modules(remove_duplicate=False)}
    shared = parameter_names(model)
    targets = LoraTargets()
    for name in _parameter_names(model, names, modules):
        holder, _, tensor = name.rpartition(".")
        parent, _, own = holder.rpartition(".")
        attention = modules[parent][1] if parent in modules and own == "out_proj" else None
        reason = _why_not(model, name, modules[holder], shared)
        if reason is not None:
            targets.refused.append(Refusal(holder, reason))
        elif isinstance(attention, nn.MultiheadAttention):
            targets.modules.setdefault(modules[parent][0], set()).add("out_proj.weight")
        elif _is_adaptable(modules[holder][1]):
            targets.modules.setdefault(modules[holder][0], set()).add(tensor)
        elif modules[holder][1].get_parameter(tensor).dim() not in (2, 3):
            reason = f"{tensor} is neither a matrix nor a stack of matrices that peft can adapt"
            targets.refused.append(Refusal(holder, reason))
        elif dropout:
            reason = f"{tensor} is a parameter that no module is called for, where peft has no dropout: pass dropout=0"
            targets.refused.append(Refusal(holder, reason))
        else:
            targets.stacks.append(name)
    return targets


def _parameter_names(model: nn.Module, names: Iterable[str], modules: dict[str, tuple[str, nn.Module]]) -> list[str]:
    found = []
    for name in dict.fromkeys(names):
        module = modules[name][1] if name in modules else None
        weights = [t for t in ("in_proj_weight", "weight") if isinstance(getattr(module, t, None), nn.Parameter)]
        found.append(f"{name}.{weights[0]}" if weights else name)
    return list(parameters_by_name(model, found, owner="inject_lora"))


def _is_adaptable(module: nn.Module) -> bool:
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    quantised = type(module).__module__.split(".")[0] in {"bitsandbytes", "awq", "hqq", "aqlm", "eetq"}
    return isinstance(module, kinds) or is_conv1d(module) or quantised


def _why_not(model: nn.Module, name: str, found: tuple[str, nn.Module], shared: dict[int, list[str]]) -> str | None:
    tensor = name.rpartition(".")[2]
    real, module = found
    around = [model.get_submodule(real.rpartition(".base_layer")[0])] if ".base_layer" in real else []
    if is_adapted(module) or any(is_adapted(m) for m in around):
        return f"{tensor} has an adapter already"
    if not real:
        return f"{tensor} is a parameter of the model itself; peft replaces modules inside a model"
    if tensor in _SEPARATE:
        return "peft adapts no attention with separate q_proj_weight, k_proj_weight, v_proj_weight (other kdim or vdim)"
    if is_parametrized(module) or "parametrizations" in name.split("."):
        return f"{tensor} is parametrised; an adapter beside it could not be merged"
    others = [other for other in shared.get(id(module._parameters.get(tensor)), []) if plain_name(other) != name]
    if others:
        return f"{tensor} is tied to {', '.join(others)}: merging its adapter would change both"
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
        return f"{tensor} belongs to a convolution in {module.groups} groups, whose adapter peft cannot merge"
    return None


__all__ = ["LoraTargets", "is_adapted", "lora_targets"]
