from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_entropy.observe import GradientFlow, OutputError
from lightning_entropy.observe.numbered_layers import layers_around, layers_of_sites, numbered_blocks


class Chain(nn.Module):
    """Blocks one after the other, the hidden states kept."""

    def __init__(self, depth: int = 4, width: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth))
        self.hidden: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = [x]
        for block in self.blocks:
            self.hidden.append(block(self.hidden[-1]))
        return self.hidden[-1]


NAMES = [f"blocks.{i}" for i in range(4)]


def run(model: nn.Module, x: Tensor, samples: int, valid: Tensor | None = None) -> dict[str, tuple[float, float]]:
    with GradientFlow(model, NAMES) as flow:
        loss = model(x).square().mean(-1)
        loss = (loss if valid is None else loss * valid).sum() / samples
        flow.valid = {} if valid is None else {(x.shape[0], x.shape[1]): valid}
        loss.backward()
        flow.add(samples)
    return flow.norms()


def test_norms_are_those_of_autograd() -> None:
    model, x = Chain(), torch.randn(3, 5, 6, requires_grad=True)
    found = run(model, x, samples=3)
    loss = model(x).square().mean(-1).sum() / 3
    gradients = torch.autograd.grad(loss, model.hidden)
    expected = [3 * float(g.square().sum(-1).mean().sqrt()) for g in gradients]
    for i, name in enumerate(NAMES):
        assert found[name] == (pytest.approx(expected[i + 1], rel=1e-5), pytest.approx(expected[i], rel=1e-5))


@pytest.mark.parametrize("a", [0.5, 0.9, 3.0])
def test_a_linear_chain_decays_by_minus_ln_a(a: float) -> None:
    chain = nn.Module()
    chain.blocks = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(4))
    chain.forward = lambda x: chain.blocks[3](chain.blocks[2](chain.blocks[1](chain.blocks[0](x))))  # type: ignore
    for block in chain.blocks:
        block.weight.data = a * torch.eye(2)
    found = run(chain, torch.randn(4, 3, 2), samples=4)
    for after, before in found.values():
        assert math.log(after) - math.log(before) == pytest.approx(-math.log(a), abs=1e-5)


def test_duplicated_and_padded_batches_have_the_same_norms() -> None:
    model, x = Chain().double(), torch.randn(3, 5, 6, dtype=torch.float64)
    plain = run(model, x, samples=3)
    doubled = run(model, torch.cat([x, x]), samples=6)
    padded = torch.cat([x, torch.randn(3, 4, 6, dtype=torch.float64)], 1)
    valid = torch.arange(9).expand(3, 9) < 5
    masked = run(model, padded, 3, valid)
    for name in NAMES:
        assert doubled[name] == pytest.approx(plain[name])
        assert masked[name] == pytest.approx(plain[name])


def test_batches_add_up_to_the_whole() -> None:
    model, x = Chain().double(), torch.randn(6, 5, 6, dtype=torch.float64)
    whole = run(model, x, samples=6)
    with GradientFlow(model, NAMES) as flow:
        for part in x.split([2, 3, 1]):
            (model(part).square().mean(-1).sum() / len(part)).backward()
            flow.add(len(part))
    for name in NAMES:
        assert flow.norms()[name] == pytest.approx(whole[name])


def test_a_frozen_model_has_norms_too_and_the_users_input_is_left_alone() -> None:
    model, x = Chain(), torch.randn(3, 5, 6)
    with_gradients = run(model, x, samples=3)
    frozen = run(model.requires_grad_(False), x, samples=3)
    for name in NAMES:
        assert frozen[name] == pytest.approx(with_gradients[name])
    assert not x.requires_grad


def test_hooks_go_with_the_context_and_a_layer_beside_the_loss_has_norm_zero() -> None:
    model = Chain()
    with GradientFlow(model, NAMES) as flow:
        model(torch.randn(2, 3, 6))
        model.hidden[2].sum().backward()
        flow.add(2)
    assert flow.norms()["blocks.1"][0] == pytest.approx(2 * 6**0.5)
    assert flow.norms()["blocks.3"] == (0.0, 0.0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(AttributeError), GradientFlow(model, ["blocks.9"]):
        pass


def test_output_error_is_the_mean_distance_of_p_and_y() -> None:
    z = torch.randn(7, 3, requires_grad=True)
    y = torch.randint(0, 3, (7,))
    with OutputError() as error:
        loss = F.cross_entropy(z, y)
    loss.backward()
    expected = (z.softmax(-1) - F.one_hot(y, 3)).norm(dim=-1).mean()
    torch.testing.assert_close(error.take(), expected.detach())
    assert error.take() is None


def test_output_error_of_other_losses() -> None:
    z = torch.randn(7, 3, requires_grad=True)
    y = torch.randint(0, 3, (7,))
    expected = (z.softmax(-1) - F.one_hot(y, 3)).norm(dim=-1).mean().detach()
    with OutputError() as error:
        loss = -z.log_softmax(-1).gather(1, y[:, None]).mean()
    loss.backward()
    torch.testing.assert_close(error.take(), expected)
    logit = torch.randn(9, requires_grad=True)
    target = torch.randint(0, 2, (9,)).float()
    with OutputError() as error:
        loss = F.binary_cross_entropy_with_logits(logit, target)
    loss.backward()
    torch.testing.assert_close(error.take(), (logit.sigmoid() - target).abs().mean().detach())
    image = torch.randn(2, 3, 4, 4, requires_grad=True)
    labels = torch.randint(0, 3, (2, 4, 4))
    with OutputError() as error:
        loss = nn.CrossEntropyLoss()(image, labels)
    loss.backward()
    per_pixel = (image.softmax(1) - F.one_hot(labels, 3).movedim(-1, 1)).norm(dim=1).mean()
    torch.testing.assert_close(error.take(), per_pixel.detach())


def test_numbered_blocks_are_those_with_modules_inside() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))
    model.drops = nn.ModuleList(nn.Dropout() for _ in range(2))
    model.mixed = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    assert numbered_blocks(model) == ["layers.0", "layers.1"]
    assert layers_around(["layers.0.self_attn", "pool"], ["layers.0"]) == (
        {"layers.0": ["layers.0.self_attn"]},
        ["pool"],
    )
    assert layers_of_sites(["a.self", "a.cross", "b.attn"]) == ["a.self", "a.cross", "b"]


@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointed_layers_are_seen_once(frozen: bool) -> None:
    """Checkpointing runs the layers again in the backward, with the same operations; those are not another forward."""
    chain, x = Chain().requires_grad_(not frozen), torch.randn(5, 3, 6)
    names = [f"blocks.{i}" for i in range(4)]
    found: list[dict[str, tuple[float, float]]] = []
    for again in (False, True):
        seen: list[str] = []
        with GradientFlow(chain, names, on_output=lambda name, _, seen=seen: seen.append(name)) as flow:
            for _ in range(2):
                y = checkpoint(chain, x, use_reentrant=False) if again else chain(x)
                y.square().mean().backward()
                flow.add(samples=5)
        assert seen == names * 2
        found.append(flow.norms())
    assert found[0].keys() == found[1].keys() == set(names)
    for name in names:
        assert found[1][name] == pytest.approx(found[0][name])
        assert min(found[0][name]) > 0
