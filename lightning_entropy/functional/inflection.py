r"""Which layers are inflection layers: attention saturated, and the gradient small or falling.

.. math:: \mathrm{SKI}(l) = \alpha \, H_n(l) + (1 - \alpha) \, G_n(l), \qquad
    H_n = 1 - \mathrm{minmax}(H), \quad G_n = 1 - \mathrm{minmax}(\ln G)

The paper gives neither alpha nor the normalisation; both are ours, and so is what counts as flat: a min-max scale
turns the noise of a flat profile into a full swing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

RULES = ("ski", "intersection", "decay")


class InflectionRule(NamedTuple):
    """How layers are chosen.

    Attributes:
        rule: ``"ski"``: local maxima of the index that reach ``minimum``, ends included (see ``peaks``).
            ``"intersection"``: entropy in its lowest and decay in its highest ``quantile``. ``"decay"``: decay alone,
            for models without attention.
        alpha: weight of the entropy in the index, 0 to 1.
        minimum: the least index of a chosen layer. Above 0.5 a layer must, with alpha at 0.5, have both less entropy
            and less gradient than others.
        quantile: share of the layers that count as low in entropy, and as steep in decay.
        flat_entropy: a range of entropies below this is flat, and a layer is low only if it is this far below the
            median.
        flat_gradient: the same for logarithms of gradients, and the least decay that counts as steep, in nats.
        peaks: with ``"ski"`` take local maxima only, of two neighbours the higher one; False takes every layer whose
            index reaches ``minimum``.
        top_k: choose at most this many, the highest first.
        band: add this many layers on either side of each chosen one.
    """

    rule: str = "ski"
    alpha: float = 0.5
    minimum: float = 0.6
    quantile: float = 0.3
    flat_entropy: float = 0.05
    flat_gradient: float = 0.1
    peaks: bool = True
    top_k: int | None = None
    band: int = 0

    def check(self) -> InflectionRule:
        """This rule.

        Raises:
            ValueError: if an entry is out of range.
        """
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        for name in ("alpha", "minimum", "quantile"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in ("flat_entropy", "flat_gradient", "band"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        return self


@dataclass(frozen=True)
class Inflection:
    """The chosen layers.

    Attributes:
        layers: their positions, ascending; empty where the profile has none.
        index: SKI of every layer, ``(layers,)``.
        low_entropy: which layers count as low in entropy, ``(layers,)`` bool.
        steep_decay: which layers count as steep in decay, ``(layers,)`` bool.
        notes: what to know of the choice, in sentences; why there is none, where there is none.
    """

    layers: list[int]
    index: Tensor
    low_entropy: Tensor
    steep_decay: Tensor
    notes: list[str]


def _log_gradient(gradient: Tensor) -> Tensor:
    """Logarithms; layers that no gradient reaches a little below the smallest that one does."""
    g = torch.as_tensor(gradient, dtype=torch.float64)
    alive = g[g > 0]
    if not len(alive):
        return torch.zeros_like(g)
    return torch.where(g > 0, g.clamp(min=1e-300).log(), float(alive.min().log()) - 1.0)


def _inverse(values: Tensor, flat: float) -> Tensor:
    """1 - min-max, 0 for what is not known, and everywhere where the profile is flat."""
    known = values[values.isfinite()]
    if not len(known) or float(known.max() - known.min()) < max(flat, 1e-12):
        return torch.zeros_like(values)
    return torch.where(values.isfinite(), 1 - (values - known.min()) / (known.max() - known.min()), 0.0)


def saturation_gradient_index(
    entropy: Tensor, gradient: Tensor, *, alpha: float = 0.5, flat_entropy: float = 0.05, flat_gradient: float = 0.1
) -> Tensor:
    r"""The saturation-gradient coupling index SKI of each layer, 0 to 1.

    Args:
        entropy: attention entropy, ``(layers,)``; NaN for a layer without attention.
        gradient: activation-gradient norm, ``(layers,)``, positive.
        alpha: weight of the entropy.
        flat_entropy: a smaller range of the entropies counts as none: that term is 0 everywhere.
        flat_gradient: the same for the range of the gradient's logarithm.

    Returns:
        ``(layers,)``, float64; 1 for a layer that has the least entropy and the least gradient of all.

    Raises:
        ValueError: if the shapes differ or alpha is out of range.

    Reference:
        arXiv 2511.00797; normalisation and the treatment of flat profiles are ours.

    Example:
        >>> saturation_gradient_index(torch.tensor([0.9, 0.1, 0.9]), torch.tensor([1.0, 0.01, 1.0]))
        tensor([0., 1., 0.], dtype=torch.float64)
    """
    h, g = torch.as_tensor(entropy, dtype=torch.float64), torch.as_tensor(gradient, dtype=torch.float64)
    if h.dim() != 1 or h.shape != g.shape:
        raise ValueError(f"entropy and gradient must both be (layers,), got {tuple(h.shape)} and {tuple(g.shape)}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    return alpha * _inverse(h, flat_entropy) + (1 - alpha) * _inverse(_log_gradient(g), flat_gradient)


def _local_maxima(index: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(index, (1, 1), value=-torch.inf)
    return (index >= padded[:-2]) & (index >= padded[2:])


def inflection_layers(
    entropy: Tensor, gradient: Tensor, decay: Tensor | None = None, *, rule: InflectionRule | None = None
) -> Inflection:
    """Choose the inflection layers of a profile over depth.

    Args:
        entropy: attention entropy, ``(layers,)``; NaN for a layer without attention.
        gradient: activation-gradient norm at each layer's output, ``(layers,)``.
        decay: by how many nats the gradient falls on its way back through each layer,
            ``ln G(output) - ln G(input)``; None takes ``ln G(l) - ln G(l - 1)`` and no decay for the first.
        rule: see :class:`InflectionRule`; None takes its defaults.

    Returns:
        :class:`Inflection`, with ``layers`` empty and a note where the profile is flat.

    Raises:
        ValueError: if shapes differ, or a rule on entropy meets a profile without any.

    Reference:
        arXiv 2511.00797: layers "characterized by both low attention entropy and steep gradient decay".

    Example:
        >>> h, g = torch.tensor([0.9, 0.9, 0.1, 0.9]), torch.tensor([0.1, 0.1, 1.0, 1.0])
        >>> inflection_layers(h, g, rule=InflectionRule("intersection")).layers
        [2]
    """
    rule = InflectionRule() if rule is None else rule
    rule.check()
    h = torch.as_tensor(entropy, dtype=torch.float64)
    log_g = _log_gradient(gradient)
    index = saturation_gradient_index(
        h, gradient, alpha=rule.alpha, flat_entropy=rule.flat_entropy, flat_gradient=rule.flat_gradient
    )
    if decay is None:
        fall = torch.nn.functional.pad(log_g[1:] - log_g[:-1], (1, 0))
    else:
        fall = torch.as_tensor(decay, dtype=torch.float64).nan_to_num(nan=0.0, posinf=1e3, neginf=-1e3)
        if fall.shape != h.shape:
            raise ValueError(f"decay must have one value a layer, {tuple(h.shape)}, got {tuple(fall.shape)}")
    known = h[h.isfinite()]
    if not len(known) and rule.rule != "decay" and not (rule.rule == "ski" and rule.alpha == 0):
        raise ValueError(
            f"rule {rule.rule!r} looks at attention entropy, and no layer has any: use rule='decay', which looks "
            "at the gradient alone"
        )
    notes: list[str] = []
    low = torch.zeros_like(h, dtype=torch.bool)
    entropy_flat = not len(known) or float(known.max() - known.min()) < max(rule.flat_entropy, 1e-12)
    if not entropy_flat:
        edge = min(float(known.quantile(rule.quantile)), float(known.median()) - rule.flat_entropy)
        low = h.nan_to_num(nan=torch.inf) <= edge
    fall_flat = float(fall.max() - fall.min()) < max(rule.flat_gradient, 1e-12)
    edge = max(float(fall.quantile(1 - rule.quantile)), float(fall.median()) + rule.flat_gradient, rule.flat_gradient)
    steep = (fall >= edge) & (not fall_flat)
    gradient_flat = float(log_g.max() - log_g.min()) < max(rule.flat_gradient, 1e-12)
    if not bool((torch.as_tensor(gradient) > 0).any()):
        notes.append("No gradient reaches any layer: the loss does not depend on them, or all examples are fitted.")
    if entropy_flat and len(known):
        notes.append(
            f"Attention entropy is flat over depth ({float(known.min()):.3f} to {float(known.max()):.3f}, less than "
            f"{rule.flat_entropy:g} apart): it singles out no layer."
        )
    if gradient_flat and (rule.rule == "ski" or fall_flat):
        notes.append(
            f"The activation gradient is flat over depth (less than {rule.flat_gradient:g} nats apart): it singles out "
            "no layer."
        )
    if rule.rule == "ski":
        taken, strength = (index >= rule.minimum) & (index > 0), index
        if rule.peaks:
            taken = taken & _local_maxima(index)
    elif rule.rule == "intersection":
        taken, strength = low & steep, fall
    else:
        taken, strength = steep, fall
    layers = [int(i) for i in taken.nonzero().flatten()]
    if rule.top_k is not None and len(layers) > rule.top_k:
        layers = sorted(layers, key=lambda i: -float(strength[i]))[: rule.top_k]
    layers = sorted({j for i in layers for j in range(i - rule.band, i + rule.band + 1) if 0 <= j < len(h)})
    if not layers:
        notes.append(f"No layer is an inflection layer by the rule {_in_words(rule)}.")
    return Inflection(layers, index, low, steep, notes)


def _in_words(rule: InflectionRule) -> str:
    if rule.rule == "ski":
        return f"'ski' (alpha {rule.alpha:g}, index at least {rule.minimum:g})"
    return f"{rule.rule!r} (quantile {rule.quantile:g}, decay at least {rule.flat_gradient:g} nats)"


__all__ = ["RULES", "Inflection", "InflectionRule", "inflection_layers", "saturation_gradient_index"]
