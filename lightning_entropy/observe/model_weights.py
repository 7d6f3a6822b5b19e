"""The weights of a model that are linear maps, under the names that they have without adapters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_entropy.observe.dequantize import numbers_of
from lightning_entropy.observe.stored_weights import EXPERT_TENSORS, StoredWeight, weights_fingerprint
from lightning_entropy.observe.weight_matrices import MatrixWeight, is_conv1d, parameter_names, weights_of

# What peft wraps a module in, by the name of a base class, and the child that is the module itself.
_WRAPPERS = {"BaseTunerLayer": "base_layer", "AuxiliaryTrainingWrapper": "original_module"}
_WRAPPERS |= {"ModulesToSaveWrapper": "original_module", "PeftModel": "base_model", "BaseTuner": "model"}


def wrapped_in(module: nn.Module) -> str | None:
    """The name of the child that a module of peft wraps; None for any other module."""
    for base in type(module).__mro__:
        child = _WRAPPERS.get(base.__name__)
        if (
            child is not None
            and base.__module__.startswith("peft.")
            and isinstance(getattr(module, child, None), nn.Module)
        ):
            return child
    return None


def plain_modules(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Every module of a model without what peft put around and beside it.

    Adapters, and the trained copies of ``modules_to_save``, are left out; the base layer has the name that it had
    before they were injected.

    Args:
        model: any module.

    Yields:
        Its name without adapters, its name, and the module; each module once.
    """
    seen: set[int] = set()
    pending = [("", "", model)]
    while pending:
        plain, name, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        child = wrapped_in(module)
        if child is not None:
            pending.append((plain, _join(name, child), getattr(module, child)))
            continue
        yield plain, name, module
        pending += [(_join(plain, n), _join(name, n), m) for n, m in reversed(list(module.named_children()))]


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def model_weights(model: nn.Module) -> list[StoredWeight]:
    """Weights of linear layers, convolutions, ``nn.MultiheadAttention`` and stacks of experts, in the model's order.

    A parameter that several modules share is listed once. Weights that cannot be read are listed with the reason; so
    are embedding tables and the packed weights of GPTQ and AWQ, since a selection says what it passed over.

    Args:
        model: any module, with adapters of peft or without.

    Returns:
        The weights; possibly none.

    Example:
        >>> [weight.name for weight in model_weights(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))]
        ['0.weight']
    """
    clean = {name: plain for plain, name, _ in plain_modules(model)}
    shared = parameter_names(model)
    found: list[StoredWeight] = []
    seen: set[int] = set()
    for plain, name, module in plain_modules(model):
        for weight in [*weights_of(model, name, module, True), *_experts(name, module), *_passed_over(name, module)]:
            parameter = module._parameters.get(weight.tensor)
            if parameter is not None and not isinstance(module, nn.Embedding):
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
            others = [_clean(n, clean) for n in shared.get(id(parameter), []) if n != weight.key]
            found.append(replace(_stored(plain, weight), tied=tuple(others)))
    # An embedding that is tied to a linear layer is that layer's weight, and no second one.
    return [w for w in found if not (isinstance(w.holder, nn.Embedding) and id(w.holder.weight) in seen)]


def _clean(name: str, clean: dict[str, str]) -> str:
    module, _, tensor = name.rpartition(".")
    return _join(clean.get(module, module), tensor)


def _experts(name: str, module: nn.Module) -> Iterator[MatrixWeight]:
    if isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd):
        return
    where = f"{name}.{type(module).__name__}".lower()
    for tensor, value in module._parameters.items():
        if value is None or isinstance(value, UninitializedParameter) or value.dim() != 3:
            continue
        if tensor in EXPERT_TENSORS or ("expert" in where and len(value) > 1):
            yield MatrixWeight(name, module, tensor)


def _passed_over(name: str, module: nn.Module) -> Iterator[MatrixWeight]:
    if isinstance(module, nn.Embedding):
        yield MatrixWeight(name, module, "weight")
    elif isinstance(module._buffers.get("qweight"), Tensor) or isinstance(module._parameters.get("qweight"), Tensor):
        yield MatrixWeight(name, module, "qweight")


def _stored(plain: str, weight: MatrixWeight) -> StoredWeight:
    module, tensor = weight.module, weight.tensor
    key = _join(plain, tensor)
    if isinstance(module, nn.Embedding):
        reason = "rows of an embedding are looked up: it is no linear map of activations"
        return _refused(key, plain, weight, tuple(module.weight.shape), reason)
    if tensor == "qweight":
        reason = f"it is packed by the library of {type(module).__name__}, which nothing here unpacks"
        return _refused(key, plain, weight, (), reason)
    numbers = numbers_of(module, tensor)
    if isinstance(numbers, str):
        value = module._parameters.get(tensor)
        # An uninitialised parameter raises when it is asked for its shape.
        known = value is not None and not numbers.startswith("it has no shape")
        return _refused(key, plain, weight, tuple(value.shape) if value is not None and known else (), numbers)
    conv = isinstance(module, nn.modules.conv._ConvNd)
    own = isinstance(module, nn.Linear | nn.MultiheadAttention) or conv or is_conv1d(module)
    return StoredWeight(
        name=key,
        module=plain,
        shape=numbers.shape,
        layout="conv" if conv else "linear" if own else "experts",
        dtype=numbers.dtype,
        read=numbers.read,
        bits=numbers.bits,
        precision=numbers.precision,
        parts=weight.parts,
        transposed=is_conv1d(module),
        groups=int(getattr(module, "groups", 1)) if conv else 1,
        holder=module,
        tensor=tensor,
    )


def _refused(key: str, plain: str, weight: MatrixWeight, shape: tuple[int, ...], reason: str) -> StoredWeight:
    def read() -> Tensor:
        raise ValueError(f"{key} cannot be read: {reason}")

    return StoredWeight(
        key, plain, shape, "linear", torch.float32, read, holder=weight.module, tensor=weight.tensor, refusal=reason
    )


def model_fingerprint(model: nn.Module, names: Iterable[str]) -> str | None:
    """The fingerprint of some weights of a model; None where it lacks one of them.

    Args:
        model: with adapters or without.
        names: of parameters, without the wrapping of adapters.
    """
    wanted = set(names)
    found = [weight for weight in model_weights(model) if weight.name in wanted and weight.refusal is None]
    return weights_fingerprint(found) if len(found) == len(wanted) else None


__all__ = ["model_fingerprint", "model_weights", "plain_modules", "wrapped_in"]
