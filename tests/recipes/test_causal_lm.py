from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM

from lightning_entropy import CausalLM, ForgettingMonitor, TextStream
from lightning_entropy.training.lightning import seed_everything
from tests.recipes.bag_cases import quiet_trainer
from tests.recipes.text_cases import tiny_llama, tiny_tokenizer, write_lines, write_reviews


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return tiny_llama(tmp_path / "llama")


@pytest.fixture
def novel(tmp_path: Path) -> str:
    return str(write_lines(tmp_path / "novel.txt"))


def ready(*arguments: str, **options: Any) -> TextStream:
    stream = TextStream(*arguments, **options)
    stream.setup()
    return stream


def test_windows_are_the_text_in_its_order(llama: str, novel: str) -> None:
    stream = ready(novel, tokenizer=llama, length=16, val_fraction=0.2)
    tokenizer = tiny_tokenizer()
    everything = tokenizer(" ".join(Path(novel).read_text().split()))["input_ids"]  # this tokenizer has no line breaks
    count = len(everything) // 16
    windows = torch.cat([stream.train.windows, stream.val.windows])
    assert windows.flatten().tolist() == everything[: 16 * count]
    assert len(stream.val) == round(0.2 * count)
    assert torch.equal(stream.test.windows, stream.val.windows)
    batch = next(iter(stream.val_dataloader()))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 16)
    assert bool(batch["attention_mask"].all())


def test_draws_orders_and_other_texts(tmp_path: Path, llama: str, novel: str) -> None:
    other = str(write_reviews(tmp_path / "r.csv"))
    few = {"max_train": 6, "max_val": 2, "max_test": 3, "max_old": 4}
    stream = ready(novel, test=other, old_task=other, tokenizer=llama, length=16, seed=1, **few)
    assert [len(part) for part in (stream.train, stream.val, stream.test)] == [6, 2, 3]
    (old,) = stream.old_task_dataloaders().values()
    assert sum(len(batch["input_ids"]) for batch in old) == 4
    loader = stream.train_dataloader()
    first = [batch["input_ids"] for batch in loader]
    assert all(torch.equal(a, b["input_ids"]) for a, b in zip(first, stream.train_dataloader()))
    loader.sampler.set_epoch(1)  # type: ignore[attr-defined]
    assert not torch.equal(next(iter(loader))["input_ids"], first[0])
    rest = ready(novel, tokenizer=llama, length=16, seed=2, max_train=6)
    assert not torch.equal(rest.train.windows, stream.train.windows)


def test_the_loss_is_that_of_transformers(tmp_path: Path, llama: str, novel: str) -> None:
    stream = ready(novel, tokenizer=llama, length=16)
    module, plain = CausalLM(llama), LlamaForCausalLM.from_pretrained(llama).eval()
    found = quiet_trainer(tmp_path).test(module, datamodule=stream, verbose=False)[0]
    with torch.no_grad():
        expected = plain(input_ids=stream.test.windows, labels=stream.test.windows).loss.item()
    assert found["test/loss"] == pytest.approx(expected, rel=1e-5)
    assert found["test/perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_padded_tokens_do_not_count(llama: str) -> None:
    module = CausalLM(llama)
    module.configure_model()
    module.eval()
    ids = torch.randint(2, 20, (2, 6))
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    found = module.old_task_step({"input_ids": ids, "attention_mask": mask})
    assert found["labels"].tolist()[1][3:] == [-100] * 3
    alone = module(ids[1:, :3], mask[1:, :3])
    torch.testing.assert_close(found["logits"][1, :3], alone[0])
    losses = module._token_losses({"input_ids": ids, "attention_mask": mask})
    expected = F.cross_entropy(found["logits"][0, :-1], ids[0, 1:], reduction="none")
    torch.testing.assert_close(losses[:5], expected)
    assert len(losses) == 7


def test_it_learns_the_novel_and_perplexity_is_watched(tmp_path: Path, llama: str, novel: str) -> None:
    seed_everything(0, verbose=False)
    old = str(write_reviews(tmp_path / "r.csv"))
    module = CausalLM(llama, lr=1e-2)
    monitor = ForgettingMonitor(metric="perplexity", new_task="val/loss", log_figures=False, json=False)
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=[monitor])
    trainer.fit(module, datamodule=TextStream(novel, old_task=old, length=16, max_old=20))
    before, *_, last = monitor.history
    assert before["old"]["old"]["loss"] == pytest.approx(math.log(len(tiny_tokenizer())), abs=0.1)
    assert last["new"]["val/loss"] < before["old"]["old"]["loss"] - 0.1
    assert last["old"]["old"]["perplexity"] == pytest.approx(math.exp(last["old"]["old"]["loss"]))
    trainer.save_checkpoint(tmp_path / "l.ckpt")
    again = CausalLM.load_from_checkpoint(tmp_path / "l.ckpt", weights_only=True)
    ids = torch.randint(2, 20, (1, 5))
    assert torch.equal(again.eval()(ids, torch.ones_like(ids)), module.eval()(ids, torch.ones_like(ids)))


def test_what_is_wrong_is_named(tmp_path: Path, llama: str, novel: str) -> None:
    with pytest.raises(ValueError, match="length must be at least 2"):
        TextStream(novel, length=1)
    with pytest.raises(ValueError, match="nothing to test on"):
        TextStream(novel, val_fraction=0)
    with pytest.raises(ValueError, match=r"the texts have .* tokens, fewer than a window of 5000"):
        ready(novel, tokenizer=llama, length=5000)
    with pytest.raises(ValueError, match=r"leaves .* to train on and 0 to validate on"):
        ready(novel, tokenizer=llama, length=200, val_fraction=0.05)
    with pytest.raises(ValueError, match="TextStream has no old task"):
        ready(novel, tokenizer=llama, length=16).old_task_dataloaders()
    with pytest.raises(ValueError, match="CausalLM was not given a model by its name"):
        quiet_trainer(tmp_path).fit(CausalLM(nn.Linear(2, 2)), datamodule=TextStream(novel, length=16))
    with pytest.raises(ValueError, match="this one exists already"):
        CausalLM(nn.Linear(2, 2), model_kwargs={"a": 1})
    with pytest.raises(RuntimeError, match="loaded by a Trainer"):
        CausalLM(llama)(torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 2))
