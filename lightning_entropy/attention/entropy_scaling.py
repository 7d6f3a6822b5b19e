r"""Entropy-preserving attention scaling for another resolution (arXiv 2306.08645).

A model trained with T tokens that runs with N spreads its attention differently. The logits are multiplied by

    c = sqrt(ln N / ln T)          mode "paper"
    c = ln N / ln T                mode "log"
    c = sqrt(1 + 2 ln(N / T) / v)  mode "absolute", v the variance of the logits over the keys

For Gaussian logits of variance v the entropy is ln N - v / 2: the paper's factor keeps H / ln N, the absolute one keeps
H itself (both derivations are ours; the paper gives the first formula). N is counted in each call, T is given or
follows from the ratio of the areas. Self-attention only: the keys of cross-attention are the text, of one length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_entropy.arguments import check_types
from lightning_entropy.functional.entropy_scaling import entropy_scaling_factor
from lightning_entropy.observe.selection import as_patterns
from lightning_entropy.surgery.attention_call import AttentionCall, ScaledLogits, rewrite_attention
from lightning_entropy.surgery.attention_modules import chosen_attention
from lightning_entropy.surgery.input_area import InputArea
from lightning_entropy.surgery.report import SurgeryReport
from lightning_entropy.training.lightning import Callback, LightningModule, Trainer
from lightning_entropy.verbosity import announce


class _Scaling(ScaledLogits):
    method = "AttentionEntropyScaling"

    def __init__(
        self,
        mode: str,
        base_tokens: float | None,
        base_area: float | None,
        prefix_tokens: int,
        variance: float | Mapping[str, float] | None,
    ) -> None:
        self.mode, self.variance = mode, variance
        self.base_tokens, self.base_area, self.prefix_tokens = base_tokens, base_area, prefix_tokens
        self.input = InputArea()
        self.refused: dict[str, str] = {}
        self.factors: dict[str, tuple[float, float, float]] = {}

    def describe(self) -> str:
        return f"attentions scaled (mode {self.mode})"

    def prepare(self, name: str, module: nn.Module) -> str | None:
        return self.refused.get(name)

    def _trained_with(self, call: AttentionCall) -> float:
        if self.base_tokens is not None:
            return self.base_tokens
        assert self.base_area is not None
        if self.input.area is None:
            raise ValueError(
                f"{self.method}(base_size=...) saw no (batch, channels, height, width) input above {call.name}, so it "
                "does not know by how much the area grew. Pass base_tokens= with the tokens in training."
            )
        return self.prefix_tokens + (call.keys - self.prefix_tokens) * self.base_area / self.input.area

    def factor(self, call: AttentionCall) -> float | Tensor:
        if call.kind == "cross":
            return 1.0
        base = self._trained_with(call)
        variance = self.variance
        if isinstance(variance, Mapping):
            if call.name not in variance:
                raise ValueError(f"{self.method}(variance=...) has no entry for {call.name}")
            variance = variance[call.name]
        c = entropy_scaling_factor(call.keys, base, mode=self.mode, variance=variance)
        if not torch.compiler.is_compiling():
            self.factors[call.name] = (float(call.keys), float(base), c)
        return c


class EntropyScalingReport(SurgeryReport):
    """The report of :func:`scale_attention`; as a context it undoes the scaling at the end."""

    scaling: _Scaling

    @property
    def factors(self) -> dict[str, tuple[float, float, float]]:
        """Of each module in its last forward: tokens now, tokens in training, factor. Not filled by compiled code."""
        return dict(self.scaling.factors)

    def __enter__(self) -> EntropyScalingReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def scale_attention(
    model: nn.Module,
    *,
    base_tokens: int | None = None,
    base_size: int | tuple[int, int] | list[int] | None = None,
    mode: str = "paper",
    variance: float | Mapping[str, float] | None = None,
    prefix_tokens: int | None = None,
    modules: str | Iterable[str] | None = None,
) -> EntropyScalingReport:
    r"""Multiply the logits of self-attention so that its entropy fits the number of tokens.

    See :func:`lightning_entropy.functional.entropy_scaling_factor` for the formulas. With ``base_size`` the tokens in
    training follow for each layer from the areas,

    .. math:: T = P + (N - P) \cdot \text{area in training} / \text{area now}

    where the area now is that of the first image among the arguments of the outermost module that is given one.

    Args:
        model: a diffusers UNet or transformer, a vision transformer, or any module; changed in place.
        base_tokens: T, the keys of self-attention in training, the same for every layer, class and register tokens
            included.
        base_size: height and width (or one number for both) of the model's input in training: latents for a UNet
            (64 for 512 pixels), pixels for a vision transformer. Either this or ``base_tokens``.
        mode: ``"paper"`` and ``"log"`` keep H / ln N (of Gaussian logits the first), ``"absolute"`` keeps H.
        variance: of the unscaled logits over the keys, a number or one by module (:func:`logit_variance`); for
            ``"absolute"``.
        prefix_tokens: P, tokens that stand for no place in the image; None asks the model (timm and transformers say
            it), else 0.
        modules: shell patterns over dotted names of attention modules or of modules that contain them; None takes
            every attention. Cross-attention among them is left as it is.

    Returns:
        The report; ``undo()``, or leaving it as a context, restores the model bit for bit.

    Raises:
        ValueError: if arguments are missing or out of range, nothing is recognised as attention, or every layer is
            refused: with ``base_size`` windowed attention (its keys do not grow with the image) and joint attention of
            text and image (the text does not grow); pass ``base_tokens`` there.

    Reference:
        Training-free Diffusion Model Adaptation for Variable-Sized Text-to-Image Synthesis, arXiv 2306.08645.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
        >>> with scale_attention(layer, base_tokens=4) as report:
        ...     _ = layer(torch.zeros(1, 16, 8))
        >>> report.factors["self_attn"]
        (16.0, 4.0, 1.4142135623730951)
    """
    scaling = _scaling(base_tokens, base_size, mode, variance, prefix_tokens)
    if base_size is not None:
        chosen = chosen_attention(model, as_patterns(modules), scaling.method)
        scaling.refused = {n: reason for n in chosen if (reason := _no_area(model, n)) is not None}
        if prefix_tokens is None:
            scaling.prefix_tokens = _prefix_tokens(model)
    done = rewrite_attention(model, scaling, modules)
    report = EntropyScalingReport(done.method, done.changes, done.refused, done.added_parameters)
    report.scaling = scaling
    report.on_undo(done.undo)
    if base_size is not None and done.changes:
        for watch in scaling.input.watch(model, [change.module for change in done.changes]):
            report.on_undo(watch.remove)
    return report


def _scaling(
    base_tokens: int | None,
    base_size: int | tuple[int, int] | list[int] | None,
    mode: str,
    variance: float | Mapping[str, float] | None,
    prefix_tokens: int | None,
) -> _Scaling:
    """The rewrite of checked arguments."""
    if (base_tokens is None) == (base_size is None):
        raise ValueError(
            "exactly one of base_tokens (tokens in training) and base_size (size of the input in training) must be "
            f"given, got base_tokens={base_tokens}, base_size={base_size}"
        )
    if base_tokens is not None and base_tokens < 1:
        raise ValueError(f"base_tokens must be at least 1, got {base_tokens}")
    area: float | None = None
    if base_size is not None:
        sides = (base_size, base_size) if isinstance(base_size, int) else tuple(base_size)
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"base_size must be a positive number or two, got {base_size}")
        area = float(sides[0] * sides[1])
    if prefix_tokens is not None and prefix_tokens < 0:
        raise ValueError(f"prefix_tokens must not be negative, got {prefix_tokens}")
    for v in variance.values() if isinstance(variance, Mapping) else [variance]:
        entropy_scaling_factor(2, 2, mode=mode, variance=v)
    return _Scaling(mode, base_tokens, area, prefix_tokens or 0, variance)


def _prefix_tokens(model: nn.Module) -> int:
    for module in model.modules():
        count = getattr(module, "num_prefix_tokens", None)  # timm
        if isinstance(count, int):
            return count
    for module in model.modules():
        if isinstance(getattr(module, "cls_token", None), Tensor) or isinstance(
            getattr(module, "class_token", None), Tensor
        ):  # transformers, torchvision
            registers = getattr(module, "register_tokens", None)
            return 1 + (registers.shape[1] if isinstance(registers, Tensor) else 0)
    return 0


def _no_area(model: nn.Module, name: str) -> str | None:
    """Why the keys of an attention do not grow with the area of the image."""
    module = model.get_submodule(name)
    if getattr(module, "add_k_proj", None) is not None:
        return "text and image share its softmax, and the text does not grow; pass base_tokens= with the sum"
    for holder in (module, model.get_submodule(name.rpartition(".")[0])):
        for attribute in ("window_size", "window_area", "partition_size"):
            size: Any = getattr(holder, attribute, None)
            if size and not isinstance(size, Tensor):
                return f"its windows ({attribute}={size}) have as many tokens at every size"
    return None


class AttentionEntropyScaling(Callback):
    """Validates, tests and predicts with attention scaled for another resolution than that of training.

    The model is changed when an evaluation starts and restored, bit for bit, when it ends; training is not touched.
    For sampling inside a step of your own use ``with scale_attention(...)``.

    Args:
        base_tokens: see :func:`scale_attention`, and so for the others.
        base_size: see there.
        mode: see there.
        variance: see there.
        prefix_tokens: see there.
        modules: see there.

    Raises:
        ValueError: if arguments are missing or out of range (here), or nothing is recognised as attention (when the
            first evaluation starts).

    Reference:
        arXiv 2306.08645.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[AttentionEntropyScaling(base_size=224)])
    """

    def __init__(
        self,
        *,
        base_tokens: int | None = None,
        base_size: int | list[int] | None = None,
        mode: str = "paper",
        variance: float | dict[str, float] | None = None,
        prefix_tokens: int | None = None,
        modules: str | list[str] | None = None,
    ) -> None:
        check_types(AttentionEntropyScaling, locals())
        super().__init__()
        _scaling(base_tokens, base_size, mode, variance, prefix_tokens)
        self.base_tokens = base_tokens
        self.base_size = base_size
        self.mode = mode
        self.variance = variance
        self.prefix_tokens = prefix_tokens
        self.modules = modules
        self.report: EntropyScalingReport | None = None
        self._active = self._announced = False

    def _scale(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._active:
            return
        self.report = scale_attention(
            pl_module,
            base_tokens=self.base_tokens,
            base_size=self.base_size,
            mode=self.mode,
            variance=self.variance,
            prefix_tokens=self.prefix_tokens,
            modules=self.modules,
        )
        self._active = True
        if not self._announced:
            announce(str(self.report))
            self._announced = True

    def _restore(self, *args: Any, **kwargs: Any) -> None:
        if self._active and self.report is not None:
            self.report.undo()
            self._active = False

    on_validation_start = on_test_start = on_predict_start = _scale
    on_validation_end = on_test_end = on_predict_end = on_exception = teardown = _restore


__all__ = ["AttentionEntropyScaling", "EntropyScalingReport", "scale_attention"]
