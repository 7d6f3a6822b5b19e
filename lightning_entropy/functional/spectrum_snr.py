"""Signal-to-noise ratio of singular values, by which the program Spectrum ranks weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def spectrum_snr(values: Tensor, shape: Sequence[int]) -> Tensor:
    r"""Sum of the singular values above a threshold over the sum of the others, over the largest.

    .. math:: \mathrm{snr} = \frac{\sum_{\sigma_i > t} \sigma_i}{\sigma_1 \sum_{\sigma_i \le t} \sigma_i}, \qquad
        t = \frac{\mathrm{IQR}(\sigma)}{1.349} (1 + \sqrt\beta)

    with :math:`\beta` the smaller over the larger side. The threshold takes the spread of the singular values for that
    of the entries and has no factor for the size, so it is no Marchenko-Pastur edge; it is the formula as it is used.
    Not invariant to scale.

    Args:
        values: singular values, ``(..., r)``, descending.
        shape: rows and columns of the matrix.

    Returns:
        ``(...)``; inf where no value is at or below the threshold, 0 for a zero matrix.

    Raises:
        ValueError: if the number of values is not the smaller side.

    Reference:
        Spectrum: Targeted Training on Signal to Noise Ratio, arXiv 2406.06623.

    Example:
        >>> round(float(spectrum_snr(torch.tensor([4.0, 1.0, 0.5, 0.1]), (4, 4))), 4)
        0.625
    """
    if values.shape[-1] != min(shape):
        raise ValueError(f"{values.shape[-1]} values are not the singular values of a matrix of shape {tuple(shape)}")
    quartiles = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=values.dtype, device=values.device), dim=-1)
    threshold = (quartiles[1] - quartiles[0]) / 1.349 * (1 + math.sqrt(min(shape) / max(shape)))
    signal = values > threshold.unsqueeze(-1)
    above = torch.where(signal, values, 0).sum(-1)
    below = torch.where(signal, 0, values).sum(-1)
    ratio = above / (below * values[..., 0])
    return torch.where(values[..., 0] > 0, ratio, 0)


__all__ = ["spectrum_snr"]
