"""A callback that looks at the layers of a model before and after its training, on the same batches."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import torch

from lightning_entropy.functional.inflection import InflectionRule
from lightning_entropy.training.figures import log_figure
from lightning_entropy.training.layer_diagnosis import measure_layers
from lightning_entropy.training.layer_report import LayerDiagnosis
from lightning_entropy.training.lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    submodule,
)

_KEPT = ("entropy", "gradient", "relative_gradient", "decay", "parameter_gradient", "delta_cka", "retained_variance")


class LayerChange(Callback):
    """Diagnoses a model on validation batches before the first step and after the last, and compares the two.

    Attention entropy and gradients of both moments, and Delta-CKA between them in one PCA basis; see
    :func:`~lightning_entropy.diagnose_layers`. The training is not disturbed. With a logger of figures the second
    diagnosis is drawn.

    Args:
        batches: how many validation batches are read.
        max_rows: tokens that Delta-CKA is computed from.
        components: of the shared PCA basis.

    Attributes:
        before: the diagnosis before training, None until then.
        after: the diagnosis after it, with Delta-CKA; None until then, and where weights are not finite.

    Raises:
        MisconfigurationException: if there is no validation data.

    Example:
        >>> LayerChange(batches=2).before is None
        True
    """

    def __init__(self, batches: int = 2, *, max_rows: int = 2048, components: int = 64) -> None:
        if batches < 1:
            raise ValueError(f"batches must be at least 1, got {batches}")
        self.batches, self.max_rows, self.components = batches, max_rows, components
        self.before: LayerDiagnosis | None = None
        self.after: LayerDiagnosis | None = None

    def _look(self, trainer: Trainer, module: LightningModule, earlier: LayerDiagnosis | None) -> LayerDiagnosis:
        loaders = trainer.val_dataloaders
        loader = loaders[0] if isinstance(loaders, list | tuple) and loaders else loaders
        with submodule("utilities.seed").isolate_rng():  # a loader draws a seed when it begins
            batches = [] if loader is None else list(islice(loader, self.batches))
        if not batches:
            raise MisconfigurationException(
                "LayerChange reads validation batches, and there are none when training begins: give the module or "
                "its data a val_dataloader, and leave num_sanity_val_steps above 0"
            )
        options: dict[str, Any] = {"max_rows": self.max_rows, "components": self.components}
        options |= {"compare_with": earlier, "keep_representations": earlier is None}
        return measure_layers(module, batches, rule=InflectionRule(), **options)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Diagnose before the first step."""
        self.before, self.after = self._look(trainer, pl_module, None), None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Diagnose after the last step, and compare."""
        finite = all(bool(torch.isfinite(p).all()) for p in pl_module.parameters())
        if self.before is None or not finite:
            return
        self.after = self._look(trainer, pl_module, self.before)
        if trainer.is_global_zero and trainer.loggers:
            log_figure(trainer, "layer_change/after", self.after.plot())

    def record(self) -> dict[str, dict[str, list[Any]]]:
        """Both diagnoses in plain values: ``before`` and ``after``, each quantity -> a value a layer, None for NaN."""
        found: dict[str, dict[str, list[Any]]] = {}
        for moment, diagnosis in (("before", self.before), ("after", self.after)):
            if diagnosis is None:
                continue
            values: dict[str, list[Any]] = {"layer": diagnosis.layers}
            for name in _KEPT:
                column = [float(getattr(row, name)) for row in diagnosis.rows]
                values[name] = [value if math.isfinite(value) else None for value in column]
            found[moment] = values
        return found


__all__ = ["LayerChange"]
