"""What the layers of a model are, when nobody says: the numbered blocks in which its attention runs."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def numbered_blocks(root: nn.Module) -> list[str]:
    """Children of every ``ModuleList`` and ``Sequential`` whose children are modules of one class.

    A block has modules inside and parameters: lists of linear layers, dropouts or activations are none.

    Args:
        root: any module.

    Returns:
        Dotted names in the order of ``named_modules``; blocks inside blocks included.

    Example:
        >>> numbered_blocks(nn.Sequential(*[nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2)]))
        ['0', '1']
    """
    found = []
    for name, module in root.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        children = dict(module.named_children())
        if len({type(child) for child in children.values()}) != 1:
            continue
        for key, child in children.items():
            if any(True for _ in child.children()) and any(True for _ in child.parameters()):
                found.append(f"{name}.{key}" if name else key)
    return found


def layers_around(sites: Iterable[str], blocks: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The innermost block around each module that computes attention.

    Args:
        sites: names of the modules that computed attention, in the order of the forward.
        blocks: names of blocks.

    Returns:
        Block -> its sites, in the order of the forward; and the sites around which there is no block.

    Example:
        >>> layers_around(["h.0.attn", "h.1.attn"], ["h.0", "h.1"])
        ({'h.0': ['h.0.attn'], 'h.1': ['h.1.attn']}, [])
    """
    known = set(blocks)
    inside: dict[str, list[str]] = {}
    alone: list[str] = []
    for site in dict.fromkeys(sites):
        parts = site.split(".")
        above = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
        block = next((name for name in above if name in known), None)
        if block is None:
            alone.append(site)
        else:
            inside.setdefault(block, []).append(site)
    return inside, alone


def layers_of_sites(sites: Iterable[str]) -> list[str]:
    """Layers for attention that is in no numbered block: the module that holds it, or itself where that holds several.

    Args:
        sites: names of the modules that computed attention.

    Example:
        >>> layers_of_sites(["first.attn", "second.attn"])
        ['first', 'second']
    """
    names = list(dict.fromkeys(sites))
    parents = [name.rpartition(".")[0] for name in names]
    return [name if not above or parents.count(above) > 1 else above for name, above in zip(names, parents)]


__all__ = ["layers_around", "layers_of_sites", "numbered_blocks"]
