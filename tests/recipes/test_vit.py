from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_entropy import AttentionEntropyRegularizer, ImageSet, SigmaReparam, ViTClassifier
from lightning_entropy.recipes.vit import WarmUp
from lightning_entropy.training.lightning import seed_everything
from tests.recipes.bag_cases import quiet_trainer

SMALL: dict[str, Any] = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "global_pool": "avg"}
SIZES: dict[str, Any] = {"image_size": 8, "in_channels": 1, "num_classes": 10}


def small(**options: Any) -> ViTClassifier:
    seed_everything(0, verbose=False)
    return ViTClassifier(**{"model_kwargs": SMALL, **options})


class Exploding(nn.Module):
    """Logits that are finite in the first two training forwards, and then are not."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)
        self.calls = 0

    def forward(self, image: Tensor) -> Tensor:
        self.calls += self.training
        logits: Tensor = self.head(image.flatten(1))
        return logits * torch.inf if self.training and self.calls > 2 else logits


def test_it_learns_the_digits(tmp_path: Path) -> None:
    module = small(lr=5e-3, model_kwargs={**SMALL, "patch_size": 2, "embed_dim": 32})
    trainer = quiet_trainer(tmp_path, max_epochs=6)
    trainer.fit(module, datamodule=ImageSet(batch_size=32))
    assert trainer.callback_metrics["val/accuracy"] > 0.6
    found = trainer.test(module, datamodule=ImageSet(), verbose=False)[0]
    assert set(found) == {"test/accuracy", "test/loss"}
    assert found["test/accuracy"] > 0.6


def test_metrics_are_those_of_all_images(tmp_path: Path) -> None:
    module, images = small(), ImageSet(batch_size=100)
    trainer = quiet_trainer(tmp_path)
    found = trainer.test(module, datamodule=images, verbose=False)[0]
    pixels = torch.stack([images.test[i]["image"] for i in range(len(images.test))])
    labels = torch.tensor(images.test.labels)
    with torch.no_grad():
        logits = module.eval()(pixels)
    assert found["test/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["test/accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item(), rel=1e-6)
    predicted = trainer.predict(module, datamodule=images)
    assert predicted is not None
    assert [name for batch in predicted for name in batch["name"]] == list(images.source.names)  # type: ignore[index]
    assert torch.cat([batch["probabilities"] for batch in predicted]).sum(1).sub(1).abs().max() < 1e-5  # type: ignore[index]


def test_sizes_come_from_the_data_and_go_into_the_checkpoint(tmp_path: Path) -> None:
    module = small(qk_norm=True)
    with pytest.raises(RuntimeError, match="built by a Trainer"):
        module(torch.zeros(1, 1, 8, 8))
    trainer = quiet_trainer(tmp_path, limit_train_batches=2, limit_val_batches=1)
    trainer.fit(module, datamodule=ImageSet())
    assert type(module.net.blocks[0].attn.q_norm).__name__ == "LayerNorm"  # type: ignore[union-attr, index]
    trainer.save_checkpoint(tmp_path / "v.ckpt")
    again = ViTClassifier.load_from_checkpoint(tmp_path / "v.ckpt", weights_only=True)
    image = torch.randn(2, 1, 8, 8)
    assert torch.equal(again.eval()(image), module.eval()(image))
    pickle.dumps(again)


def test_a_variant_has_the_initial_weights_of_the_plain_run() -> None:
    plain, normed = small(**SIZES).state_dict(), small(**SIZES, qk_norm=True).state_dict()
    assert len(normed) > len(plain)
    assert all(torch.equal(value, normed[name]) for name, value in plain.items())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_diverged_run_is_recorded_and_stops(tmp_path: Path, accumulate: int) -> None:
    module = small(model=Exploding(), model_kwargs=None, **SIZES)
    trainer = quiet_trainer(tmp_path, max_epochs=3, accumulate_grad_batches=accumulate)
    with pytest.warns(UserWarning, match="the training loss is nan in step"):
        trainer.fit(module, datamodule=ImageSet())
    assert (module.diverged_at, trainer.global_step) == {1: (2, 3), 2: (1, 1)}[accumulate]
    assert module.net.calls == 3  # type: ignore[union-attr]
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert not trainer.callback_metrics["train/loss"].isfinite()
    assert trainer.callback_metrics["val/loss"].isfinite()
    module.net.calls = -10_000  # type: ignore[union-attr]
    again = quiet_trainer(tmp_path)
    again.fit(module, datamodule=ImageSet())
    assert module.diverged_at is None
    assert again.global_step == 18


@pytest.mark.parametrize("callback", [SigmaReparam(), AttentionEntropyRegularizer(weight=1.0, objective="floor")])
def test_a_model_that_is_all_nan_ends_cleanly_with_every_method(tmp_path: Path, callback: Any) -> None:
    module = small(lr=1e30, **SIZES)
    trainer = quiet_trainer(tmp_path, callbacks=[callback])
    with pytest.warns(UserWarning, match="has diverged and stops here"):
        trainer.fit(module, datamodule=ImageSet())
    assert module.diverged_at is not None
    found = trainer.test(module, datamodule=ImageSet(), verbose=False)[0]
    assert not found["test/loss"] < 1e30
    assert 0 <= found["test/accuracy"] < 0.2


def test_warm_up_and_decay(tmp_path: Path) -> None:
    assert [WarmUp(0)(t) for t in (0, 9)] == [1.0, 1.0]
    assert [WarmUp(4)(t) for t in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    falling = WarmUp(2, cosine_steps=4)
    assert [falling(t) for t in range(5)] == pytest.approx([0.5, 0.853553, 0.5, 0.146447, 0.0], abs=1e-6)
    rates: list[float] = []

    class Noting(ViTClassifier):
        def on_train_batch_end(self, *arguments: Any) -> None:
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    module = Noting(model_kwargs=SMALL, lr=1.0, warmup_steps=3, decay="cosine")
    quiet_trainer(tmp_path, limit_train_batches=4, limit_val_batches=0).fit(module, datamodule=ImageSet())
    assert rates == pytest.approx([WarmUp(3, cosine_steps=4)(t) for t in range(1, 5)])  # each after its step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and >= 0"),
        ({"warmup_steps": -1}, "warmup_steps must be"),
        ({"decay": "linear"}, "decay must be"),
        ({"model": nn.Identity(), "qk_norm": True, "model_kwargs": None}, "this one exists already"),
        ({"model": "vit_minuscule", **SIZES}, "timm cannot make 'vit_minuscule'"),
        ({"model_kwargs": {"depht": 2}, **SIZES}, "depht"),
        ({"model": "resnet18", "qk_norm": True, "model_kwargs": None, **SIZES}, "timm cannot make 'resnet18'"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_unknown_sizes_are_named(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    with pytest.raises(ValueError, match="ViTClassifier needs image_size: the Trainer has no datamodule"):
        trainer.fit(small(), [torch.zeros(1)])
