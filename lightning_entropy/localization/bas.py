r"""BAS: background activation suppression (arXiv 2112.00580, CVPR 2022; extension arXiv 2309.12943).

A classifier is split into a head, F = head(x), and a tail whose class map A gives the logits by its mean. A generator
on F gives a foreground map M for the label y, trained so that what is left of the activation of y without the
foreground is small, while the foreground stays small:

    L = L_task + w (alpha CE(mean(A * pool(M)), y) + mean(S_bg / S) + beta mean(M))

S is the logit of y, without gradient, and S_bg the logit of y of tail(F * (1 - M)), where neither F nor the tail takes
a gradient. F is not detached where it enters the generator, so the head learns from M too. The task's loss is the
user's own.

Ours are that the classifier is not edited, that only the label's map is computed, and that the masked pass copies no
weights. The term enters in ``on_before_backward``; the features and the last map are those of the user's own forward
of that step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_entropy.arguments import check_types
from lightning_entropy.functional.bas import VARIANTS, check_factors
from lightning_entropy.localization.bas_step import bas_parts
from lightning_entropy.localization.foreground_generator import ForegroundGenerator
from lightning_entropy.localization.image_labels import check_range, draw_label, find_labels
from lightning_entropy.surgery.frozen_call import BATCH_NORM_MODES
from lightning_entropy.surgery.report import Change, SurgeryReport
from lightning_entropy.surgery.split_backbone import SplitBackbone
from lightning_entropy.surgery.split_classifier import split_classifier
from lightning_entropy.surgery.split_reader import SplitPass, SplitReader
from lightning_entropy.training.backward import add_to_loss
from lightning_entropy.training.lightning import LightningModule, MisconfigurationException, Trainer
from lightning_entropy.training.loss_term import LossTerm
from lightning_entropy.training.next_call import around_next_call
from lightning_entropy.training.parameter_groups import own_groups
from lightning_entropy.training.schedule import WeightSchedule
from lightning_entropy.training.surgery import SurgeryCallback


class BackgroundActivationSuppression(LossTerm, SurgeryCallback):
    """Trains a foreground map beside any image classifier, from image labels alone.

    Add it to any Trainer whose module trains a classifier. The classifier is found around ``split`` and not edited; a
    :class:`ForegroundGenerator` is added to the LightningModule as soon as the model exists, so an optimizer over
    ``self.parameters()`` has it, in a group of its own with ``lr_factor`` times the learning rate. Checkpoints hold it.

    It logs, every ``log_every_n_steps`` steps, ``bas/loss``, ``bas/ratio``, ``bas/area``, ``bas/guidance``,
    ``bas/exceeding_fraction`` (images whose background exceeds the whole: no gradient from the ratio) and
    ``bas/dead_fraction`` (images whose logit of the label is not positive).

    Args:
        split: dotted name of the module whose input are the features: ``"net.layer4"`` of a ResNet, ``"net.blocks.9"``
            of a ViT with average pooling.
        classes: number of classes; None takes the classifier's.
        classifier: dotted name of the linear layer that gives the logits; None: the last one that runs.
        alpha: factor of the foreground region guidance.
        beta: factor of the area; a larger one gives a smaller foreground.
        variant: of the ratio, see :func:`lightning_entropy.functional.background_activation_ratio`.
        bn_mode: batch normalisation of the masked pass: ``"batch"``, as the official code, is normalised by the masked
            features' statistics while the model trains; ``"eval"`` by the running ones.
        multilabel: images have several labels, ``(batch, classes)`` of zeros and ones; each step takes one of an
            image's labels at random. Images without a label are left out.
        guide_classifier: whether the guidance trains the classifier too; the paper's segmentation trains the map alone.
        lr_factor: learning rate of the generator over that of its group; 1 leaves it in the group.
        target: key or index of the labels in the batch, see
            :func:`lightning_entropy.localization.image_labels.find_labels`; None finds them.
        input_shape: ``(channels, height, width)`` of images on which the split is checked; None guesses.
        seed: of the generator's initial weights and of the random labels.
        weight: factor of the whole term; the paper's is 1.
        schedule: of the weight, see :class:`lightning_entropy.training.WeightSchedule`.
        end_weight: the weight at the end of a linear or cosine schedule.

    Raises:
        ValueError: if an argument is out of range (here), if the classifier cannot be split there, with the reason
            (when the model exists), or if the labels are not found (in the first step).
        MisconfigurationException: if no optimizer has the generator's parameters, and under sharding strategies.

    Reference:
        Background Activation Suppression for Weakly Supervised Object Localization, arXiv 2112.00580; and Semantic
        Segmentation, arXiv 2309.12943.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[BackgroundActivationSuppression("net.layer4", alpha=0.5, beta=1.5)])
    """

    log_name = "bas"

    def __init__(
        self,
        split: str,
        *,
        classes: int | None = None,
        classifier: str | None = None,
        alpha: float = 0.5,
        beta: float = 1.2,
        variant: str = "extension",
        bn_mode: str = "batch",
        multilabel: bool = False,
        guide_classifier: bool = True,
        lr_factor: float = 10.0,
        target: str | int | None = None,
        input_shape: tuple[int, int, int] | list[int] | None = None,
        seed: int = 0,
        weight: float = 1.0,
        schedule: str | WeightSchedule = "constant",
        end_weight: float = 0.0,
    ) -> None:
        check_types(BackgroundActivationSuppression, locals())
        LossTerm.__init__(self, weight, schedule=schedule, end_weight=end_weight)
        SurgeryCallback.__init__(self)
        check_factors(alpha=alpha, beta=beta)
        for name, value, known in (("variant", variant, VARIANTS), ("bn_mode", bn_mode, BATCH_NORM_MODES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if not 0 < lr_factor < float("inf"):
            raise ValueError(f"lr_factor must be finite and positive, got {lr_factor}")
        if not split:
            raise ValueError("split must name the module whose input are the features, got an empty name")
        self.split, self.classifier, self.classes = split, classifier, classes
        self.alpha, self.beta, self.variant = float(alpha), float(beta), variant
        self.bn_mode, self.multilabel, self.guide_classifier = bn_mode, multilabel, guide_classifier
        self.lr_factor, self.target, self.input_shape, self.seed = lr_factor, target, input_shape, seed
        self.backbone: SplitBackbone | None = None
        self.generator: ForegroundGenerator | None = None
        self._reader: SplitReader | None = None
        self._terms: dict[str, Tensor] = {}
        self._step = (0, 0, 0)

    @property
    def state_key(self) -> str:
        """Distinct for instances that split at different modules."""
        return self._generate_state_key(split=self.split)

    @property
    def generator_name(self) -> str:
        """The generator's name in the LightningModule."""
        return f"foreground_generator_{self.split.replace('.', '_')}"

    # The surgery.

    def operate(self, module: nn.Module) -> SurgeryReport:
        """Split the classifier and add the generator to the module."""
        backbone, _ = split_classifier(module, self.split, classifier=self.classifier, input_shape=self.input_shape)
        if self.classes not in (None, backbone.classes):
            raise ValueError(
                f"{self.name}(classes={self.classes}): {backbone.classifier} of {type(backbone.model).__name__} gives "
                f"{backbone.classes} logits"
            )
        report = SurgeryReport(self.name, [Change(self.split, "classifier split")])
        name = self.generator_name
        held = getattr(module, name, None)
        if held is None:
            like = next(p for p in backbone.model.parameters() if p.is_floating_point())
            held = ForegroundGenerator(backbone.channels, backbone.classes, seed=self.seed)
            module.add_module(name, held.to(device=like.device, dtype=like.dtype))
            report.added_parameters = sum(p.numel() for p in held.parameters())
            report.on_undo(lambda: delattr(module, name))
        elif not isinstance(held, ForegroundGenerator) or (held.channels, held.classes) != (
            backbone.channels,
            backbone.classes,
        ):
            raise ValueError(
                f"{self.name}: {type(module).__name__} has an attribute {name} that is something else: {held}"
            )
        self.backbone, self.generator = backbone, held
        return report

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask to operate when the model exists, and for a group of the optimizer."""
        LossTerm.setup(self, trainer, pl_module, stage)
        SurgeryCallback.setup(self, trainer, pl_module, stage)
        if stage == "fit" and self.lr_factor != 1:
            factor = self.lr_factor
            options = lambda given: {"lr": factor * given["lr"]} if "lr" in given else {}  # noqa: E731
            groups = lambda: own_groups(lambda: getattr(pl_module, self.generator_name).parameters(), options)  # noqa: E731
            self._withdraw.append(around_next_call(pl_module, "configure_optimizers", groups))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, and refuse a generator that would not be trained."""
        assert self.generator is not None
        trained = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        if any(id(p) not in trained for p in self.generator.parameters()):
            raise MisconfigurationException(
                f"{self.name}: no optimizer has the parameters of {self.generator_name}. Build it over "
                f"self.parameters() in configure_optimizers, or add self.{self.generator_name}.parameters()."
            )
        if getattr(trainer.strategy.model, "find_unused_parameters", False):
            raise MisconfigurationException(
                f"{self.name} does not work with find_unused_parameters=True: its generator is used after the forward, "
                "where DDP has taken it for unused. Use strategy='ddp'."
            )
        LossTerm.on_fit_start(self, trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach; the generator stays."""
        LossTerm.teardown(self, trainer, pl_module, stage)
        SurgeryCallback.teardown(self, trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach; the generator stays."""
        LossTerm.on_exception(self, trainer, pl_module, exception)
        SurgeryCallback.on_exception(self, trainer, pl_module, exception)

    # The loss term.

    def attach(self, module: LightningModule) -> None:
        """Read the features and the last map."""
        assert self.backbone is not None
        self._reader = SplitReader(self.backbone)
        self._reader.attach()

    def detach(self) -> None:
        """Remove the hooks."""
        self.forget()
        if self._reader is not None:
            self._reader.detach()
            self._reader = None

    def begin(self, batch: Any) -> None:
        """Read."""
        self.forget()
        if self._reader is not None:
            self._reader.start()

    def end(self) -> None:
        """Read no further."""
        if self._reader is not None:
            self._reader.stop()

    def has_read(self) -> bool:
        """Whether the classifier ran."""
        return self._reader is not None and self._reader.has_read

    def forget(self) -> None:
        """Drop what was read."""
        self._terms = {}
        if self._reader is not None:
            self._reader.clear()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Read this step."""
        self._step = (trainer.current_epoch, batch_idx, trainer.global_rank)
        LossTerm.on_train_batch_start(self, trainer, pl_module, batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add the term to the loss; at weight 0 the generator gets a gradient of 0, for which DDP waits."""
        pending = self._pending
        LossTerm.on_before_backward(self, trainer, pl_module, loss)
        if pending and not self._pending and self.current_weight(trainer) == 0:
            assert self.generator is not None
            nothing = 0.0 * torch.stack([p.sum() for p in self.generator.parameters()]).sum()
            add_to_loss(trainer, pl_module, loss, nothing, self.name)

    def term(self) -> Tensor | None:
        """The term of the step, mean over its forwards; None in a further backward pass without one."""
        assert self._reader is not None
        if not self._reader.passes:
            if self._said:
                return None
            raise MisconfigurationException(
                f"{self.name}: {self.split} did not run with gradient in this step. The training_step must run the "
                "classifier that holds it."
            )
        parts = [self._parts(seen) for seen in self._reader.passes]
        self._terms = {key: torch.stack([p[key].detach() for p in parts]).mean() for key in parts[0]}
        terms = [p["ratio"] + self.alpha * p["guidance"] + self.beta * p["area"] for p in parts]
        return torch.stack(terms).mean()

    def _parts(self, seen: SplitPass) -> dict[str, Tensor]:
        backbone, generator, reader = self.backbone, self.generator, self._reader
        assert backbone is not None and generator is not None and reader is not None  # noqa: PT018
        labels = find_labels(
            self._batch, len(seen.features), backbone.classes, target=self.target, multilabel=self.multilabel
        )
        known = None
        if self.multilabel:
            known = labels.any(1)
            labels = draw_label(labels, seed=(self.seed, *self._step))
        elif not self._said:
            check_range(labels, backbone.classes)
        return bas_parts(
            backbone,
            generator,
            seen,
            reader.last_map(seen),
            labels,
            known,
            variant=self.variant,
            bn_mode=self.bn_mode,
            guide_classifier=self.guide_classifier,
        )

    def quantities(self) -> dict[str, Tensor | float]:
        """The parts of the term."""
        return dict(self._terms)

    def describe(self) -> str:
        """The split."""
        assert self.backbone is not None
        backbone, name = self.backbone, type(self.backbone.model).__name__
        return (
            f"{name} split at {self.split} ({backbone.channels} channels), class map of {backbone.classes} classes by "
            f"{backbone.classifier}"
        )

    def __getstate__(self) -> dict[str, Any]:
        dropped: dict[str, Any] = {
            "backbone": None,
            "generator": None,
            "_reader": None,
            "_terms": {},
            "_added": [],
            "_batch": None,
        }
        return {**SurgeryCallback.__getstate__(self), **dropped}

    # Inference.

    @torch.no_grad()
    def foreground_maps(self, images: Tensor, *, labels: Tensor | None = None, top_k: int = 1) -> tuple[Tensor, Tensor]:
        """Foreground maps of images, at the resolution of the features.

        Args:
            images: what the classifier takes.
            labels: the classes whose maps are wanted, ``(batch,)``; None: the mean of the likeliest ``top_k``.
            top_k: 1 is the map of the predicted class, the number of classes the class-agnostic mean.

        Returns:
            Maps ``(batch, 1, H, W)`` in (0, 1), and the classifier's logits ``(batch, classes)``.

        Raises:
            RuntimeError: if the model does not exist yet (before a Trainer ran).
        """
        if self.backbone is None or self.generator is None:
            raise RuntimeError(f"{self.name} has no model yet: run a Trainer with it, or call operate(module)")
        with SplitReader(self.backbone, always=True) as reader:
            self.backbone.model(images)
        seen = reader.passes[0]
        logits = self.backbone.logits(reader.last_map(seen), frozen=True)
        features = self.backbone.layout.to_map(seen.features)
        if labels is not None:
            return self.generator.label_maps(features, labels), logits
        return self.generator.top_map(features, logits, top_k), logits


__all__ = ["BackgroundActivationSuppression"]
