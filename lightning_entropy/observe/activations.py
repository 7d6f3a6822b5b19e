"""Reads what goes into the activation functions of an unmodified model: a random sample of each site's input.

The input is read, not the output, since everything follows from it: the activation is computed again in float32 when
its entropy is asked for, where a bfloat16 output would be a few hundred distinct numbers. Nothing of the model's
computation or of its random state is touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_entropy.observe.activation_modules import activation_sites
from lightning_entropy.observe.interception import Handles

_FEWEST_ROWS = 256  # of a sample by channel


class ActivationSample(NamedTuple):
    """What was read of one site.

    Attributes:
        site: dotted name of the module.
        values: a sample of its input, ``(values,)``, or ``(rows, channels)`` where channels are kept apart.
        dtype: what the input was computed in.
        seen: how many values went in.
        calls: how often the module ran.
    """

    site: str
    values: Tensor
    dtype: torch.dtype
    seen: int
    calls: int


def strata(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """``wanted`` different indices below ``count``, one at random in each of as many equal parts."""
    if wanted >= count:
        return torch.arange(count)
    shift = torch.rand(wanted, generator=generator, dtype=torch.float64)
    index = ((torch.arange(wanted, dtype=torch.float64) + shift) * (count / wanted)).long().clamp(max=count - 1)
    return torch.unique(index)  # rounding can let two neighbours meet


class ActivationReader:
    """Keeps a random sample of the inputs of a model's activations.

    Use it as a context for one or more forwards, or attach it once and :meth:`start` and :meth:`stop` it around each
    step. The draws come from a generator of its own. What is recomputed under gradient checkpointing is not read again.

    Args:
        module: any module; it gets hooks, which :meth:`detach` (or leaving the context) removes.
        modules: see :func:`activation_sites`.
        samples: how many values of each site are kept at most.
        per_channel: keep the channels apart; then rows are sampled, and channels where all would be too many.
        channel_dim: which dimension the channels are; None takes 1 for inputs of four dimensions and the last
            otherwise.
        owner: the name that messages carry.

    Raises:
        ValueError: as :func:`activation_sites` does; on leaving the context, if no site ran.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> with ActivationReader(model) as reader:
        ...     _ = model(torch.zeros(3, 4))
        >>> reader.samples[0].site, reader.samples[0].seen
        ('1', 24)
    """

    def __init__(
        self,
        module: nn.Module,
        modules: str | Iterable[str] | None = None,
        *,
        samples: int = 100_000,
        per_channel: bool = False,
        channel_dim: int | None = None,
        owner: str = "ActivationReader",
    ) -> None:
        if samples < 100:
            raise ValueError(f"samples must be at least 100, got {samples}")
        self.module, self.owner = module, owner
        self.wanted, self.per_channel, self.channel_dim = samples, per_channel, channel_dim
        self.sites = activation_sites(module, modules, owner=owner)
        self.recording = False
        self._handles = Handles()
        self._attached = False
        self._later: list[tuple[str, Tensor]] = []
        self._kept: dict[str, ActivationSample] = {}
        self._units: dict[str, int] = {}  # values, or rows, that each site has seen
        self._generator = torch.Generator()

    def attach(self) -> None:
        """Install the hooks. Does nothing when they are installed."""
        if self._attached:
            return
        self._attached = True
        for name, module in self.sites.items():

            def enter(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                if not self.recording:
                    return
                x = args[0] if args else next(iter(kwargs.values()), None)
                if isinstance(x, Tensor):
                    self._note(name, module, x.detach())

            self._handles.before(module, enter)

    def _note(self, name: str, module: nn.Module, x: Tensor) -> None:
        if torch.compiler.is_compiling():
            # Sampled when the step is over; an activation that works in place would overwrite it.
            self._later.append((name, x.clone() if getattr(module, "inplace", False) else x))
        elif torch._C._current_graph_task_id() == -1:  # else a backward pass recomputes a checkpointed forward
            self._keep(name, x)

    def _keep(self, name: str, x: Tensor) -> None:
        if not x.is_floating_point() or x.numel() == 0:
            return
        if self.per_channel or _by_channel(self.sites[name]):
            drawn, units, most = self._rows(name, x)
        else:
            drawn, units, most = self._flat(x), x.numel(), self.wanted
        old = self._kept.get(name)
        if old is None or old.values.shape[1:] != drawn.shape[1:]:
            self._kept[name], self._units[name] = ActivationSample(name, drawn, x.dtype, x.numel(), 1), units
            return
        # Each call has a share of the sample in proportion to what went into it.
        before = self._units[name]
        self._units[name] = total = before + units
        new = round(min(most, total) * units / total)
        values = torch.cat([self._pick(old.values, min(most, total) - new), self._pick(drawn, new)])
        self._kept[name] = old._replace(values=values, seen=old.seen + x.numel(), calls=old.calls + 1)

    def _pick(self, values: Tensor, wanted: int) -> Tensor:
        return values[strata(len(values), wanted, self._generator).to(values.device)]

    def _flat(self, x: Tensor) -> Tensor:
        # A copy, also where all is kept: the next operation may work in place.
        return x.flatten()[strata(x.numel(), self.wanted, self._generator).to(x.device)]

    def _rows(self, name: str, x: Tensor) -> tuple[Tensor, int, int]:
        dim = self.channel_dim
        if dim is None:
            dim = getattr(self.sites[name], "channel_dim", 1 if x.dim() == 4 else -1)
        rows = x.movedim(dim, -1).reshape(-1, x.shape[dim])
        channels = rows.shape[1]
        if not _by_channel(self.sites[name]) and channels * _FEWEST_ROWS > self.wanted:
            fixed = torch.Generator().manual_seed(0)  # the same channels in every call
            chosen = strata(channels, max(1, self.wanted // _FEWEST_ROWS), fixed)
            rows = rows[:, chosen.to(x.device)]
        wanted = max(_FEWEST_ROWS, self.wanted // rows.shape[1])
        return rows[strata(len(rows), wanted, self._generator).to(x.device)], len(rows), wanted

    @property
    def samples(self) -> list[ActivationSample]:
        """One entry for each site that ran since :meth:`start`, in the order of the first run."""
        later, self._later[:] = list(self._later), []
        for name, x in later:
            self._keep(name, x)
        return list(self._kept.values())

    @property
    def has_read(self) -> bool:
        """Whether a site ran since :meth:`start`."""
        return bool(self._kept or self._later)

    def start(self, batch: Any = None, *, seed: int = 0) -> None:
        """Forget what was read, and read from here on; equal seeds draw alike."""
        self.clear()
        self._generator.manual_seed(seed)
        self.recording = True

    def stop(self) -> None:
        """Read no further; what was read stays."""
        self.recording = False

    def clear(self) -> None:
        """Drop what was read."""
        self._later.clear()
        self._kept.clear()
        self._units.clear()

    def detach(self) -> None:
        """Remove every hook and what was read. Safe at any moment and any number of times."""
        self.stop()
        self.clear()
        self._handles.remove()
        self._attached = False

    def __enter__(self) -> ActivationReader:
        self.attach()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._handles.remove()
        self._attached = False
        if kind is None and not self.has_read:
            raise self.nothing_read()

    def nothing_read(self) -> ValueError:
        """The error for a model none of whose activation modules ran."""
        names = list(self.sites)
        return ValueError(
            f"{self.owner}: none of the {len(names)} activation modules of {type(self.module).__name__} ran "
            f"({', '.join(names[:5])}{' ...' if len(names) > 5 else ''}). Fused paths compute activations without "
            "calling their modules, as nn.TransformerEncoderLayer does in evaluation mode."
        )


def _by_channel(module: nn.Module) -> bool:
    """Whether an activation has a parameter for each channel, so that it needs them apart."""
    return any(p.numel() > 1 for p in module.parameters())


__all__ = ["ActivationReader", "ActivationSample", "strata"]
