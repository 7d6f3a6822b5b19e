"""Trains a model with other activations: the callback of :func:`swap_activations`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_entropy.activation.swap import swap_activations
from lightning_entropy.activation.swap_rules import activation_rules, named_activation
from lightning_entropy.arguments import check_types
from lightning_entropy.observe.selection import as_patterns
from lightning_entropy.surgery.report import SurgeryReport, name_patterns
from lightning_entropy.surgery.swap_checkpoint import SwapCheckpoint
from lightning_entropy.surgery.swap_report import SwapReport
from lightning_entropy.training.figures import log_figure
from lightning_entropy.training.lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    is_compiled,
    logs_this_step,
)
from lightning_entropy.training.surgery import SurgeryCallback

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of a site's input this many values are looked at once an epoch.
_SAMPLE = 20_000


class ActivationSwap(SurgeryCallback):
    """Exchanges activations of the LightningModule before weights are restored and optimizers are built.

    Parameters of the new activations get no weight decay, whatever ``configure_optimizers`` says; a run in which no
    optimizer has them ends at its start. A checkpoint of the plain model can be loaded (the new parameters keep their
    initial values); one in which other activations were swapped is refused.

    Logged are the mean, smallest and largest value of each kind of new parameter (``activation/eps_mean`` and so on for
    CRReLU), and, from the first batch of each epoch, the spread of what goes into the new activations
    (``activation/input_std_mean``, ``_min``, ``_max``). With ``log_figures`` each epoch draws both over depth.

    Args:
        old: see :func:`swap_activations`: a name or a list of names here.
        new: a name, or the dotted path of a class (``"torch.nn.Mish"``).
        new_options: keyword arguments of the new activation's class.
        modules: see there, and so for ``share``.
        share: see there.
        check: whether the model is run once for the check, if an input for it can be found.
        decay: True lets the optimizer decay the new parameters like others.
        input_spread: whether to look at the inputs of the activations, once an epoch; not in compiled modules.
        log_figures: whether to draw.

    Raises:
        ValueError: as :func:`swap_activations` does, when the model exists.
        MisconfigurationException: at the start of training, if no optimizer has the new parameters.
        RuntimeError: when a checkpoint with other swaps is loaded.

    Reference:
        arXiv 2405.12954 for CRReLU, the default.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ActivationSwap(old="gelu", new="silu")])
    """

    log_name = "activation"

    def __init__(
        self,
        old: str | list[str] | None = None,
        new: str = "crrelu",
        *,
        new_options: dict[str, Any] | None = None,
        modules: str | list[str] | None = None,
        share: bool = False,
        check: bool = True,
        decay: bool = False,
        input_spread: bool = True,
        log_figures: bool = False,
    ) -> None:
        check_types(ActivationSwap, locals())
        super().__init__()
        as_patterns(modules)
        self.old, self.new, self.new_options = old, new, dict(new_options or {})
        self.modules, self.share, self.check, self.decay = modules, share, check, decay
        self.input_spread, self.log_figures = input_spread, log_figures
        activation_rules(self._olds(), self._factory())  # it knows the names
        self._input_hooks: list[Any] = []
        self._input_std: dict[str, float] = {}

    def _olds(self) -> Any:
        return tuple(self.old) if isinstance(self.old, list) else self.old

    def _factory(self) -> Any:
        return named_activation(self.new, self.new_options)

    @property
    def state_key(self) -> str:
        """Distinguishes instances by what they exchange."""
        return self._generate_state_key(old=self.old, modules=self.modules)

    def operate(self, module: nn.Module) -> SurgeryReport:
        """Exchange the activations."""
        # No optimizer is meant: those of an earlier fit are not the ones that Lightning builds for this one.
        report = swap_activations(
            module, old=self._olds(), new=self._factory(), modules=self.modules, share=self.share, example=self.check,
            optimizer=(),
        )  # fmt: skip
        if report.added_parameters:
            hook = module._register_load_state_dict_pre_hook(  # its public name is newer than torch 2.4
                SwapCheckpoint(self.name, [s.name for s in report.swapped]), with_module=True
            )
            report.on_undo(hook.remove)
        return report

    def parameters_without_decay(self, module: nn.Module) -> list[nn.Parameter]:
        """The new parameters, unless they are to decay."""
        return [] if self.decay else [p for _, p in self._parameters(module)]

    def _swapped(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """The new activations by name, in the order of their first use."""
        if not isinstance(self.report, SwapReport) or self.report.undone:
            return []
        names = [*(record.name for record in self.report.swapped), *self.report.already]
        return [(name, module.get_submodule(name)) for name in names]

    def _parameters(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for name, activation in self._swapped(module):
            for key, parameter in activation.named_parameters():
                found.setdefault(id(parameter), (f"{name}.{key}", parameter))
        return list(found.values())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that every new parameter is in an optimizer."""
        if not trainer.optimizers:
            return
        optimized = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        parameters = self._parameters(pl_module)
        forgotten = [name for name, p in parameters if p.requires_grad and id(p) not in optimized]
        if forgotten:
            raise MisconfigurationException(
                f"{self.name}: no optimizer has {', '.join(name_patterns(forgotten)[:6])} ({len(forgotten)} of "
                f"{len(parameters)} new parameters), which would never move. Collect the parameters in "
                "configure_optimizers, after the model was changed, and do not choose them by a list made before."
            )
        frozen = [name for name, p in parameters if not p.requires_grad]
        if frozen:
            warnings.warn(
                f"{self.name}: {', '.join(name_patterns(frozen)[:6])} do not require a gradient and keep their values.",
                stacklevel=2,
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """In the first batch of an epoch, look at what goes into the activations."""
        if self.input_spread and batch_idx == 0 and not is_compiled(pl_module):  # each hook would compile it again
            self._input_std = {}
            for name, activation in self._swapped(pl_module):
                self._input_hooks.append(activation.register_forward_pre_hook(self._reader(name)))

    def _reader(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def read(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                values = args[0].detach().flatten()
                step = max(1, values.numel() // _SAMPLE)
                self._input_std[name] = float(values[::step].float().std(correction=0))

        return read

    def _stop_reading(self) -> None:
        for hook in self._input_hooks:
            hook.remove()
        self._input_hooks = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log."""
        values: dict[str, float | Tensor] = {}
        if self._input_hooks:
            self._stop_reading()
            if self._input_std:
                values |= _summary("input_std", torch.tensor(list(self._input_std.values())))
        if logs_this_step(trainer):
            for key, numbers in self._values(pl_module).items():
                values |= _summary(key, torch.cat(list(numbers.values())))
        if values:
            named = {f"{self.log_name}/{key}": value for key, value in values.items()}
            pl_module.log_dict(named, on_step=True, on_epoch=False, batch_size=1)

    @torch.no_grad()
    def _values(self, module: nn.Module) -> dict[str, dict[str, Tensor]]:
        """The new parameters by their own name, then by the activation's, flat."""
        found: dict[str, dict[str, Tensor]] = {}
        for full, parameter in self._parameters(module):
            name, _, key = full.rpartition(".")
            found.setdefault(key, {})[name] = parameter.detach().float().flatten()
        return found

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, where asked to."""
        if not self.log_figures or not trainer.is_global_zero:
            return
        for key, numbers in self._values(pl_module).items():
            log_figure(trainer, f"{self.log_name}/{key}", _depth_figure(key, numbers, self._input_std))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        super().on_exception(trainer, pl_module, exception)
        self._stop_reading()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        super().teardown(trainer, pl_module, stage)
        self._stop_reading()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the swap of a checkpoint with this one.

        Raises:
            RuntimeError: if other activations were swapped, or for others.
        """
        record = (state_dict.get("report") or {}).get("swapped")
        if record is None or not isinstance(self.report, SwapReport):
            return
        there = {s["name"]: s["new"] for s in record}
        here = {s.name: s.new for s in self.report.swapped}
        other = sorted({n for n in there.keys() | here.keys() if there.get(n) != here.get(n)})
        if other and here:
            raise RuntimeError(
                f"{self.name}: the checkpoint was written with other activations at "
                f"{', '.join(name_patterns(other)[:5])} "
                f"({there.get(other[0], 'none swapped')} there, {here.get(other[0], 'none swapped')} here). Use the "
                "old=, new= and modules= with which it was trained."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_input_hooks": []}


def _summary(key: str, values: Tensor) -> dict[str, Tensor]:
    return {f"{key}_mean": values.mean(), f"{key}_min": values.min(), f"{key}_max": values.max()}


def _depth_figure(key: str, numbers: dict[str, Tensor], spread: dict[str, float]) -> Figure:
    """Parameters over depth, a box for each activation that has several; below the spread of its inputs."""
    from matplotlib.figure import Figure

    names = list(numbers)
    rows = 2 if spread else 1
    figure = Figure(figsize=(max(5.0, 0.22 * len(names)), 2.4 * rows + 1), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False, sharex=True)[:, 0]
    places = range(len(names))
    if any(values.numel() > 1 for values in numbers.values()):
        axes[0].boxplot([values.tolist() for values in numbers.values()], positions=list(places), widths=0.6)
    else:
        axes[0].plot(places, [float(values) for values in numbers.values()], "o-", markersize=4)
    axes[0].axhline(0, color="0.7", linewidth=0.8)
    axes[0].set_ylabel(key)
    if spread:
        axes[1].plot(places, [spread.get(name, float("nan")) for name in names], "o-", markersize=4, color="C1")
        axes[1].set_ylabel("std of the input")
    axes[-1].set_xticks(list(places), names, rotation=90, fontsize=6)
    axes[0].set_title(f"{key} of the new activations, in the order in which they run", fontsize=9)
    return figure


__all__ = ["ActivationSwap"]
