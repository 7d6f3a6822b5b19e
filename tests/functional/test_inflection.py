from __future__ import annotations

import pytest
import torch

from lightning_entropy.functional import InflectionRule, inflection_layers, saturation_gradient_index

FLAT = torch.full((6,), 0.9)
VALLEY = torch.tensor([0.9, 0.9, 0.9, 0.2, 0.9, 0.9])
DEAD = torch.tensor([1.0, 1.0, 1.0, 0.01, 1.0, 1.0])


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_a_common_valley_is_found_with_every_alpha(alpha: float) -> None:
    found = inflection_layers(VALLEY, DEAD, rule=InflectionRule(alpha=alpha))
    assert found.layers == [3]
    assert found.index[3] == pytest.approx(1)


def test_alpha_decides_between_valleys_apart() -> None:
    other = DEAD.roll(-2)
    assert inflection_layers(VALLEY, other, rule=InflectionRule(alpha=1.0)).layers == [3]
    assert inflection_layers(VALLEY, other, rule=InflectionRule(alpha=0.0)).layers == [1]
    half = inflection_layers(VALLEY, other)
    assert half.layers == []  # neither is low in both
    assert "No layer is an inflection layer" in half.notes[-1]


def test_a_flat_profile_gives_no_layer_and_says_so() -> None:
    noise = 1e-3 * torch.randn(6, generator=torch.Generator().manual_seed(0))
    for h, g in ((FLAT, torch.ones(6)), (FLAT + noise, torch.ones(6) + noise)):
        for rule in ("ski", "intersection", "decay"):
            found = inflection_layers(h, g, rule=InflectionRule(rule))
            assert found.layers == []
            assert any("gradient is flat" in note for note in found.notes)
            assert any("entropy is flat" in note for note in found.notes)
        assert not saturation_gradient_index(h, g).any()


def test_the_index_is_the_formula() -> None:
    h, g = torch.tensor([0.5, 1.0, 0.2, 0.7]), torch.tensor([0.1, 1.0, 10.0, 0.3])
    hn = 1 - (h - h.min()) / (h.max() - h.min())
    gn = 1 - (g.log() - g.log().min()) / (g.log().max() - g.log().min())
    torch.testing.assert_close(
        saturation_gradient_index(h, g, alpha=0.3), (0.3 * hn + 0.7 * gn).double(), rtol=1e-6, atol=1e-6
    )


def test_ends_count_and_neighbours_only_without_peaks() -> None:
    h = torch.tensor([0.1, 0.15, 0.9, 0.9, 0.1])
    g = torch.tensor([0.01, 0.01, 1.0, 1.0, 0.01])
    assert inflection_layers(h, g).layers == [0, 4]
    assert inflection_layers(h, g, rule=InflectionRule(peaks=False)).layers == [0, 1, 4]
    assert inflection_layers(h, g, rule=InflectionRule(band=1)).layers == [0, 1, 3, 4]
    assert inflection_layers(h, g - torch.tensor([0, 0, 0, 0, 0.005]), rule=InflectionRule(top_k=1)).layers == [4]


def test_the_intersection_needs_both() -> None:
    h = torch.tensor([0.9, 0.2, 0.9, 0.2, 0.9, 0.9, 0.9, 0.9])
    decay = torch.tensor([0.0, 3.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    found = inflection_layers(h, torch.ones(8), decay, rule=InflectionRule("intersection"))
    assert found.layers == [1]
    assert found.low_entropy.nonzero().flatten().tolist() == [1, 3]
    assert found.steep_decay.nonzero().flatten().tolist() == [1, 2]
    assert inflection_layers(h, torch.ones(8), decay, rule=InflectionRule("decay")).layers == [1, 2]


def test_decay_is_taken_from_the_gradients_where_it_is_not_given() -> None:
    g = 0.5 ** torch.arange(6.0)
    g[3:] *= 100
    found = inflection_layers(torch.full((6,), torch.nan), g, rule=InflectionRule("decay"))
    assert found.layers == [3]


def test_layers_without_attention_or_gradient_are_taken_as_they_are() -> None:
    h = VALLEY.clone()
    h[0] = torch.nan
    g = DEAD.clone()
    g[3] = 0.0
    found = inflection_layers(h, g)
    assert found.layers == [3]
    assert found.index.isfinite().all()
    nothing = inflection_layers(h, torch.zeros(6))
    assert nothing.layers == []
    assert "No gradient reaches any layer" in nothing.notes[0]


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ValueError, match="no layer has any: use rule='decay'"):
        inflection_layers(torch.full((3,), torch.nan), torch.ones(3))
    with pytest.raises(ValueError, match="rule must be one of ski, intersection, decay"):
        inflection_layers(FLAT, FLAT, rule=InflectionRule("peak"))
    with pytest.raises(ValueError, match="alpha must be between 0 and 1, got 2"):
        InflectionRule(alpha=2).check()
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        InflectionRule(top_k=0).check()
    with pytest.raises(ValueError, match="flat_entropy must be >= 0"):
        InflectionRule(flat_entropy=float("nan")).check()
    with pytest.raises(ValueError, match="must both be"):
        saturation_gradient_index(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="one value a layer"):
        inflection_layers(FLAT, FLAT, torch.ones(2))
