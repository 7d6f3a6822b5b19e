"""Reading activations: which modules, what is kept, and that nothing is disturbed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_entropy.activation import CRReLU, eafo
from lightning_entropy.functional import Normal, activation_entropy
from lightning_entropy.observe import ActivationReader, ActivationReport, activation_sites, is_activation
from lightning_entropy.observe.activation_report import measure_site, recompute
from lightning_entropy.observe.activations import strata
from lightning_entropy.observe.interception import InertHook


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


def network(*activations: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(m for a in activations for m in (nn.Linear(16, 16), a)))


def test_what_counts() -> None:
    eafo_module = eafo(nn.Softplus(), Normal(), step=0.1)
    yes = (nn.GELU(), nn.ReLU6(), nn.Hardswish(), nn.PReLU(), nn.Sigmoid(), CRReLU(), Swish(), eafo_module)
    no = (nn.Linear(2, 2), nn.Softmax(-1), nn.MultiheadAttention(2, 1), nn.GLU(), nn.Identity(), nn.LayerNorm(2))
    assert all(is_activation(m) for m in yes)
    assert not any(is_activation(m) for m in no)
    assert list(activation_sites(network(eafo_module, nn.GELU()))) == ["1", "3"]  # not the base inside


def test_activations_of_timm_and_transformers() -> None:
    timm = pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    vit = timm.create_model("vit_tiny_patch16_224", depth=2)
    assert list(activation_sites(vit)) == ["blocks.0.mlp.act", "blocks.1.mlp.act"]
    assert len(activation_sites(timm.create_model("efficientnet_lite0"))) == 33
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50)
    assert list(activation_sites(transformers.GPT2Model(config))) == ["h.0.mlp.act", "h.1.mlp.act"]


def test_patterns() -> None:
    model = nn.ModuleDict({"a": network(nn.GELU(), nn.Tanh()), "b": network(Square())})
    assert list(activation_sites(model, "a")) == ["a.1", "a.3"]
    assert list(activation_sites(model, "a.3")) == ["a.3"]
    assert list(activation_sites(model, ["b.1"])) == ["b.1"]  # a leaf that the user names
    with pytest.raises(ValueError, match="matched 0 of"):
        activation_sites(model, "c.*")
    with pytest.raises(ValueError, match="found no activation module in the modules that"):
        activation_sites(model, "b.0", owner="Monitor")


def test_nothing_there_is_an_error_that_says_what_is() -> None:
    with pytest.raises(ValueError, match=r"found no activation module in Sequential, which has 1 Linear\. .*F\.gelu"):
        activation_sites(nn.Sequential(nn.Linear(2, 2)))
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(ValueError, match="hold their activation as a function"):
        activation_sites(nn.Sequential(encoder))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True)])
def test_what_is_kept_is_the_input(activation: nn.Module) -> None:
    model = network(activation)
    x = torch.randn(50, 16)
    with ActivationReader(model) as reader:
        model(x)
    (sample,) = reader.samples
    assert torch.equal(sample.values.view(50, 16), model[0](x))
    assert (sample.seen, sample.calls, sample.dtype) == (800, 1, torch.float32)
    assert not model[1]._forward_pre_hooks


def test_reservoir_over_several_calls() -> None:
    model = nn.Sequential(nn.Tanh())
    with ActivationReader(model, samples=1000) as reader:
        for k in range(10):
            model(torch.full((400,), float(k)))
    (sample,) = reader.samples
    assert (sample.seen, sample.calls) == (4000, 10)
    assert 900 < len(sample.values) <= 1000
    shares = torch.stack([(sample.values == k).float().mean() for k in range(10)])
    torch.testing.assert_close(shares, torch.full((10,), 0.1), rtol=0, atol=0.02)


def test_strata_are_distinct_and_cover() -> None:
    index = strata(1_000_003, 10_000, torch.Generator().manual_seed(0))
    assert torch.unique(index).numel() == index.numel() > 9_900
    assert index.min() < 200 < 999_800 < index.max()
    assert torch.equal(strata(5, 10, torch.Generator()), torch.arange(5))


def test_random_state_gradients_and_output_are_untouched() -> None:
    model = network(nn.GELU(), nn.ReLU(inplace=True), nn.RReLU())
    x = torch.randn(64, 16)

    def run(read: bool) -> tuple[Tensor, list[Tensor], Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        reader = ActivationReader(model, samples=100)
        if read:
            reader.attach()
            reader.start(seed=3)
        out = model(x)
        out.square().sum().backward()
        ActivationReport.of(reader.samples, reader.sites)
        reader.detach()
        return out.detach(), [p.grad.clone() for p in model.parameters()], torch.get_rng_state()

    for a, b in zip(run(False), run(True)):
        pairs = zip(a, b) if isinstance(a, list) else [(a, b)]
        assert all(torch.equal(p, q) for p, q in pairs)


def test_checkpointing_is_read_once() -> None:
    model = network(nn.GELU())
    with ActivationReader(model) as reader:
        checkpoint(model, torch.randn(4, 16, requires_grad=True), use_reentrant=False).sum().backward()
    assert reader.samples[0].calls == 1


def test_compiled_models_are_read() -> None:
    torch._dynamo.reset()
    model = network(nn.GELU(), nn.ReLU(inplace=True))
    x = torch.randn(32, 16)
    with ActivationReader(model) as eager:
        model(x)
    reader = ActivationReader(model)
    reader.attach()
    compiled = torch.compile(model, backend="aot_eager")
    reader.start()
    compiled(x)
    reader.stop()
    for one, other in zip(eager.samples, reader.samples):
        torch.testing.assert_close(one.values.sort().values, other.values.sort().values)
    reader.detach()


def test_copies_keep_no_live_hook() -> None:
    model = network(nn.GELU())
    reader = ActivationReader(model)
    reader.attach()
    assert all(isinstance(h, InertHook) for h in copy.deepcopy(model)[1]._forward_pre_hooks.values())
    reader.detach()


def test_nothing_ran_is_an_error() -> None:
    reader = ActivationReader(network(nn.GELU()))
    with pytest.raises(ValueError, match="none of the 1 activation modules of Sequential ran"), reader:
        pass


# Measuring.


def test_channels_are_kept_apart_where_asked_and_where_the_activation_needs_them() -> None:
    scales = torch.logspace(0, 2, 8)
    model = nn.Sequential(nn.Identity(), nn.Tanh(), nn.PReLU(8))
    x = torch.randn(5000, 8) * scales
    with ActivationReader(model, per_channel=True) as reader:
        model(x)
    tanh = reader.samples[0]
    assert tanh.values.shape == (5000, 8)
    row = measure_site(tanh, nn.Identity(), per_channel=True)
    expected = activation_entropy(x, channel_dim=-1).entropy.mean()
    assert row["entropy"] == pytest.approx(float(expected), abs=1e-4)
    with ActivationReader(model) as reader:
        model(x)
    assert [s.values.dim() for s in reader.samples] == [1, 2]
    assert measure_site(reader.samples[1], model[2])["site"] == "2"
    images = nn.Sequential(nn.ReLU())
    with ActivationReader(images, per_channel=True, samples=1000) as reader:
        images(torch.randn(4, 6, 32, 32))
    assert reader.samples[0].values.shape == (333, 3)  # fewer channels, enough rows


def test_bfloat16_is_recomputed_in_float32() -> None:
    model = network(nn.GELU(), nn.ReLU())
    x = torch.randn(4000, 16)
    rows = {}
    for name, enabled in (("float32", False), ("bfloat16", True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), ActivationReader(model, samples=50_000) as reader:
            model(x)
        rows[name] = ActivationReport.of(reader.samples, reader.sites).rows
    for wide, narrow in zip(rows["float32"], rows["bfloat16"]):
        assert narrow["precision"] == "bfloat16"
        assert narrow["entropy"] == pytest.approx(wide["entropy"], abs=0.05)
        assert narrow["atom_mass"] == pytest.approx(wide["atom_mass"], abs=0.01)


def test_what_is_recomputed_equals_what_the_model_computed() -> None:
    for activation in (nn.GELU(), nn.ReLU(inplace=True), CRReLU(0.3), nn.PReLU(16)):
        x = torch.randn(8, 16)
        kept = x.clone()
        torch.testing.assert_close(recompute(activation, x), activation(x.clone()).detach())
        assert torch.equal(x, kept)
    with pytest.raises(ValueError, match="no activation of each element"):
        recompute(nn.Linear(16, 4), torch.randn(8, 16))


def test_report() -> None:
    model = network(CRReLU(0.25), nn.ReLU(), eafo(nn.Softplus(), Normal(), step=0.1))
    with ActivationReader(model) as reader:
        model(torch.randn(500, 16))
    report = ActivationReport.of(reader.samples, reader.sites, step=7)
    assert [row["site"] for row in report.rows] == ["1", "3", "5"]
    assert report.rows[0]["eps"] == pytest.approx(0.25)
    assert report.rows[2]["eps"] == pytest.approx(0.1)
    assert report.rows[1]["atom_mass"] > 0.3
    text = str(report)
    assert text.splitlines()[0].split()[:2] == ["site", "activation"]
    assert "CRReLU" in text
    stored = json.loads(report.to_json())
    assert stored["step"] == 7
    assert stored["sites"][1]["eps"] is None
    figure = report.plot()
    assert [axis.get_ylabel() for axis in figure.axes] == ["nats", "atom mass", "spread of the input", "learned amount"]


def test_values_that_are_not_finite_are_left_out() -> None:
    model = nn.Sequential(nn.Tanh())
    with ActivationReader(model) as reader:
        model(torch.cat([torch.randn(1000), torch.tensor([float("nan"), float("inf")])]))
    row = ActivationReport.of(reader.samples, reader.sites).rows[0]
    assert row["input_std"] == pytest.approx(1.0, abs=0.1)
