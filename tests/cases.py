"""One case a method: what the generated suite needs to try it. A new method adds a case here and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule

from lightning_entropy import (
    ActivationEntropyMonitor,
    ActivationSwap,
    AttentionEntropyMaximization,
    AttentionEntropyMonitor,
    AttentionEntropyRegularizer,
    BackgroundActivationSuppression,
    EntropyGuidedSurgery,
    ForgettingMonitor,
    InflectionLoRA,
    KappaTune,
    LearnableTemperature,
    SigmaReparam,
    SoftplusAttention,
)
from tests.user_modules import BagClassifier, MeanClassifier, PicturedTokens, TokenClassifier, bags, pictured_bags


@dataclass(frozen=True)
class Case:
    """A method under test.

    ``without_target`` is a module in which the method finds nothing; ``error`` is part of what it says then.
    ``incompatible_with`` maps another case's name to the reason for which the two refuse each other.
    ``weighted``: has a weight and a schedule, and trains bitwise as without it at weight 0.
    ``only_watches``: trains bitwise as without it, always.
    ``undo``: what takes a surgery back; a method without one leaves nothing behind by itself.
    ``sharded``: what FSDP2 is refused with; None where it works.
    ``reentrant``: what reentrant gradient checkpointing is refused with; None where it works.
    ``manual``: what manual optimization is refused with; None where it works.
    """

    name: str
    make: Callable[..., Any]
    arguments: dict[str, Any]
    class_path: str
    module: Callable[..., LightningModule] = BagClassifier
    batches: Callable[..., list] = bags
    without_target: Callable[..., LightningModule] = MeanClassifier
    error: str = "found no attention"
    second: dict[str, Any] = field(default_factory=dict)
    incompatible_with: dict[str, str] = field(default_factory=dict)
    weighted: bool = True
    only_watches: bool = False
    undo: Callable[[Any], None] | None = None
    sharded: str | None = None
    reentrant: str | None = None
    manual: str | None = None

    def build(self, **changes: Any) -> Any:
        return self.make(**{**self.arguments, **changes})

    def steady(self) -> Any:
        """Built with a weight that does not change over the run."""
        return self.build(schedule="constant") if self.weighted else self.build()


CASES = [
    Case(
        "aem",
        AttentionEntropyMaximization,
        {"weight": 0.3, "schedule": "cosine"},
        "lightning_entropy.AttentionEntropyMaximization",
        second={"modules": "pool", "weight": 0.05, "top_k": 3},
        reentrant="use_reentrant=False works",
    ),
    Case(
        "entropy_regularizer",
        AttentionEntropyRegularizer,
        {"weight": 3.0, "objective": "floor", "target": 0.999, "schedule": "cosine"},
        "lightning_entropy.AttentionEntropyRegularizer",
        module=TokenClassifier,
        without_target=BagClassifier,
        error="no attention between tokens ran in BagClassifier",
        second={"modules": "pool.layers.1*", "objective": "ceiling", "target": 0.5, "weight": 0.05},
        reentrant="use_reentrant=False works",
    ),
    Case(
        "softplus_attention",
        SoftplusAttention,
        {"variant": "lssar", "power": 3},
        "lightning_entropy.SoftplusAttention",
        module=TokenClassifier,
        without_target=MeanClassifier,
        error="SoftplusAttention found no attention",
        second={"modules": "pool.layers.1*"},
        weighted=False,
        undo=lambda callback: callback.report.undo(),
        sharded="shards it",
        incompatible_with={
            "entropy_regularizer": "no attention between tokens ran",
            "learnable_temperature": "cannot be combined",
        },
    ),
    Case(
        "learnable_temperature",
        LearnableTemperature,
        {"init": 1.0},
        "lightning_entropy.LearnableTemperature",
        module=TokenClassifier,
        without_target=MeanClassifier,
        error="LearnableTemperature found no attention",
        second={"modules": "pool.layers.1*"},
        weighted=False,
        undo=lambda callback: callback.report.undo(),
        sharded="shards it",
    ),
    Case(
        "sigma_reparam",
        SigmaReparam,
        {"modules": "pool*"},
        "lightning_entropy.SigmaReparam",
        module=TokenClassifier,
        error="none of them holds",
        second={"modules": "head", "gamma_init": "one"},
        weighted=False,
        undo=lambda callback: callback.report.undo(),
        sharded="shards it",
    ),
    Case(
        "entropy_guided_surgery",
        EntropyGuidedSurgery,
        {"modules": "pool*"},
        "lightning_entropy.EntropyGuidedSurgery",
        module=TokenClassifier,
        without_target=BagClassifier,
        error="found no feed-forward",
        second={"modules": "pool.layers.1*", "scale": False, "remove_norm": True},
        weighted=False,
        undo=lambda callback: callback.report.undo(),
        sharded="shards it",
    ),
    Case(
        "activation_swap",
        ActivationSwap,
        {"old": "relu", "new": "crrelu"},
        "lightning_entropy.ActivationSwap",
        module=TokenClassifier,
        without_target=BagClassifier,
        error="swapped nothing",
        second={"old": "relu", "new": "crrelu", "modules": "pool.layers.1*"},
        weighted=False,
        undo=lambda callback: callback.report.undo(),
        sharded="shards it",
    ),
    Case(
        "entropy_monitor",
        AttentionEntropyMonitor,
        {"every_n_steps": 2, "patience": 50},  # under a floor of 0.999 its alarm for uniform heads is right to go off
        "lightning_entropy.AttentionEntropyMonitor",
        module=TokenClassifier,
        without_target=BagClassifier,
        error="no attention between tokens ran in BagClassifier",
        second={"modules": "pool.layers.1*", "every_n_steps": 3, "queries": 4},
        weighted=False,
        only_watches=True,
        incompatible_with={"softplus_attention": "no attention between tokens ran"},
    ),
    Case(
        "activation_entropy_monitor",
        ActivationEntropyMonitor,
        {"every_n_steps": 1, "samples": 1000},
        "lightning_entropy.ActivationEntropyMonitor",
        without_target=MeanClassifier,
        error="found no activation module in MeanClassifier",
        second={"modules": "pool"},
        weighted=False,
        only_watches=True,
    ),
    Case(
        "forgetting_monitor",
        ForgettingMonitor,
        {"metric": "accuracy", "every_n_steps": 3},
        "lightning_entropy.ForgettingMonitor",
        module=TokenClassifier,
        without_target=BagClassifier,
        error="found no old-task data",
        second={"metric": "perplexity", "every_n_steps": None, "before": False},
        weighted=False,
        only_watches=True,
    ),
    Case(
        "kappatune",
        KappaTune,
        {"budget": 0.4, "normalize": "shape", "modules": "pool*"},
        "lightning_entropy.KappaTune",
        module=TokenClassifier,
        error="names none of the",
        second={"modules": "pool.layers.1*", "head": None},
        weighted=False,
        undo=lambda callback: callback.report.undo(),
        sharded="shards it",
        incompatible_with={"sigma_reparam": "parametri"},
    ),
    Case(
        "kappatune_lora",
        KappaTune,
        {
            "budget": 0.4,
            "normalize": "shape",
            "modules": "pool*",
            "exclude": "pool.bag*",
            "mode": "lora",
            "rank": 2,
        },
        "lightning_entropy.KappaTune",
        module=TokenClassifier,
        error="names none of the",
        second={"modules": "pool.layers.1*", "exclude": None, "head": None, "mode": "full"},
        weighted=False,
        undo=lambda callback: callback.report.undo(),
        sharded="shards it",
        incompatible_with={"sigma_reparam": "parametri"},
    ),
    Case(
        "inflection_lora",
        InflectionLoRA,
        {
            "minimum": 0.0,
            "peaks": False,
            "top_k": 1,
            "flat_entropy": 0.0,
            "flat_gradient": 0.0,
            "rank": 2,
            "every_n_epochs": 1,
        },
        "lightning_entropy.InflectionLoRA",
        module=TokenClassifier,
        error="no attention between tokens ran",
        second={"layers": "pool.layers.0", "projections": "*linear1", "head": None},
        weighted=False,
        undo=lambda callback: callback.report and callback.report.undo(),
        sharded="shards it",
        reentrant="use_reentrant=False works",
        manual="optimizes manually",
        incompatible_with={"sigma_reparam": "parametri", "softplus_attention": "no attention between tokens ran"},
    ),
    Case(
        "bas",
        BackgroundActivationSuppression,
        {"split": "picture.stage3", "input_shape": [3, 12, 12], "weight": 0.3, "schedule": "cosine"},
        "lightning_entropy.BackgroundActivationSuppression",
        module=PicturedTokens,
        batches=pictured_bags,
        without_target=TokenClassifier,
        error="picture.stage3",
        second={"split": "picture.stage2", "weight": 0.05},
        undo=lambda callback: callback.report and callback.report.undo(),
        sharded="shards it",
        reentrant="did not run with gradient",
    ),
]
