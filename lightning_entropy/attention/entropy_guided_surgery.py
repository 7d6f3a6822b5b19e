r"""Scaled feed-forward and layers without normalisation, from Entropy-Guided Attention (arXiv 2501.03489).

    X_out = beta X + (1/alpha) FFN(X),    alpha, beta learned for each layer

The paper trains transformers without layer normalisation and activations for private inference: normalisations become
the identity, the two linear layers of a feed-forward without an activation become one d x d, and alpha and beta hold
its scale. Ours is that a branch is found by running its block, and that alpha = beta = 1 changes no bit.
"""

from __future__ import annotations

from torch import nn

from lightning_entropy.arguments import check_types
from lightning_entropy.observe.selection import as_patterns
from lightning_entropy.surgery.plain_blocks import RemovedNorm, fuse_linear_ffn, remove_layer_norm
from lightning_entropy.surgery.report import SurgeryReport
from lightning_entropy.surgery.scaled_feed_forward import ALPHA, BETA, scale_ffn
from lightning_entropy.training.surgery import SurgeryCallback


class EntropyGuidedSurgery(SurgeryCallback):
    """Trains a model with scaled feed-forwards, and without normalisations and activations where asked to.

    The surgery happens as soon as the model exists. ``alpha`` and ``beta`` are kept out of weight decay.

    Args:
        scale: learn alpha and beta of every feed-forward (:func:`scale_ffn`).
        remove_norm: put the identity in the place of normalisations (:func:`remove_layer_norm`).
        fuse: merge feed-forwards into one layer, without their activation (:func:`fuse_linear_ffn`).
        modules: shell patterns over dotted names of modules that contain what is meant; None takes all.

    Raises:
        ValueError: if nothing is asked for (here), or nothing is found (when the model exists).
        MisconfigurationException: under a strategy that shards the model.

    Reference:
        Entropy-Guided Attention for Private LLMs, arXiv 2501.03489.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[EntropyGuidedSurgery(remove_norm=True)])
    """

    def __init__(
        self,
        *,
        scale: bool = True,
        remove_norm: bool = False,
        fuse: bool = False,
        modules: str | list[str] | None = None,
    ) -> None:
        check_types(EntropyGuidedSurgery, locals())
        super().__init__()
        as_patterns(modules)
        if not (scale or remove_norm or fuse):
            raise ValueError("at least one of scale, remove_norm and fuse must be True")
        self.scale, self.remove_norm, self.fuse = scale, remove_norm, fuse
        self.modules = modules

    @property
    def state_key(self) -> str:
        """Distinguishes instances by what they do and where."""
        return self._generate_state_key(
            modules=self.modules, scale=self.scale, remove_norm=self.remove_norm, fuse=self.fuse
        )

    def operate(self, module: nn.Module) -> SurgeryReport:
        """Remove normalisations, fuse, then scale."""
        report = SurgeryReport(self.name)
        parts: list[SurgeryReport] = []
        try:
            if self.remove_norm:
                parts.append(remove_layer_norm(module, modules=self.modules))
            if self.fuse:
                parts.append(fuse_linear_ffn(module, modules=self.modules, drop_activation=True))
            if self.scale:
                parts.append(scale_ffn(module, modules=self.modules))
        except ValueError:
            for part in reversed(parts):
                part.undo()
            raise
        for part in parts:
            report.changes += part.changes
            report.refused += part.refused
            report.added_parameters += part.added_parameters
            report.on_undo(part.undo)
        return report

    def parameters_without_decay(self, module: nn.Module) -> list[nn.Parameter]:
        """Alpha and beta."""
        return [p for name, p in module.named_parameters() if name.rpartition(".")[2] in (ALPHA, BETA)]


__all__ = ["EntropyGuidedSurgery", "RemovedNorm", "fuse_linear_ffn", "remove_layer_norm", "scale_ffn"]
