"""The diagnosis of a run's own model on its own data before its optimizers exist, and whether its features are weak."""

from __future__ import annotations

from lightning_entropy.functional.inflection import InflectionRule
from lightning_entropy.functional.linear_probe import LinearProbe
from lightning_entropy.training.before_fit import training_batches
from lightning_entropy.training.diagnosis_totals import in_one_process
from lightning_entropy.training.feature_reader import FeatureReader
from lightning_entropy.training.layer_diagnosis import measure_layers
from lightning_entropy.training.layer_report import LayerDiagnosis
from lightning_entropy.training.lightning import LightningModule, Trainer


def first_diagnosis(
    trainer: Trainer, module: LightningModule, count: int, rule: InflectionRule, *, probe: bool
) -> tuple[LayerDiagnosis, LinearProbe | str | None]:
    """Diagnose on the first training batches, in this process alone.

    Args:
        trainer: inside ``fit``, before the strategy is set up.
        module: its module.
        count: of batches.
        rule: how layers are chosen.
        probe: ask a linear probe what the last layer's features say of the targets.

    Returns:
        The diagnosis; and the probe, why there is none in words, or None where it was not asked.
    """
    trainer.strategy.model_to_device()  # gradients need the data beside the weights; Lightning does the same next
    reader = FeatureReader() if probe else None
    with training_batches(trainer, module, count) as data, in_one_process():
        found = measure_layers(module, data, rule=rule, features=reader)
    return found, None if reader is None else reader.probe()


def weakness(probe: LinearProbe | None, level: float | None, lowest: str, *, wholly: bool) -> str | None:
    """What to say of features that are weak; None of others.

    Args:
        probe: of them; None where there was none.
        level: of the test; None for no test.
        lowest: name of the lowest layer that is trained.
        wholly: whether the layers from there up are trained wholly.
    """
    if probe is None or level is None or probe.p_value <= level:
        return None
    said = "are trained wholly instead" if wholly else "can be trained wholly instead: full_path=True"
    return (
        "the base features are weak for this task: a linear probe on the pooled last hidden state predicts the targets "
        f"no better than chance ({probe}). Adapters in a few layers reuse features and may not make new ones. The "
        f"layers from {lowest} up {said}."
    )


__all__ = ["first_diagnosis", "weakness"]
