r"""KappaTune: train the weights with the lowest condition numbers (arXiv 2506.16289).

    kappa(W) = s_max / s_min,    trained are the weights with the lowest kappa under a budget, the rest is frozen

A linear layer whose singular values are alike passes on the most entropy for its norm: with sum s_i^2 fixed, the
log-volume sum ln s_i is largest where kappa = 1. The paper takes weights with a low kappa for the least specialised,
to be trained for a new task at the least cost to what the others hold.

Ours are: certified selection with exact values where they decide; normalisation by shape, since kappa ranks shapes
before anything else; budgets in parameters; zero and rank-deficient weights never chosen; the choice in the checkpoint,
applied again on resume; adapters on exact names in any module; other scores and random choices as controls. The
selection is :func:`lightning_entropy.select_modules`, the training is that of every ``FineTuningCallback``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_entropy.arguments import check_types
from lightning_entropy.observe.model_weights import model_weights
from lightning_entropy.observe.selection import as_patterns
from lightning_entropy.observe.stored_weights import narrow
from lightning_entropy.surgery.budget import BudgetRule
from lightning_entropy.surgery.gradient_scores import GRADIENT_SCORES
from lightning_entropy.surgery.module_scores import score_of
from lightning_entropy.surgery.select_modules import select_modules
from lightning_entropy.surgery.selection import Selection
from lightning_entropy.training.before_fit import training_batches, training_loss
from lightning_entropy.training.figures import log_figure
from lightning_entropy.training.fine_tuning import FineTuningCallback
from lightning_entropy.training.lightning import LightningModule, Trainer


class KappaTune(FineTuningCallback):
    """Trains the weights of a pretrained model that have the lowest condition numbers, or adapters beside them.

    The weights are chosen when they are loaded, before optimizers exist; everything else is frozen but the head of the
    task. Rank zero chooses, checkpoints carry the choice, and a run that resumes takes it. ``<name>_selection.json``
    is written beside the logs of a run that has a logger, and ``chosen.selection`` is the selection.

    Args:
        budget: how much is chosen: a count of tensors, a fraction of them, or a mapping
            (``{"parameters": 0.1}``, ``{"threshold": 30.0}``); see :func:`~lightning_entropy.select_modules`.
        by: the score, and so for the next two; see there.
        normalize: ``"shape"`` or ``"type"``: without it condition numbers rank shapes first.
        largest: choose from the other end of the ranking, as a control.
        mode: ``"full"`` trains the weights themselves, ``"lora"`` adapters of peft beside them.
        rank: of adapters.
        alpha: adapters are scaled by ``alpha / rank``.
        dropout: on the input of adapters.
        head: shell patterns over names of modules that are trained whole and never candidates; ``"auto"`` finds the
            head of the task by its name, None trains none.
        norms: train the scales and shifts of all normalisations too.
        modules: shell patterns of candidates; None takes all.
        exclude: shell patterns of what is no candidate.
        selection: a JSON file of a selection to take instead of choosing.
        save: ``"adapters"``: checkpoints have what is trained alone; ``"all"``.
        batches: of the training data, for scores from gradients.
        seed: of ``by="random"``.
        log_figures: draw the ranking, for the logger.

    Raises:
        ValueError: if an argument is out of range (here), or nothing can be chosen (when the weights are there).
        MisconfigurationException: under a strategy that shards the model; where optimizers exist already.

    Reference:
        arXiv 2506.16289.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[KappaTune(0.2, normalize="shape", mode="lora")])
    """

    log_name = "kappatune"

    def __init__(
        self,
        budget: int | float | dict[str, int | float] = 0.2,
        *,
        by: str = "condition_number",
        normalize: str | None = None,
        largest: bool | None = None,
        mode: str = "full",
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        head: str | list[str] | None = "auto",
        norms: bool = False,
        modules: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        selection: str | Path | None = None,
        save: str = "all",
        batches: int = 8,
        seed: int = 0,
        log_figures: bool = False,
    ) -> None:
        check_types(KappaTune, locals())
        super().__init__(
            mode=mode, rank=rank, alpha=alpha, dropout=dropout, head=head, norms=norms, selection=selection, save=save
        )
        score_of(by, normalize, "KappaTune")
        BudgetRule.of(budget, "KappaTune")
        if batches < 1:
            raise ValueError(f"batches must be >= 1, got {batches}")
        as_patterns(modules)
        as_patterns(exclude, argument="exclude")
        self.budget, self.by, self.normalize, self.largest = budget, by, normalize, largest
        self.modules, self.exclude, self.batches, self.seed = modules, exclude, batches, seed
        self.log_figures = log_figures

    @property
    def state_key(self) -> str:
        """Distinguishes instances by what they choose from."""
        return self._generate_state_key(modules=self.modules, exclude=self.exclude)

    def choose(self, trainer: Trainer, module: LightningModule, *, exclude: list[str]) -> Selection:
        """Score the weights and choose under the budget."""
        options: dict[str, Any] = {
            "by": self.by,
            "normalize": self.normalize,
            "budget": self.budget,
            "largest": self.largest,
            "modules": self.modules,
            "exclude": self._left_out(module, exclude),
            "seed": self.seed,
        }
        if self.by not in GRADIENT_SCORES:
            return select_modules(module, **options)
        trainer.strategy.model_to_device()  # gradients need the data beside the weights; Lightning does the same next
        with training_batches(trainer, module, self.batches) as data:
            loss = lambda _, batch: training_loss(module, batch)  # noqa: E731
            return select_modules(module, data=data, loss=loss, **options)

    def _left_out(self, module: LightningModule, heads: list[str]) -> list[str] | None:
        """Patterns of no candidates; a head that is none anyway is not named, since each pattern must match."""
        weights = model_weights(module)
        patterns = as_patterns(self.modules)
        within = weights if patterns is None else narrow(weights, patterns, self.name)
        inside = [h for h in heads if any(f"{w.module}.".startswith(f"{h}.") for w in within)]
        return [*(as_patterns(self.exclude) or []), *inside] or None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that the choice was made in time, write it, and draw it where asked to."""
        super().on_fit_start(trainer, pl_module)
        if self.log_figures and trainer.is_global_zero and self.chosen is not None:
            log_figure(trainer, f"{self.log_name}/selection", self.chosen.selection.plot())


__all__ = ["KappaTune"]
