from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_entropy.data import SlideBags
from lightning_entropy.training.lightning import Callback, LightningModule, Trainer
from tests.data.bag_folders import arrays, table, write


class Recorder(LightningModule):
    """Notes the instances of every training batch, in this process."""

    def __init__(self, features: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(features, 2)
        self.seen: list[list[Any]] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.seen.append([self.current_epoch, batch["slide"], batch["features"].sum().item()])
        return torch.nn.functional.cross_entropy(self.layer(batch["features"].mean(1)), batch["label"])

    def validation_step(self, batch: Any, index: int) -> None:
        assert batch["mask"].any()

    def test_step(self, batch: Any, index: int) -> None:
        self.seen.append([-1, batch["slide"], batch["features"].sum().item()])

    def predict_step(self, batch: Any, index: int) -> Any:
        return batch["slide"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


class Save(Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def _trainer(folder: Path, **options: Any) -> Trainer:
    options = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_checkpointing": False, **options}
    return Trainer(default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False, **options)


def _on_disk(folder: Path, **options: Any) -> SlideBags:
    if not (folder / "bags").exists():
        slides = arrays(12)
        write(folder / "bags", "h5", slides)
        table(folder / "slides.csv", list(slides))
    chosen = {"max_instances": 4, "batch_size": 2, "test_fraction": 0, "val_fraction": 0.2, **options}
    return SlideBags(str(folder / "bags"), str(folder / "slides.csv"), **chosen)


@pytest.mark.parametrize("step", [2, 5, 7, 10])  # inside an epoch, and at its last batch
def test_a_run_resumed_in_an_epoch_sees_what_the_uninterrupted_run_sees(tmp_path: Path, step: int) -> None:
    whole, first, second = Recorder(8), Recorder(8), Recorder(8)
    _trainer(tmp_path).fit(whole, datamodule=_on_disk(tmp_path))
    assert len(whole.seen) == 15
    save = Save(tmp_path / "k.ckpt", step)
    _trainer(tmp_path, max_steps=step, callbacks=[save]).fit(first, datamodule=_on_disk(tmp_path))
    _trainer(tmp_path).fit(second, datamodule=_on_disk(tmp_path), ckpt_path=tmp_path / "k.ckpt")
    assert first.seen + second.seen == whole.seen
    assert torch.equal(second.layer.weight, whole.layer.weight)


def test_workers_change_nothing_and_resume_with_the_right_epoch(tmp_path: Path) -> None:
    alone, workers, resumed = Recorder(8), Recorder(8), Recorder(8)
    _trainer(tmp_path, max_epochs=2).fit(alone, datamodule=_on_disk(tmp_path))
    save = Save(tmp_path / "k.ckpt", 7)
    _trainer(tmp_path, max_epochs=2, callbacks=[save]).fit(workers, datamodule=_on_disk(tmp_path, num_workers=2))
    assert workers.seen == alone.seen
    bags = _on_disk(tmp_path, num_workers=2)
    _trainer(tmp_path, max_epochs=2).fit(resumed, datamodule=bags, ckpt_path=tmp_path / "k.ckpt")
    assert resumed.seen == alone.seen[7:]
    assert alone.seen[:5] != alone.seen[5:]


def test_loading_takes_no_random_numbers_from_training() -> None:
    bags = SlideBags(options={"train_bags": 4, "val_bags": 2, "test_bags": 2})
    bags.setup()
    torch.manual_seed(0)
    for loader in (bags.train_dataloader(), bags.val_dataloader()):
        list(loader)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


def test_evaluation_uses_all_instances_in_order(tmp_path: Path) -> None:
    bags = _on_disk(tmp_path, batch_size=1, test_fraction=0.3)
    bags.setup()
    for split, loader in (("val", bags.val_dataloader()), ("test", bags.test_dataloader())):
        dataset = getattr(bags, split)
        sizes = [bags.source.sizes[i] for i in dataset.indices]
        assert [batch["mask"].sum().item() for batch in loader] == sizes
        assert [name for batch in loader for name in batch["slide"]] == dataset.slides
    assert bags.in_features == 8
    assert bags.num_classes == 2
    assert bags.classes == ["0", "1"]


def test_test_and_predict(tmp_path: Path) -> None:
    bags, module = _on_disk(tmp_path, test_fraction=0.3, batch_size=1), Recorder(8)
    trainer = _trainer(tmp_path)
    trainer.test(module, datamodule=bags, verbose=False)
    assert [slides[0] for _, slides, _ in module.seen] == bags.test.slides
    assert [name for part in trainer.predict(module, datamodule=bags) for name in part] == bags.source.slides  # type: ignore[union-attr]
    bags = _on_disk(tmp_path, test_fraction=0.3, batch_size=1, predict_split="test")
    predicted = trainer.predict(module, datamodule=bags)
    assert [name for part in predicted for name in part] == bags.test.slides  # type: ignore[union-attr]


def test_slides_without_a_table_can_be_predicted_and_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "bags", "pt", arrays(3))
    bags = SlideBags(str(tmp_path / "bags"))
    predicted = _trainer(tmp_path).predict(Recorder(8), datamodule=bags)
    assert [name for part in predicted for name in part] == ["s0", "s1", "s2"]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="fit needs labels: pass table"):
        SlideBags(str(tmp_path / "bags")).setup("fit")


def test_standardizing_is_fitted_on_training_instances(tmp_path: Path) -> None:
    bags = _on_disk(tmp_path, standardize=True, max_instances=None, test_fraction=0.3)
    bags.setup()
    raw = torch.cat([bags.source.read(i).features for i in bags.train.indices]).double()
    torch.testing.assert_close(bags.state_dict()["mean"].double(), raw.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(bags.state_dict()["std"].double(), raw.std(0, correction=0), atol=1e-6, rtol=1e-6)
    own = torch.cat([bags.train[i]["bag"].features for i in range(len(bags.train))])
    torch.testing.assert_close(own.mean(0), torch.zeros(8), atol=0.05, rtol=0)
    assert own.abs().max() <= 5
    index = bags.test.indices[0]
    expected = (bags.source.read(index).features.double() - raw.mean(0)) / raw.std(0, correction=0)
    torch.testing.assert_close(bags.test[0]["bag"].features.double(), expected.clamp(-5, 5), atol=1e-5, rtol=0)


def test_a_checkpoint_brings_the_standardizing_along(tmp_path: Path) -> None:
    module, bags = Recorder(8), _on_disk(tmp_path, standardize=True)
    trainer = _trainer(tmp_path, max_epochs=1)
    trainer.fit(module, datamodule=bags)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = _on_disk(tmp_path, standardize=True, seed=9)  # other training slides, other moments
    other.setup()
    assert not torch.equal(other.state_dict()["mean"], bags.state_dict()["mean"])
    other.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["SlideBags"])
    assert torch.equal(other.train.mean, bags.state_dict()["mean"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_instances": 0}, "max_instances must be at least 1"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"folds": 1}, "folds must be at least 2"),
        ({"fold": 5, "folds": 5}, "fold must be under folds=5"),
        ({"on_empty": "drop"}, "on_empty must be one of error, skip, got 'drop'"),
        ({"check": "none"}, "check must be one of"),
        ({"predict_split": "all"}, "predict_split must be one of"),
    ],
)
def test_arguments_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlideBags(**options)


def test_before_setup_there_is_a_plain_answer() -> None:
    for name in ("in_features", "classes", "num_classes", "train", "val", "test"):
        with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
            getattr(SlideBags(), name)


def _rank(rank: int, folder: str, port: int) -> None:
    import os
    import warnings

    warnings.simplefilter("ignore")
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="2"
    )
    torch.set_num_threads(1)
    module = Recorder(8)
    bags = _on_disk(Path(folder), batch_size=1)
    _trainer(Path(folder), max_epochs=2, devices=2, strategy="ddp", num_sanity_val_steps=0).fit(module, datamodule=bags)
    torch.save(module.seen, Path(folder) / f"seen{rank}.pt")


def test_two_processes_share_the_bags_of_an_epoch(tmp_path: Path) -> None:
    import multiprocessing
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    expected = _on_disk(tmp_path)
    expected.setup()
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path), port)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    seen = [torch.load(tmp_path / f"seen{rank}.pt") for rank in (0, 1)]
    orders = []
    for epoch in (0, 1):
        parts = [[slides[0] for e, slides, _ in part if e == epoch] for part in seen]
        assert sorted(parts[0] + parts[1]) == sorted(expected.train.slides)
        orders.append(parts[0])
    assert orders[0] != orders[1]
