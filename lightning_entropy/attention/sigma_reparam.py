r"""SigmaReparam: spectral reparametrisation against attention entropy collapse (arXiv 2303.06296, ICML 2023).

    W_hat = (gamma / sigma(W)) W,    sigma(W) = ||W||_2,    gamma one learned number a weight

The entropy of attention is bounded from below by a function that falls in the spectral norm of the query and key
weights (:func:`lightning_entropy.functional.attention_entropy_lower_bound`). With the norm a parameter of its own, a
step along the gradient by W does not raise it: <dL/dW, W> = 0, since u and v in sigma = u^T W v are constants.

Ours are: one power iteration an optimizer step instead of one a forward, so that accumulated batches and recomputed
(checkpointed) forwards see one sigma; q, k and v of a fused projection apart; sigma as the initial gamma, so that a
trained model is not changed; no weight decay on gamma; weights that are all zeros left alone instead of made NaN. The
surgery is :mod:`lightning_entropy.surgery.sigma_reparametrize`.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_entropy.arguments import check_types
from lightning_entropy.observe.selection import as_patterns
from lightning_entropy.surgery.report import SurgeryReport, name_patterns
from lightning_entropy.surgery.sigma_reparametrize import (
    GAMMA_INITS,
    fold_sigma,
    folded_state_dict,
    sigma_reparametrize,
    update_sigma,
)
from lightning_entropy.surgery.spectral_weight import original, spectral_weights
from lightning_entropy.training.figures import log_figure
from lightning_entropy.training.lightning import LightningModule, Trainer, logs_this_step
from lightning_entropy.training.surgery import SurgeryCallback

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SigmaReparam(SurgeryCallback):
    """Trains a model with spectrally reparametrised weights.

    The weights are rescaled as soon as the model exists (see :func:`sigma_reparametrize`), the singular vectors are
    followed once an optimizer step, and gammas are kept out of weight decay: a parameter group of the user's that
    decays is split in two, before schedulers are built on it. It logs ``sigma_reparam/sigma_max``, ``sigma_mean``,
    ``gamma_max`` and ``gamma_mean`` (the spectral norms of the stored and of the effective weights), every
    ``log_every_n_steps`` steps. ``report.undo()`` or :func:`fold_sigma` leaves a plain model.

    Args:
        modules: see :func:`sigma_reparametrize`, and so for the next two.
        gamma_init: see there.
        split_qkv: see there.
        decay_gamma: leave gammas to the weight decay of their groups.
        log_figures: draw sigma and gamma of every weight at the end of each epoch, for the logger.

    Raises:
        ValueError: if an argument is out of range (here), or as :func:`sigma_reparametrize` (when the model exists).
        MisconfigurationException: under a strategy that shards the model.

    Reference:
        Stabilizing Transformer Training by Preventing Attention Entropy Collapse, arXiv 2303.06296.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SigmaReparam()])
    """

    log_name = "sigma_reparam"

    def __init__(
        self,
        *,
        modules: str | list[str] | None = None,
        gamma_init: str = "sigma",
        split_qkv: bool = True,
        decay_gamma: bool = False,
        log_figures: bool = False,
    ) -> None:
        check_types(SigmaReparam, locals())
        super().__init__()
        as_patterns(modules)
        if gamma_init not in GAMMA_INITS:
            raise ValueError(f"gamma_init must be 'sigma' or 'one', got {gamma_init!r}")
        self.modules = modules
        self.gamma_init = gamma_init
        self.split_qkv = split_qkv
        self.decay_gamma = decay_gamma
        self.log_figures = log_figures
        self._steps = 0

    def operate(self, module: nn.Module) -> SurgeryReport:
        """Rescale the weights."""
        return sigma_reparametrize(module, modules=self.modules, gamma_init=self.gamma_init, split_qkv=self.split_qkv)

    def parameters_without_decay(self, module: nn.Module) -> list[nn.Parameter]:
        """The gammas, unless ``decay_gamma``."""
        return [] if self.decay_gamma else [spectral.gamma for _, _, _, spectral in spectral_weights(module)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count optimizer steps from here; a gamma that no optimizer has is worth a warning."""
        self._steps = trainer.global_step
        optimized = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        forgotten = [
            name
            for name, module, tensor, spectral in spectral_weights(pl_module)
            if id(original(module, tensor)) in optimized and id(spectral.gamma) not in optimized
        ]
        if forgotten and self._leads(trainer):
            warnings.warn(
                f"{self.name}: the optimizers train the weights of {', '.join(name_patterns(forgotten))} and not their "
                "gammas, which stay as they are. Collect the parameters in configure_optimizers, after the surgery.",
                stacklevel=2,
            )

    def _leads(self, trainer: Trainer) -> bool:
        """Several instances work on one model: the first follows all weights."""
        return next(c for c in trainer.callbacks if isinstance(c, SigmaReparam)) is self  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the weights if an optimizer has stepped, and log.

        Not in ``on_before_zero_grad``, which Lightning calls between forward and backward.
        """
        if not self._leads(trainer):
            return
        if trainer.global_step != self._steps:
            self._steps = trainer.global_step
            update_sigma(pl_module)
        if logs_this_step(trainer):
            sigma, gamma = (torch.cat(numbers) for numbers in self._spectra(pl_module)[1:])
            values = {"sigma_max": sigma.max(), "sigma_mean": sigma.mean()}
            values |= {"gamma_max": gamma.max(), "gamma_mean": gamma.mean()}
            named = {f"{self.log_name}/{key}": value for key, value in values.items()}
            pl_module.log_dict(named, on_step=True, on_epoch=False, batch_size=1)

    @torch.no_grad()
    def _spectra(self, module: nn.Module) -> tuple[list[str], list[Tensor], list[Tensor]]:
        """Name, sigma and gamma of each weight."""
        names, sigmas, gammas = [], [], []
        for name, holder, tensor, spectral in spectral_weights(module):
            names.append(f"{name}.{tensor}")
            sigmas.append(spectral.sigma(original(holder, tensor)).float())
            gammas.append(spectral.gamma.float())
        return names, sigmas, gammas

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, where asked to."""
        if self.log_figures and self._leads(trainer) and trainer.is_global_zero:
            log_figure(trainer, f"{self.log_name}/spectral_norms", self._draw(pl_module))

    def _draw(self, module: nn.Module) -> Figure:
        from matplotlib.figure import Figure

        names, sigmas, gammas = self._spectra(module)
        rows = [f"{name}[{part}]" if len(s) > 1 else name for name, s in zip(names, sigmas) for part in "qkv"[: len(s)]]
        figure = Figure(figsize=(7, 1 + 0.18 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for values, label, mark in ((sigmas, "sigma(W), stored", "o"), (gammas, "gamma, effective", "x")):
            axes.plot(torch.cat(values).tolist(), range(len(rows)), mark, markersize=4, label=label)
        axes.set_yticks(range(len(rows)), rows, fontsize=6)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel("spectral norm")
        axes.legend()
        return figure

    def leave_process(self, module: nn.Module) -> None:
        """Fold: the plain model of the process that waits computes the same with the effective weights."""
        fold_sigma(module)
        if self.report is not None:
            self.report.undo()


__all__ = ["SigmaReparam", "fold_sigma", "folded_state_dict", "sigma_reparametrize", "update_sigma"]
