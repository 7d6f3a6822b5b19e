"""Which weights of a layer are its attention projections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from lightning_entropy.observe.model_weights import model_weights
from lightning_entropy.observe.selection import as_patterns
from lightning_entropy.observe.stored_weights import StoredWeight, narrow
from lightning_entropy.surgery.attention_modules import attention_modules
from lightning_entropy.surgery.trainable import plain_name

PROJECTIONS = ("attention", "attention+mlp")


def layer_weights(
    model: nn.Module,
    layers: Mapping[str, Iterable[str]],
    projections: str | Iterable[str] = "attention",
    *,
    exclude: Iterable[str] = (),
    owner: str = "layer_weights",
) -> dict[str, list[StoredWeight]]:
    """The linear maps of layers that an adapter goes to.

    With ``"attention"`` those are the weights in the largest module of the layer around the place where attention is
    computed: queries, keys, values and the output, wherever the library keeps the latter. Where a layer computes
    attention in its own forward they are its own linear layers that keep its width or map to three times it.

    Args:
        model: any module, with adapters or without.
        layers: dotted name of a layer -> names of the modules in it that compute attention; where those are empty they
            are told from the code (:func:`~lightning_entropy.surgery.attention_modules.attention_modules`).
        projections: ``"attention"``; ``"attention+mlp"``: all weights of the layer; or shell patterns over names of
            weights and modules, of which those in the layers are taken.
        exclude: names of modules of which none is taken.
        owner: who asks, for messages.

    Returns:
        Layer -> its weights, in the order of the model; possibly none.

    Raises:
        ValueError: if a pattern names nothing.

    Example:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
        >>> [weight.name for weight in layer_weights(encoder, {"layers.1": []})["layers.1"]]
        ['layers.1.self_attn.in_proj_weight', 'layers.1.self_attn.out_proj.weight']
    """
    weights = [w for w in model_weights(model) if not _inside(w.module, exclude)]
    weights = [w for w in weights if w.refusal is None or not isinstance(w.holder, nn.Embedding)]
    if projections not in PROJECTIONS:
        weights = narrow(weights, as_patterns(projections, argument="projections") or [], owner, argument="projections")
    found: dict[str, list[StoredWeight]] = {}
    computing: list[str] | None = None
    for layer, sites in layers.items():
        own = [w for w in weights if _inside(w.module, [layer])]
        places = [plain_name(site) for site in sites]
        if projections == "attention":
            if not places:
                computing = list(attention_modules(model)) if computing is None else computing
                places = [plain_name(name) for name in computing if _inside(plain_name(name), [layer])]
            own = _of_attention(model, layer, places, own)
        found[layer] = own
    return found


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(not module or f"{name}.".startswith(f"{module}.") for module in modules)


def _of_attention(model: nn.Module, layer: str, sites: list[str], weights: list[StoredWeight]) -> list[StoredWeight]:
    taken: set[str] = set()
    for site in sites:
        branch = _branch(model, layer, site)
        if branch is not None:
            taken |= {w.name for w in weights if _inside(w.module, [branch])}
        else:
            taken |= _keeping_width(layer, weights)
    return [w for w in weights if w.name in taken]


def _branch(model: nn.Module, layer: str, site: str) -> str | None:
    """The largest module around a site that is less than the layer; None where that is the layer's own forward."""
    if site == layer or not _inside(site, [layer]):
        return layer if isinstance(_module(model, layer), nn.MultiheadAttention) else None
    name = layer
    for part in site.removeprefix(f"{layer}." if layer else "").split("."):
        name = f"{name}.{part}" if name else part
        if not isinstance(_module(model, name), nn.ModuleList | nn.Sequential | nn.ModuleDict):
            break
    return name


def _module(model: nn.Module, name: str) -> nn.Module | None:
    return next((m for n, m in model.named_modules() if plain_name(n) == name), None)


def _keeping_width(layer: str, weights: list[StoredWeight]) -> set[str]:
    direct = [w for w in weights if w.module.rpartition(".")[0] == layer and len(w.shape) == 2]
    sizes = {w.name: (w.shape[0], w.shape[1]) if w.transposed else (w.shape[1], w.shape[0]) for w in direct}
    if not sizes:
        return set()
    width = next(iter(sizes.values()))[0]
    return {name for name, (inputs, outputs) in sizes.items() if inputs == width and outputs in (width, 3 * width)}


__all__ = ["PROJECTIONS", "layer_weights"]
