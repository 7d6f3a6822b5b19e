"""One pass over the data of a diagnosis: each batch forward and backward, read as it goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_entropy.functional.inflection import InflectionRule
from lightning_entropy.functional.similarity import delta_cka
from lightning_entropy.observe.gradient_flow import FlowSums, GradientFlow, OutputError, norm_of
from lightning_entropy.observe.numbered_layers import layers_around, layers_of_sites, numbered_blocks
from lightning_entropy.observe.selection import match_modules
from lightning_entropy.observe.token_entropy import TokenEntropyReader
from lightning_entropy.training.diagnosis_totals import distributed, entropies_of, merged, parameter_gradients
from lightning_entropy.training.diagnostic_backward import (
    Loss,
    loss_of,
    place_of,
    run_loss,
    samples_in,
    undisturbed_backward,
)
from lightning_entropy.training.feature_reader import FeatureReader
from lightning_entropy.training.hidden_rows import RowSample, checksum_of, other_weights, tokens_of, with_weights
from lightning_entropy.training.layer_report import LayerDiagnosis, LayerRow

OWNER = "diagnose_layers"
_DEAD = 1e-30  # what a gradient that vanishes entirely is taken to be beside the one before


class DiagnosisRun:
    """The state of one diagnosis: :meth:`step` for each batch, then :meth:`result`."""

    def __init__(
        self,
        module: nn.Module,
        loss: Loss | None,
        patterns: list[str] | None,
        rule: InflectionRule,
        queries: int | None,
        valid: Callable[[Any], Tensor] | None,
    ) -> None:
        self.module, self.loss, self.rule, self.queries, self.valid = module, loss, rule, queries, valid
        self.layers: list[str] | None = None
        if patterns is not None:
            matched = {n for found in match_modules(module, patterns, OWNER).values() for n in found if n}
            names = [n for n, _ in module.named_modules() if n in matched]
            self.layers = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
        self.blocks = numbered_blocks(module)
        self.flow = GradientFlow(module, self.layers if self.layers is not None else self.blocks)
        self.reader = TokenEntropyReader(module, self.layers, queries=queries, gradient=False, owner=OWNER)
        self.samples = self.batches = 0
        self.reference = 0  # gradients are weighted by the batch's samples over those of the first
        self.loss_sum: Tensor | float = 0.0
        self.error_sum: Tensor | float = 0.0
        self.checksum = 0.0
        self.error_seen = True
        self.rows: dict[str, RowSample] = {}
        self.other_rows: dict[str, RowSample] = {}
        self.limit = 0
        self.other: Any = None
        self.features: FeatureReader | None = None

    def read_features(self, features: FeatureReader) -> None:
        """Have it see the outputs of the layers and the targets of the losses."""
        self.features = features
        before = self.flow.on_output

        def see(name: str, hidden: Tensor) -> None:
            if before is not None:
                before(name, hidden)
            features.see(name, hidden, self.flow.token_mask(hidden.shape))

        self.flow.on_output = see

    def compare(self, other: Any, limit: int) -> None:
        """Keep hidden states, and those of another moment where there is one."""
        self.limit = limit
        self.flow.on_output = self._collect(self.flow, self.rows)
        if isinstance(other, LayerDiagnosis):
            if other.representations is None:
                raise ValueError(
                    f"{OWNER}: compare_with has no representations: make it with keep_representations=True (they are "
                    "not in its JSON file)"
                )
            self.other = other
        elif isinstance(other, nn.Module):
            if place_of(other) != place_of(self.module):
                raise ValueError(
                    f"{OWNER}: compare_with is on {place_of(other)} and the module on {place_of(self.module)}: move "
                    "one, or pass compare_with.state_dict()"
                )
            self.other = other
        elif other is not None:
            self.other = other_weights(self.module, other, OWNER)

    def _collect(self, flow: GradientFlow, into: dict[str, RowSample]) -> Callable[[str, Tensor], None]:
        def collect(name: str, hidden: Tensor) -> None:
            rows = tokens_of(hidden, flow.token_mask(hidden.shape))
            into.setdefault(name, RowSample(self.limit)).add(rows)

        return collect

    def step(self, batch: Any) -> None:
        """Run one batch, forward and backward."""
        count = samples_in(batch)
        self.reference = self.reference or count
        self.reader.start()
        self.reader.expect(self._valid(batch))
        self.flow.valid = self.reader.valid
        with self.features or nullcontext(), OutputError() as error:
            value, output = loss_of(self.module, batch, self.loss, OWNER)
            if output is not None:
                error.watch(output)
        self.reader.stop()
        value.backward(torch.full_like(value, count / self.reference))
        if self.layers is None and not self._settle():
            for p in self.module.parameters():
                p.grad = None
            return self.step(batch)
        if self.features is not None:
            self.features.take(self.layers or [], count)
        self.flow.add(self.reference)
        self.reader.add()
        self.samples, self.batches = self.samples + count, self.batches + 1
        self.loss_sum += value.detach().double() * count
        size = error.take()
        self.error_seen = self.error_seen and size is not None
        self.error_sum += 0.0 if size is None else size.double() * self.reference
        if self.limit:
            self.checksum += checksum_of(batch)
            self._run_other(batch)
        return None

    def _valid(self, batch: Any) -> Tensor | None:
        if self.valid is not None:
            return self.valid(batch) != 0
        mask = batch.get("attention_mask") if hasattr(batch, "get") else None
        return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _settle(self) -> bool:
        """Decide which layers there are, from where attention ran; False where the batch has to be run again."""
        sites = list(dict.fromkeys(layer.module for layer in self.reader.layers))
        if not sites and (self.rule.rule != "decay" or not self.blocks):
            raise self.reader.nothing_read()
        inside, alone = layers_around(sites, self.blocks)
        if alone and not inside:
            self.layers = layers_of_sites(alone)
        else:
            beside = {name.rpartition(".")[0] for name in inside}
            # Blocks beside those, without attention (of hybrid models), are layers too; without any attention all are.
            self.layers = [n for n in self.blocks if n.rpartition(".")[0] in beside]
            if not sites:
                self.layers = [n for n in self.blocks if not any(n.startswith(f"{b}.") for b in self.blocks)]
        ready = set(self.layers) <= set(self.blocks)
        self.flow.narrow(self.layers)
        for name in [n for n in self.rows if not ready or n not in self.layers]:
            del self.rows[name]
        return ready

    @torch.no_grad()
    def _run_other(self, batch: Any) -> None:
        if isinstance(self.other, nn.Module):
            assert self.layers is not None
            with undisturbed_backward(self.other), torch.no_grad(), GradientFlow(self.other, self.layers) as flow:
                flow.valid, flow.on_output = self.reader.valid, self._collect(flow, self.other_rows)
                run_loss(self.other, batch, self.loss, OWNER)
        elif isinstance(self.other, Mapping):
            collect = self.flow.on_output
            self.flow.on_output = self._collect(self.flow, self.other_rows)
            with with_weights(self.module, self.other):
                run_loss(self.module, batch, self.loss, OWNER)
            self.flow.on_output = collect

    def result(self, components: int, debiased: bool | None, keep: bool) -> LayerDiagnosis:
        """The measurements over all batches of all processes; no layer is chosen yet."""
        if not self.batches and not distributed():
            raise ValueError(f"{OWNER}: data gave no batch")
        totals = merged(
            {
                "counts": torch.tensor(
                    [self.samples, self.batches, float(self.loss_sum), float(self.error_sum)]
                ).double(),
                "unseen": torch.tensor([0.0 if self.error_seen else 1.0]),
                "layers": self.layers or [],
                "flow": {n: torch.stack([v.double().cpu() for v in s]) for n, s in self.flow.sums.items()},
                "entropy": {n: v.cpu() for n, v in self.reader.sums.items()},
                "rows": {n: s.rows for n, s in self.rows.items()},
                "other": {n: s.rows for n, s in self.other_rows.items()},
            }
        )
        samples, batches, loss, error = totals["counts"].tolist()
        if not batches:
            raise ValueError(f"{OWNER}: data gave no batch")
        error = math.nan if totals["unseen"] else error / samples
        self.layers = totals["layers"]
        assert self.layers is not None
        if not any(float(FlowSums(*sums).output_tokens) for sums in totals["flow"].values()):
            raise ValueError(
                f"{OWNER}: none of the {len(self.layers)} layers ran with gradients recorded, so that nothing can be "
                "said of them: gradient checkpointing with use_reentrant=True does that, and "
                "use_reentrant=False works; or they run under torch.no_grad()."
            )
        gradients = parameter_gradients(self.module, self.layers, self.reference, samples)
        sites = layers_around(totals["entropy"], self.layers)[0]
        rows = []
        for name in self.layers:
            flow = FlowSums(*totals["flow"].get(name, torch.zeros(4)))
            after, before = norm_of(flow.output, flow.output_tokens), norm_of(flow.input, flow.input_tokens)
            decay = math.nan
            if after > 0 and before >= 0:
                decay = math.log(after / max(before, after * _DEAD))
            found: dict[str, Any] = {
                "gradient": after,
                "input_gradient": before,
                "decay": decay,
                "relative_gradient": after / error if error else math.nan,
            }
            found |= entropies_of([totals["entropy"][site] for site in sites.get(name, [])])
            trainable = [p.numel() for p in self.module.get_submodule(name).parameters() if p.requires_grad]
            rows.append(
                LayerRow(
                    name,
                    tuple(sites.get(name, [])),
                    parameter_gradient=gradients[name],
                    parameters=sum(trainable),
                    **found,
                    **self._change(name, totals, components, debiased),
                )
            )
        notes = []
        if self.queries is not None:
            notes.append(f"Attention entropy is estimated from {self.queries} query rows of each attention.")
        if math.isnan(error):
            notes.append(
                "The output error was not seen (no loss of torch.nn.functional ran): let loss return (loss, z)."
            )
        return LayerDiagnosis(
            tuple(rows),
            self.rule,
            type(self.module).__name__,
            loss / samples,
            error,
            int(samples),
            int(batches),
            self.queries,
            tuple(notes),
            representations=dict(totals["rows"]) if keep else None,
            checksum=self.checksum if self.limit else math.nan,
        )

    def _change(self, name: str, totals: dict[str, Any], components: int, debiased: bool | None) -> dict[str, Any]:
        if self.other is None:
            return {}
        before, after = totals["other"].get(name), totals["rows"].get(name)
        if isinstance(self.other, LayerDiagnosis):
            assert self.other.representations is not None
            before = self.other.representations.get(name)
            same = before is not None and after is not None and len(before) == len(after)
            if not same or not math.isclose(self.other.checksum, self.checksum, rel_tol=1e-6, abs_tol=1e-6):
                raise ValueError(
                    f"{OWNER}: compare_with is a diagnosis of other layers or other batches ({name}): give both the "
                    "same batches in the same order, and equal max_rows"
                )
        if before is None or after is None or len(before) < 4:
            return {}
        found = delta_cka(before, after, components=components, debiased=debiased)
        return {"delta_cka": found.change, "retained_variance": found.retained}


__all__ = ["OWNER", "DiagnosisRun"]
