"""Measuring the layers of a model on data: attention entropy, gradients, change of representation, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from itertools import islice
from typing import Any

from torch import Tensor, nn

from lightning_entropy.functional.inflection import InflectionRule
from lightning_entropy.observe.entropy_reader import is_sharded
from lightning_entropy.observe.progress import Progress, progress_of
from lightning_entropy.observe.selection import as_patterns
from lightning_entropy.surgery.report import name_patterns
from lightning_entropy.training.diagnosis_run import OWNER, DiagnosisRun
from lightning_entropy.training.diagnostic_backward import Loss, on_device, place_of, undisturbed_backward
from lightning_entropy.training.feature_reader import FeatureReader
from lightning_entropy.training.layer_report import LayerDiagnosis
from lightning_entropy.training.lightning import rank_zero_warn
from lightning_entropy.verbosity import announce


def diagnose_layers(
    module: nn.Module,
    data: Iterable[Any],
    *,
    loss: Loss | None = None,
    layers: str | Iterable[str] | None = None,
    max_batches: int | None = None,
    rule: InflectionRule | str = "ski",
    compare_with: Any = None,
    components: int = 64,
    debiased: bool | None = None,
    max_rows: int = 2048,
    keep_representations: bool = False,
    queries: int | None = None,
    valid: Callable[[Any], Tensor] | None = None,
    progress: Progress = None,
    **thresholds: Any,
) -> LayerDiagnosis:
    r"""Find where attention is saturated and where gradients are small or fall, layer by layer.

    One forward and one backward a batch, in evaluation mode; the module, the random states and the loader's generators
    are afterwards as before. Of each layer: attention entropy over the tokens that exist, activation-gradient norm
    :math:`G = B \sqrt{\mathrm{mean}_t \lVert \partial L / \partial h_t \rVert^2}` at its output and input, the same
    divided by the size of the output error, the norm of the gradient in its parameters, and with ``compare_with`` how
    much its representation changed. Padding and batch size change none of them (for a loss that is a mean over the
    samples). In a distributed run every process gives its own batches, and all get the result over all of them.

    Args:
        module: a LightningModule (its ``training_step`` gives the loss; what that logs is dropped), or any module.
        data: batches, as the module takes them; they are moved to its device.
        loss: ``loss(module, batch)`` that returns a scalar which is a mean over the samples, or the scalar and the
            output z it is computed from; None takes the ``training_step`` of a LightningModule, or the ``loss`` of what
            the module returns for a batch that is a mapping.
        layers: shell patterns over dotted names; None takes the numbered blocks in which attention runs.
        max_batches: stop after so many (a process).
        rule: how layers are chosen, see :class:`lightning_entropy.functional.InflectionRule`.
        compare_with: another moment for Delta-CKA: a module, a state dict, the path of a checkpoint, or an earlier
            diagnosis of the same batches that kept its representations.
        components: of the shared PCA basis.
        debiased: see :func:`lightning_entropy.functional.delta_cka`.
        max_rows: tokens (a process) that Delta-CKA is computed from.
        keep_representations: keep the hidden states of ``max_rows`` tokens for a later ``compare_with``.
        queries: read this many query rows of each attention instead of all; said in ``notes``.
        valid: ``valid(batch)`` returns which tokens exist, ``(batch, tokens)``; None takes ``attention_mask`` of the
            batch, else what the attention masks.
        progress: see :func:`lightning_entropy.observe.progress.progress_of`.
        **thresholds: entries of the rule, such as ``alpha=1.0``.

    Returns:
        :class:`LayerDiagnosis`.

    Raises:
        ValueError: if no attention or no loss is found, a pattern matches nothing, or there is no batch.

    Reference:
        arXiv 2511.00797.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
        >>> batches = [torch.randn(4, 5, 8) for _ in range(2)]
        >>> found = diagnose_layers(model, batches, loss=lambda m, x: m(x)[:, 0].square().mean(), rule="intersection")
        >>> found.layers
        ['layers.0', 'layers.1', 'layers.2']
    """
    start = (InflectionRule(rule) if isinstance(rule, str) else rule)._replace(**thresholds)
    found = measure_layers(
        module,
        data,
        loss=loss,
        layers=layers,
        max_batches=max_batches,
        rule=start,
        compare_with=compare_with,
        components=components,
        debiased=debiased,
        max_rows=max_rows,
        keep_representations=keep_representations,
        queries=queries,
        valid=valid,
        progress=progress,
    )
    if not found.chosen:
        rank_zero_warn(f"{OWNER}: {' '.join(found.verdict)}")
    where = ", ".join(name_patterns(found.layers))
    announce(f"{OWNER}: {len(found.rows)} layers ({where}) in {found.batches:,} batches; {found}")
    return found


def measure_layers(
    module: nn.Module,
    data: Iterable[Any],
    *,
    rule: InflectionRule,
    loss: Loss | None = None,
    layers: str | Iterable[str] | None = None,
    max_batches: int | None = None,
    compare_with: Any = None,
    components: int = 64,
    debiased: bool | None = None,
    max_rows: int = 2048,
    keep_representations: bool = False,
    queries: int | None = None,
    valid: Callable[[Any], Tensor] | None = None,
    progress: Progress = None,
    features: FeatureReader | None = None,
) -> LayerDiagnosis:
    """:func:`diagnose_layers` without a word about what it found.

    Args:
        module: see there, as for all but the last.
        data: see there.
        rule: see there.
        loss: see there.
        layers: see there.
        max_batches: see there.
        compare_with: see there.
        components: see there.
        debiased: see there.
        max_rows: see there.
        keep_representations: see there.
        queries: see there.
        valid: see there.
        progress: see there.
        features: reads the last layer's pooled hidden states and the targets of the loss.

    Raises:
        ValueError: see there.
    """
    rule.check()
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, got {max_batches}")
    if max_rows < 4:
        raise ValueError(f"max_rows must be at least 4, got {max_rows}")
    if is_sharded(module):
        raise ValueError(
            f"{OWNER}: the parameters of {type(module).__name__} are sharded (FSDP), so that its backward cannot run "
            "outside the strategy. Diagnose before it is wrapped, in setup or configure_model, or offline."
        )
    run = DiagnosisRun(module, loss, as_patterns(layers), rule, queries, valid)
    if compare_with is not None or keep_representations:
        run.compare(compare_with, max_rows)
    if features is not None:
        run.read_features(features)
    total = max_batches or 0
    if isinstance(data, Sized):
        length = len(data)
        total = min(length, max_batches or length)
    with undisturbed_backward(module, data), run.flow, progress_of(progress, OWNER, total) as tell:
        try:
            run.reader.attach()
            for number, batch in enumerate(islice(data, max_batches)):
                tell(number, "")
                run.step(on_device(batch, place_of(module)))
        finally:
            run.reader.detach()
        return run.result(components, debiased, keep_representations).choose()


__all__ = ["diagnose_layers", "measure_layers"]
