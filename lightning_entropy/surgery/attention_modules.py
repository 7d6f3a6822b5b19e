"""Which modules compute attention, told from their code and not from a list of architectures."""

from __future__ import annotations

import inspect
from types import CodeType
from typing import Any

from torch import nn

from lightning_entropy.observe.selection import match_modules

# What code calls that computes attention: torch's two functions and transformers' table of implementations.
_OPERATIONS = {"scaled_dot_product_attention", "multi_head_attention_forward", "ALL_ATTENTION_FUNCTIONS"}
# What libraries call the number of heads.
_HEADS = ("num_heads", "heads", "num_attention_heads", "n_heads", "n_head", "nhead", "nheads")


def _own(module: nn.Module, name: str) -> Any:
    """An attribute of a module or its class, without the look-ups that libraries add to ``__getattr__``."""
    return getattr(module, name, None) if name in module.__dict__ or hasattr(type(module), name) else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def attention_heads(module: nn.Module) -> int | None:
    """The number of query heads that a module says it has; None where it says nothing."""
    config = _own(module, "config")
    said = [*(_own(module, name) for name in _HEADS), *(getattr(config, name, None) for name in _HEADS)]
    return next((heads for heads in said if _is_count(heads)), None)


def _own_heads(module: nn.Module) -> bool:
    return any(_is_count(_own(module, name)) for name in _HEADS)


def _names(code: CodeType) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _names(constant)
    return found


def _names_used(kind: type[nn.Module]) -> set[str]:
    """Names that a class's forward uses, and the methods of the class that it calls."""
    used: set[str] = set()
    pending, seen = ["forward"], set()
    while pending:
        name = pending.pop()
        seen.add(name)
        function: Any = getattr(kind, name, None)
        if function is None or (hasattr(nn.Module, name) and name != "forward"):
            continue
        code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
        if code is not None:
            names = _names(code)
            used |= names
            pending.extend(n for n in names if n not in seen and inspect.isfunction(getattr(kind, n, None)))
    return used


def _computes_attention(module: nn.Module, used: dict[type, set[str]]) -> bool:
    kind = type(module)
    if kind not in used:
        used[kind] = _names_used(kind)
    names = used[kind]
    if isinstance(module, nn.MultiheadAttention) or names & _OPERATIONS:
        return True
    if not _own_heads(module):
        return False
    called = kind.__name__.lower()
    return "softmax" in names or ("processor" in names and hasattr(module, "processor")) or "att" in called


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The innermost modules of a model that compute attention themselves, by dotted name.

    Recognised are modules whose forward (or a method that it calls) uses ``scaled_dot_product_attention``,
    ``multi_head_attention_forward`` or transformers' attention interface; and modules that have a number of heads and
    either call a softmax, delegate to a diffusers attention processor, or are named attention.

    Example:
        >>> list(attention_modules(nn.TransformerEncoderLayer(8, 2)))
        ['self_attn']
    """
    used: dict[type, set[str]] = {}
    found = {name: module for name, module in model.named_modules() if _computes_attention(module, used)}
    return {
        name: module
        for name, module in found.items()
        if not any(other != name and (not name or other.startswith(f"{name}.")) for other in found)
    }


def chosen_attention(model: nn.Module, patterns: list[str] | None, owner: str) -> dict[str, nn.Module]:
    """The attention modules that patterns choose; all of them for None.

    A pattern may name a module that contains attention. One that is attention to the user and not recognised as such
    is taken at the user's word.

    Raises:
        ValueError: if a pattern matches no module; if None is given and nothing is recognised, with an inventory.
    """
    known = attention_modules(model)
    if patterns is None:
        if not known:
            kinds = sorted({type(m).__name__ for m in model.modules()})
            shown = ", ".join(kinds[:15]) + (f" and {len(kinds) - 15} more" if len(kinds) > 15 else "")
            raise ValueError(
                f"{owner} found no attention in {type(model).__name__}: none of its modules calls "
                "scaled_dot_product_attention, multi_head_attention_forward or a softmax over heads.\n"
                f"Its modules are of the classes {shown}.\nPass modules= with a pattern over their names if one of "
                "them computes attention another way."
            )
        return known
    chosen: dict[str, nn.Module] = {}
    for names in match_modules(model, patterns, owner).values():
        inside = [n for n in known if any(n == m or not m or n.startswith(f"{m}.") for m in names)]
        outermost = [n for n in names if not any(o != n and (not o or n.startswith(f"{o}.")) for o in names)]
        chosen.update({n: model.get_submodule(n) for n in inside or outermost})
    return chosen


__all__ = ["attention_heads", "attention_modules", "chosen_attention"]
