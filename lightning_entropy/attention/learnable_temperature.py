"""Learnable attention temperature, from Entropy-Guided Attention (arXiv 2501.03489).

    A_ij = softmax_j( q_i . k_j / (t_i sqrt(d)) ),    t > 0 learned for each head, or for each head and query position

Entropy rises with t. Ours is that the parameter is log t: t stays positive, and weight decay draws it to 1, the plain
model, where decay of t itself would draw it to 0, one-hot attention. The paper's initial values, 1e-2 and 1e-1, make
the softmax one-hot at the start if t divides the logits as printed; here t starts at 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_entropy.arguments import check_types
from lightning_entropy.surgery.attention_call import AttentionCall, ScaledLogits, rewrite_attention
from lightning_entropy.surgery.attention_modules import attention_heads
from lightning_entropy.surgery.report import SurgeryReport
from lightning_entropy.training.lightning import LightningModule, Trainer
from lightning_entropy.training.surgery import SurgeryCallback

PARAMETER = "attention_log_temperature"


class _Temperature(ScaledLogits):
    method = "LearnableTemperature"

    def __init__(self, init: float, positions: int | None) -> None:
        if not (math.isfinite(init) and init > 0):
            raise ValueError(f"init must be finite and positive, got {init}")
        if positions is not None and positions < 1:
            raise ValueError(f"positions must be at least 1, got {positions}")
        self.init, self.positions = init, positions

    def describe(self) -> str:
        each = "head" if self.positions is None else f"head and query position of {self.positions}"
        return f"attentions given a temperature for each {each}, {self.init:g} at the start"

    def prepare(self, name: str, module: nn.Module) -> str | None:
        heads = attention_heads(module)
        if heads is None:
            return "it does not say how many heads it has (num_heads, heads, n_heads, num_attention_heads)"
        if hasattr(module, PARAMETER):
            return f"it has a parameter {PARAMETER} already"
        like = next(module.parameters(), None)
        value = torch.full((heads, self.positions or 1), math.log(self.init))
        if like is not None and like.is_floating_point():
            value = value.to(device=like.device, dtype=like.dtype)
        module.register_parameter(PARAMETER, nn.Parameter(value))
        return None

    def undo(self, module: nn.Module) -> None:
        delattr(module, PARAMETER)

    def factor(self, call: AttentionCall) -> float | Tensor:
        inverse = (-getattr(call.module, PARAMETER)).exp()
        if self.positions is None:
            return inverse
        # A query that continues a cache stands behind the keys that it holds.
        first = call.keys - call.queries if call.kind == "self" and call.keys > call.queries else 0
        if first + call.queries > self.positions:
            raise ValueError(
                f"LearnableTemperature(positions={self.positions}) has no temperature for query position "
                f"{first + call.queries - 1} of {call.name or type(call.module).__name__}. Pass positions= with the "
                "longest sequence, or None for one temperature a head."
            )
        return inverse[:, first : first + call.queries]


def add_learnable_temperature(
    model: nn.Module,
    *,
    init: float = 1.0,
    positions: int | None = None,
    modules: str | Iterable[str] | None = None,
) -> SurgeryReport:
    r"""Give every attention head a learnable temperature.

    .. math:: A_{ij} = \mathrm{softmax}_j(s_{ij} / t_i), \qquad t = \exp(\theta)

    The parameter :math:`\theta` is registered on the attention module as ``attention_log_temperature``, ``(heads, 1)``
    or ``(heads, positions)``, and is in its state dict. A relative position bias is divided too. With ``init=1`` the
    output does not change: to the bit with fused and eager attention, to rounding in ``nn.MultiheadAttention``.

    Args:
        model: any module; changed in place.
        init: initial temperature.
        positions: a temperature for each of this many query positions; None has one a head. A cache must grow with the
            sequence (transformers' dynamic cache), since the position is counted from its keys.
        modules: shell patterns over dotted names of attention modules or of modules that contain them; None takes
            every attention.

    Returns:
        The report; ``undo()`` removes the parameters.

    Raises:
        ValueError: if an argument is out of range, nothing is recognised as attention, or no attention module says how
            many heads it has. The forward raises for a sequence longer than ``positions``.

    Reference:
        arXiv 2501.03489, equation of the learnable temperature.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> report = add_learnable_temperature(layer)
        >>> temperatures(layer)
        {'self_attn': tensor([1., 1.])}
    """
    return rewrite_attention(model, _Temperature(init, positions), modules)


def temperatures(model: nn.Module) -> dict[str, Tensor]:
    """The temperatures of a model by module: ``(heads,)``, or ``(heads, positions)``; without gradient."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, PARAMETER, None), nn.Parameter):
            found[name] = getattr(module, PARAMETER).detach().exp().squeeze(1)
    return found


class LearnableTemperature(SurgeryCallback):
    """Trains a model whose attention heads have learnable temperatures.

    The parameters are added before weights are restored and optimizers are built, so that they are trained and
    checkpoints hold them. Each epoch logs the mean, smallest and largest temperature as ``temperature/mean``,
    ``temperature/min`` and ``temperature/max``.

    Args:
        init: see :func:`add_learnable_temperature`, and so for the others.
        positions: see there.
        modules: see there.

    Raises:
        ValueError: as there, when the model exists.

    Reference:
        arXiv 2501.03489.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LearnableTemperature()])
    """

    def __init__(
        self, init: float = 1.0, *, positions: int | None = None, modules: str | list[str] | None = None
    ) -> None:
        check_types(LearnableTemperature, locals())
        super().__init__()
        _Temperature(init, positions)  # it knows the ranges
        self.init = init
        self.positions = positions
        self.modules = modules

    def operate(self, module: nn.Module) -> SurgeryReport:
        """Add the temperatures."""
        return add_learnable_temperature(module, init=self.init, positions=self.positions, modules=self.modules)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the temperatures."""
        t = torch.cat([value.flatten() for value in temperatures(pl_module).values()])
        pl_module.log_dict({"temperature/mean": t.mean(), "temperature/min": t.min(), "temperature/max": t.max()})


__all__ = ["PARAMETER", "LearnableTemperature", "add_learnable_temperature", "temperatures"]
