from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_entropy import AttentionEntropyMaximization
from lightning_entropy.training import AttentionLossTerm, LossTerm, WeightSchedule
from lightning_entropy.training.backward import _saves_its_result, check_supported
from lightning_entropy.training.lightning import MisconfigurationException
from tests.suite.running import first_gradients, loader, trainer
from tests.user_modules import BagClassifier, bags


def test_base_classes_cannot_be_made() -> None:
    """``configure_callbacks`` of a user's module would otherwise replace a Trainer's callback of the base type."""
    for base in (LossTerm, AttentionLossTerm):
        with pytest.raises(TypeError, match="abstract"):
            base(0.1)


@pytest.mark.parametrize(
    "function",
    [torch.exp, torch.sqrt, torch.sigmoid, lambda x: x.expand(3).logsumexp(0), lambda x: x.expand(3).norm()],
    ids=["exp", "sqrt", "sigmoid", "logsumexp", "norm"],
)
def test_endings_that_save_their_result_are_recognised(function) -> None:
    x = torch.tensor(0.7, requires_grad=True)
    loss = function(x * 1.0)
    assert _saves_its_result(loss)
    loss.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "function",
    [lambda x: x / 1, lambda x: x * 2.0, lambda x: x.expand(3).mean(), lambda x: x.expand(3).sum(), lambda x: x + 1],
    ids=["quotient", "product", "mean", "sum", "addition"],
)
def test_endings_that_do_not_are_changed_in_place(function) -> None:
    x = torch.tensor(0.7, requires_grad=True)
    loss = function(x * 1.0)
    assert not _saves_its_result(loss)
    loss.add_(x**2)
    loss.backward()
    assert torch.isfinite(x.grad)


def test_custom_function_that_saves_its_output() -> None:
    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            out = x.exp()
            ctx.save_for_backward(out)
            return out

        @staticmethod
        def backward(ctx, g):
            return g * ctx.saved_tensors[0]

    assert _saves_its_result(Keep.apply(torch.tensor(0.3, requires_grad=True)))


def test_deepspeed_is_refused_with_the_reason() -> None:
    strategy = type("DeepSpeedStrategy", (), {})()
    with pytest.raises(MisconfigurationException, match="inside its own engine"):
        check_supported(SimpleNamespace(strategy=strategy), "AEM")


def test_several_terms_commute(tmp_path: Path) -> None:
    def by(order: int) -> dict:
        torch.manual_seed(0)
        terms = [
            AttentionEntropyMaximization(0.3, modules="pool"),
            AttentionEntropyMaximization(0.7, modules="po*", normalize=True),
        ][::order]
        module = BagClassifier(dropout=0.0).double()
        return first_gradients(module, terms, bags(2, dtype=torch.float64), tmp_path)

    forward, backward = by(1), by(-1)
    for key in forward:
        torch.testing.assert_close(forward[key], backward[key], rtol=1e-12, atol=1e-14, msg=key)


def test_several_instances_log_under_their_own_names(tmp_path: Path) -> None:
    run = trainer([AttentionEntropyMaximization(), AttentionEntropyMaximization(modules="pool")], tmp_path)
    run.fit(BagClassifier(), loader(bags()))
    assert {"aem_0/loss", "aem_1/loss"} <= set(run.callback_metrics)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_step_that_is_skipped(tmp_path: Path) -> None:
    class Skips(BagClassifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 2 else loss

    run = trainer([AttentionEntropyMaximization()], tmp_path)
    run.fit(Skips(), loader(bags()))
    assert run.global_step == 16
    assert run.callback_metrics["aem/entropy"] > 0


def test_lbfgs_calls_its_closure_many_times(tmp_path: Path) -> None:
    class Lbfgs(BagClassifier):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), max_iter=4)

    def losses(weight: float) -> torch.Tensor:
        torch.manual_seed(0)
        module = Lbfgs(dropout=0.0)
        trainer([AttentionEntropyMaximization(weight)], tmp_path, max_epochs=1).fit(module, loader(bags(2)))
        return module.pool.score[2].weight.detach()

    assert not torch.equal(losses(0.0), losses(0.5))


def test_two_optimizers_by_hand(tmp_path: Path) -> None:
    """As DTFD trains: two losses, two backward passes; the term enters the first one after its forward."""

    class Two(BagClassifier):
        def __init__(self) -> None:
            super().__init__(dropout=0.0)
            self.automatic_optimization = False
            self.other = nn.Linear(self.width, 2)

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            first.zero_grad()
            self.manual_backward(self.loss(batch))
            first.step()
            second.zero_grad()
            z = self.pool(batch["features"], batch["mask"]).detach()
            self.manual_backward(nn.functional.cross_entropy(self.other(z), batch["label"]))
            second.step()

        def configure_optimizers(self):
            tier = [*self.pool.parameters(), *self.head.parameters()]
            return torch.optim.SGD(tier, 0.1), torch.optim.SGD(self.other.parameters(), 0.1)

    def scorer(weight: float) -> torch.Tensor:
        torch.manual_seed(0)
        module = Two()
        trainer([AttentionEntropyMaximization(weight)], tmp_path).fit(module, loader(bags()))
        return module.pool.score[2].weight.detach()

    assert not torch.equal(scorer(0.0), scorer(0.5))


def test_two_losses_with_a_forward_each_both_get_the_term(tmp_path: Path) -> None:
    """The second loss often lies where the freed first one was, with the same id."""
    added = []

    class Two(BagClassifier):
        def __init__(self) -> None:
            super().__init__(dropout=0.0)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            for _ in range(2):
                loss = self.loss(batch) * 1.0
                before = loss.item()
                self.manual_backward(loss)
                added.append(loss.item() - before)
                del loss
            optimizer.step()

    trainer([AttentionEntropyMaximization(0.5)], tmp_path).fit(Two(), loader(bags()))
    assert len(added) == 32
    assert all(value < -0.01 for value in added)


def test_resume_with_other_arguments_is_said(tmp_path: Path, announced: list[str]) -> None:
    run = trainer([AttentionEntropyMaximization(0.1)], tmp_path, max_epochs=1)
    run.fit(BagClassifier(), loader(bags()))
    run.save_checkpoint(tmp_path / "a.ckpt")
    later = trainer([AttentionEntropyMaximization(0.2)], tmp_path, max_epochs=2)
    later.fit(BagClassifier(), loader(bags()), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert "AttentionEntropyMaximization: resumed with other arguments: weight 0.1 -> 0.2" in announced


def test_weight_follows_steps_under_accumulation(tmp_path: Path) -> None:
    weights = []

    class Watch(AttentionEntropyMaximization):
        def on_train_batch_end(self, trainer, pl_module, *rest) -> None:
            super().on_train_batch_end(trainer, pl_module, *rest)
            weights.append(float(trainer.callback_metrics["aem/weight"]))

    callback = Watch(1.0, schedule=WeightSchedule("linear", unit="step"))
    trainer([callback], tmp_path, max_epochs=1, accumulate_grad_batches=4).fit(BagClassifier(), loader(bags(8)))
    assert weights == pytest.approx([1.0] * 4 + [0.5] * 4)


def test_what_no_logger_sees_is_not_computed(tmp_path: Path) -> None:
    counted = []

    class Counts(AttentionEntropyMaximization):
        def attention_quantities(self, records):
            counted.append(len(counted))
            return super().attention_quantities(records)

    trainer([Counts()], tmp_path, log_every_n_steps=3, max_epochs=1).fit(BagClassifier(), loader(bags(8)))
    assert len(counted) == 3  # steps 3 and 6, and the last of the epoch
