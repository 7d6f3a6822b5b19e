from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_entropy.data import Batch
from lightning_entropy.recipes.bag_models import build_bag_model, default_adapter, import_path, two_class_logits
from tests.recipes.bag_cases import make_batch, one_bag

pytest.importorskip("torchmil")

MODELS = ["ABMIL", "CLAM_SB", "DSMIL", "DTFDMIL", "TransformerABMIL", "SmABMIL", "TransMIL"]


class MaxModel(nn.Module):
    """A user's model: no mask, several outputs, names of its own."""

    def __init__(self, in_features: int, num_classes: int = 2, scale: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes)
        self.scale = scale

    def forward(self, bag: Tensor) -> tuple[Tensor, str]:
        return self.scale * self.linear(bag.amax(dim=1)), "extra"


class Masked(MaxModel):
    def forward(self, bag: Tensor, mask: Tensor) -> tuple[Tensor, str]:
        return super().forward(bag.masked_fill(~mask.unsqueeze(-1), -torch.inf))


def first_feature(model: nn.Module, batch: Batch) -> Tensor:
    return batch["features"][:, 0, 0]


@pytest.mark.parametrize("name", MODELS)
def test_torchmil_logits_are_two_classes(name: str) -> None:
    torch.manual_seed(0)
    model = build_bag_model(f"torchmil:{name}", in_features=6, num_classes=2, hidden=8)
    model.net.eval()
    batch = make_batch([9, 9], coords=True)
    torch.manual_seed(0)
    logits = model.logits(model.net, batch)
    assert logits.shape == (2, 2)
    assert (logits[:, 0] == 0).all()
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", [name for name in MODELS if name != "DTFDMIL"])
def test_padding_takes_no_part_in_torchmil_models(name: str) -> None:
    torch.manual_seed(0)
    model = build_bag_model(f"torchmil:{name}", in_features=6, num_classes=2, hidden=8)
    model.net.eval()
    batch = make_batch([9, 4, 6], coords=True)
    together = model.logits(model.net, batch)
    for i in range(3):
        torch.testing.assert_close(together[i], model.logits(model.net, one_bag(batch, i))[0], atol=1e-5, rtol=1e-5)


def test_torchmils_own_losses_are_used_bag_by_bag_where_padding_would_leak() -> None:
    for name, terms in {"ABMIL": 1, "DSMIL": 2, "CLAM_SB": 2, "DTFDMIL": 2}.items():
        model = build_bag_model(f"torchmil:{name}", in_features=6, num_classes=2, hidden=8)
        assert model.loss is not None
        batch = make_batch([12, 5])
        found = model.loss(model.net, batch)
        assert len(found) == terms
        assert all(torch.isfinite(term).all() for term in found.values())
        if name == "DTFDMIL":
            continue  # groups instances at random
        alone = [model.loss(model.net, one_bag(batch, i)) for i in range(2)]
        for key, term in found.items():
            expected = (alone[0][key] + alone[1][key]) / 2
            torch.testing.assert_close(term, expected)


def test_binary_cross_entropy_equals_that_of_two_classes() -> None:
    z, y = torch.randn(9), torch.randint(2, (9,))
    expected = F.binary_cross_entropy_with_logits(z, y.float())
    torch.testing.assert_close(F.cross_entropy(two_class_logits(z), y), expected)
    torch.testing.assert_close(two_class_logits(z[:, None]), two_class_logits(z))
    with pytest.raises(ValueError, match="logits"):
        two_class_logits(torch.zeros(2, 3, 4))


def test_class_path_and_adapter() -> None:
    path = f"{__name__}.MaxModel"
    model = build_bag_model(path, in_features=6, num_classes=3, model_kwargs={"scale": 2.0})
    assert isinstance(model.net, MaxModel)
    assert model.net.scale == 2
    batch = make_batch([4, 4])
    assert model.logits(model.net, batch).shape == (2, 3)
    adapted = build_bag_model(path, in_features=6, num_classes=2, adapter=f"{__name__}.first_feature")
    assert torch.equal(adapted.logits(adapted.net, batch)[:, 1], batch["features"][:, 0, 0])
    called = build_bag_model(MaxModel(6), in_features=6, num_classes=2, adapter=first_feature)
    assert called.logits(called.net, batch).shape == (2, 2)


def test_default_adapter_passes_the_mask_or_refuses_padding() -> None:
    batch = make_batch([4, 2])
    found = default_adapter(Masked(6), batch)
    assert torch.isfinite(found).all()
    with pytest.raises(ValueError, match="batch_size=1"):
        default_adapter(MaxModel(6), batch)


def test_a_graph_needs_coordinates() -> None:
    model = build_bag_model("torchmil:SmABMIL", in_features=6, num_classes=2)
    with pytest.raises(ValueError, match="coordinates"):
        model.logits(model.net, make_batch([3]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "torchmil:ABMIL", "num_classes": 3}, "is binary"),
        ({"model": "torchmil:ABML"}, "it has ABMIL"),
        ({"model": "torchmil:ABMIL", "model_kwargs": {"attdim": 3}}, "att_dim"),
        ({"model": "abml"}, "use 'abmil'"),
        ({"model": "abmil", "adapter": first_feature}, "needs none"),
        ({"model": "no.such.Thing"}, "no.such"),
        ({"model": "torch.nn.Nothing"}, "has no Nothing"),
        ({"model": "torch.zeros"}, "nn.Module"),
        ({"model": "fractions.Fraction"}, "made Fraction"),
        ({"model": nn.Linear(2, 2), "model_kwargs": {"a": 1}}, "built already"),
    ],
)
def test_wrong_models_say_what_to_do(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_bag_model(**{"in_features": 6, "num_classes": 2, **options})  # type: ignore[arg-type]


def test_import_path_wants_a_dotted_path() -> None:
    with pytest.raises(ValueError, match="dotted path"):
        import_path("thing", what="adapter")
