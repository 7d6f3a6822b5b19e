"""Adapters in peft's own files, and in the state dicts of models that carry them."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_entropy.extras import require
from lightning_entropy.files import atomic_write
from lightning_entropy.observe.weight_matrices import is_conv1d
from lightning_entropy.surgery.lora import ADAPTER, lora_modules
from lightning_entropy.surgery.lora_attention import is_adapted_attention
from lightning_entropy.surgery.trainable import plain_name

_LORA_KEY = re.compile(rf"^(?:(.+)\.)?lora_(?:embedding_)?[AB]\.{ADAPTER}(?:\.|$)")
_PREFIX = "base_model.model."


def adapted_in(keys: Iterable[str]) -> list[str]:
    """The modules that have adapters in a state dict, by the name that they have without.

    Args:
        keys: of the state dict.

    Example:
        >>> adapted_in(["net.fc.base_layer.weight", "net.fc.lora_A.default.weight", "net.fc.lora_B.default.weight"])
        ['net.fc']
    """
    matches = (_LORA_KEY.match(key) for key in keys)
    return list(dict.fromkeys(plain_name(match[1] or "") for match in matches if match))


def _trained_modules(model: nn.Module) -> list[str]:
    """Modules beside the adapters that have trained parameters of their own, without those inside another."""
    holders = {
        name.rpartition(".")[0]: name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_" not in f".{name}"
    }
    for holder, name in holders.items():
        if not holder:
            raise ValueError(f"{name} is trained and belongs to the model itself: peft's files hold whole modules only")
        if holder != plain_name(holder):
            raise ValueError(
                f"{plain_name(name)} is trained under an adapter: merge_lora first and save the whole model"
            )
    return [h for h in holders if not any(h.startswith(f"{other}.") for other in holders)]


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters and what is trained beside them, with the keys of peft's files.

    Args:
        model: of :func:`inject_lora`.

    Raises:
        ValueError: if the model has no adapter, or parameters are trained that peft's files cannot hold.

    Example:
        >>> from lightning_entropy.surgery.lora import inject_lora
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> _ = inject_lora(model, ["0"], rank=1)
        >>> sorted(adapter_state_dict(model))
        ['base_model.model.0.lora_A.weight', 'base_model.model.0.lora_B.weight']
    """
    if not lora_modules(model):
        raise ValueError(f"{type(model).__name__} has no adapter to save; inject_lora puts some in")
    extra = _matched(model, _trained_modules(model))
    found: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if _LORA_KEY.match(key):
            found[_PREFIX + re.sub(rf"\.{ADAPTER}(?=\.|$)", "", key, count=1)] = value
        elif any(key.startswith(f"{name}.") for name in extra):
            found[_PREFIX + key] = value
    return found


def _matched(model: nn.Module, names: list[str]) -> list[str]:
    """All that peft takes for one of these names when it loads: it compares the ends of names as text."""
    return [n for n, _ in model.named_modules() if n and any(n.endswith(name) for name in names)]


def adapter_config(model: nn.Module) -> Any:
    """The ``LoraConfig`` with which plain peft builds the same adapters around the plain model.

    Raises:
        ValueError: as :func:`adapter_state_dict`; if the adapters have several dropouts.
    """
    peft = require("peft", extra="finetuning")
    modules: list[str] = []
    stacks: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    dropouts: set[float] = set()
    convolved = False
    for name, outer in lora_modules(model).items():
        module: Any = outer
        while hasattr(module, "parameter_name"):  # stacks of one module are wrapped one in the other
            stacks.append(f"{name}.{module.parameter_name}")
            ranks[stacks[-1]], alphas[stacks[-1]] = module.r[ADAPTER], module.lora_alpha[ADAPTER]
            module = module.base_layer
        if hasattr(module, "base_layer"):
            modules.append(name)
            ranks[name], alphas[name] = module.r[ADAPTER], module.lora_alpha[ADAPTER]
            convolved = convolved or is_conv1d(module.base_layer)
            if not is_adapted_attention(module):
                dropouts.add(float(getattr(module.lora_dropout[ADAPTER], "p", 0.0)))
    if len(dropouts) > 1:
        raise ValueError(f"peft's file has one dropout for all adapters, and these have {sorted(dropouts)}")
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    return peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
        alpha_pattern={f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        lora_dropout=max(dropouts, default=0.0),
        target_modules=_told(model, modules),
        target_parameters=stacks or None,
        modules_to_save=_trained_modules(model) or None,
        fan_in_fan_out=convolved,
        base_model_name_or_path=base or None,
        bias="none",
    )


def _told(model: nn.Module, modules: list[str]) -> list[str] | str:
    """Names as they are: peft takes a name that ends like one for it too, and a pattern where there is such a name."""
    names = {plain_name(name) for name, _ in model.named_modules()}
    if any(other.endswith(f".{name}") for name in modules for other in names):
        return "|".join(map(re.escape, modules))
    return modules


@functools.cache
def _peft_doubles_output_projections() -> bool:
    """Whether the installed peft adds the adapter of an attention's ``out_proj`` twice, as 0.21 does."""
    peft = require("peft", extra="finetuning")
    root = nn.ModuleDict({"attention": nn.MultiheadAttention(1, 1)})
    with torch.random.fork_rng(devices=[]):
        peft.inject_adapter_in_model(peft.LoraConfig(r=1, lora_alpha=1, target_modules=["attention"]), root)
    attention: Any = root["attention"]
    inner = attention.base_layer.out_proj
    with torch.no_grad():
        inner.base_layer.weight.zero_()
        inner.lora_A[ADAPTER].weight.fill_(1.0)
        inner.lora_B[ADAPTER].weight.fill_(1.0)
        plain = attention.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    return float(plain.out_proj.weight) > 1.5


def _check_output_projections(model: nn.Module) -> None:
    adapted = {n: m for n, m in lora_modules(model).items() if is_adapted_attention(m)}
    trained = [n for n, m in adapted.items() if bool((m.base_layer.out_proj.lora_B[ADAPTER].weight != 0).any())]  # type: ignore[union-attr, index]
    if trained and _peft_doubles_output_projections():
        raise ValueError(
            f"the adapters of out_proj in {', '.join(trained)} cannot be saved for peft: the installed version adds "
            "them to the weight of nn.MultiheadAttention twice, and would compute something else. Use merge_lora and "
            "save the model, or leave out_proj out of the selection."
        )


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, which plain peft loads.

    ``PeftModel.from_pretrained(plain_model, folder)`` gives the adapted model: the plain model is one of the class and
    weights of ``model`` without adapters. Names are those in ``model``; for a network inside a LightningModule, pass
    the network.

    Args:
        model: of :func:`inject_lora`.
        folder: is made where it is missing.

    Returns:
        The folder.

    Raises:
        ValueError: as :func:`adapter_state_dict` and :func:`adapter_config`; if the installed peft would compute
            something else from the file (0.21 adds adapters of ``nn.MultiheadAttention.out_proj`` twice).
    """
    safetensors = require("safetensors.torch", extra="finetuning")
    _check_output_projections(model)
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in adapter_state_dict(model).items()}
    config = adapter_config(model)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with atomic_write(target / "adapter_model.safetensors") as temporary:
        temporary.write_bytes(safetensors.save(tensors, metadata={"format": "pt"}))  # save_file hides a full disk
    config.inference_mode = True
    config.save_pretrained(str(target))
    return target


__all__ = ["adapted_in", "adapter_config", "adapter_state_dict", "save_adapter"]
