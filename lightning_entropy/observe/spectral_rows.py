"""What the spectrum of one weight says: a row of numbers, from one decomposition."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_entropy.functional.condition_number import condition_of_spectrum, expected_condition_number
from lightning_entropy.functional.gaussian_unit import effective_rank, entropy_deficit, log_volume, stable_rank
from lightning_entropy.functional.singular_spectrum import SingularSpectrum, singular_spectrum
from lightning_entropy.functional.spectrum_snr import spectrum_snr
from lightning_entropy.observe.progress import Progress, progress_of
from lightning_entropy.observe.stored_weights import StoredWeight, weight_digest

_BATCH_NUMBERS = 2**26  # 512 MB of float64


@dataclass(frozen=True)
class SpectralRow:
    """One weight: its place, its form, and its spectrum in numbers.

    A weight of several matrices (experts, groups of a convolution; fused q, k and v with ``parts="blocks"``) is told by
    the matrix with the largest condition number, in ``sigma_max``, ``sigma_min``, ``kappa``, ``kappa_error`` and
    ``resolvable_kappa``, and by the mean over its matrices in the rest.

    Args:
        name: of the parameter, without the wrapping of adapters.
        module: that holds it.
        layout: ``"linear"``, ``"conv"`` or ``"experts"``.
        precision: how it is stored.
        shape: as it is stored.
        matrices: how many it is.
        rows: of one matrix.
        columns: of one matrix.
        parameters: how many numbers.
        sigma_max: largest singular value.
        sigma_min: smallest of the min(rows, columns).
        kappa: ``sigma_max / sigma_min``; inf for a zero or rank-deficient matrix.
        kappa_error: bound on its relative error, of the computation alone.
        kappa_mean: over the matrices; equals ``kappa`` for one.
        deficit: entropy deficit in nats, see :func:`~lightning_entropy.functional.entropy_deficit`.
        deficit_per_dimension: the same over min(rows, columns).
        stable_rank: squared Frobenius norm over squared spectral norm.
        effective_rank: exponential of the entropy of the normalised singular values.
        log_volume: sum of the log singular values, nats.
        snr: signal to noise as Spectrum defines it.
        shape_kappa: ``kappa`` over what independent numbers of that shape have.
        resolvable_kappa: the condition number above which the rounding of the stored numbers decides it.
        digest: of the numbers; see :func:`~lightning_entropy.observe.stored_weights.weight_digest`.
        tied: other names of the same parameter.
    """

    name: str
    module: str
    layout: str
    precision: str
    shape: tuple[int, ...]
    matrices: int
    rows: int
    columns: int
    parameters: int
    sigma_max: float
    sigma_min: float
    kappa: float
    kappa_error: float
    kappa_mean: float
    deficit: float
    deficit_per_dimension: float
    stable_rank: float
    effective_rank: float
    log_volume: float
    snr: float
    shape_kappa: float
    resolvable_kappa: float
    digest: str = ""
    tied: tuple[str, ...] = ()


def spectral_rows(
    weights: list[StoredWeight],
    *,
    blocks: bool = False,
    rtol: float = 1e-6,
    device: torch.device | str | None = None,
    progress: Progress = None,
) -> Iterator[SpectralRow | tuple[StoredWeight, str]]:
    """A row for each weight, one after another.

    Args:
        weights: in whatever order; each is read once and let go.
        blocks: fused q, k and v as three matrices.
        rtol: the relative error of kappa up to which the fast decomposition is accepted.
        device: where to compute; None where each weight is.
        progress: see :func:`~lightning_entropy.observe.progress.progress_of`.

    Yields:
        The row, or the weight and why it has none.
    """
    with progress_of(progress, "spectra", len(weights)) as tell:
        done = 0
        for group in _batches(weights):
            tell(done, group[0].name)
            # No name outlives its weight here: the numbers of one are let go before the next are read.
            read = [_read(weight, blocks, device) for weight in group]
            yield from ((weight, found) for weight, found in zip(group, read) if isinstance(found, str))
            readable = [found for found in read if not isinstance(found, str)]
            del read
            if readable:
                yield from _rows(readable, rtol)
            del readable
            done += len(group)
        tell(done, "")


def _read(
    weight: StoredWeight, blocks: bool, device: torch.device | str | None
) -> tuple[StoredWeight, Tensor, str] | str:
    """A weight with its matrices and their digest, or why it has none."""
    if weight.refusal is not None:
        return weight.refusal
    value = weight.read()
    matrices = on_device(weight.as_matrices(value, blocks=blocks), device)
    unusual = int((~torch.isfinite(matrices)).sum())
    if unusual:
        return f"{unusual} of its numbers are not finite"
    return weight, matrices, weight_digest(value)


def _batches(weights: list[StoredWeight]) -> Iterable[list[StoredWeight]]:
    """Alone, except on a GPU, where equal shapes are decomposed together: a small matrix leaves most of it idle."""
    groups: dict[object, list[StoredWeight]] = {}
    for i, weight in enumerate(weights):
        parameter = None if weight.holder is None else weight.holder._parameters.get(weight.tensor)
        together = parameter is not None and parameter.device.type == "cuda" and weight.layout == "linear"
        key: object = i
        if together and parameter is not None:
            key = (weight.shape, weight.dtype, weight.bits, weight.parts, parameter.device)
        groups.setdefault(key, []).append(weight)
    for group in groups.values():
        most = max(1, _BATCH_NUMBERS // max(1, group[0].parameters))
        yield from (group[i : i + most] for i in range(0, len(group), most))


def on_device(matrices: Tensor, device: torch.device | str | None) -> Tensor:
    """Matrices where they are decomposed, and in a type in which that is possible."""
    matrices = matrices if device is None else matrices.to(device)
    return matrices.float() if matrices.element_size() == 1 else matrices  # little arithmetic exists in float8


def _rows(group: list[tuple[StoredWeight, Tensor, str]], rtol: float) -> Iterator[SpectralRow]:
    stack = group[0][1] if len(group) == 1 else torch.cat([matrices for _, matrices, _ in group])
    spectrum = singular_spectrum(stack, rtol=rtol)
    start = 0
    for weight, matrices, digest in group:
        end = start + len(matrices)
        yield _row(weight, digest, matrices, SingularSpectrum(*(field[start:end] for field in spectrum)))
        start = end


def _row(weight: StoredWeight, digest: str, matrices: Tensor, spectrum: SingularSpectrum) -> SpectralRow:
    rows, columns = matrices.shape[-2:]
    small = min(rows, columns)
    condition = condition_of_spectrum(spectrum, rows, columns, weight.bits or weight.dtype)
    worst = int(condition.value.argmax())
    kappa = float(condition.value[worst])
    deficit = float(entropy_deficit(spectrum).mean())
    return SpectralRow(
        name=weight.name,
        module=weight.module,
        layout=weight.layout,
        precision=weight.precision,
        shape=weight.shape,
        matrices=len(matrices),
        rows=rows,
        columns=columns,
        parameters=weight.parameters,
        sigma_max=float(condition.sigma_max[worst]),
        sigma_min=float(condition.sigma_min[worst]),
        kappa=kappa,
        kappa_error=float(condition.error[worst]),
        kappa_mean=float(condition.value.mean()),
        deficit=deficit,
        deficit_per_dimension=deficit / small,
        stable_rank=float(stable_rank(spectrum).mean()),
        effective_rank=float(effective_rank(spectrum).mean()),
        log_volume=float(log_volume(spectrum).mean()),
        snr=float(spectrum_snr(spectrum.values, (rows, columns)).mean()),
        shape_kappa=kappa / expected_condition_number(rows, columns),
        resolvable_kappa=float(condition.resolvable[worst]),
        digest=digest,
        tied=weight.tied,
    )


def is_deficient(row: SpectralRow) -> str | None:
    """Why a weight may not be chosen by its spectrum; None where it may."""
    if row.sigma_max == 0:
        return "all its numbers are zero"
    if math.isinf(row.kappa):
        return f"its rank is deficient at the precision that it is stored in ({row.precision}): kappa is infinite"
    return None


__all__ = ["SpectralRow", "is_deficient", "on_device", "spectral_rows"]
