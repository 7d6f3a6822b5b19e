"""Measures where the bumps of a model's CRReLU modules should stand: at the pre-activations, as wide as they spread.

The paper takes pre-activations to be standard normal. In trained networks their spread is often near 0.2, and there
the uncalibrated bump is a straight line: CRReLU is a leaky ReLU of slope eps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_entropy.activation.crrelu import CRReLU
from lightning_entropy.observe.selection import as_patterns, match_modules
from lightning_entropy.verbosity import announce


class CalibratedSite(NamedTuple):
    """Mean and standard deviation of what entered a module, over ``values`` numbers; for each channel, where it has."""

    module: str
    mu: list[float]
    sigma: list[float]
    values: int


@dataclass
class Calibration:
    """What :func:`calibrate` measured and set; prints as a table.

    Attributes:
        sites: in the order of the model's modules.
        not_run: modules that the batches did not reach; they are left as they were.
    """

    sites: list[CalibratedSite]
    not_run: list[str] = field(default_factory=list)
    _before: list[tuple[CRReLU, Tensor | None, Tensor | None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Give every module the centre and width that it had."""
        for module, mu, sigma in self._before:
            module.mu, module.sigma = mu, sigma

    def to_json(self) -> str:
        """The measured numbers as JSON."""
        return json.dumps({"sites": [site._asdict() for site in self.sites], "not_run": self.not_run})

    def __str__(self) -> str:
        width = max([len("module"), *(len(site.module) for site in self.sites)])
        lines = [f"{'module':{width}s} {'mu':>10s} {'sigma':>10s} {'values':>10s}"]
        for site in self.sites:
            mu, sigma = sum(site.mu) / len(site.mu), sum(site.sigma) / len(site.sigma)
            note = f"  mean of {len(site.mu)} channels" if len(site.mu) > 1 else ""
            lines.append(f"{site.module:{width}s} {mu:10.4f} {sigma:10.4f} {site.values:10d}{note}")
        if self.not_run:
            lines.append(f"not run: {', '.join(self.not_run)}")
        return "\n".join(lines)


class _Moments:
    """Count, mean and sum of squared deviations, merged batch by batch in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take in ``(channels, values)``."""
        x = x.detach().double()
        count, mean = x.shape[1], x.mean(1)
        squares = (x - mean[:, None]).square().sum(1)
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total = self.count + count
        step = mean - self.mean
        self.squares = self.squares + squares + step.square() * self.count * count / total
        self.mean = self.mean + step * count / total
        self.count = total


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    modules: str | Iterable[str] | None = None,
    call: Callable[[nn.Module, Any], Any] | None = None,
) -> Calibration:
    r"""Set mu and sigma of every CRReLU to mean and standard deviation of what enters it.

    All are measured in one pass, with the bumps as they are, and then set; with ``scope="channel"`` for each channel.
    The model runs in evaluation mode and gets its modes back. mu and sigma are buffers: they are saved, and under DDP
    they are those of the first process.

    Args:
        model: holds the modules; changed in place.
        batches: what the model is called on: a tensor, a tuple of arguments, or a mapping of them. A few hundred
            thousand pre-activations for each module are ample.
        modules: shell patterns over dotted names; None takes every CRReLU.
        call: ``call(model, batch)``, where a batch is none of these.

    Returns:
        What was measured; ``undo()`` restores.

    Raises:
        ValueError: if there is no CRReLU, a pattern matches none, nothing ran, or a pre-activation does not vary.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4), CRReLU())
        >>> print(calibrate(model, [torch.randn(100, 8)]).sites[0].values)
        400
    """
    chosen = _chosen(model, modules)
    moments = {name: _Moments() for name in chosen}
    hooks = [module.register_forward_pre_hook(_reader(module, moments[name])) for name, module in chosen.items()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for batch in batches:
            if call is not None:
                call(model, batch)
            elif isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, tuple | list):
                model(*batch)
            else:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    return _set(chosen, moments)


def _chosen(model: nn.Module, modules: str | Iterable[str] | None) -> dict[str, CRReLU]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, CRReLU)}
    if not found:
        kinds = sorted({type(m).__name__ for m in model.modules() if not any(True for _ in m.children())})
        raise ValueError(
            f"calibrate found no CRReLU in {type(model).__name__} (its leaves are {', '.join(kinds)}): "
            'call swap_activations(model, old=..., new="crrelu") first'
        )
    patterns = as_patterns(modules)
    if patterns is None:
        return found
    matched = match_modules(model, patterns, "calibrate")
    for pattern, names in matched.items():
        if not any(name in found for name in names):
            raise ValueError(f"calibrate(modules={pattern!r}) matched no CRReLU; there are {', '.join(found)}")
    return {name: module for name, module in found.items() if any(name in names for names in matched.values())}


def _reader(module: CRReLU, moments: _Moments) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def read(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        if module.scope == "channel":
            moments.add(x.movedim(module.channel_dim, 0).flatten(1))
        else:
            moments.add(x.reshape(1, -1))

    return read


def _set(chosen: dict[str, CRReLU], moments: dict[str, _Moments]) -> Calibration:
    sites, not_run = [], []
    for name, m in moments.items():
        if m.mean is None or m.squares is None:
            not_run.append(name)
            continue
        sigma = (m.squares / m.count).sqrt()
        if not bool((sigma.isfinite() & (sigma > 0)).all()):
            raise ValueError(f"calibrate: what enters {name} does not vary, or is not finite (sigma {sigma.tolist()})")
        sites.append(CalibratedSite(name, m.mean.tolist(), sigma.tolist(), m.count))
    if not sites:
        raise ValueError(f"calibrate: the batches reached none of {', '.join(chosen)}")
    before = [(chosen[site.module], chosen[site.module].mu, chosen[site.module].sigma) for site in sites]
    for site in sites:
        chosen[site.module].set_bump(torch.tensor(site.mu), torch.tensor(site.sigma))
    widths = [sum(site.sigma) / len(site.sigma) for site in sites]
    missed = f"; not run: {', '.join(not_run)}" if not_run else ""
    announce(f"CRReLU: calibrated {len(sites)} sites, sigma {min(widths):.3g} to {max(widths):.3g}{missed}")
    return Calibration(sites, not_run, before)
