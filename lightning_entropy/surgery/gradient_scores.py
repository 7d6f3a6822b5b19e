"""Scores of weights from gradients on data: how much a task asks of each tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lightning_entropy.observe.stored_weights import StoredWeight

GRADIENT_SCORES = ("gradient_norm", "relative_gradient_norm", "fisher")
Loss = Callable[[nn.Module, Any], Tensor]


def gradient_scores(
    model: nn.Module,
    weights: list[StoredWeight],
    data: Iterable[Any],
    loss: Loss,
    *,
    by: str = "gradient_norm",
    max_batches: int | None = None,
    owner: str = "gradient_scores",
) -> dict[str, float]:
    r"""Gradient norm, relative gradient norm or Fisher information of each weight, in evaluation mode.

    With :math:`g_b` the gradient of the loss of batch *b* and :math:`\bar g` the mean over batches:
    ``gradient_norm`` is :math:`\lVert \bar g \rVert`, ``relative_gradient_norm``
    :math:`\lVert \bar g \rVert / \lVert W \rVert`, ``fisher`` the mean over batches and over the numbers of the tensor
    of :math:`g_b^2` (with batches of one example and a log-likelihood: the diagonal of the empirical Fisher matrix).
    The model's modes, its gradients, which parameters require them, and the random state are as before.

    Args:
        model: that the loss runs.
        weights: of it; quantised ones have no gradient and are left out.
        data: batches, as the loss takes them (on the model's device).
        loss: ``loss(model, batch)``, a scalar that is the mean over the batch.
        by: one of the three.
        max_batches: stop after so many.
        owner: who asks, for messages.

    Returns:
        The score by name; a weight that no gradient reached is missing.

    Raises:
        ValueError: if there is no batch, or a loss is no finite scalar that depends on a weight.

    Reference:
        Lee and others, *Surgical Fine-Tuning*, arXiv 2210.11466, for the relative norm.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> from lightning_entropy.observe.model_weights import model_weights
        >>> batch = (torch.tensor([[3.0, 4.0]]), None)
        >>> gradient_scores(model, model_weights(model), [batch], lambda m, b: m(b[0]).sum())
        {'weight': 5.0}
    """
    parameters = {w.name: p for w in weights if (p := _parameter(w)) is not None}
    total: dict[str, Tensor] = {}
    squares: dict[str, float] = {}
    batches = 0
    with _undisturbed(model, list(parameters.values())):
        for batch in islice(data, max_batches):
            with torch.enable_grad():
                value = loss(model, batch)
            _check(value, owner)
            gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            batches += 1
            for name, gradient in zip(parameters, gradients):
                if gradient is None:
                    continue
                wide = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
                squares[name] = squares.get(name, 0.0) + float(wide.square().sum(dtype=torch.float64))
                if by != "fisher":
                    total[name] = wide.clone() if name not in total else total[name].add_(wide)
    if not batches:
        raise ValueError(f"{owner}(by={by!r}) got no batch from data")
    if not squares:
        raise ValueError(f"{owner}(by={by!r}): the loss does not depend on any of the {len(weights)} weights")
    scores: dict[str, float] = {}
    for name, square in squares.items():
        weight = parameters[name]
        if by == "fisher":
            scores[name] = square / batches / weight.numel()
            continue
        norm = float(torch.linalg.vector_norm(total[name], dtype=torch.float64)) / batches
        if by == "relative_gradient_norm":
            size = float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64))
            if size == 0:
                continue
            norm /= size
        scores[name] = norm
    return scores


def _parameter(weight: StoredWeight) -> nn.Parameter | None:
    value = None if weight.holder is None else weight.holder._parameters.get(weight.tensor)
    return value if isinstance(value, nn.Parameter) and value.is_floating_point() and weight.bits is None else None


def _check(value: Any, owner: str) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"{owner}: loss(model, batch) must return a scalar tensor, got {got}")
    if not value.requires_grad:
        raise ValueError(f"{owner}: loss(model, batch) has no gradient: does the loss run under no_grad?")
    if not bool(torch.isfinite(value)):
        raise ValueError(f"{owner}: loss(model, batch) is {float(value.detach())}")


@contextmanager
def _undisturbed(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, these parameters requiring gradients; everything as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in parameters]
    devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, flag in required:
                parameter.requires_grad_(flag)
            for module, mode in modes:
                module.training = mode


__all__ = ["GRADIENT_SCORES", "gradient_scores"]
