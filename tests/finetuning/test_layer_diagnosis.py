from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_entropy.finetuning import LayerDiagnosis, diagnose_layers
from lightning_entropy.functional import linear_cka
from tests.finetuning.diagnosed_models import (
    Classifier,
    Encoder,
    batches,
    block_gradient,
    close,
    loss,
    model,
    padded,
    saturate,
)
from tests.suite.running import same, traces

pytestmark = pytest.mark.filterwarnings("ignore:.*diagnose_layers.*no layer")


# What is measured


def test_every_number_against_its_definition() -> None:
    net = model().double()
    data = batches(1, dtype=torch.float64)
    (batch,) = data
    found = diagnose_layers(net, data, loss=loss)
    z = net(batch["x"], batch["mask"])
    value = F.cross_entropy(z, batch["y"])
    error = (z.softmax(-1) - F.one_hot(batch["y"], 3)).norm(dim=-1).mean()
    assert found.loss == pytest.approx(float(value.detach()))
    assert found.output_error == pytest.approx(float(error.detach()))
    gradients = torch.autograd.grad(value, net.hidden, retain_graph=True)
    tokens = batch["mask"].sum()
    norms = [16 * float((g.square().sum(-1) * batch["mask"]).sum().div(tokens).sqrt()) for g in gradients]
    for i, row in enumerate(found.rows):
        assert row.layer == f"blocks.{i}"
        assert row.attention == (f"blocks.{i}",)
        assert row.gradient == pytest.approx(norms[i + 1])
        assert row.input_gradient == pytest.approx(norms[i])
        assert row.relative_gradient == pytest.approx(norms[i + 1] / float(error.detach()))
        assert row.decay == pytest.approx(math.log(norms[i + 1] / norms[i]))
        own = torch.autograd.grad(value, list(net.blocks[i].parameters()), retain_graph=True)
        assert row.parameter_gradient == pytest.approx(float(torch.stack([g.norm() for g in own]).norm()))
        block: Any = net.blocks[i]
        x = block.norm1(net.hidden[i])
        q, k = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (block.query, block.key))
        p = (q @ k.mT / 8**0.5).masked_fill(~batch["mask"][:, None, None, :], -torch.inf).softmax(-1)
        h = -torch.special.xlogy(p, p).sum(-1).mean(1)[batch["mask"]]
        keys = batch["mask"].sum(1, keepdim=True).expand(16, 12)[batch["mask"]]
        assert row.entropy_nats == pytest.approx(float(h.mean().detach()), rel=1e-5)
        assert row.entropy == pytest.approx(float((h / keys.log()).mean().detach()), rel=1e-5)


def test_parameter_gradients_are_those_of_all_data() -> None:
    net, data = model().double(), batches(3, dtype=torch.float64)
    data[2] = {k: v[:5] for k, v in data[2].items()}
    found = diagnose_layers(net, data, loss=loss)
    total = sum(loss(net, b) * len(b["y"]) for b in data) / 37
    for i, row in enumerate(found.rows):
        own = torch.autograd.grad(total, list(net.blocks[i].parameters()), retain_graph=True)
        assert row.parameter_gradient == pytest.approx(float(torch.stack([g.norm() for g in own]).norm()))
    assert found.samples == 37
    assert found.batches == 3


def test_padding_duplication_and_batching_change_nothing() -> None:
    net, data = model().double(), batches(2, dtype=torch.float64)
    plain = diagnose_layers(net, data, loss=loss)
    close(plain, diagnose_layers(net, [padded(b, 7) for b in data], loss=loss))
    close(plain, diagnose_layers(net, [{k: torch.cat([v, v]) for k, v in b.items()} for b in data], loss=loss))
    close(plain, diagnose_layers(net, [*data, *data], loss=loss))
    split = [{k: v[rows] for k, v in b.items()} for b in data for rows in (slice(0, 3), slice(3, 16))]
    close(plain, diagnose_layers(net, split, loss=loss))


def test_a_confident_model_has_a_small_gradient_and_no_small_relative_one() -> None:
    """dL/dz = p - y: as logits grow on correct samples G goes to 0, and G over the error stays."""
    net, (batch,) = model().double(), batches(1, dtype=torch.float64)
    with torch.no_grad():
        batch["y"] = net(batch["x"], batch["mask"]).argmax(-1)
    found = []
    for t in (1.0, 100.0, 1000.0):
        scaled = lambda m, b, t=t: F.cross_entropy(t * m(b["x"], b["mask"]), b["y"])  # noqa: E731
        found.append(diagnose_layers(net, [batch], loss=scaled))
    first, _, last = ([r.gradient for r in d.rows] for d in found)
    assert all(b < 1e-3 * a for a, b in zip(first, last))
    for a, b in zip(found[0].rows, found[2].rows):
        assert math.isfinite(b.relative_gradient)
        assert b.relative_gradient / 1000 > 0.05 * a.relative_gradient  # the logits' own factor taken out


def test_sampled_rows_are_said_and_close() -> None:
    net, data = saturate(model(), (1,)), batches(2)
    some = diagnose_layers(net, data, loss=loss, queries=6)
    every = diagnose_layers(net, data, loss=loss)
    assert "estimated from 6 query rows" in some.notes[0]
    assert not every.notes
    assert [r.entropy for r in some.rows] == pytest.approx([r.entropy for r in every.rows], abs=0.03)


# What is chosen


@pytest.mark.parametrize("pre", [True, False], ids=["pre-norm", "post-norm"])
def test_two_saturated_layers_are_found_at_twenty_seeds(pre: bool) -> None:
    for seed in range(20):
        net = model(seed, depth=8, pre=pre)
        assert diagnose_layers(net, batches(seed=seed), loss=loss).chosen == []
        saturate(net, (2, 5))
        assert diagnose_layers(net, batches(seed=seed), loss=loss).chosen == ["blocks.2", "blocks.5"], seed


def test_saturated_layers_anywhere_are_found_by_entropy_alone() -> None:
    for seed in range(20):
        pair = tuple(sorted(random.Random(seed).sample(range(8), 2)))
        net = saturate(model(seed, depth=8), pair)
        found = diagnose_layers(net, batches(seed=seed), loss=loss, alpha=1.0, peaks=False)
        assert found.chosen == [f"blocks.{i}" for i in pair], seed


def test_saturated_layers_that_block_the_gradient_are_their_intersection() -> None:
    for seed in range(20):
        net = block_gradient(saturate(model(seed, depth=8), (2, 5)), (2, 5))
        found = diagnose_layers(net, batches(seed=seed), loss=loss, rule="intersection")
        assert found.chosen == ["blocks.2", "blocks.5"], seed
        assert all(found.rows[i].decay > 2 for i in (2, 5))


def test_a_layer_that_kills_gradients_is_the_one_of_the_decay() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(5)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    net = Mlp()
    net.layers[3][0].weight.data.mul_(1e-3)
    data = [torch.randn(8, 6)]
    found = diagnose_layers(net, data, loss=lambda m, x: m(x).square().mean(1).mean(), rule="decay")
    assert found.chosen == ["layers.3"]
    with pytest.raises(ValueError, match="no attention between tokens ran in Mlp"):
        diagnose_layers(net, data, loss=lambda m, x: m(x).square().mean())


def test_a_flat_profile_gives_no_layer_and_says_so() -> None:
    with pytest.warns(UserWarning, match=r"Attention entropy is flat over depth .* No layer is an inflection layer"):
        found = diagnose_layers(model(), batches(), loss=loss)
    assert found.chosen == []
    assert "No layer is an inflection layer" in found.explain()


def test_choosing_anew_needs_no_second_run() -> None:
    net = saturate(model(0, depth=8), (0, 1))
    found = diagnose_layers(net, batches(), loss=loss)
    assert found.choose(alpha=1.0, peaks=False).chosen == ["blocks.0", "blocks.1"]
    assert found.choose("decay").rule.rule == "decay"
    with pytest.raises(ValueError, match="rule must be one of"):
        found.choose("steep")


# The model comes out as it went in


def state_of(module: nn.Module) -> dict[str, Any]:
    return {
        "traces": traces(module),
        "modes": [m.training for m in module.modules()],
        "weights": {k: v.clone() for k, v in module.state_dict().items()},
        "gradients": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "requires": [p.requires_grad for p in module.parameters()],
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
    }


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_out_as_it_went_in(fails: bool) -> None:
    module = Classifier(depth=3, batch_norm=True)
    module.net.blocks[1].requires_grad_(False)
    module.net.drop.eval()
    first = next(module.parameters())
    for p in module.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    stepped = []
    first.register_post_accumulate_grad_hook(lambda p: stepped.append(p))
    module.accuracy(torch.eye(3), torch.arange(3))
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(batches(4), batch_size=None, shuffle=True, generator=generator)
    before, grads = state_of(module), [p.grad for p in module.parameters()]
    counted, drawn = module.accuracy.tp.clone(), generator.get_state()
    if fails:

        def broken(m: nn.Module, batch: Any) -> Tensor:
            m.net(batch["x"], batch["mask"])
            raise RuntimeError("out of luck")

        with pytest.raises(RuntimeError, match="out of luck"):
            diagnose_layers(module, loader, loss=broken, compare_with=copy.deepcopy(module).state_dict())
    else:
        diagnose_layers(module, loader, compare_with=copy.deepcopy(module).state_dict())
    after = state_of(module)
    assert same(before["weights"], after["weights"])
    assert before["traces"] == after["traces"]
    assert before["modes"] == after["modes"]
    assert before["requires"] == after["requires"]
    assert all(p.grad is g for p, g in zip(module.parameters(), grads))
    assert all(a is None or torch.equal(a, b) for a, b in zip(before["gradients"], after["gradients"]))
    assert torch.equal(before["random"][0], after["random"][0])
    assert before["random"][1:] == after["random"][1:]
    assert torch.equal(module.accuracy.tp, counted)
    assert module.accuracy._update_count == 1
    assert torch.equal(generator.get_state(), drawn)
    assert not stepped
    first.sum().backward()
    assert len(stepped) == 1  # the user's hook is back


def test_frozen_layers_have_activation_gradients_and_no_parameter_gradient() -> None:
    net, data = model().double(), batches(1, dtype=torch.float64)
    every = diagnose_layers(net, data, loss=loss)
    net.requires_grad_(False)
    net.head.requires_grad_(True)
    frozen = diagnose_layers(net, data, loss=loss)
    for a, b in zip(every.rows, frozen.rows):
        assert b.gradient == pytest.approx(a.gradient)
        assert b.parameter_gradient == 0.0
        assert b.parameters == 0


# Change between two moments


def moved(net: Encoder) -> Encoder:
    other = copy.deepcopy(net)
    with torch.no_grad():
        torch.manual_seed(4)
        for p in other.blocks[1].parameters():
            p.add_(0.3 * torch.randn_like(p))
    return other


@pytest.mark.parametrize("kind", ["module", "state dict", "checkpoint", "diagnosis"])
def test_delta_cka_between_two_moments(kind: str, tmp_path: Path) -> None:
    before, data = model(), batches(2)
    after = moved(before)
    other: Any = before
    if kind == "state dict":
        other = before.state_dict()
    elif kind == "checkpoint":
        other = tmp_path / "last.ckpt"
        torch.save({"state_dict": before.state_dict()}, other)
    elif kind == "diagnosis":
        other = diagnose_layers(before, data, loss=loss, keep_representations=True)
    found = diagnose_layers(after, data, loss=loss, compare_with=other, components=32, debiased=False)
    expected = []
    with torch.no_grad():
        hidden = {}
        for net in (before, after):
            rows = []
            for batch in data:
                net(batch["x"], batch["mask"])
                rows.append([h[batch["mask"]] for h in net.hidden[1:]])
            hidden[net] = [torch.cat(r) for r in zip(*rows)]
        expected = [1 - float(linear_cka(a, b)) for a, b in zip(hidden[before], hidden[after])]
    assert [r.delta_cka for r in found.rows] == pytest.approx(expected, abs=1e-9)
    assert found.rows[0].delta_cka == pytest.approx(0, abs=1e-9)
    assert found.rows[1].delta_cka > 0.01
    assert all(r.retained_variance == pytest.approx(1) for r in found.rows)
    assert found.representations is None
    assert "dCKA" in found.table()


def test_a_bounded_sample_of_tokens_is_compared() -> None:
    net, data = model(), batches(3)
    first = diagnose_layers(net, data, loss=loss, keep_representations=True, max_rows=50)
    assert first.representations is not None
    assert {len(rows) for rows in first.representations.values()} == {50}
    again = diagnose_layers(net, data, loss=loss, compare_with=first, max_rows=50)
    assert [r.delta_cka for r in again.rows] == pytest.approx([0] * 3, abs=1e-9)
    with pytest.raises(ValueError, match="other layers or other batches"):
        diagnose_layers(net, batches(3, seed=1), loss=loss, compare_with=first, max_rows=50)


def test_moments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    net, data = model(), batches(1)
    with pytest.raises(ValueError, match=r"compare_with lacks \d+ of the \d+ tensors of Encoder"):
        diagnose_layers(net, data, loss=loss, compare_with={"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="both moments must be of one architecture"):
        diagnose_layers(net, data, loss=loss, compare_with=model(width=16).state_dict())
    plain = diagnose_layers(net, data, loss=loss)
    with pytest.raises(ValueError, match="keep_representations=True"):
        diagnose_layers(net, data, loss=loss, compare_with=plain)


# The result as data


def test_json_and_file_round_trip(tmp_path: Path) -> None:
    net = saturate(model(0, depth=8), (2, 5))
    found = diagnose_layers(net, batches(), loss=loss)
    path = found.save(tmp_path / "deep" / "diagnosis.json")
    back = LayerDiagnosis.load(path)
    assert back.to_json() == found.to_json()
    assert back.chosen == ["blocks.2", "blocks.5"]
    assert back.choose().chosen == back.chosen
    assert json.loads(path.read_text())["chosen"] == back.chosen
    assert "NaN" not in path.read_text()
    (tmp_path / "other.json").write_text('{"kind": "selection"}')
    with pytest.raises(ValueError, match=r"other\.json holds no layer diagnosis"):
        LayerDiagnosis.load(tmp_path / "other.json")
    (tmp_path / "broken.json").write_text("[")
    with pytest.raises(ValueError, match="holds no layer diagnosis"):
        LayerDiagnosis.load(tmp_path / "broken.json")


def test_table_words_and_figure() -> None:
    net = saturate(model(0, depth=8), (2, 5))
    found = diagnose_layers(net, batches(), loss=loss, compare_with=moved(net))
    assert "* blocks.2" in found.table()
    words = found.explain()
    assert "blocks.2: Chosen: attention entropy 0.0" in words
    assert "blocks.3: Not chosen: attention entropy" in words
    assert "on its way back through it" in words
    assert str(found).startswith("Encoder: 2 of 8 layers are inflection layers (blocks.2, blocks.5)")
    figure = found.plot()
    figure.canvas.draw()
    assert len([p for p in figure.axes[0].patches if p.get_width() == 1]) == 2
    assert LayerDiagnosis.from_record(found.record()).plot().axes


# What cannot be done is said


def test_what_cannot_be_diagnosed_is_said() -> None:
    net, data = model(), batches(1)
    with pytest.raises(ValueError, match="data gave no batch"):
        diagnose_layers(net, [], loss=loss)
    with pytest.raises(ValueError, match=r"Encoder is no LightningModule .* pass loss=function"):
        diagnose_layers(net, [(1, 2)])
    with pytest.raises(ValueError, match=r"a scalar loss is needed .* got a tensor of shape \(16, 3\)"):
        diagnose_layers(net, data, loss=lambda m, b: m(b["x"], b["mask"]))
    with pytest.raises(ValueError, match="the loss is nan"):
        diagnose_layers(net, data, loss=lambda m, b: loss(m, b) * float("nan"))
    with pytest.raises(ValueError, match="has no gradient"):
        diagnose_layers(net, data, loss=lambda m, b: loss(m, b).detach())
    with pytest.raises(ValueError, match="max_batches must be at least 1"):
        diagnose_layers(net, data, loss=loss, max_batches=0)
    manual = Classifier(depth=2)
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="Classifier optimizes manually"):
        diagnose_layers(manual, data)
    assert not torch._C._len_torch_function_stack()


def test_an_error_that_is_not_seen_is_said_and_can_be_shown() -> None:
    net, (batch,) = model(), batches(1)
    own = lambda m, b: (m(b["x"], b["mask"]) ** 2).mean()  # noqa: E731
    found = diagnose_layers(net, [batch], loss=own)
    assert math.isnan(found.output_error)
    assert "let loss return (loss, z)" in found.notes[0]

    def shown(m: nn.Module, b: Any) -> tuple[Tensor, Tensor]:
        z = m(b["x"], b["mask"])
        return (z**2).mean(), z

    assert math.isfinite(diagnose_layers(net, [batch], loss=shown).output_error)


def test_max_batches_and_progress() -> None:
    told: list[tuple[int, int]] = []
    found = diagnose_layers(
        model(), batches(5), loss=loss, max_batches=3, progress=lambda done, total, name: told.append((done, total))
    )
    assert found.batches == 3
    assert told == [(0, 3), (1, 3), (2, 3)]
