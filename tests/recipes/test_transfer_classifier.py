from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_entropy import TextSet
from lightning_entropy.recipes import TransferClassifier
from lightning_entropy.recipes.source_task import SourceTask
from lightning_entropy.recipes.transfer_classifier import encoder_layers
from lightning_entropy.training.lightning import Trainer, seed_everything
from tests.recipes.text_cases import tiny_bert, write_reviews


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Any]:
    """A random BERT and sentences that it can tell apart."""
    return {
        "model": tiny_bert(tmp_path / "bert"),
        "source_texts": str(write_reviews(tmp_path / "source.csv")),
        "source_cache": str(tmp_path / "cache"),
        "source_count": 40,
        "source_lr": 3e-3,
        "num_classes": 2,
    }


def made(places: dict[str, Any], **more: Any) -> TransferClassifier:
    torch.manual_seed(5)
    return TransferClassifier(**{**places, **more})


def state(module: TransferClassifier) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_equal_settings_share_one_training(places: dict[str, Any], announced: list[str]) -> None:
    first = made(places)
    drawn_after_training = torch.rand(1)
    assert "are in" not in announced[-1]
    (file,) = Path(places["source_cache"]).iterdir()
    second = made(places)
    assert "already" in announced[-1]
    assert torch.rand(1) == drawn_after_training
    assert same(state(first), state(second))
    assert first.source_result == second.source_result
    assert first.training
    assert all(part.training for part in first.modules())
    stored = load_file(file)
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in stored.items())
    assert all(p.grad is None for p in first.parameters())
    without = made(places, source_cache=None)
    assert same(state(first), state(without))
    assert list(Path(places["source_cache"]).iterdir()) == [file]


@pytest.mark.parametrize(
    "change", [{"source_seed": 1}, {"source_lr": 1e-3}, {"source_count": 39}, {"source_epochs": 2}]
)
def test_other_settings_are_another_training(places: dict[str, Any], change: dict[str, Any]) -> None:
    first, second = made(places), made(places, **change)
    assert len(list(Path(places["source_cache"]).iterdir())) == 2
    assert not same(state(first), state(second))


def test_other_weights_or_texts_are_another_training(places: dict[str, Any]) -> None:
    made(places)
    torch.manual_seed(6)  # the head is drawn by the seed of the source task
    TransferClassifier(**places)
    assert len(list(Path(places["source_cache"]).iterdir())) == 1
    weights = Path(places["model"]) / "model.safetensors"
    save_file({k: 1.01 * v for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    made(places)
    assert len(list(Path(places["source_cache"]).iterdir())) == 2
    source = Path(places["source_texts"])
    source.write_text(source.read_text().replace("film", "story"))
    made(places)
    assert len(list(Path(places["source_cache"]).iterdir())) == 3


def test_many_epochs_saturate_the_source_task(places: dict[str, Any]) -> None:
    under, over, none = (made(places, source_epochs=n) for n in (1, 30, 0))
    assert over.source_result["loss"] < 0.1 < under.source_result["loss"]
    assert over.source_result["accuracy"] == 1.0
    assert none.source_result == {}
    assert over.source_record()["epochs"] == 30
    moved = [n for n, p in over.named_parameters() if not torch.equal(p, dict(none.named_parameters())[n])]
    assert {name.split(".")[0] for name in moved} == {"encoder", "head"}  # the head is kept


def test_steps_are_those_of_the_paper_s_count() -> None:
    assert SourceTask("x", count=33, batch_size=16, epochs=8).steps == 24


def test_top_layers_are_trained_and_the_rest_is_frozen(places: dict[str, Any]) -> None:
    for top, layers in ((0, ()), (1, (1,)), (2, (0, 1))):
        module = made(places, top_layers=top)
        prefixes = ("head.", *(f"encoder.encoder.layer.{i}." for i in layers))
        for name, parameter in module.named_parameters():
            assert parameter.requires_grad == name.startswith(prefixes), (top, name)
    assert all(p.requires_grad for p in made(places).parameters())
    assert module.encoder is not None
    assert encoder_layers(module.encoder) == ["encoder.layer.0", "encoder.layer.1"]


def test_frozen_or_not_the_start_is_the_same(places: dict[str, Any]) -> None:
    assert same(state(made(places)), state(made(places, top_layers=0)))


def test_errors_say_what_to_do(places: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most the encoder's 2, got 3"):
        made(places, top_layers=3)
    with pytest.raises(ValueError, match="2 classes and the target task 3"):
        made(places, num_classes=3)
    with pytest.raises(ValueError, match="source_epochs must be at least 0"):
        made(places, source_epochs=-1)
    with pytest.raises(ValueError, match="source_lr must be finite"):
        made(places, source_lr=float("nan"))
    with pytest.raises(ValueError, match="top_layers must be at least 0"):
        made(places, top_layers=-1)
    with pytest.raises(ValueError, match="takes an encoder by its name"):
        made(places, model=torch.nn.Linear(1, 1))
    lines = tmp_path / "lines.txt"
    lines.write_text("a film\n")
    with pytest.raises(ValueError, match="have no labels"):
        made(places, source_texts=str(lines))
    with pytest.raises(ValueError, match="no list of layers"):
        encoder_layers(torch.nn.Linear(1, 1))


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_in_a_trainer_the_seed_is_that_of_the_data(places: dict[str, Any], tmp_path: Path) -> None:
    kept = {k: v for k, v in places.items() if k != "num_classes"}
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}

    def run(seed: int, **more: Any) -> TransferClassifier:
        seed_everything(3, verbose=False)
        module = TransferClassifier(**kept, lr=0.0, head_lr=0.0, **more)
        data = TextSet(str(write_reviews(tmp_path / "target.csv")), batch_size=8, seed=seed)
        trainer = Trainer(max_epochs=1, accelerator="cpu", devices=1, default_root_dir=tmp_path, **quiet)
        trainer.fit(module, datamodule=data)
        return module

    a, b, c = run(1), run(2), run(2, source_seed=1)
    assert (a.source_task.seed, b.source_task.seed, c.source_task.seed) == (1, 2, 1)
    assert torch.equal(a.head.weight, c.head.weight)  # type: ignore[union-attr]
    assert not torch.equal(a.head.weight, b.head.weight)  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_a_checkpoint_is_loaded_without_training_the_source_anew(
    places: dict[str, Any], tmp_path: Path, announced: list[str]
) -> None:
    module = TransferClassifier(**{k: v for k, v in places.items() if k != "num_classes"})
    trainer = Trainer(max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    trainer.fit(module, datamodule=TextSet(str(write_reviews(tmp_path / "target.csv")), batch_size=8, seed=4))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    torch.manual_seed(9)
    loaded = TransferClassifier.load_from_checkpoint(tmp_path / "run.ckpt")
    assert same(state(loaded), state(module))
    assert loaded.source_task == module.source_task
    assert loaded.source_task.seed == 4
    assert "are in" in announced[-1]
    assert len(list(Path(places["source_cache"]).iterdir())) == 1
    left_out = TransferClassifier.load_from_checkpoint(tmp_path / "run.ckpt", source_epochs=0)
    assert same(state(left_out), state(module))
