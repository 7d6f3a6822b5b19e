from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_entropy import ForgettingMonitor
from tests.finetuning.forgetting_cases import Classifier, NewTask, fit, old_loader, trainer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "f1"}, "metric must be 'perplexity', 'accuracy', 'retrieval', a torchmetrics metric"),
        ({"metric": MulticlassAccuracy}, "an instance"),
        ({"step": "validation_step"}, "would add the old task's batches to what the new task logs"),
        ({"step": 3}, "step must be a function"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"limit_batches": 0}, "limit_batches must be at least 1"),
        ({"every_n_epochs": None}, "nothing would be read"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ForgettingMonitor(old_loader(), **options)


@pytest.mark.parametrize(
    ("loaders", "options", "message"),
    [
        ({}, {}, "must be a DataLoader or a mapping"),
        ({"a": 3}, {}, "got a: int"),
        ([iter([1])][0], {}, "got old: list_iterator"),
        ({"empty": DataLoader([])}, {}, r"ForgettingMonitor \(empty\): the loader gave no batch"),
        (old_loader(), {"metric": "perplexity", "step": "missing"}, "Classifier has no method 'missing'"),
        (DataLoader([torch.zeros(2, 4)]), {"metric": "retrieval"}, r"needs batches \(first, second\), got a tensor"),
        (old_loader(), {"metric": "retrieval", "step": lambda m, b: m(b[0])}, "row by row. The step gave a tensor"),
        (old_loader(), {"step": lambda m, b: {"a": 1}}, "The step gave dict with a, of the batch a list of a tensor"),
        (
            old_loader(),
            {"new_task": "val_f1"},
            "new_task='val_f1' was not logged by the end of epoch 0; logged: .*val_loss",
        ),
        (old_loader(), {"metric": MulticlassAccuracy(2, average=None)}, "has 2 values"),
        (old_loader(), {"metric": lambda output, batch: "x"}, "must return a number"),
    ],
)
def test_what_cannot_be_read_is_an_error(tmp_path: Path, loaders: Any, options: dict, message: str) -> None:
    monitor = ForgettingMonitor(loaders, **{"metric": "accuracy", **options})
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, monitor)


def test_no_data_is_an_error(tmp_path: Path) -> None:
    run = trainer(tmp_path, ForgettingMonitor())
    with pytest.raises(
        MisconfigurationException, match=r"found no old-task data: loaders is None and Classifier has no"
    ):
        run.fit(Classifier(), NewTask().train_dataloader())


def test_a_module_without_forward_needs_a_step(tmp_path: Path) -> None:
    class Steps(Classifier):
        forward = LightningModule.forward

    with pytest.raises(MisconfigurationException, match="defines neither forward nor old_task_step"):
        fit(tmp_path, ForgettingMonitor(old_loader()), module=Steps())


def test_yaml_spells_a_torchmetric(tmp_path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    accuracy = {"class_path": "torchmetrics.classification.MulticlassAccuracy", "init_args": {"num_classes": 2}}
    arguments = {"metric": accuracy, "new_task": "val_accuracy", "every_n_steps": 3}
    config = parser.parse_object(
        {"callback": {"class_path": "lightning_entropy.ForgettingMonitor", "init_args": arguments}}
    )
    (tmp_path / "config.yaml").write_text(parser.dump(config))
    again = ArgumentParser(exit_on_error=False)
    again.add_argument("--config", action="config")
    again.add_subclass_arguments(Callback, "callback")
    built = again.instantiate_classes(again.parse_args(["--config", str(tmp_path / "config.yaml")])).callback
    assert isinstance(built.metric, MulticlassAccuracy)
    fit(tmp_path, built)
    assert math.isfinite(built.history[-1]["old"]["lines"]["multiclassaccuracy"])
