from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_entropy.attention import AttentionEntropyMaximization
from lightning_entropy.data import Batch, SlideBags
from lightning_entropy.recipes import MILClassifier
from lightning_entropy.recipes.class_weights import bag_loss, balanced_weights, resolve_weights
from lightning_entropy.recipes.half_cosine import HalfCosine
from lightning_entropy.training.lightning import LightningDataModule, seed_everything
from tests.recipes.bag_cases import make_batch, quiet_trainer

FEW: dict[str, Any] = {"train_bags": 8, "val_bags": 6, "test_bags": 8, "bag_size": 20, "witness_rate": 0.3}


class Bags(LightningDataModule):
    """Bags in memory; ``classes`` of them, or all of one class in validation."""

    in_features = 6

    def __init__(self, *, classes: int = 2, val_classes: int | None = None) -> None:
        super().__init__()
        self.num_classes = classes
        self.classes = [f"class {c}" for c in range(classes)]
        self.val_classes = val_classes or classes

    def _loader(self, classes: int, seed: int) -> DataLoader[Batch]:
        batches = [make_batch([5, 8, 3], classes=classes, seed=seed + i) for i in range(3)]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.num_classes, 0)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.val_classes, 10)

    test_dataloader = val_dataloader


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr("lightning_entropy.recipes.mil.announce", said.append)
    return said


def test_it_learns_digit_bags(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    options = {"train_bags": 40, "bag_size": 30, "witness_rate": 0.4, "noise": 0.05, "test_bags": 40}
    data = SlideBags("embedded:digits", seed=0, options=options)
    trainer = quiet_trainer(tmp_path, max_epochs=12, limit_val_batches=0)
    classifier = MILClassifier(hidden=32, lr=3e-3)
    trainer.fit(classifier, datamodule=data)
    found = trainer.test(classifier, datamodule=data, verbose=False)[0]
    assert found["test/auc"] > 0.85
    assert found["test/instance_auc"] > 0.6
    assert 0 < found["test/entropy"] < math.log(30)
    assert {"test/f1", "test/balanced_accuracy", "test/loss", "test/coverage", "test/key_mass"} <= found.keys()


@pytest.mark.parametrize("name", ["ABMIL", "DSMIL", "CLAM_SB", "DTFDMIL", "TransformerABMIL"])
def test_torchmil_models_by_name(tmp_path: Path, name: str, announced: list[str]) -> None:
    pytest.importorskip("torchmil")
    data = SlideBags("embedded:digits", options=FEW)
    trainer = quiet_trainer(tmp_path)
    classifier = MILClassifier(f"torchmil:{name}", hidden=16)
    trainer.fit(classifier, datamodule=data)
    found = trainer.test(classifier, datamodule=data, verbose=False)[0]
    assert "val/f1_plus_auc" in trainer.validate(classifier, datamodule=data, verbose=False)[0]
    # DTFD-MIL attends within groups that it shuffles: no attention over a bag, and that is said once.
    assert ("test/entropy" in found) == (name != "DTFDMIL")
    assert len([text for text in announced if "no attention metrics" in text]) == (name == "DTFDMIL")


def test_multi_class_with_padding_and_attention_entropy(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[AttentionEntropyMaximization(0.1)])
    classifier = MILClassifier(branches=2)
    trainer.fit(classifier, datamodule=Bags(classes=3))
    assert classifier.num_classes == 3
    assert {"val/auc", "aem/entropy", "train/loss"} <= trainer.callback_metrics.keys()


def test_mean_pooling_attends_equally(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    classifier = MILClassifier(pooling="mean", hidden=8)
    found = trainer.test(classifier, datamodule=Bags(), verbose=False)[0]
    assert found["test/normalized_entropy"] == pytest.approx(1)
    assert found["test/instance_auc"] == pytest.approx(0.5)


def test_one_class_in_validation_is_named_once(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=3)
    with pytest.warns(UserWarning, match="none of class class 1") as caught:
        trainer.fit(MILClassifier(), datamodule=Bags(val_classes=1))
    assert len([w for w in caught if "none of class" in str(w.message)]) == 1
    metrics = trainer.callback_metrics
    assert math.isnan(metrics["val/auc"])
    assert float(metrics["val/f1_plus_auc"]) == pytest.approx(float(metrics["val/f1"]) + 0.5)


def test_selection_is_f1_plus_auc(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    found = trainer.validate(MILClassifier(), datamodule=Bags(), verbose=False)[0]
    assert found["val/f1_plus_auc"] == pytest.approx(found["val/f1"] + found["val/auc"])


def test_optimizer_and_half_cosine(tmp_path: Path) -> None:
    rates: list[float] = []

    class Watched(MILClassifier):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    classifier = Watched(lr=1e-3)
    trainer = quiet_trainer(tmp_path, max_epochs=2)
    trainer.fit(classifier, datamodule=Bags())
    expected = [1e-3 * 0.5 * (1 + math.cos(math.pi * t / 6)) for t in range(6)]
    assert rates == pytest.approx(expected)
    (optimizer,) = trainer.optimizers
    assert type(optimizer).__name__ == "AdamW"
    assert optimizer.param_groups[0]["weight_decay"] == 1e-5
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    assert HalfCosine(6)(9) == pytest.approx(0, abs=1e-12)


def test_a_run_without_an_end_has_a_constant_rate(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=-1, max_time="00:00:00:00", limit_val_batches=0)
    classifier = MILClassifier()
    trainer.fit(classifier, datamodule=Bags())
    assert trainer.lr_scheduler_configs == []


def test_class_weights_act_in_batches_of_one() -> None:
    logits, label = torch.randn(1, 3), torch.tensor([2])
    weight = torch.tensor([1.0, 1.0, 5.0])
    torch.testing.assert_close(bag_loss(logits, label, weight), 5 * F.cross_entropy(logits, label))
    assert F.cross_entropy(logits, label, weight=weight) == F.cross_entropy(logits, label)  # what is avoided
    many, labels = torch.randn(8, 3), torch.arange(8) % 3
    expected = torch.stack([weight[y] * F.cross_entropy(z[None], y[None]) for z, y in zip(many, labels)]).mean()
    torch.testing.assert_close(bag_loss(many, labels, weight), expected)


def test_balanced_weights_come_from_the_training_bags(tmp_path: Path) -> None:
    assert balanced_weights([0, 0, 0, 1], num_classes=2) == [4 / 6, 2.0]
    data = SlideBags("embedded:digits", options={**FEW, "train_bags": 9})
    classifier = MILClassifier(class_weights="balanced")
    trainer = quiet_trainer(tmp_path)
    trainer.fit(classifier, datamodule=data)
    assert classifier.hparams["class_weights"] == [9 / 10, 9 / 8]
    trainer.save_checkpoint(tmp_path / "w.ckpt")
    again = MILClassifier.load_from_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    torch.testing.assert_close(again.class_weight, torch.tensor([9 / 10, 9 / 8]))


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1.0], "2 finite numbers"), ([1.0, -1.0], "2 finite"), ("equal", "balanced"), ("balanced", "datamodule")],
)
def test_wrong_class_weights(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_weights(weights, labels=None, num_classes=2)
    with pytest.raises(ValueError, match="a training bag of every class"):
        balanced_weights([0, 0], num_classes=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be"),
        ({"weight_decay": math.nan}, "weight_decay must be"),
        ({"model": "torchmil:ABMIL", "branches": 2}, "branches"),
        ({"model": "torchmil:DSMIL", "class_weights": [1.0, 2.0]}, "criterion"),
    ],
)
def test_arguments_are_checked_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MILClassifier(**options)


def test_sizes_must_be_known(tmp_path: Path) -> None:
    loader = Bags().train_dataloader()
    with pytest.raises(ValueError, match="needs in_features"):
        quiet_trainer(tmp_path).fit(MILClassifier(), loader)
    with pytest.raises(RuntimeError, match="in_features and num_classes"):
        MILClassifier()(torch.zeros(1, 2, 6))
    quiet_trainer(tmp_path).fit(MILClassifier(in_features=6, num_classes=2), loader)


def test_checkpoint_round_trip_without_data(tmp_path: Path) -> None:
    classifier = MILClassifier(hidden=8, branches=2)
    trainer = quiet_trainer(tmp_path)
    trainer.fit(classifier, datamodule=Bags(classes=3))
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    again = MILClassifier.load_from_checkpoint(tmp_path / "m.ckpt", weights_only=True)
    assert (again.in_features, again.num_classes) == (6, 3)
    batch = make_batch([4, 6])
    classifier.eval()
    again.eval()
    assert torch.equal(again(batch["features"], batch["mask"]), classifier(batch["features"], batch["mask"]))
    assert not [key for key in again.state_dict() if "metrics" in key or key == "weight"]


def test_a_module_of_ones_own(tmp_path: Path, announced: list[str]) -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 1)

        def forward(self, bag: Tensor, mask: Tensor) -> Tensor:
            return self.linear((bag * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)).squeeze(-1)

    trainer = quiet_trainer(tmp_path)
    classifier = MILClassifier(Mean())
    trainer.fit(classifier, datamodule=Bags())
    found = trainer.test(classifier, datamodule=Bags(), verbose=False)[0]
    assert "test/auc" in found
    assert "test/entropy" not in found
    assert len(announced) == 1
    assert "no attention metrics" in announced[0]
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    again = MILClassifier.load_from_checkpoint(tmp_path / "own.ckpt", model=Mean(), weights_only=True)
    batch = make_batch([3, 2])
    torch.testing.assert_close(again(batch["features"], batch["mask"]), classifier(batch["features"], batch["mask"]))


def test_an_error_of_the_model_is_not_taken_for_unreadable_attention(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, bag: Tensor, mask: Tensor) -> Tensor:
            raise ValueError("of the model")

    classifier = MILClassifier(Broken(), in_features=6, num_classes=2)
    with pytest.raises(ValueError, match="of the model"):
        classifier.attend(make_batch([3]))
    assert not classifier.net._forward_hooks  # type: ignore[union-attr]


def test_predictions_are_probabilities_and_attention(tmp_path: Path) -> None:
    classifier = MILClassifier(in_features=6, num_classes=2, branches=3).eval()
    batch = make_batch([4, 7, 1])
    found = classifier.predict_step(batch, 0)
    assert found["slide"] == ["s0", "s1", "s2"]
    torch.testing.assert_close(found["probabilities"].sum(-1), torch.ones(3))
    assert [len(a) for a in found["attention"]] == [4, 7, 1]
    for attention in found["attention"]:
        assert float(attention.sum()) == pytest.approx(1, abs=1e-5)


def test_evaluation_leaves_the_output_alone_and_no_hook() -> None:
    classifier = MILClassifier(in_features=6, num_classes=2).eval()
    batch = make_batch([5, 2])
    logits, attention = classifier.attend(batch)
    assert torch.equal(logits, classifier(batch["features"], batch["mask"]))
    assert attention is not None
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in classifier.modules())


def test_it_can_be_copied_and_pickled() -> None:
    classifier = MILClassifier(in_features=6, num_classes=2).eval()
    batch = make_batch([5, 2])
    expected = classifier(batch["features"], batch["mask"])
    for twin in (copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier))):
        assert torch.equal(twin(batch["features"], batch["mask"]), expected)
        assert twin.built.net is twin.net


def test_configure_model_is_idempotent() -> None:
    classifier = MILClassifier(in_features=6, num_classes=2)
    before = classifier.net
    classifier.configure_model()
    assert classifier.net is before
