"""Generated for every registered case: what a Trainer or a user's module may do besides the plain step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from tests.cases import CASES, Case
from tests.suite.running import first_gradients, loader, same, trainer, weights

every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def built(case: Case, module: Any = None, **options: Any) -> LightningModule:
    """The case's module, or a subclass of it, always from the same numbers."""
    seed_everything(3, verbose=False)
    return (module or case.module)(**options)


def compare(case: Case, folder: Path, ours: LightningModule, rtol: float = 1e-9, **options: Any) -> None:
    """Refuse unless the first step's gradients equal those of a plain Trainer in float64."""
    batches = case.batches(dtype=torch.float64)
    plain = first_gradients(built(case, dropout=0.0).double(), [case.steady()], batches, folder)
    found = first_gradients(ours.double(), [case.steady()], batches, folder, **options)
    assert plain.keys() <= found.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name].to(gradient.dtype), gradient, rtol=rtol, atol=1e-12, msg=name)


@every_case
def test_fp16_with_a_scaler(case: Case, tmp_path: Path) -> None:
    """The scaler's factor is divided out again: the gradients are those of float32, to what half precision holds."""

    class Unscaled(Callback):
        seen: dict[str, Tensor]

        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            if trainer.global_step == 0:  # the plugin has unscaled them by now
                self.seen = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}

    found = []
    for half in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)] if half else []
        look = Unscaled()
        module = built(case, dropout=0.0)
        trainer([case.steady(), look], tmp_path, plugins=plugins, max_epochs=1).fit(module, loader(case.batches()))
        assert all(torch.isfinite(v).all() for v in weights(module).values())
        found.append(look.seen)
    whole, half_ = found
    size = max(float(g.norm()) for g in whole.values())
    for name, gradient in whole.items():
        assert float((half_[name] - gradient).norm()) < 0.03 * size, name


@every_case
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_gradient_checkpointing(case: Case, reentrant: bool, tmp_path: Path, record_property: Any) -> None:
    """What runs again in the backward pass is counted once."""
    module = built(case, dropout=0.0)
    for name, part in module.named_children():
        if name in ("pool", "picture"):
            run = part.forward

            def again(*inputs: Tensor, run: Any = run) -> Tensor:
                # Reentrant checkpointing has no gradient where no input has one.
                inputs = tuple(x.requires_grad_() if reentrant and x.is_floating_point() else x for x in inputs)
                return checkpoint(run, *inputs, use_reentrant=reentrant)

            part.forward = again
    if reentrant and case.reentrant is not None:
        record_property("refused", case.reentrant)
        with pytest.raises(Exception, match=case.reentrant):
            compare(case, tmp_path, module)
        return
    compare(case, tmp_path, module)


@every_case
def test_manual_optimization_with_two_optimizers(case: Case, tmp_path: Path, record_property: Any) -> None:
    class TwoOptimizers(case.module):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.automatic_optimization = False

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            loss = self.loss(batch)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            head = {id(p) for p in self.head.parameters()}
            parts = [[p for p in self.parameters() if (id(p) in head) == first] for first in (True, False)]
            return [torch.optim.AdamW(part, lr=0.01, eps=1e-4) for part in parts]

    module = built(case, TwoOptimizers, dropout=0.0)
    if case.manual is not None:
        record_property("refused", case.manual)
        with pytest.raises(Exception, match=case.manual):
            compare(case, tmp_path, module)
        return
    compare(case, tmp_path, module)


@every_case
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by torch's own tracing
def test_compiled_in_place(case: Case, when: str, tmp_path: Path) -> None:
    """A user who compiles parts of the module: before the Trainer has it, or when the method is attached."""
    torch._dynamo.reset()
    module = built(case, dropout=0.0)

    class Compile(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            pl_module.pool.compile(backend="aot_eager")

    if when == "before":
        module.pool.compile(backend="aot_eager")
        return compare(case, tmp_path, module)
    batches = case.batches(dtype=torch.float64)
    plain = first_gradients(built(case, dropout=0.0).double(), [case.steady()], batches, tmp_path)
    found = first_gradients(module.double(), [case.steady(), Compile()], batches, tmp_path)
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def averaging(kind: str) -> Callback:
    if kind == "ema":
        return EMAWeightAveraging(decay=0.9)
    return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)


@every_case
@pytest.mark.parametrize("first", ["method", "average"])
@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")  # of sharding, which is refused anyway
def test_averaged_weights(case: Case, kind: str, first: str, tmp_path: Path) -> None:
    """Callbacks that copy the module before training: the mean of what was trained comes out, in either order."""
    seen: list[dict[str, Tensor]] = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            seen.append(weights(pl_module))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            seen.append(weights(pl_module))

    average = averaging(kind)
    callbacks = [case.build(), average] if first == "method" else [average, case.build()]
    module = built(case)
    trainer([*callbacks, Look()], tmp_path, max_epochs=3).fit(module, loader(case.batches()))
    ends = weights(module)
    assert ends.keys() == seen[-1].keys()
    for name, end in ends.items():
        if end.is_floating_point():
            path = torch.stack([step[name] for step in seen])
            assert (end >= path.amin(0) - 1e-4).all(), name
            assert (end <= path.amax(0) + 1e-4).all(), name
    if kind == "ema":
        assert not same(ends, seen[-1]), "the average is the last step"


class Validated:
    """What a user adds to be told when to stop."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch["label"]))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), batch_size=len(batch["label"]))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)


def validated(case: Case) -> type:
    return type("Validated", (Validated, case.module), {})


@every_case
def test_early_stopping_and_model_checkpoint(case: Case, tmp_path: Path) -> None:
    module = built(case, validated(case))
    stop = EarlyStopping("val_loss", patience=1, min_delta=1e6)  # never better by so much: stops in the second epoch
    keep = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1, filename="best")
    callback = case.build()
    run = trainer([callback, stop, keep], tmp_path, max_epochs=6, enable_checkpointing=True)
    run.fit(module, loader(case.batches()), loader(case.batches(count=2)))
    assert run.current_epoch == 2
    best = torch.load(keep.best_model_path, weights_only=True)
    assert all(torch.isfinite(v).all() for v in best["state_dict"].values())
    tested = run.test(module, loader(case.batches(count=2)), ckpt_path="best", verbose=False, weights_only=True)
    assert torch.isfinite(torch.tensor(tested[0]["test_loss"]))


@every_case
def test_validate_and_predict_without_a_fit(case: Case, tmp_path: Path) -> None:
    """They run; what only acts in training changes no number of theirs."""
    results = []
    for callbacks in ([], [case.build()]):
        module = built(case, validated(case), dropout=0.0)
        run = trainer(callbacks, tmp_path)
        batches = DataLoader(case.batches(count=2), batch_size=None)
        scores = run.validate(module, batches, verbose=False)
        predicted = run.predict(module, batches)
        results.append((scores[0]["val_loss"], torch.stack(predicted)))
    (plain, plain_predicted), (found, predicted) = results
    assert torch.isfinite(predicted).all()
    assert torch.isfinite(torch.tensor(found))
    if case.undo is None:
        # To what float32 rounds: what reads attention takes torch's fused layer of evaluation apart.
        torch.testing.assert_close(found, plain, rtol=1e-6, atol=0)
        torch.testing.assert_close(predicted, plain_predicted, rtol=1e-6, atol=0)
