from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_entropy.surgery.task_head import task_heads
from lightning_entropy.surgery.trainable import frozen_batch_norms, hold_batch_norms, plain_name, train_only


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.stats = nn.BatchNorm2d(4, affine=False)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.stats(self.bn(self.conv(x))).mean((-1, -2))
        return self.head(self.body(x))


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(5, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_trains_what_is_named_and_nothing_else() -> None:
    model = Net()
    report = train_only(model, ["body.0.weight", "conv.weight"], also="head")
    assert trained(model) == {"body.0.weight", "conv.weight", "head.weight", "head.bias"}
    assert {change.module for change in report.changes} == {"body.0", "conv", "head"}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        step(model, optimizer)
    # stats has no parameters and belongs to the model, where something is trained: it goes on counting
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k]) and not k.startswith("stats.")}
    assert moved == {"body.0.weight", "conv.weight", "head.weight", "head.bias"}


def test_a_gradient_from_before_moves_nothing() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(torch.randn(5, 3, 8, 8)).square().mean().backward()
    train_only(model, ["body.0.weight"])
    kept = model.body[2].weight.clone()
    optimizer.step()
    assert torch.equal(model.body[2].weight, kept)
    assert model.body[2].weight.grad is None


def test_frozen_batch_norms_keep_their_statistics_until_train_and_again_when_held() -> None:
    model = Net()
    report = train_only(model, ["body.0.weight"])
    assert frozen_batch_norms(model) == [model.bn]
    assert not model.bn.training
    model.train()
    assert model.bn.training
    hold_batch_norms(model)
    mean = model.bn.running_mean.clone()
    model(torch.randn(5, 3, 8, 8))
    assert torch.equal(model.bn.running_mean, mean)
    report.undo()
    assert model.bn.training


def test_norms_are_trained_with_their_statistics() -> None:
    model = Net()
    train_only(model, ["body.0.weight"], norms=True)
    assert trained(model) == {"body.0.weight", "bn.weight", "bn.bias", "body.1.weight", "body.1.bias"}
    assert frozen_batch_norms(model) == []
    assert model.bn.training


def test_batch_norms_without_parameters_belong_to_what_holds_them() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)), "b": nn.Linear(2, 2)})
    train_only(model, ["b.weight"])
    assert frozen_batch_norms(model) == [model["a"][1]]
    train_only(model, ["a.0.weight"])
    assert frozen_batch_norms(model) == []


def test_undo_restores_what_was_trained() -> None:
    model = Net()
    model.conv.requires_grad_(False)
    before = trained(model)
    report = train_only(model, ["conv.weight"])
    report.undo()
    report.undo()
    assert trained(model) == before


def test_a_tied_weight_may_be_named_by_any_of_its_names() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "out": nn.Linear(3, 5, bias=False), "mid": nn.Linear(3, 3)})
    model["out"].weight = model["embed"].weight
    train_only(model, ["out.weight"])
    assert trained(model) == {"embed.weight"}


def test_what_cannot_be_trained() -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"no parameter 'body.0.wieght'.\nClosest names: body.0.weight"):
        train_only(model, ["body.0.wieght"])
    with pytest.raises(ValueError, match="no names were given"):
        train_only(model, [])
    with pytest.raises(ValueError, match="matched 0 of"):
        train_only(model, [], also="heads")
    quantised = nn.Module()
    quantised.inner = nn.Module()
    quantised.inner.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"quantised \(torch.int8\)"):
        train_only(quantised, ["inner.weight"])


def test_plain_names() -> None:
    assert plain_name("a.base_layer.b.base_layer.weight") == "a.b.weight"


def test_heads_by_what_libraries_call_them() -> None:
    timm = pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    assert task_heads(Net()) == ["head"]
    assert task_heads(nn.ModuleDict({"net": Net()})) == ["net.head"]
    small = {"img_size": 32, "patch_size": 16, "embed_dim": 8, "num_heads": 2, "depth": 1}
    assert task_heads(timm.create_model("vit_tiny_patch16_224", **small)) == ["head"]
    assert task_heads(timm.create_model("resnet10t")) == ["fc"]
    sizes = {
        "vocab_size": 11,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    assert task_heads(nn.ModuleDict({"model": bert})) == ["model.classifier"]
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2))
    assert task_heads(llama) == []  # its lm_head was pretrained
