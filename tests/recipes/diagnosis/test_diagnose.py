from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_entropy.cli import main
from lightning_entropy.finetuning import LayerDiagnosis
from lightning_entropy.recipes.diagnosis.batches import open_batches
from lightning_entropy.recipes.diagnosis.measure import layers_to_read, measure
from lightning_entropy.recipes.diagnosis.subject import Subject, load_weights, open_subject

SECTIONS = {"attention_entropy", "layer_diagnosis", "activations", "massive_activations", "condition_numbers"}
OWN = """
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader


class Own(LightningModule):
    def __init__(self, width=8, by_hand=False):
        super().__init__()
        self.automatic_optimization = not by_hand
        layer = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(width, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.head(self.encoder(x).mean(1)), y)
        self.log_dict({"loss": loss})
        return loss

    def train_dataloader(self):
        g = torch.Generator().manual_seed(0)
        return DataLoader([(torch.randn(5, 8, generator=g), i % 3) for i in range(12)], batch_size=4)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_net.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_net", raising=False)
    return "own_net.Own"


@pytest.mark.filterwarnings("ignore:.*Attention entropy is flat.*", "ignore:.*No layer is an inflection layer.*")
@pytest.mark.parametrize("model", ["timm:vit_tiny_patch16_224", "own"])
def test_report_of_an_unmodified_model(model: str, own: str, tmp_path: Path, capsys) -> None:
    options = ["--batches", "1", "--batch-size", "2"] if model.startswith("timm") else []
    name = own if model == "own" else model
    assert main(["diagnose", "--model", name, *options, "--output", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert told.startswith("1. ")
    assert "   -> " in told
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert record.keys() >= SECTIONS
    assert record["model"] == name
    assert [f["severity"] for f in record["findings"]] == sorted(
        (f["severity"] for f in record["findings"]), reverse=True
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('<img alt="') >= 3
    assert "http://" not in page
    layers = LayerDiagnosis.load(tmp_path / "out" / "report.json")
    assert layers.layers == [row["layer"] for row in record["layer_diagnosis"]["rows"]]
    assert 'src="data:image/png;base64,' in page


@pytest.mark.filterwarnings("ignore:.*Attention entropy is flat.*", "ignore:.*No layer is an inflection layer.*")
def test_checkpoint_of_a_trainer_is_what_is_diagnosed(own: str, tmp_path: Path, capsys) -> None:
    sys.path.insert(0, str(tmp_path))
    from own_net import Own

    sys.path.remove(str(tmp_path))
    module = Own()
    nn.init.zeros_(module.encoder.layers[1].linear1.weight)
    trainer = Trainer(max_epochs=0, logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(module)
    trainer.save_checkpoint("own.ckpt")
    assert main(["diagnose", "--model", own, "--checkpoint", "own.ckpt", "--output", "out"]) == 0
    record = json.loads(Path("out/report.json").read_text())
    assert any("own.ckpt" in fact for fact in record["facts"])
    singular = [r["name"] for r in record["condition_numbers"]["rows"] if r["kappa"] is None]
    assert singular == ["encoder.layers.1.linear1.weight"]
    assert any("rank-deficient" in f["what"] for f in record["findings"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "nothing"], "is not a dotted path"),
        (["--model", "timm:no_such_net"], "timm says"),
        (["--model", "timm:resnet10t", "--data", "no/such/folder"], "neither random"),
        (["--model", "timm:resnet10t", "--checkpoint", "absent.ckpt"], "does not exist"),
        (["--model", "timm:resnet10t", "--batches", "0"], "at least 1"),
        (["--model", "own", "--arguments", "{"], "no JSON"),
        (["--model", "own", "--arguments", '{"depth": 3}'], "cannot be built"),
        (["--model", "own", "--arguments", '{"by_hand": true}'], "optimizes by hand"),
        (["--model", "own", "--classes", "3"], "--arguments"),
        (["--model", "torch.nn.Linear"], "is no LightningModule"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], told: str, own: str, capsys) -> None:
    arguments = [own if a == "own" else a for a in arguments]
    assert main(["diagnose", *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not Path("report.html").exists()


def test_a_model_without_attention_says_what_was_not_measured() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    batches = [{"image": torch.randn(6, 4), "label": torch.zeros(6, dtype=torch.long)}]
    subject = Subject(
        "mine",
        model,
        "images",
        lambda b: model(b["image"]),
        lambda m, b: nn.functional.cross_entropy(m(b["image"]), b["label"]),
        "cross-entropy",
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = measure(subject, batches)
    assert "no attention" in found.measured["attention_entropy"].absent
    assert [row["layer"] for row in found.measured["massive_activations"].rows] == ["0", "1", "2"]
    assert found.measured["activations"].rows[0]["site"] == "1"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_single_containers_are_opened() -> None:
    holder = nn.Module()
    holder.net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert list(layers_to_read(holder)) == ["net.0", "net.1"]


def test_weights_are_found_under_any_prefix(tmp_path: Path) -> None:
    source, target = nn.Linear(2, 3), nn.Linear(2, 3)
    torch.save({"state_dict": {f"net.model.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "a.ckpt")
    assert "'net.model.'" in load_weights(target, tmp_path / "a.ckpt")
    assert torch.equal(source.weight, target.weight)
    torch.save({"state_dict": {"weight": source.weight}}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="lacks 1 of 2 tensors of Linear, for example bias"):
        load_weights(target, tmp_path / "b.ckpt")
    torch.save({"state_dict": nn.Linear(2, 4).state_dict()}, tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match="does not fit Linear"):
        load_weights(target, tmp_path / "c.ckpt")
    (tmp_path / "d.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(target, tmp_path / "d.ckpt")


@pytest.fixture
def tiny_bert(tmp_path: Path) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "good", "bad", "film"]
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=2,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "bert")
    return f"transformers:{tmp_path / 'bert'}"


def test_sentences_for_a_model_of_transformers(tiny_bert: str, tmp_path: Path) -> None:
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["text", "label"], ["good film", "1"], ["bad bad film", "0"], ["film", "1"]])
    subject = open_subject(tiny_bert)
    first, second = open_batches(subject, str(tmp_path / "reviews.csv"), count=2, size=2)
    assert first["input_ids"].tolist() == [[2, 4, 0], [3, 3, 4]]
    assert first["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert second["label"].tolist() == [1]
    loss = subject.loss(subject.module.eval(), first)
    logits = subject.forward(first).logits
    assert torch.equal(loss, nn.functional.cross_entropy(logits, first["label"]))
    with pytest.raises(ValueError, match="takes tokens"):
        open_batches(subject, "embedded:digits", count=1, size=2)


def test_labels_beyond_the_head_are_refused() -> None:
    subject = open_subject("timm:resnet10t", classes=3)
    with pytest.raises(ValueError, match="give --classes"):
        open_batches(subject, "embedded:digits", count=1, size=32)


class NoLoss(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        return None

    def train_dataloader(self):
        return DataLoader([torch.zeros(2)])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_step_without_a_loss_is_named(capsys) -> None:
    assert main(["diagnose", "--model", f"{__name__}.NoLoss"]) in (0, 2)
    captured = capsys.readouterr()
    assert "returns no loss" in captured.err + Path("report.json").read_text()
