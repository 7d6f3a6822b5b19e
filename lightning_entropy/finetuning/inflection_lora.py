r"""Inflection layers: adapters where attention is saturated and the gradient is lost, and nowhere else (2511.00797).

A model that was trained long on one task can be confident, with attention that looks at few tokens and gradients that
die on their way down; then what is above the blocked layers learns and what is below does not. The paper finds such
layers by attention entropy and activation gradients and puts LoRA there.

The paper gives neither the weights of its index nor its scales, its gain lies within the spread of its seeds, and its
layers are the same ones in both of its regimes. So this is a diagnosis with a place to act, and ``layers="random"`` is
the control without which a result says little.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_entropy.arguments import check_types
from lightning_entropy.files import atomic_write
from lightning_entropy.functional.inflection import InflectionRule
from lightning_entropy.functional.linear_probe import LinearProbe
from lightning_entropy.observe.selection import as_patterns
from lightning_entropy.surgery.layer_weights import PROJECTIONS
from lightning_entropy.surgery.selection import Selection
from lightning_entropy.training.figures import log_figure
from lightning_entropy.training.fine_tuning import FineTuningCallback
from lightning_entropy.training.fine_tuning_record import FineTuningRecord
from lightning_entropy.training.first_diagnosis import first_diagnosis, weakness
from lightning_entropy.training.layer_choice import as_diagnosis, chosen_layers, in_module, is_named, rule_settings
from lightning_entropy.training.layer_report import LayerDiagnosis
from lightning_entropy.training.layer_selection import select_layers
from lightning_entropy.training.lightning import LightningModule, Trainer, log_prefix
from lightning_entropy.training.signal_recovery import SignalReading, recovery_figure
from lightning_entropy.training.signal_watch import SignalWatch
from lightning_entropy.verbosity import announce

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class InflectionLoRA(FineTuningCallback):
    """Diagnoses a pretrained model on the training data and puts LoRA into its inflection layers.

    Before optimizers exist, rank zero reads ``batches`` training batches, forward and backward, and chooses; or it
    takes a diagnosis that was made before. Everything else is frozen but the head of the task. Checkpoints carry the
    choice, and a run that resumes takes it. ``inflectionlora_diagnosis.json`` and ``inflectionlora_selection.json`` are
    written beside the logs.

    With an interval the first batch is kept, and the layers are measured on it again as training goes, which disturbs
    nothing. Logged are ``inflection_lora/gradient_norm/<layer>``, ``inflection_lora/entropy/<layer>``,
    ``inflection_lora/recovery`` (how many times larger than before the first step the gradient is that arrives at the
    chosen layers and those below them) and ``inflection_lora/relative_recovery`` (the same of the gradient divided by
    the output error).

    Args:
        diagnosis: of this model: a :class:`LayerDiagnosis`, a file of one, or the ``report.json`` of
            ``lightning-entropy diagnose``. None makes one.
        rule: ``"ski"``, ``"intersection"`` or ``"decay"``, and so for the next eight, which are those of
            :class:`~lightning_entropy.functional.InflectionRule`; None keeps the diagnosis' own, ``"ski"`` of a new
            one.
        index_alpha: its ``alpha``: the weight of the entropy in the index.
        minimum: see there.
        quantile: see there.
        flat_entropy: see there.
        flat_gradient: see there.
        peaks: see there.
        top_k: see there.
        band: see there.
        layers: take these instead: shell patterns over dotted names, positions among the diagnosed layers, ``"all"``,
            or ``"random"``: as many as the rule chooses, as a control.
        seed: of ``layers="random"``.
        projections: what is adapted in a chosen layer: ``"attention"`` (queries, keys, values, output),
            ``"attention+mlp"`` (every linear weight), or shell patterns over names of weights and modules.
        rank: of adapters.
        alpha: adapters are scaled by ``alpha / rank``.
        dropout: on the input of adapters.
        head: shell patterns over names of modules that are trained whole; ``"auto"`` finds the head of the task by its
            name, None trains none.
        norms: train the scales and shifts of all normalisations too.
        save: ``"adapters"``: checkpoints have what is trained alone; ``"all"``.
        batches: of the training data, for the diagnosis.
        every_n_steps: measure the layers again after so many optimizer steps.
        every_n_epochs: measure them at the end of every so many epochs.
        weak_features: level of the test that a linear probe on the pooled last hidden state predicts the targets
            better than permuted ones; a warning says so where it does not. Needs 100 samples. None: no test.
        full_path: True trains the layers from the lowest chosen one up, wholly and without adapters; ``"if_weak"`` does
            so where the test says that features are weak.
        log_figures: draw the diagnosis and the recovery, for the logger.

    Attributes:
        diagnosis_made: the diagnosis that chose, None before it is known and on ranks other than zero's.
        layers_taken: names of the layers that were taken.
        features: what the linear probe said; None where it was not asked or had too few samples.
        readings: the measurements at the interval: ``step``, ``recovery``, ``relative_recovery``, ``gradient_norm`` and
            ``entropy`` (layer -> value), ``loss``.

    Raises:
        ValueError: if an argument is out of range (here), or no layer is found (when the weights are there).
        MisconfigurationException: under a strategy that shards the model; where optimizers exist already.

    Reference:
        arXiv 2511.00797.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[InflectionLoRA(rule="intersection", rank=4, every_n_epochs=1)])
    """

    log_name = "inflection_lora"

    def __init__(
        self,
        diagnosis: str | Path | LayerDiagnosis | None = None,
        *,
        rule: str | None = None,
        index_alpha: float | None = None,
        minimum: float | None = None,
        quantile: float | None = None,
        flat_entropy: float | None = None,
        flat_gradient: float | None = None,
        peaks: bool | None = None,
        top_k: int | None = None,
        band: int | None = None,
        layers: str | list[int] | list[str] | None = None,
        seed: int = 0,
        projections: str | list[str] = "attention",
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        head: str | list[str] | None = "auto",
        norms: bool = False,
        save: str = "all",
        batches: int = 8,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        weak_features: float | None = 0.05,
        full_path: bool | str = False,
        log_figures: bool = False,
    ) -> None:
        check_types(InflectionLoRA, locals())
        super().__init__(mode="lora", rank=rank, alpha=alpha, dropout=dropout, head=head, norms=norms, save=save)
        owner = type(self).__name__
        self.rule = rule_settings(
            owner,
            rule=rule,
            alpha=index_alpha,
            minimum=minimum,
            quantile=quantile,
            flat_entropy=flat_entropy,
            flat_gradient=flat_gradient,
            peaks=peaks,
            top_k=top_k,
            band=band,
        )
        if batches < 1:
            raise ValueError(f"batches must be >= 1, got {batches}")
        if weak_features is not None and not 0 < weak_features < 1:
            raise ValueError(f"weak_features must be between 0 and 1, or None, got {weak_features}")
        if full_path not in (True, False, "if_weak"):
            raise ValueError(f"full_path must be True, False or 'if_weak', got {full_path!r}")
        if full_path == "if_weak" and (weak_features is None or diagnosis is not None):
            raise ValueError(
                "full_path='if_weak' needs weak_features and a diagnosis of the run's own data (diagnosis=None)"
            )
        if isinstance(layers, Sequence) and not layers:
            raise ValueError("layers must name at least one layer; None leaves the choice to the diagnosis")
        if projections not in PROJECTIONS:
            as_patterns(projections, argument="projections")
        self.diagnosis, self.layers, self.seed, self.projections = diagnosis, layers, seed, projections
        self.batches, self.weak_features, self.full_path = batches, weak_features, full_path
        self.log_figures = log_figures
        self.diagnosis_made: LayerDiagnosis | None = None
        self.features: LinearProbe | None = None
        self._watch = SignalWatch(owner, every_n_steps, every_n_epochs)
        self._wholly = False

    @property
    def state_key(self) -> str:
        """Distinguishes instances by what they adapt."""
        return self._generate_state_key(layers=self.layers, projections=self.projections)

    @property
    def layers_taken(self) -> list[str]:
        """Names of the layers that were taken."""
        return self._watch.layers

    @property
    def readings(self) -> list[SignalReading]:
        """What was measured during training."""
        return self._watch.readings

    def plot(self) -> Figure:
        """Recovery over the steps.

        Raises:
            ValueError: if nothing was measured during training.
        """
        if not self.readings:
            raise ValueError(f"{self.name} has measured nothing during training: pass every_n_steps or every_n_epochs")
        return recovery_figure(self.readings, f"{self.name}: {', '.join(self.layers_taken[:6])}")

    # The choice, on rank zero

    def decide(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """What to train, and which layers that is."""
        decided = super().decide(trainer, module)
        told = {} if self.diagnosis_made is None else {"diagnosis": self.diagnosis_made.record()}
        mode = "full" if self._wholly else self.mode
        return {"fine_tuning": {**decided, "mode": mode}, "layers": self.layers_taken, **told}

    def take_decision(self, decided: dict[str, Any]) -> FineTuningRecord:
        """The same on every rank."""
        self._watch.begin(decided["layers"])
        if "diagnosis" in decided:
            self.diagnosis_made = LayerDiagnosis.from_record(decided["diagnosis"])
        return super().take_decision(decided["fine_tuning"])

    def choose(self, trainer: Trainer, module: LightningModule, *, exclude: list[str]) -> Selection:
        """Diagnose, choose layers, and name the weights in them."""
        self.diagnosis_made, self.features, self._wholly = None, None, False
        found = self._diagnosis(trainer, module)
        layers, by = chosen_layers(self.layers, found, module, seed=self.seed, owner=self.name)
        self.diagnosis_made = found
        self._watch.begin(layers)
        said = weakness(self.features, self.weak_features, layers[0], wholly=bool(self.full_path))
        if said is not None:
            warnings.warn(f"{self.name}: {said}", stacklevel=2)
        self._wholly = self.full_path is True or (self.full_path == "if_weak" and said is not None)
        projections = None if self._wholly else self.projections
        return select_layers(module, layers, found, by=by, projections=projections, exclude=exclude, owner=self.name)

    def _diagnosis(self, trainer: Trainer, module: LightningModule) -> LayerDiagnosis | None:
        ruled = self.layers is None or self.layers == "random"
        if self.diagnosis is not None:
            return in_module(as_diagnosis(self.diagnosis), module, self.name).choose(**self.rule)
        if is_named(self.layers) and self.weak_features is None:
            return None
        rule = InflectionRule()._replace(**(self.rule if ruled else {"rule": "decay"}))
        found, probe = first_diagnosis(trainer, module, self.batches, rule, probe=self.weak_features is not None)
        self.features = probe if isinstance(probe, LinearProbe) else None
        if isinstance(probe, str):
            announce(f"{self.name}: whether the base features are weak was not tested: {probe}")
        return found

    # During the fit

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that the choice was made in time, write it, and draw it where asked to."""
        super().on_fit_start(trainer, pl_module)
        found = self.diagnosis_made
        if found is None or not trainer.loggers:
            return
        folder = trainer.log_dir  # every rank must ask
        if trainer.is_global_zero and folder is not None:
            with atomic_write(Path(folder) / f"{self.name.lower()}_diagnosis.json") as temporary:
                temporary.write_text(found.to_json() + "\n", encoding="utf-8")
        if self.log_figures and trainer.is_global_zero:
            log_figure(trainer, f"{log_prefix(self, self.log_name, trainer)}/diagnosis", found.plot())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what later measurements are compared with."""
        super().on_train_start(trainer, pl_module)
        self._watch.start(trainer, pl_module, log_prefix(self, self.log_name, trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if enough steps have passed."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._watch.after_step(trainer, pl_module, log_prefix(self, self.log_name, trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure if enough epochs have."""
        self._watch.after_epoch(trainer, pl_module, log_prefix(self, self.log_name, trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the recovery where asked to."""
        if self.log_figures and trainer.is_global_zero and len(self.readings) > 1:
            log_figure(trainer, f"{log_prefix(self, self.log_name, trainer)}/recovery", self.plot())

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The choice, the diagnosis, and what was measured."""
        made = {} if self.diagnosis_made is None else {"diagnosis": self.diagnosis_made.record()}
        return {**super().state_dict(), **made, "watch": self._watch.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was."""
        super().load_state_dict(state_dict)
        if "diagnosis" in state_dict:
            self.diagnosis_made = LayerDiagnosis.from_record(state_dict["diagnosis"])
        if "watch" in state_dict:
            self._watch.load_state_dict(state_dict["watch"])


__all__ = ["InflectionLoRA"]
