from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_entropy.recipes import LayerChange
from lightning_entropy.training.lightning import MisconfigurationException, Trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*", "ignore:.*number of training batches.*"
)


class Words(LightningModule):
    """A user's transformer with dropout, of a style of its own."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(8, 2)
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.head(self.body(x).mean(1)), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)


def data(*, shuffle: bool = True) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(24, 6, 8, generator=generator), torch.randint(2, (24,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=shuffle)


def fitted(module: Words, *callbacks: Any, validate: bool = True) -> Trainer:
    torch.manual_seed(2)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", devices=1, enable_checkpointing=False, callbacks=list(callbacks), **quiet
    )
    trainer.fit(module, data(), data(shuffle=False) if validate else None)
    return trainer


def hidden(module: Words, batches: int) -> list[Tensor]:
    """Outputs of the three layers in evaluation, all tokens, in double precision."""
    was, kept = module.training, []
    module.eval()
    with torch.no_grad():
        x = torch.cat([batch[0] for _, batch in zip(range(batches), data(shuffle=False))])
        for layer in module.body.layers:
            x = layer(x)
            kept.append(x.reshape(-1, 8).double())
    module.train(was)
    return kept


def textbook_cka(x: Tensor, y: Tensor) -> float:
    """From centred Gram matrices, as Kornblith et al. write it, with the unbiased HSIC of Song et al."""
    n = len(x)

    def hsic(k: Tensor, q: Tensor) -> Tensor:
        k, q = k - torch.diag(k.diagonal()), q - torch.diag(q.diagonal())
        one = torch.ones(n, dtype=torch.float64)
        first = (k @ q).trace() + (one @ k @ one) * (one @ q @ one) / ((n - 1) * (n - 2))
        return (first - 2 / (n - 2) * (one @ k @ q @ one)) / (n * (n - 3))

    k, q = x @ x.T, y @ y.T
    return float(hsic(k, q) / (hsic(k, k) * hsic(q, q)).sqrt())


def test_what_changed_is_the_textbook_s_cka() -> None:
    """Eight features lie wholly in the shared basis, which then changes nothing."""
    torch.manual_seed(0)
    module = Words(lr=0.5)
    before = hidden(module, 2)
    callback = LayerChange(batches=2)
    fitted(module, callback)
    after = hidden(module, 2)
    assert callback.after is not None
    debiased = len(before[0]) < 80  # ten rows a component
    assert not debiased  # 96 rows: the plain estimator
    for row, x, y in zip(callback.after.rows, before, after):
        x, y = x - x.mean(0), y - y.mean(0)
        plain = float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))
        assert row.delta_cka == pytest.approx(1 - plain, abs=2e-6)
        assert row.delta_cka > 1e-4
        assert row.retained_variance == pytest.approx(1.0)
    few = LayerChange(batches=1)
    torch.manual_seed(0)
    module = Words(lr=0.5)
    before = hidden(module, 1)
    fitted(module, few)
    assert few.after is not None
    for row, x, y in zip(few.after.rows, before, hidden(module, 1)):
        assert row.delta_cka == pytest.approx(1 - textbook_cka(x, y), abs=2e-6)


def test_nothing_changes_without_training() -> None:
    callback = LayerChange()
    fitted(Words(lr=0.0), callback)
    assert callback.before is not None
    assert callback.after is not None
    assert callback.before.layers == ["body.layers.0", "body.layers.1", "body.layers.2"]
    for before, after in zip(callback.before.rows, callback.after.rows):
        assert abs(after.delta_cka) < 1e-9
        assert after.gradient == before.gradient > 0
        assert after.entropy == before.entropy


def test_the_training_is_not_disturbed() -> None:
    """Dropout and the order of the data are drawn as without it."""
    states = []
    for callbacks in ([], [LayerChange()]):
        torch.manual_seed(0)
        module = Words()
        fitted(module, *callbacks)
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_record_is_plain() -> None:
    callback = LayerChange(batches=1)
    assert callback.record() == {}
    fitted(Words(), callback)
    record = callback.record()
    assert list(record) == ["before", "after"]
    assert record["before"]["delta_cka"] == [None] * 3
    assert all(isinstance(value, float) for value in record["after"]["delta_cka"])
    assert record["after"]["layer"] == ["body.layers.0", "body.layers.1", "body.layers.2"]


def test_weights_that_are_not_finite_are_not_diagnosed() -> None:
    class Broken(Words):
        def on_train_end(self) -> None:
            self.head.weight.data.fill_(float("nan"))

        def on_train_epoch_end(self) -> None:
            self.head.weight.data.fill_(float("nan"))

    callback = LayerChange(batches=1)
    fitted(Broken(lr=0.0), callback)
    assert callback.before is not None
    assert callback.after is None
    assert list(callback.record()) == ["before"]


def test_errors() -> None:
    with pytest.raises(ValueError, match="batches must be at least 1"):
        LayerChange(batches=0)
    with pytest.raises(MisconfigurationException, match="reads validation batches"):
        fitted(Words(), LayerChange(), validate=False)
