"""Which of the operations that ran is the attention over instances, and what to say when none is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_entropy.observe.interception import Call, is_square


class Site(NamedTuple):
    """A place where attention is computed: the module and which of its operations."""

    module: str
    source: str
    dims: int
    dim: int
    ordinals: frozenset[int] | None  # None: every operation of this kind in the module

    def takes(self, call: Call) -> bool:
        """Whether a call was made at this place."""
        return (
            call.site == self.module
            and call.source == self.source
            and len(call.shape) == self.dims
            and call.dim == self.dim
            and (self.ordinals is None or call.ordinal in self.ordinals)
        )


def instance_counts(*values: Any) -> set[int]:
    """Sizes that may be the number of instances of a bag, from the shapes of the tensors in a batch.

    (N, D) and (N, C, H, W) are one bag; (B, N, D) and (B, N, C, H, W) are padded bags; a (B, N) mask counts too.
    """
    sizes: set[int] = set()
    pending = list(values)
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            if value.dim() >= 2:
                is_mask = value.dim() == 2 and value.dtype in (torch.bool, torch.uint8)
                sizes.add(value.shape[1 if is_mask or value.dim() in (3, 5) else 0])
        elif isinstance(value, Mapping) or (hasattr(value, "items") and hasattr(value, "keys")):
            pending.extend(v for _, v in value.items())
        elif isinstance(value, list | tuple):
            pending.extend(value)
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
            pending.extend(v for v in vars(value).values() if isinstance(v, Tensor | list | tuple | dict))
    sizes.discard(0)
    sizes.discard(1)
    return sizes


def as_patterns(modules: str | Iterable[str] | None, *, argument: str = "modules") -> list[str] | None:
    """Normalise the argument ``modules``: a shell pattern, a list of them, or None for automatic.

    Raises:
        ValueError: if the list is empty.
        TypeError: if an entry is not a string.
    """
    if modules is None:
        return None
    patterns = [modules] if isinstance(modules, str) else list(modules)
    if not patterns:
        raise ValueError(f"{argument} must name at least one pattern, got an empty list; None selects automatically")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} must be shell patterns over dotted names, got {pattern!r}")
    return patterns


def match_modules(root: nn.Module, patterns: list[str], owner: str) -> dict[str, list[str]]:
    """The modules that each pattern names.

    Raises:
        ValueError: if a pattern matches no module; the message has the nearest names.
    """
    names = [name for name, _ in root.named_modules()]
    matched = {p: [n for n in names if fnmatchcase(n, p)] for p in patterns}
    for pattern, found in matched.items():
        if not found:
            close = difflib.get_close_matches(pattern, [n for n in names if n], n=3, cutoff=0.4)
            hint = f"Closest names: {', '.join(close)}." if close else f"Modules: {', '.join(names[1:21])}."
            raise ValueError(
                f"{owner}(modules={pattern!r}) matched 0 of {len(names) - 1} modules in {type(root).__name__}.\n{hint}"
            )
    return matched


def _label(root: nn.Module, name: str) -> str:
    kind = type(root.get_submodule(name)).__name__
    return f"{name} ({kind})" if name else f"{kind} itself"


def _refusal(root: nn.Module, call: Call) -> str | None:
    """Why a call is not a distribution over instances, whatever its shape."""
    parts = call.site.split(".") if call.site else []
    chain = [root.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1)]
    if any("nystrom" in base.__name__.lower() for module in chain for base in type(module).__mro__):
        return (
            "Nystrom attention multiplies three softmax matrices and a pseudo-inverse: the product is not a "
            "distribution over instances (its rows do not sum to 1)"
        )
    if is_square(call.shape, call.dim):
        return f"self-attention over {call.shape[call.dim]} x {call.shape[call.dim]} pairs, not pooling over a bag"
    if call.logits is None:
        return "its keys are not the instances alone (as many queries as keys, or extra keys)"
    return None


def inventory(root: nn.Module, calls: list[Call]) -> str:
    """What a model computed, a line for each place."""
    if not calls:
        return (
            "No softmax, scaled_dot_product_attention or multi_head_attention_forward ran in its forward. If it "
            "computes attention another way, pass modules=function(outputs, batch) that returns the logits."
        )
    lines: dict[str, int] = {}
    for call in calls:
        refusal = _refusal(root, call)
        line = f"  {_label(root, call.site)}: {call.source} over axis {call.dim} of {call.shape}"
        line += f" - {refusal}" if refusal else ""
        lines[line] = lines.get(line, 0) + 1
    shown = [line + (f" ({n} calls)" if n > 1 else "") for line, n in lines.items()]
    more = [f"  ... and {len(shown) - 20} more"] if len(shown) > 20 else []
    return "Attention computed in its forward:\n" + "\n".join(shown[:20] + more)


def _sites(chosen: list[Call], calls: list[Call]) -> list[Site]:
    sites: list[Site] = []
    for key in dict.fromkeys((c.site, c.source, len(c.shape), c.dim) for c in chosen):
        kind = Site(*key, None)
        taken = [c for c in calls if kind.takes(c)]
        mine = [c for c in chosen if kind.takes(c)]
        if len(mine) < len(taken):
            kind = kind._replace(ordinals=frozenset(c.ordinal for c in mine))
        sites.append(kind)
    return sites


def choose(root: nn.Module, calls: list[Call], counts: set[int], patterns: list[str] | None, owner: str) -> list[Site]:
    """Choose the places whose attention is over the instances of a bag.

    Automatic: operations whose softmax axis has the size of a bag, and which are not between equals, and operations
    of one module whose axes add up to a bag (pseudo-bags). With patterns: the same inside the modules
    that they match, or every operation there when none has the size of a bag.

    Args:
        root: the module that ran.
        calls: everything that was intercepted.
        counts: sizes that may be the number of instances.
        patterns: shell patterns over dotted names, or None.
        owner: who asks, for messages.

    Returns:
        At least one place.

    Raises:
        ValueError: if nothing qualifies or the match is ambiguous, with an inventory.
    """
    pool = calls
    if patterns is not None:
        pool = []
        for pattern, names in match_modules(root, patterns, owner).items():
            inside = [c for c in calls if any(c.site == n or not n or c.site.startswith(n + ".") for n in names)]
            if not inside:
                raise ValueError(
                    f"{owner}(modules={pattern!r}) matched {len(names)} modules in {type(root).__name__}, and none of "
                    f"them computed attention.\n{inventory(root, calls)}"
                )
            held = {id(c) for c in pool}
            pool.extend(c for c in inside if id(c) not in held)
    usable = [c for c in pool if _refusal(root, c) is None]
    chosen: list[Call] = []
    for site in dict.fromkeys(c.site for c in usable):
        parts = [c for c in usable if c.site == site]
        pseudo_bags = len(parts) > 1 and sum(c.shape[c.dim] for c in parts) in counts
        chosen.extend(c for c in parts if pseudo_bags or c.shape[c.dim] in counts)
    if not chosen and patterns is not None:
        chosen = usable
    if not chosen:
        reasons = dict.fromkeys(r for c in pool if (r := _refusal(root, c)))
        why = f" Refused: {'; '.join(reasons)}." if reasons else ""
        raise ValueError(
            f"{owner} found no attention over the instances of a bag in {type(root).__name__} (sizes in the batch: "
            f"{', '.join(map(str, sorted(counts))) or 'none above 1'}).{why}\n{inventory(root, calls)}\n"
            "Pass modules= with a pattern over these names, or a function(outputs, batch) that returns the logits."
        )
    kinds = {(type(root.get_submodule(c.site)), c.source, len(c.shape), c.dim) for c in chosen}
    if len(kinds) > 1 and (patterns is None or len({c.site for c in chosen}) < len(kinds)):
        raise ValueError(
            f"{owner} found {len(kinds)} different attentions in {type(root).__name__} and cannot tell which is "
            f"meant.\n{inventory(root, chosen)}\nPass modules= with a pattern that names one of them."
        )
    return _sites(chosen, calls)


def describe(root: nn.Module, records: Iterable[Any]) -> str:
    """The places that were read and how many instances they had, for the line said at the start."""
    groups: dict[tuple[str, str], list[int]] = {}
    for record in records:
        groups.setdefault((record.module, record.source), []).append(record.instances)
    parts = []
    for (module, source), sizes in groups.items():
        low, high = min(sizes), max(sizes)
        span = f"{high:,}" if low == high else f"{low:,} to {high:,}"
        calls = f", {len(sizes)} calls a step" if len(sizes) > 1 else ""
        place = module or type(root).__name__
        parts.append(f"{place}, {source.replace('_', ' ')} over {span} instances{calls}, from logits")
    return "; ".join(parts)


def without_gradient(records: Iterable[Any]) -> list[str]:
    """Names of modules whose recorded attention carries no gradient."""
    return [r.module or "the module itself" for r in records if not r.logits.requires_grad]
