from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_entropy.observe.model_weights import model_weights
from lightning_entropy.surgery.gradient_scores import gradient_scores
from lightning_entropy.surgery.select_modules import select_modules


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(4, 2)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(x))))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 3, generator=generator) for _ in range(count)]


def reference(model: nn.Module) -> dict[str, list[Tensor]]:
    model.eval()
    found: dict[str, list[Tensor]] = {"first.weight": [], "last.weight": []}
    for batch in batches():
        model.zero_grad()
        loss(model, batch).backward()
        for name in found:
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            found[name].append(gradient.double().clone())
    model.zero_grad()
    return found


@pytest.mark.parametrize("by", ["gradient_norm", "relative_gradient_norm", "fisher"])
def test_the_scores_are_those_of_backward(by: str) -> None:
    torch.manual_seed(0)
    model = Net()
    expected = {}
    for name, gradients in reference(model).items():
        mean = torch.stack(gradients).mean(0)
        weight = model.get_parameter(name).detach().double()
        expected[name] = {
            "gradient_norm": mean.norm(),
            "relative_gradient_norm": mean.norm() / weight.norm(),
            "fisher": torch.stack(gradients).square().mean(),
        }[by]
    found = gradient_scores(model, model_weights(model), batches(), loss, by=by)
    assert set(found) == set(expected)  # what no gradient reached is missing
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-5)


def test_nothing_of_the_model_is_disturbed() -> None:
    torch.manual_seed(0)
    model = Net().train()
    model.drop.eval()
    model.first.weight.requires_grad_(False)
    model.last.weight.grad = torch.ones(2, 4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    gradient_scores(model, model_weights(model), batches(), lambda m, b: loss(m, b + torch.randn_like(b)))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model.drop.training
    assert not model.first.weight.requires_grad
    assert torch.equal(model.last.weight.grad, torch.ones(2, 4))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_it_works_inside_no_grad_and_stops_where_it_is_told() -> None:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        some = gradient_scores(model, model_weights(model), batches(), loss, max_batches=1)
    assert some == gradient_scores(model, model_weights(model), batches(1), loss)


def test_a_selection_by_gradients() -> None:
    torch.manual_seed(0)
    model = Net()
    scores = gradient_scores(model, model_weights(model), batches(), loss, by="fisher")
    selection = select_modules(model, by="fisher", budget=1, data=batches(), loss=loss)
    assert selection.names == [max(scores, key=scores.__getitem__)]
    assert [refusal.module for refusal in selection.skipped] == ["unused.weight"]
    lowest = select_modules(model, by="fisher", budget=1, data=batches(), loss=loss, largest=False)
    assert lowest.names == [min(scores, key=scores.__getitem__)]
    by_norm = select_modules(model, by="gradient_norm", normalize="shape", budget=1, data=batches(), loss=loss)
    norms = gradient_scores(model, model_weights(model), batches(), loss)
    row = next(row for row in by_norm.rows if row.name == "first.weight")
    assert row.score == pytest.approx(norms["first.weight"] / math.sqrt(12))


def test_what_is_missing_or_wrong_is_named() -> None:
    model = Net()
    weights = model_weights(model)
    with pytest.raises(ValueError, match="is measured on data and needs data and loss"):
        select_modules(model, by="fisher")
    with pytest.raises(ValueError, match="needs loss"):
        select_modules(model, by="gradient_norm", data=batches())
    with pytest.raises(ValueError, match="got no batch from data"):
        gradient_scores(model, weights, [], loss)
    with pytest.raises(ValueError, match=r"must return a scalar tensor, got a tensor of shape \(5, 2\)"):
        gradient_scores(model, weights, batches(), lambda m, b: m(b))
    with pytest.raises(ValueError, match="must return a scalar tensor, got a float"):
        gradient_scores(model, weights, batches(), lambda m, b: m(b).sum().item())  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="has no gradient"):
        gradient_scores(model, weights, batches(), lambda m, b: m(b).sum().detach())
    with pytest.raises(ValueError, match="is nan"):
        gradient_scores(model, weights, batches(), lambda m, b: m(b).sum() * math.nan)
    with pytest.raises(ValueError, match="does not depend on any of the 3 weights"):
        gradient_scores(model, weights, batches(), lambda m, b: m.norm.weight.sum())
