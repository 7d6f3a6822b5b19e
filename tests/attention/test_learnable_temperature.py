"""Learnable temperature: identity at 1, entropy that rises with it, and a parameter that is trained and saved."""

from __future__ import annotations

import copy
import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_entropy.attention.learnable_temperature import (
    PARAMETER,
    LearnableTemperature,
    add_learnable_temperature,
    temperatures,
)
from lightning_entropy.observe import AttentionEntropyReader
from lightning_entropy.surgery.attention_modules import attention_modules
from tests.observe.model_cases import EVERY, ModelCase


def output_of(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


@pytest.mark.parametrize(("case", "mode"), EVERY, ids=[f"{c.library}-{c.name}-{m}" for c, m in EVERY])
def test_starts_as_the_plain_model_and_comes_off(case: ModelCase, mode: str) -> None:
    model, arguments = case.build(mode)
    keys = list(model.state_dict())
    with torch.no_grad():
        plain = output_of(model(**arguments))
        report = add_learnable_temperature(model)
        assert report.added_parameters == sum(t.numel() for t in temperatures(model).values())
        same = output_of(model(**arguments))
        if case.source[mode] == "multi_head_attention":
            torch.testing.assert_close(same, plain)
        else:
            assert torch.equal(same, plain)
        report.undo()
        assert torch.equal(output_of(model(**arguments)), plain)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(("case", "mode"), EVERY, ids=[f"{c.library}-{c.name}-{m}" for c, m in EVERY])
def test_entropy_rises_with_the_temperature_of_its_head(case: ModelCase, mode: str) -> None:
    model, arguments = case.build(mode)
    add_learnable_temperature(model)
    name = next(iter(attention_modules(model)))
    parameter = getattr(model.get_submodule(name), PARAMETER)
    readings = []
    for t in (0.25, 1.0, 4.0):
        with torch.no_grad():
            parameter[0] = math.log(t)
            with AttentionEntropyReader(model) as reader:
                model(**arguments)
        readings.append(reader.layers[0].per_head())
    first = torch.stack([r[0] for r in readings])
    assert (first.diff() > 0).all()
    if len(readings[0]) > 1 and case.name != "cait_xxs24_224":
        assert torch.equal(readings[0][1:], readings[2][1:])  # the other heads keep theirs


class DotProduct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def expected(self, x: Tensor, t: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return ((q @ k.mT / 2 / t[..., None]).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("positions", [None, 5, 9])
def test_value_and_gradient(positions: int | None) -> None:
    torch.manual_seed(0)
    model, x = DotProduct().double(), torch.randn(3, 5, 8, dtype=torch.float64)
    add_learnable_temperature(model, positions=positions)
    theta = getattr(model, PARAMETER)
    assert theta.shape == (2, positions or 1)
    with torch.no_grad():
        theta.copy_(torch.randn_like(theta))
    t = theta.exp()[:, :5]
    torch.testing.assert_close(model(x), model.expected(x, t))
    (got,) = torch.autograd.grad(model(x).square().sum(), theta)
    (expected,) = torch.autograd.grad(model.expected(x, t).square().sum(), theta)
    torch.testing.assert_close(got, expected)
    assert temperatures(model)[""].shape == ((2,) if positions is None else (2, positions))


def test_positions_follow_a_cache() -> None:
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = t.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = t.LlamaForCausalLM(config).eval()
    for positions in (None, 16):
        report = add_learnable_temperature(model, positions=positions)
        with torch.no_grad():
            getattr(model.model.layers[0].self_attn, PARAMETER).normal_()
            prompt = torch.randint(1, 50, (1, 5))
            out = model.generate(
                prompt, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            whole = model(out.sequences).logits
        torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, 4:-1], rtol=1e-4, atol=1e-5)
        report.undo()


def test_a_longer_sequence_than_positions_is_an_error() -> None:
    model = DotProduct()
    add_learnable_temperature(model, positions=4)
    with pytest.raises(ValueError, match=r"positions=4\) has no temperature for query position 4 of DotProduct"):
        model(torch.randn(1, 5, 8))


def test_the_parameter_is_in_the_state_dict_and_copies_have_their_own() -> None:
    model, x = DotProduct(), torch.randn(1, 5, 8)
    add_learnable_temperature(model, init=2.0)
    assert PARAMETER in model.state_dict()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        getattr(twin, PARAMETER).zero_()
    torch.testing.assert_close(twin(x), twin.expected(x, torch.ones(2, 1)))
    torch.testing.assert_close(model(x), model.expected(x, torch.full((2, 1), 2.0)))
    again = DotProduct()
    add_learnable_temperature(again)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x), model(x))


def test_the_papers_initial_value_is_one_hot() -> None:
    torch.manual_seed(0)
    model = DotProduct()
    add_learnable_temperature(model, init=1e-2)
    with AttentionEntropyReader(model) as reader:
        model(5 * torch.randn(1, 9, 8))
    assert reader.layers[0].entropy.median() < 1e-3


def test_compiles_and_autocasts() -> None:
    torch._dynamo.reset()
    model, x = DotProduct(), torch.randn(1, 5, 8)
    add_learnable_temperature(model, init=3.0)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).square().sum().backward()
    assert getattr(model, PARAMETER).grad.abs().sum() > 0
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(x).float(), exact, rtol=0.02, atol=0.02)
    half = DotProduct().bfloat16()
    add_learnable_temperature(half)
    assert getattr(half, PARAMETER).dtype == torch.bfloat16
    assert half(x.bfloat16()).dtype == torch.bfloat16
    torch._dynamo.reset()


class Tokens(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = DotProduct()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.attention(batch[0]).square().mean()

    test_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader() -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 5, 8)), batch_size=2)


def test_is_trained_saved_and_logged(tmp_path: Any) -> None:
    def trainer() -> L.Trainer:
        return L.Trainer(
            max_epochs=2,
            accelerator="cpu",
            callbacks=[LearnableTemperature()],
            logger=False,
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    module, run = Tokens(), trainer()
    run.fit(module, loader())
    (t,) = temperatures(module).values()
    assert (t != 1).all()
    assert run.logged_metrics["temperature/mean"].item() == pytest.approx(t.mean().item())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = Tokens()
    trainer().test(again, loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)
    (restored,) = temperatures(again).values()
    assert torch.equal(restored, t)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": 0.0}, "init must be finite and positive, got 0.0"),
        ({"positions": 0}, "positions must be at least 1, got 0"),
    ],
)
def test_refuses_arguments_at_once(arguments: dict[str, Any], message: str) -> None:
    for make in (LearnableTemperature, lambda **a: add_learnable_temperature(DotProduct(), **a)):
        with pytest.raises(ValueError, match=message):
            make(**arguments)


def test_a_module_that_does_not_say_its_heads_is_refused() -> None:
    model = DotProduct()
    del model.num_heads
    with pytest.raises(ValueError, match=r"can change none of the 1 attention modules.*\n.*how many heads"):
        add_learnable_temperature(model)


def test_twice_is_once() -> None:
    model = DotProduct()
    add_learnable_temperature(model)
    again = add_learnable_temperature(model)
    assert (again.changes, again.added_parameters) == ([], 0)
    assert len(again.refused) == 1


def test_nothing_to_attach_to() -> None:
    with pytest.raises(ValueError, match="LearnableTemperature found no attention in Linear"):
        add_learnable_temperature(nn.Linear(2, 2))
