r"""Background activation suppression (BAS): what turns the labels of images into a foreground map.

With the class map :math:`A` of the plain pass, the foreground map :math:`M` of the label :math:`y`, and the logit of
the label of the plain pass, :math:`S`, and of the pass whose features are multiplied by :math:`1 - M`,
:math:`S_{bg}`:

.. math::

    L = L_{CLS} + \alpha L_{FRG} + L_{BAS} + \beta L_{AC}

with :math:`L_{CLS} = CE(\overline{A}, y)`, :math:`L_{FRG} = CE(\overline{A \cdot pool(M)}, y)`,
:math:`L_{BAS} = \overline{S_{bg} / S}` and :math:`L_{AC} = \overline{M}`; :math:`S` is a constant of the gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

VARIANTS = ("extension", "cvpr")


class BASTerms(NamedTuple):
    """The loss of BAS and what it is made of, each a scalar and without its factor.

    Attributes:
        loss: classification + alpha * guidance + background + beta * area.
        classification: cross-entropy of the plain pass.
        guidance: cross-entropy of the class map inside the foreground.
        background: background activation ratio, mean over images.
        area: mean of the foreground map.
    """

    loss: Tensor
    classification: Tensor
    guidance: Tensor
    background: Tensor
    area: Tensor


def background_activation_ratio(
    overall: Tensor, background: Tensor, *, variant: str = "extension", eps: float = 1e-8
) -> Tensor:
    r"""How much of the activation of the label is left when the foreground is suppressed, for each image.

    .. math:: r = S_{bg} / (S + \epsilon)

    :math:`S` carries no gradient, and where the background exceeds it r is a constant:

    ============ ================================ ========================== ======================
    variant      activations                      r is a constant where      the constant
    ============ ================================ ========================== ======================
    extension    ReLU of both logits              background > overall       1
    cvpr         the logits                       background >= overall      0
    ============ ================================ ========================== ======================

    The gradient differs at an exact tie only, where that of ``cvpr`` is 0. Without a ReLU at the end of the classifier
    logits are negative at times, and then the ratio of ``cvpr`` pushes the wrong way; that of ``extension`` is 0
    without gradient. It is computed in float32 or wider: in half precision epsilon is 0 and 0/0 is NaN.

    Args:
        overall: logit of the label in the plain pass, ``(batch,)``.
        background: logit of the label with the foreground suppressed, ``(batch,)``.
        variant: ``"extension"`` (of the journal version, any classifier) or ``"cvpr"`` (of the conference version, for
            classifiers that end in a ReLU).
        eps: epsilon.

    Returns:
        ``(batch,)``, float32 or wider.

    Raises:
        ValueError: if the shapes differ or the variant is unknown.

    Reference:
        Background Activation Suppression for Weakly Supervised Object Localization (CVPR 2022), arXiv 2112.00580.

    Example:
        >>> background_activation_ratio(torch.tensor([4.0, 1.0]), torch.tensor([1.0, 2.0]))
        tensor([0.2500, 1.0000])
    """
    _check_variant(variant)
    if overall.shape != background.shape:
        raise ValueError(f"overall {tuple(overall.shape)} and background {tuple(background.shape)} must have one shape")
    overall, background = _wide(overall.detach()), _wide(background)
    if variant == "extension":
        overall, background = overall.relu(), background.relu()
        constant = background > overall
    else:
        constant = background >= overall
    divisor = overall + eps
    constant = constant | (divisor == 0)
    # Both operands are made harmless first: a gradient of 0 through 1/0 would be NaN.
    ratio = background.masked_fill(constant, 0.0) / divisor.masked_fill(constant, 1.0)
    return ratio.masked_fill(constant, 1.0 if variant == "extension" else 0.0)


def area_constraint(foreground: Tensor) -> Tensor:
    r"""Mean of the foreground map, :math:`\overline{M}`.

    Args:
        foreground: map in [0, 1], ``(batch, 1, H, W)``.

    Returns:
        A scalar, float32 or wider.

    Example:
        >>> area_constraint(torch.full((2, 1, 4, 4), 0.25))
        tensor(0.2500)
    """
    return _wide(foreground).mean()


def pool_foreground(foreground: Tensor, size: tuple[int, int]) -> Tensor:
    """The foreground map at the resolution of a class map, by averages.

    Args:
        foreground: ``(batch, 1, H, W)``.
        size: ``(h, w)``; where it does not divide H and W the cells of an adaptive average pool are taken.

    Returns:
        ``(batch, 1, h, w)``.

    Example:
        >>> pool_foreground(torch.eye(4)[None, None], (2, 2))
        tensor([[[[0.5000, 0.0000],
                  [0.0000, 0.5000]]]])
    """
    height, width = foreground.shape[-2:]
    if (height, width) == tuple(size):
        return foreground
    if height % size[0] == 0 and width % size[1] == 0:
        return F.avg_pool2d(foreground, (height // size[0], width // size[1]))
    return F.adaptive_avg_pool2d(foreground, size)


def foreground_region_guidance(class_map: Tensor, foreground: Tensor, target: Tensor) -> Tensor:
    r"""Cross-entropy of the class map inside the foreground.

    .. math:: CE\left(\frac{1}{hw} \sum_{ij} A_{\cdot ij} \, pool(M)_{ij}, \; y\right)

    Args:
        class_map: class map of the plain pass, ``(batch, classes, h, w)``.
        foreground: ``(batch, 1, H, W)``; averaged to the class map's size.
        target: labels, ``(batch,)``.

    Returns:
        A scalar, float32 or wider.

    Raises:
        ValueError: if the class map is not of four dimensions, or the batches differ.

    Example:
        >>> foreground_region_guidance(torch.ones(1, 2, 2, 2), torch.ones(1, 1, 4, 4), torch.tensor([0]))
        tensor(0.6931)
    """
    _check_maps(class_map, foreground)
    inside = _wide(class_map) * pool_foreground(_wide(foreground), (class_map.shape[-2], class_map.shape[-1]))
    return F.cross_entropy(inside.mean((2, 3)), target)


def bas_loss(
    class_map: Tensor,
    background_map: Tensor,
    foreground: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 1.2,
    variant: str = "extension",
    guide_classifier: bool = True,
) -> BASTerms:
    r"""The loss of BAS, from the maps of its two passes.

    .. math:: L = L_{CLS} + \alpha L_{FRG} + L_{BAS} + \beta L_{AC}

    For the gradients that the paper means, ``background_map`` comes from the features of the plain pass, detached,
    times ``1 - foreground``, through the tail of the classifier with weights that take no gradient; see
    :class:`lightning_entropy.surgery.SplitBackbone`.

    Args:
        class_map: of the plain pass, ``(batch, classes, h, w)``; its mean over h and w are the logits.
        background_map: of the pass with the foreground suppressed, ``(batch, classes, h, w)``, or its logits
            ``(batch, classes)``.
        foreground: map of the label, ``(batch, 1, H, W)``, in [0, 1].
        target: labels, ``(batch,)``.
        alpha: factor of the foreground region guidance.
        beta: factor of the area. With a linear tail the foreground is where the class map exceeds beta times its mean.
        variant: see :func:`background_activation_ratio`.
        guide_classifier: whether the guidance trains the classifier too (localization), or the map alone
            (segmentation).

    Returns:
        The loss and its parts.

    Raises:
        ValueError: if shapes do not fit, a factor is negative, or the variant is unknown.

    Reference:
        arXiv 2112.00580, and its extension arXiv 2309.12943.

    Example:
        >>> terms = bas_loss(torch.ones(2, 3, 4, 4), torch.zeros(2, 3), torch.ones(2, 1, 8, 8), torch.tensor([0, 2]))
        >>> round(terms.loss.item(), 4)
        2.8479
    """
    check_factors(alpha=alpha, beta=beta)
    _check_maps(class_map, foreground)
    logits = _wide(class_map).mean((2, 3))
    background = _wide(background_map)
    background = background.mean((2, 3)) if background.dim() == 4 else background
    if background.shape != logits.shape:
        raise ValueError(
            f"background_map {tuple(background_map.shape)} must be the class map or the logits of the second pass, for "
            f"logits {tuple(logits.shape)}"
        )
    index = target[:, None]
    classification = F.cross_entropy(logits, target)
    guided = class_map if guide_classifier else class_map.detach()
    guidance = foreground_region_guidance(guided, foreground, target)
    overall, left = logits.gather(1, index)[:, 0], background.gather(1, index)[:, 0]
    ratio = background_activation_ratio(overall, left, variant=variant).mean()
    area = area_constraint(foreground)
    return BASTerms(classification + alpha * guidance + ratio + beta * area, classification, guidance, ratio, area)


def multi_label_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    r"""Cross-entropy for images with several labels: each label competes with the absent classes alone.

    .. math:: \frac1B \sum_b \sum_{p \in P_b} -\log \frac{e^{s_p}}{e^{s_p} + \sum_{n \notin P_b} e^{s_n}}

    Args:
        logits: ``(batch, classes)``.
        target: 1 where a class is present, ``(batch, classes)``.

    Returns:
        A scalar, float32 or wider; with one label an image it is the ordinary cross-entropy.

    Raises:
        ValueError: if the shapes differ.

    Reference:
        arXiv 2309.12943 (the segmentation part).

    Example:
        >>> multi_label_cross_entropy(torch.zeros(1, 3), torch.tensor([[1, 1, 0]]))
        tensor(1.3863)
    """
    if logits.shape != target.shape:
        raise ValueError(f"target {tuple(target.shape)} must have the shape of the logits {tuple(logits.shape)}")
    logits, present = _wide(logits), target.bool()
    # The lowest finite number, not -inf: an image with every label has a finite loss (0) and gradient.
    absent = logits.masked_fill(present, torch.finfo(logits.dtype).min).logsumexp(1, keepdim=True)
    return (F.softplus(absent - logits) * present).sum(1).mean()


def check_factors(**factors: float) -> None:
    """Refuse factors that are negative or not finite."""
    for name, value in factors.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be finite and >= 0, got {value}")


def _check_variant(variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")


def _check_maps(class_map: Tensor, foreground: Tensor) -> None:
    if class_map.dim() != 4:
        raise ValueError(f"class_map must be (batch, classes, h, w), got {tuple(class_map.shape)}")
    if foreground.dim() != 4 or foreground.shape[:2] != (class_map.shape[0], 1):
        raise ValueError(
            f"foreground must be ({class_map.shape[0]}, 1, H, W), one map an image, got {tuple(foreground.shape)}"
        )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


__all__ = [
    "VARIANTS",
    "BASTerms",
    "area_constraint",
    "background_activation_ratio",
    "bas_loss",
    "check_factors",
    "foreground_region_guidance",
    "multi_label_cross_entropy",
    "pool_foreground",
]
