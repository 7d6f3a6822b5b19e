"""The diagnosis on models of other libraries, and how its layers are found."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_entropy.finetuning import diagnose_layers
from tests.finetuning.diagnosed_models import Classifier, batches, close, loss, model, saturate

pytestmark = pytest.mark.filterwarnings("ignore:.*diagnose_layers.*no layer")


def test_a_lightning_module_gives_its_own_loss(announced: list[str]) -> None:
    module = Classifier(depth=4)
    saturate(module.net, (1,))
    found = diagnose_layers(module, batches())
    assert found.layers == [f"net.blocks.{i}" for i in range(4)]
    assert any("diagnose_layers: 4 layers (net.blocks.*) in 2 batches" in line for line in announced)
    own = diagnose_layers(module.net, batches(), loss=loss)
    assert [r.gradient for r in found.rows] == pytest.approx([r.gradient for r in own.rows])
    assert [r.entropy for r in found.rows] == pytest.approx([r.entropy for r in own.rows])
    assert found.output_error == pytest.approx(own.output_error)


def test_transformers_with_labels_and_padding() -> None:
    t = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    ids = torch.randint(0, 50, (4, 9))
    mask = torch.ones_like(ids)
    mask[2:, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 1, 0])}
    more = {**batch, "input_ids": F.pad(ids, (0, 4)), "attention_mask": F.pad(mask, (0, 4))}
    found = {}
    for way in ("sdpa", "eager"):
        torch.manual_seed(0)
        config = t.BertConfig(vocab_size=50, num_labels=2, attn_implementation=way, **sizes)
        net = t.BertForSequenceClassification(config).double().eval()
        found[way] = diagnose_layers(net, [batch])
        assert found[way].layers == [f"bert.encoder.layer.{i}" for i in range(3)]
        assert found[way].output_error > 0
        close(found[way], diagnose_layers(net, [more]))
    close(found["sdpa"], found["eager"], rel=1e-4)
    torch.manual_seed(0)
    causal = t.LlamaForCausalLM(t.LlamaConfig(vocab_size=50, num_key_value_heads=1, **sizes))
    assert len(diagnose_layers(causal, [{"input_ids": ids, "labels": ids}]).layers) == 3


def test_other_architectures() -> None:
    timm = pytest.importorskip("timm")
    images = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))]
    classify = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=2)
    assert diagnose_layers(vit, images, loss=classify).layers == ["blocks.0", "blocks.1", "blocks.2"]
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1, 2, 1), num_classes=2)
    big = [(torch.randn(2, 3, 56, 56), torch.tensor([0, 1]))]
    found = diagnose_layers(swin, big, loss=classify)
    assert found.layers == [f"layers.{i}.blocks.{j}" for i, j in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0))]
    assert all(math.isfinite(r.decay) and math.isfinite(r.entropy) for r in found.rows)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)  # tokens first
    first = diagnose_layers(encoder, [torch.randn(5, 3, 8)], loss=lambda m, x: m(x).square().mean())
    assert all(0 < r.entropy <= 1 for r in first.rows)


def test_attention_that_is_in_no_numbered_block() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.second = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    found = diagnose_layers(Two(), [torch.randn(4, 5, 8)] * 2, loss=lambda m, x: m(x)[:, 0].square().mean())
    assert found.layers == ["first", "second"]
    assert found.samples == 8
    assert all(r.parameter_gradient > 0 for r in found.rows)


def test_layers_by_pattern() -> None:
    net, data = model(), batches(1)
    assert diagnose_layers(net, data, loss=loss, layers="blocks.*").layers == ["blocks.0", "blocks.1", "blocks.2"]
    assert diagnose_layers(net, data, loss=loss, layers=["blocks.[02]"]).layers == ["blocks.0", "blocks.2"]
    with pytest.raises(ValueError, match=r"diagnose_layers\(modules='block.0'\) matched 0 of"):
        diagnose_layers(net, data, loss=loss, layers="block.0")


def test_only_valid_tokens_as_the_user_says() -> None:
    net, (batch,) = model().double(), batches(1, dtype=torch.float64)
    found = diagnose_layers(net, [batch], loss=loss, valid=lambda b: b["mask"].long())
    close(found, diagnose_layers(net, [batch], loss=loss))


def test_a_compiled_module_runs_as_it_was_written() -> None:
    net, data = saturate(model(), (1,)), batches(1)
    plain = diagnose_layers(net, data, loss=loss)
    compiled = diagnose_layers(torch.compile(net, backend="eager"), data, loss=loss)
    assert [r.gradient for r in compiled.rows] == pytest.approx([r.gradient for r in plain.rows])
    assert [r.layer for r in compiled.rows] == [f"_orig_mod.blocks.{i}" for i in range(3)]
