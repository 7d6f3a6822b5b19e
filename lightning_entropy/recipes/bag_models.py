"""Models of bags by name: ours, torchmil's, and a user's own through one adapter.

Whatever the model, :class:`BagModel` answers two questions about a batch: its logits ``(B, C)``, and the loss
that the model itself prescribes, where it has one.

Models of torchmil are called as torchmil calls them: their own loss terms (summed), their own prediction,
masks as its collate function makes them, tile graphs from the coordinates. DTFD-MIL splits a bag into random
groups in evaluation too (drawn from NumPy's generator).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from lightning_entropy.data import Batch
from lightning_entropy.extras import require
from lightning_entropy.recipes.abmil import ABMIL
from lightning_entropy.recipes.tile_grid import grid_adjacency

Adapter = Callable[[nn.Module, Batch], Tensor]

# Models of torchmil 1.0.2 in which padding takes part: DSMIL may pick it as the critical instance, CLAM's
# instance loss does not see the mask, and a group of DTFD that holds padding alone is NaN. They get a padded
# batch bag by bag.
_PADDING_TAKES_PART = ("DSMIL", "CLAM_SB", "DTFDMIL")


def import_path(path: str, *, what: str) -> Any:
    """Import ``package.module.name``.

    Args:
        path: dotted path.
        what: what the path is, for the message.

    Raises:
        ValueError: if there is no such module or no such name in it.
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(f"{what} {path!r} is not a dotted path: expected package.module.name")
    try:
        return getattr(import_module(module), name)
    except AttributeError as error:
        raise ValueError(f"{what} {path!r}: module {module} has no {name}") from error
    except ModuleNotFoundError as error:
        raise ValueError(f"{what} {path!r}: {error}") from error


def two_class_logits(logits: Tensor) -> Tensor:
    """Turn binary logits ``(B,)`` or ``(B, 1)`` into ``(B, 2)``: (0, z) has the softmax (1 - sigmoid(z),
    sigmoid(z)).

    Logits that are ``(B, C)`` with C >= 2 are returned as they are.

    Raises:
        ValueError: if the shape is another one.
    """
    if logits.dim() == 2 and logits.shape[1] >= 2:
        return logits
    if logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1):
        z = logits.reshape(-1)
        return torch.stack((torch.zeros_like(z), z), dim=-1)
    raise ValueError(f"logits of a batch must be (B,), (B, 1) or (B, C), got {tuple(logits.shape)}")


def default_adapter(model: nn.Module, batch: Batch) -> Tensor:
    """Call a module as most MIL models are called: ``model(features, mask)``, or ``model(features)``.

    Args:
        model: a module whose forward takes features ``(B, N, D)`` and, if its second parameter is required or
            is named ``mask``, the mask ``(B, N)``.
        batch: the batch.

    Returns:
        Its output, or the first item of it where it returns several.

    Raises:
        ValueError: if the batch has padding and the model takes no mask.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    second = parameters[1] if len(parameters) > 1 else None
    if any(p.name == "mask" for p in parameters):
        out = model(batch["features"], mask=batch["mask"])
    elif second is not None and second.default is second.empty and second.kind is second.POSITIONAL_OR_KEYWORD:
        out = model(batch["features"], batch["mask"])
    elif bool(batch["mask"].all()):
        out = model(batch["features"])
    else:
        raise ValueError(
            f"{type(model).__name__}.forward takes no mask and the batch is padded: padding would take part. "
            "Set batch_size=1, or give an adapter that passes batch['mask'] where the model wants it"
        )
    return out[0] if isinstance(out, tuple | list) else out


@dataclass(frozen=True)
class BagModel:
    """A built model with how it is called.

    Attributes:
        net: the module itself, unchanged.
        logits: ``(net, batch) -> (B, C)``.
        loss: ``(net, batch) -> {name: term}`` where the model prescribes its loss, else ``None``.
    """

    net: nn.Module
    logits: Adapter
    loss: Callable[[nn.Module, Batch], Mapping[str, Tensor]] | None = None


def _abmil_logits(net: nn.Module, batch: Batch) -> Tensor:
    return net(batch["features"], batch["mask"])


def _adapted(adapter: Adapter) -> Adapter:
    def logits(net: nn.Module, batch: Batch) -> Tensor:
        return two_class_logits(adapter(net, batch))

    return logits


def _single_bags(batch: Batch) -> list[Batch]:
    """The bags of a batch, each without its padding."""
    single: list[Batch] = []
    for i, exists in enumerate(batch["mask"]):
        bag: dict[str, Any] = {"label": batch["label"][i : i + 1], "slide": batch["slide"][i : i + 1]}
        for name in ("features", "mask", "coords", "instance_labels"):
            if name in batch:
                bag[name] = batch[name][i : i + 1, exists]  # type: ignore[literal-required]
        single.append(bag)  # type: ignore[arg-type]
    return single


def _padding_takes_part(net: nn.Module) -> bool:
    return type(net).__name__ in _PADDING_TAKES_PART or "mask" not in inspect.signature(net.forward).parameters


def _torchmil_inputs(function: Callable[..., Any], batch: Batch) -> dict[str, Tensor]:
    wanted = inspect.signature(function).parameters
    inputs = {"X": batch["features"]}
    if "mask" in wanted:
        inputs["mask"] = batch["mask"].to(torch.uint8)  # what torchmil's own collate_fn makes
    if "adj" in wanted or "coords" in wanted:
        if "coords" not in batch:
            raise ValueError("this torchmil model needs the coordinates of the instances, and the bags have none")
        if "adj" in wanted:
            inputs["adj"] = grid_adjacency(batch["coords"], batch["mask"]).to(batch["features"].dtype)
        if "coords" in wanted:
            inputs["coords"] = batch["coords"]
    return inputs


def _torchmil_logits(net: nn.Module, batch: Batch) -> Tensor:
    if _padding_takes_part(net) and not bool(batch["mask"].all()):
        return torch.cat([_torchmil_logits(net, bag) for bag in _single_bags(batch)])
    inputs = _torchmil_inputs(net.forward, batch)
    predict: Any = net.predict  # DSMIL predicts with the mean of its two streams, its forward gives one of them
    if set(inputs) <= set(inspect.signature(predict).parameters):
        out = predict(**inputs, return_inst_pred=False)
    else:
        out = net(**inputs)
    return two_class_logits(out[0] if isinstance(out, tuple) else out)


def _torchmil_loss(net: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    if _padding_takes_part(net) and not bool(batch["mask"].all()):
        single = [_torchmil_loss(net, bag) for bag in _single_bags(batch)]
        return {name: torch.stack([terms[name] for terms in single]).mean() for name in single[0]}
    compute_loss: Any = net.compute_loss
    _, terms = compute_loss(batch["label"], **_torchmil_inputs(compute_loss, batch))
    return terms


def _build_torchmil(
    name: str, *, in_features: int, num_classes: int, hidden: int | None, kwargs: dict[str, Any]
) -> BagModel:
    if num_classes != 2:
        raise ValueError(
            f"model 'torchmil:{name}' is binary, as all models of torchmil are; here are {num_classes} classes: "
            "use model='abmil' (any number of classes), or a module of your own through adapter="
        )
    models = require("torchmil.models", extra="mil")
    known = sorted(
        n for n, c in vars(models).items() if inspect.isclass(c) and n not in ("MILModel", "MILModelWrapper")
    )
    if name not in known:
        raise ValueError(f"torchmil has no model {name!r}; it has {', '.join(known)}")
    constructor = getattr(models, name)
    accepted = inspect.signature(constructor).parameters
    arguments: dict[str, Any] = {"in_shape": (in_features,)}
    if hidden is not None:
        if "feat_ext" not in accepted:
            raise ValueError(f"hidden={hidden} puts a layer before the model, and torchmil:{name} has no place for it")
        arguments["feat_ext"] = nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU())
    unknown = sorted(set(kwargs) - set(accepted))
    if unknown:
        raise ValueError(f"torchmil:{name} has no argument {unknown}; it has {sorted(accepted)}")
    # torchmil's default criterion is one module for all models of the process: a copy keeps their modes
    # apart.
    net = copy.deepcopy(constructor(**{**arguments, **kwargs}))
    return BagModel(net, _torchmil_logits, _torchmil_loss)


def build_bag_model(
    model: str | nn.Module,
    *,
    in_features: int,
    num_classes: int,
    hidden: int | None = None,
    abmil: Mapping[str, Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    adapter: str | Adapter | None = None,
) -> BagModel:
    """Build a model by its name.

    Args:
        model: ``"abmil"``, ``"torchmil:NAME"``, the dotted path of an ``nn.Module`` class, or a module.
        in_features: width of an instance.
        num_classes: number of classes.
        hidden: width of a ReLU layer before the attention (ours and torchmil's).
        abmil: further arguments of :class:`~lightning_entropy.recipes.abmil.ABMIL`, unused by other models.
        model_kwargs: arguments of the model's constructor; ``in_features`` and ``num_classes`` are added
            where a class given by path has parameters of these names.
        adapter: ``(module, batch) -> logits``, or its dotted path; only for a module or a class path.

    Returns:
        The model.

    Raises:
        ValueError: if the name is unknown, or an argument does not apply to the model.
    """
    kwargs = dict(model_kwargs or {})
    if isinstance(model, str) and (model == "abmil" or model.startswith("torchmil:")):
        if adapter is not None:
            raise ValueError(f"adapter= is for modules of your own; {model!r} needs none")
        if model == "abmil":
            net = ABMIL(in_features, num_classes=num_classes, hidden=hidden, **{**(abmil or {}), **kwargs})
            return BagModel(net, _abmil_logits)
        name = model.removeprefix("torchmil:")
        return _build_torchmil(name, in_features=in_features, num_classes=num_classes, hidden=hidden, kwargs=kwargs)
    if isinstance(model, str):
        if "." not in model:
            raise ValueError(
                f"model {model!r} is unknown: use 'abmil', 'torchmil:NAME' (for example 'torchmil:DSMIL'), the "
                "dotted path of a class, or an nn.Module"
            )
        constructor = import_path(model, what="model")
        if not (inspect.isclass(constructor) or inspect.isfunction(constructor)):
            raise ValueError(f"model {model!r} must be a class or a function that makes an nn.Module")
        accepted = inspect.signature(constructor).parameters
        for name, value in {"in_features": in_features, "num_classes": num_classes}.items():
            if name in accepted:
                kwargs.setdefault(name, value)
        built = constructor(**kwargs)
        if not isinstance(built, nn.Module):
            raise ValueError(f"model {model!r} must make an nn.Module, it made {type(built).__name__}")
    else:
        if kwargs:
            raise ValueError("model_kwargs are for a model that is given by name; the module is built already")
        built = model
    chosen = import_path(adapter, what="adapter") if isinstance(adapter, str) else adapter
    return BagModel(built, _adapted(chosen or default_adapter))


__all__ = ["Adapter", "BagModel", "build_bag_model", "default_adapter", "import_path", "two_class_logits"]
