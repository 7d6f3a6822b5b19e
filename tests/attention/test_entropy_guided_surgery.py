"""Scaled feed-forwards against the formula written out, fusing and removal against their claims, and the callback."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_entropy import EntropyGuidedSurgery
from lightning_entropy.attention import fuse_linear_ffn, remove_layer_norm, scale_ffn
from tests.suite.running import loader, trainer
from tests.user_modules import TokenClassifier, bags


class FFN(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(6, 12), act, nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    """A residual block of a user's, pre-norm."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 6)
        self.norm, self.mlp = nn.LayerNorm(6), FFN(act or nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x).tanh()
        return x + self.mlp(self.norm(x))


class Straight(Block):
    """No residual around its feed-forward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x))


def model(act: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(Block(act), Block(act))


X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(4))


def test_scaled_is_the_formula_and_starts_as_the_plain_residual() -> None:
    net = model()
    before = net(X)
    state, mode = torch.get_rng_state(), [m.training for m in net.modules()]
    report = scale_ffn(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == mode
    assert str(report) == "ScaledFFN: 2 of 2 feed-forward scaled (*.mlp), +4 parameters; nothing refused"
    assert torch.equal(net(X), before)
    with torch.no_grad():
        for i, block in enumerate(net):
            block.mlp.ffn_alpha.fill_(2.0 + i)
            block.mlp.ffn_beta.fill_(0.5 - i)
    expected = X
    for i, block in enumerate(net):
        x = expected + block.mix(expected).tanh()
        normed = block.norm(x)
        expected = (0.5 - i) * x + block.mlp.down(block.mlp.act(block.mlp.up(normed))) / (2.0 + i)
    torch.testing.assert_close(net(X), expected)
    assert torch.equal(copy.deepcopy(net)(X), net(X))
    net(X).square().sum().backward()
    assert all(block.mlp.ffn_alpha.grad != 0 and block.mlp.ffn_beta.grad != 0 for block in net)
    again = scale_ffn(net)
    assert {r.reason for r in again.refused} == {"its branch is scaled already"}
    report.undo()
    report.undo()
    assert torch.equal(net(X), before)
    assert list(net.state_dict()) == list(model().state_dict())


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_layer_is_scaled_in_training_and_in_its_fused_evaluation(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True, norm_first=norm_first)
    scale_ffn(layer)
    with torch.no_grad():
        layer.dropout2.ffn_alpha.fill_(3.0)
        layer.dropout2.ffn_beta.fill_(0.5)

    def ffn(x: Tensor) -> Tensor:
        return layer.linear2(layer.linear1(x).relu()) / 3.0

    def attend(x: Tensor) -> Tensor:
        return layer.self_attn(x, x, x, need_weights=False)[0]

    if norm_first:
        x = X + attend(layer.norm1(X))
        expected = 0.5 * x + ffn(layer.norm2(x))
    else:
        x = layer.norm1(X + attend(X))
        expected = layer.norm2(0.5 * x + ffn(x))
    torch.testing.assert_close(layer(X), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(X), expected)


@pytest.mark.parametrize("library", ["timm", "torchvision", "transformers"])
def test_libraries_are_scaled_without_a_change_at_the_start(library: str) -> None:
    pytest.importorskip(library)
    image: Tensor = torch.randn(1, 3, 32, 32)
    if library == "timm":
        import timm

        net = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, drop_path_rate=0.2, init_values=0.1)
    elif library == "torchvision":
        import torchvision

        net = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3)
        nn.init.normal_(net.heads.head.weight)
    else:
        import transformers

        config = transformers.GPT2Config(
            n_layer=2, n_embd=16, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=0
        )
        net, image = transformers.GPT2LMHeadModel(config), torch.arange(6)[None]
    net.eval()

    def out() -> Tensor:
        found = net(image)
        return found if isinstance(found, Tensor) else found.logits

    before = out()
    report = scale_ffn(net)
    assert len(report.changes) == 2
    assert torch.equal(out(), before)
    ends = [net.get_submodule(change.module) for change in report.changes]
    if library == "timm":  # the stream must not be dropped or scaled with the branch
        assert [change.module for change in report.changes] == ["blocks.0.drop_path2", "blocks.1.drop_path2"]
    with torch.no_grad():
        ends[0].ffn_beta.fill_(0.5)
    assert not torch.equal(out(), before)
    report.undo()
    assert torch.equal(out(), before)


def test_what_has_no_residual_is_refused_and_nothing_is_an_error() -> None:
    mixed = nn.Sequential(Block(), Straight())
    report = scale_ffn(mixed)
    assert [(r.module, r.reason) for r in report.refused] == [
        ("1.mlp", "no sum of the residual stream and its output was found in its block")
    ]
    zero = model()
    nn.init.zeros_(zero[1].mlp.down.weight)
    nn.init.zeros_(zero[1].mlp.down.bias)
    assert "gives zeros" in scale_ffn(zero).refused[0].reason
    with pytest.raises(ValueError, match=r"can change none of the 1 modules:\n  mlp: no sum"):
        scale_ffn(Straight())
    with pytest.raises(ValueError, match="found no feed-forward in Linear"):
        scale_ffn(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"modules='0.mix'\) matched 1 modules.*Feed-forwards: 0.mlp, 1.mlp"):
        scale_ffn(model(), modules="0.mix")
    assert [c.module for c in scale_ffn(model(), modules="1").changes] == ["1.mlp"]


def test_fusing_keeps_a_linear_function_and_refuses_another() -> None:
    net = model(nn.Identity()).double()
    before = net(X.double())
    kept = net[0].mlp
    report = fuse_linear_ffn(net)
    assert report.added_parameters == 2 * (6 * 6 + 6 - (2 * 6 * 12 + 12 + 6))
    torch.testing.assert_close(net(X.double()), before, rtol=1e-12, atol=1e-12)
    assert {r.reason for r in fuse_linear_ffn(net).refused} == {"it is fused already"}
    assert len(scale_ffn(net).changes) == 2
    report.undo()
    assert net[0].mlp is kept
    with pytest.raises(ValueError, match="its activation is not the identity"):
        fuse_linear_ffn(model())
    curved = model()
    fuse_linear_ffn(curved, drop_activation=True)
    assert isinstance(curved[0].mlp, nn.Linear)
    scaled = model(nn.Identity())
    scale_ffn(scaled)
    with pytest.raises(ValueError, match="fuse first, then scale"):
        fuse_linear_ffn(scaled)
    dropping = model(nn.Dropout(0.25))
    with pytest.raises(ValueError, match=r"dropout 0.25, which one layer cannot have between"):
        fuse_linear_ffn(dropping)


def test_gpt2s_transposed_layers_are_fused() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_embd=8, n_head=2, vocab_size=20, resid_pdrop=0.0, activation_function="linear", n_positions=8,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    net = transformers.GPT2Model(config).eval()
    before = net(torch.arange(6)[None]).last_hidden_state
    fuse_linear_ffn(net)
    torch.testing.assert_close(net(torch.arange(6)[None]).last_hidden_state, before)


def test_norms_are_removed_and_put_back() -> None:
    net = model()
    before = net(X)
    scaled = scale_ffn(net)  # it listens to the norms, and goes on doing so
    with torch.no_grad():
        net[0].mlp.ffn_beta.fill_(0.5)
    halved = net(X)
    report = remove_layer_norm(net)
    assert str(report) == "LayerNormFree: 2 of 2 LayerNorm removed (*.norm), -24 parameters; nothing refused"
    expected = X
    for beta, block in zip((0.5, 1.0), net):
        x = expected + block.mix(expected).tanh()
        expected = beta * x + block.mlp.down(block.mlp.act(block.mlp.up(x)))
    torch.testing.assert_close(net(X), expected)
    assert not remove_layer_norm(net).changes
    report.undo()
    assert torch.equal(net(X), halved)
    scaled.undo()
    assert torch.equal(net(X), before)
    assert [c.module for c in remove_layer_norm(net, modules="1*").changes] == ["1.norm"]
    with pytest.raises(ValueError, match="found no layer or RMS normalisation in Linear"):
        remove_layer_norm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"modules='0.mix'\) matched 1 .*Normalisations: 0.norm"):
        remove_layer_norm(model(), modules="0.mix")


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_encoder_runs_without_norms_in_evaluation_and_with_padding(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    report = remove_layer_norm(encoder)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    trained = encoder(X, src_key_padding_mask=padding)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(X, src_key_padding_mask=padding), trained)
    report.undo()
    assert encoder.use_nested_tensor is not norm_first
    assert isinstance(encoder.layers[0].norm1, nn.LayerNorm)


def test_in_a_trainer(tmp_path: Path, announced: list[str]) -> None:
    callback = EntropyGuidedSurgery(remove_norm=True, modules="pool*")
    module = TokenClassifier()
    run = trainer([callback], tmp_path, max_epochs=1)
    run.fit(module, loader(bags()))
    assert announced == [
        "EntropyGuidedSurgery: 4 of 6 LayerNorm removed (pool.layers.*.norm*), 2 of 6 feed-forward scaled "
        "(pool.layers.*.dropout2), -124 parameters; nothing refused"
    ]
    scales = {n: p for n, p in module.named_parameters() if "ffn_" in n}
    assert len(scales) == 4
    assert all(p != 1 for p in scales.values())
    decay = {id(p): g["weight_decay"] for g in run.optimizers[0].param_groups for p in g["params"]}
    assert {decay[id(p)] for p in scales.values()} == {0.0}
    assert decay[id(module.head.weight)] > 0
    run.save_checkpoint(tmp_path / "last.ckpt")
    fresh: Any = TokenClassifier()
    later = trainer([EntropyGuidedSurgery(remove_norm=True, modules="pool*")], tmp_path, max_epochs=2)
    later.fit(fresh, loader(bags()), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)
    again = trainer([EntropyGuidedSurgery(remove_norm=True, modules="pool*")], tmp_path, max_epochs=1)
    again.fit(fresh, loader(bags()))
    assert len([n for n, _ in fresh.named_parameters() if "ffn_" in n]) == 4
    with pytest.raises(ValueError, match="at least one of scale, remove_norm and fuse"):
        EntropyGuidedSurgery(scale=False)


def test_a_failure_takes_back_what_was_done() -> None:
    net = nn.Sequential(Straight())
    keys = list(net.state_dict())
    with pytest.raises(ValueError, match="can change none"):
        EntropyGuidedSurgery(remove_norm=True).operate(net)
    assert list(net.state_dict()) == keys
