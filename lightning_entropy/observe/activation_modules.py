"""Which modules of a model are activation functions."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from lightning_entropy.observe.selection import as_patterns, match_modules

_NOT_ELEMENTWISE = (nn.MultiheadAttention, nn.Softmax, nn.Softmin, nn.Softmax2d, nn.LogSoftmax, nn.GLU)
_LIBRARIES = ("torch.nn.modules.activation", "timm.layers.activations", "transformers.activations")
_OURS = "lightning_entropy.activation."
_NAMES = re.compile(
    r"(relu\d*|(re|ge|si|ce|se|e)lu(tanh)?|swish|mish|tanh|sigmoid|softplus|softsign|activation)(me|jit)?$",
    re.IGNORECASE,
)


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation function: by the library that defines it, or a leaf with such a name.

    Example:
        >>> is_activation(nn.GELU()), is_activation(nn.Linear(2, 2)), is_activation(nn.Softmax(-1))
        (True, False, False)
    """
    kinds = type(module).__mro__
    if isinstance(module, (*_NOT_ELEMENTWISE, nn.Identity)):
        return False
    if any(kind.__module__.startswith(_OURS) for kind in kinds):
        return True
    if next(module.children(), None) is not None:
        return False
    return any(kind.__module__.startswith(_LIBRARIES) or _NAMES.search(kind.__name__) for kind in kinds[:-2])


def activation_sites(
    root: nn.Module, modules: str | Iterable[str] | None = None, *, owner: str = "activation_sites"
) -> dict[str, nn.Module]:
    """The activation modules of a model by name, in the order in which they are registered.

    Args:
        root: any module.
        modules: shell patterns over dotted names; activations in the modules they match are taken, and matched modules
            without children that are no known activations, if there are no others. None takes all.
        owner: the name that errors carry.

    Raises:
        ValueError: if a pattern matches no module, or there is no activation.

    Example:
        >>> list(activation_sites(nn.Sequential(nn.Linear(2, 2), nn.GELU())))
        ['1']
    """
    patterns = as_patterns(modules)
    found: dict[str, nn.Module] = {}
    inside: list[str] = []  # an activation that is made of another counts once
    for name, module in root.named_modules():
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue
        if is_activation(module):
            found[name] = module
            inside.append(name)
    if patterns is not None:
        matched = [name for names in match_modules(root, patterns, owner).values() for name in names]
        chosen = {n: m for n, m in found.items() if any(n == r or not r or n.startswith(f"{r}.") for r in matched)}
        if not chosen:
            leaves = {name: root.get_submodule(name) for name in matched}
            chosen = {n: m for n, m in leaves.items() if n and next(m.children(), None) is None and not _weighted(m)}
        found = chosen
    if not found:
        raise ValueError(_nothing(root, patterns, owner))
    return found


def _weighted(module: nn.Module) -> bool:
    return any(p.dim() > 1 for p in module.parameters())


def _nothing(root: nn.Module, patterns: list[str] | None, owner: str) -> str:
    where = f" in the modules that {patterns} match" if patterns else ""
    counts: dict[str, int] = {}
    for module in root.modules():
        if next(module.children(), None) is None and module is not root:
            counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1
    there = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())[:12]) or "no modules"
    held = [
        n for n, m in root.named_modules() if isinstance(m, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
    ]
    hint = (
        f" {held[0]} and {len(held) - 1} others hold their activation as a function, which is no module; "
        "swap_activations makes it one."
        if held
        else " Activations that a forward calls as functions (F.gelu) are no modules and are not seen; "
        "swap_activations makes them modules."
    )
    return f"{owner}: found no activation module{where} in {type(root).__name__}, which has {there}.{hint}"


__all__ = ["activation_sites", "is_activation"]
