"""The signal-to-noise ratio of the program Spectrum, against its formula in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_entropy.functional import singular_spectrum, spectrum_snr


def written_out(values: np.ndarray, rows: int, columns: int) -> float:
    sigma = (np.percentile(values, 75) - np.percentile(values, 25)) / 1.349
    threshold = sigma * (1 + math.sqrt(min(rows, columns) / max(rows, columns)))
    signal, noise = values[values > threshold].sum(), values[values <= threshold].sum()
    return float("inf") if noise == 0 else signal / noise / values.max()


@pytest.mark.parametrize(("rows", "columns"), [(12, 12), (30, 12), (12, 50), (1, 4)])
def test_against_the_formula(rows: int, columns: int) -> None:
    matrices = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(0))
    matrices[1] = matrices[1] * torch.logspace(0, -4, columns)
    values = singular_spectrum(matrices).values
    found = spectrum_snr(values, (rows, columns))
    assert found.shape == (3,)
    for one, ours in zip(values, found):
        assert float(ours) == pytest.approx(written_out(one.numpy(), rows, columns), rel=1e-10)


def test_extremes() -> None:
    assert float(spectrum_snr(torch.ones(4), (4, 8))) == math.inf  # no spread, so all is signal
    assert float(spectrum_snr(torch.zeros(4), (4, 8))) == 0
    with pytest.raises(ValueError, match="not the singular values"):
        spectrum_snr(torch.ones(4), (5, 8))
