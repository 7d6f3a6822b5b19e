"""Low-rank adapters of peft on exactly the weights that were chosen, in any ``nn.Module``."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lightning_entropy.extras import require
from lightning_entropy.observe.weight_matrices import is_conv1d
from lightning_entropy.surgery.activation_surgery import unfuse
from lightning_entropy.surgery.lora_attention import (
    compute_functionally,
    is_adapted_attention,
    merge_attention,
    train_parts,
)
from lightning_entropy.surgery.lora_targets import LoraTargets, is_adapted, lora_targets
from lightning_entropy.surgery.report import Change, SurgeryReport
from lightning_entropy.surgery.trainable import hold_batch_norms, parameters_of, plain_name, set_trained

ADAPTER = "default"


def inject_lora(
    model: nn.Module,
    names: Iterable[str],
    *,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    also_train: str | Iterable[str] | None = None,
    norms: bool = False,
) -> SurgeryReport:
    r"""Put LoRA adapters beside weights: :math:`W x + \frac{\alpha}{r} B A x`, with B = 0 at first.

    The adapters are peft's, on the very modules that hold the weights (a name like ``fc`` does not also mean
    ``head.fc``); the model need not be one of transformers. Everything else is frozen but what is named here. The
    output does not change. A is drawn from the seed of torch; random states are left as they were.

    In ``nn.MultiheadAttention`` the adapters of ``in_proj_weight`` and ``out_proj.weight`` are computed without
    changing the frozen weights, and only that of the chosen one is trained; peft has no dropout there. The evaluation
    fast path of ``nn.TransformerEncoderLayer``, which would skip adapters, is switched off in layers that have some.

    Args:
        model: any module; changed in place.
        names: of parameters (``Selection.names``) or modules.
        rank: of the adapters.
        alpha: their scale is ``alpha / rank``.
        dropout: on the input of the adapters.
        also_train: shell patterns over dotted names of modules that are trained whole, a task head for example.
        norms: train the scales and shifts of all normalisations too.

    Returns:
        The report. ``undo()`` takes the adapters away; :func:`merge_lora` adds them to the weights. Refused, with the
        reason, are weights that peft cannot adapt, tied and parametrised ones, and those that have an adapter.

    Raises:
        ImportError: if peft is not installed.
        ValueError: if a name or pattern is not in the model, an argument is out of range, or all are refused.

    Reference:
        LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> print(inject_lora(layer, ["linear1", "self_attn.in_proj_weight"], rank=2))
        LoRA: 1 of 2 weight adapted (linear1), 1 of 2 in_proj_weight adapted (self_attn), +176 parameters; nothing refused
    """  # noqa: E501
    if rank < 1 or int(rank) != rank:
        raise ValueError(f"rank must be a whole number >= 1, got {rank}")
    if not alpha > 0 or not 0 <= dropout < 1:
        raise ValueError(f"alpha must be > 0 and dropout in [0, 1), got alpha={alpha}, dropout={dropout}")
    targets = lora_targets(model, names, dropout=dropout)
    extra = parameters_of(model, also=also_train, norms=norms, owner="inject_lora")
    if not targets.modules and not targets.stacks:
        told = "\n".join(f"  {refusal.module}: {refusal.reason}" for refusal in targets.refused)
        raise ValueError(f"inject_lora can adapt none of the {len(targets.refused)} weights:\n{told or '  none named'}")
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    known = {id(parameter) for parameter in model.parameters()}
    take_away = _inject(model, targets, rank, alpha, dropout)
    report = SurgeryReport("LoRA", refused=targets.refused)
    report.on_undo(
        lambda: [parameter.requires_grad_(flag) for parameter, flag in flags if parameter.requires_grad != flag]
    )
    report.on_undo(take_away)
    trained: list[nn.Parameter] = []
    for name, tensors in targets.modules.items():
        module = model.get_submodule(name)
        if is_adapted_attention(module):
            trained += train_parts(module, tensors, ADAPTER)
        else:
            trained += [p for p in _adapters(module) if id(p) not in known]
        report.changes += [
            Change(_holder(name, tensor), f"{tensor.rpartition('.')[2]} adapted") for tensor in sorted(tensors)
        ]
    for name in targets.stacks:
        holder, _, tensor = name.rpartition(".")
        report.changes.append(Change(holder, f"{tensor} adapted"))
        trained += [p for p in _adapters(model.get_submodule(holder)) if id(p) not in known and not _among(p, trained)]
    report.added_parameters = sum(p.numel() for p in model.parameters() if id(p) not in known)
    report.on_undo(
        unfuse(model, [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer) and _holds(m)])
    )
    set_trained(model, [*trained, *extra.values()])
    report.on_undo(hold_batch_norms(model))
    return report


def _holder(module: str, tensor: str) -> str:
    return f"{module}.{tensor}".rpartition(".")[0] if "." in tensor else module


def _among(parameter: nn.Parameter, others: list[nn.Parameter]) -> bool:
    return any(parameter is other for other in others)


def _adapters(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if ".lora_" in f".{name}"]


def _holds(module: nn.Module) -> bool:
    return any(is_adapted(m) for m in module.modules())


class _Root(nn.Module):
    """Stands above the model while peft works.

    At a model of transformers peft would translate names to those of older architectures and match their ends; and it
    leaves its configuration on what it is given.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model
        for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit", "hf_quantizer"):  # peft looks for these at its root
            held = next((m.__dict__[flag] for m in model.modules() if flag in m.__dict__), None)
            if held is not None:
                self.__dict__[flag] = held


def _inject(model: nn.Module, targets: LoraTargets, rank: int, alpha: float, dropout: float) -> Callable[[], None]:
    """Let peft put the adapters in, and see that they are where they should be and nowhere else."""
    peft = require("peft", extra="finetuning")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="|".join(re.escape(f"inner.{name}") for name in targets.modules) if targets.modules else [],
        target_parameters=[f"inner.{name}" for name in targets.stacks] or None,
        fan_in_fan_out=any(is_conv1d(model.get_submodule(name)) for name in targets.modules),
        bias="none",
    )
    holders = [*targets.modules, *dict.fromkeys(name.rpartition(".")[0] for name in targets.stacks)]
    before = {name: (model.get_submodule(name), model.get_submodule(name).training) for name in holders}
    attentions = [m for m, _ in before.values() if isinstance(m, nn.MultiheadAttention)]
    projections = [
        (m, m.out_proj, m._parameters["in_proj_weight"], m.out_proj._parameters["weight"]) for m in attentions
    ]
    adapted = {name for name, module in model.named_modules() if is_adapted(module)}

    def take_away() -> None:
        for name, (module, _) in before.items():
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, module)
        for attention, projection, _, _ in projections:
            attention.out_proj = projection

    with warnings.catch_warnings(), torch.random.fork_rng(devices=_devices(model)):
        # The one flag is right for each layer in turn; peft corrects it and says so.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        # From the seed rather than the state, so that every process and a second run draw the same adapters.
        torch.default_generator.manual_seed(torch.initial_seed())
        peft.inject_adapter_in_model(config, _Root(model), adapter_name=ADAPTER)
    for name, (_, mode) in before.items():
        module = model.get_submodule(name)
        if is_adapted_attention(module):
            compute_functionally(module)
        module.train(mode)
    for attention, projection, kept, out in projections:  # peft makes new parameters of them
        attention._parameters["in_proj_weight"] = kept
        projection._parameters["weight"] = out
    placed = {_outer(name) for name, module in model.named_modules() if is_adapted(module) and name not in adapted}
    if placed != {plain_name(name) for name in holders}:
        take_away()
        raise RuntimeError(f"peft put adapters on {sorted(placed)} where {sorted(holders)} were named")
    return take_away


def _outer(name: str) -> str:
    """The name of what was adapted: an attention has a second adapter inside."""
    return plain_name(name.removesuffix(".base_layer.out_proj"))


def _devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def lora_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that carry an adapter, by the name that they have without it.

    Args:
        model: any module.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> _ = inject_lora(model, ["0"], rank=1)
        >>> list(lora_modules(model))
        ['0']
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inner = name.endswith(".base_layer") or name.endswith("base_layer.out_proj")
        if is_adapted(module) and not inner:
            found[plain_name(name)] = module
    return found


@torch.no_grad()
def merge_lora(model: nn.Module) -> list[str]:
    """Add every adapter to its weight and take it away: a plain model with the same output.

    Args:
        model: of :func:`inject_lora`, or with other adapters of peft.

    Returns:
        The names of the modules whose weights were changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> _ = inject_lora(model, ["0"], rank=1)
        >>> merge_lora(model), sorted(model.state_dict())
        (['0'], ['0.bias', '0.weight'])
    """
    merged = list(lora_modules(model))
    for name in merged:
        parent, _, own = name.rpartition(".")
        holder = model.get_submodule(parent)
        module: Any = getattr(holder, own)
        while is_adapted(module):  # several stacks of one module are wrapped one in the other
            if is_adapted_attention(module) and not module.merged:
                module = merge_attention(module, ADAPTER)
            elif hasattr(module, "unload_and_optionally_merge_module"):
                module = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                if not module.merged:
                    module.merge()
                module = module.get_base_layer()
        setattr(holder, own, module)
    return merged


__all__ = ["ADAPTER", "inject_lora", "lora_modules", "merge_lora"]
