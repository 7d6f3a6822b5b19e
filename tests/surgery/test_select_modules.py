from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_entropy.observe.spectral_report import spectral_report
from lightning_entropy.surgery.module_scores import shape_explains, type_of
from lightning_entropy.surgery.select_modules import select_modules
from lightning_entropy.surgery.selection import Selection


def layer(kappa: float, rows: int = 4, columns: int = 4) -> nn.Linear:
    """A layer whose singular values are kappa and ones; 0: all zeros; inf: a column of zeros."""
    made = nn.Linear(columns, rows, bias=False)
    weight = torch.eye(rows, columns)
    weight[0, 0] = 0 if math.isinf(kappa) else kappa
    made.weight.data.copy_(weight * (kappa > 0))
    return made


def model_of(*kappas: float) -> nn.Sequential:
    return nn.Sequential(*(layer(kappa) for kappa in kappas))


def indices(selection: Selection) -> list[int]:
    return [int(name.split(".")[0]) for name in selection.names]


def quiet(*arguments: Any, **named: Any) -> Selection:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return select_modules(*arguments, **named)


def test_the_lowest_condition_numbers_are_chosen() -> None:
    selection = select_modules(model_of(5, 2, 9, 3), budget=2)
    assert selection.names == ["1.weight", "3.weight"]
    assert [row.score for row in selection.chosen] == pytest.approx([2, 3])
    assert all(row.exact for row in selection.chosen)
    for row in selection.rows:
        true = [5, 2, 9, 3][int(row.module)]
        assert row.lower_bound <= true * (1 + 1e-12)
        assert not row.exact or row.score == pytest.approx(true)


@pytest.mark.parametrize(
    ("budget", "count"),
    [
        (3, 3),
        (99, 5),
        (0.2, 1),
        (0.01, 1),
        (0.5, 2),
        (1.0, 5),
        ({"tensors": 2}, 2),
        ({"tensors": 0.4}, 2),
        ({"parameters": 32}, 2),
        ({"parameters": 47}, 2),
        ({"parameters": 0.6}, 3),
        ({"parameters": 1}, 1),
        ({"threshold": 4.0}, 3),
        ({"threshold": 4}, 3),
    ],
)
def test_budgets(budget: Any, count: int) -> None:
    model = model_of(6, 2, 5, 4, 3)
    for source in (model, spectral_report(model)):
        for certify in (True, False):
            assert indices(select_modules(source, budget=budget, certify=certify)) == [1, 4, 3, 2, 0][:count]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (0, "a count of tensors must be >= 1, got 0"),
        (True, "budget must be a count of tensors"),
        (1.5, r"a fraction of tensors must be in \(0, 1\], got 1.5"),
        (0.0, r"a fraction of tensors must be in \(0, 1\]"),
        ("0.2", "budget must be a count of tensors"),
        ({"parameter": 3}, "one of the keys tensors, parameters, threshold"),
        ({"parameters": 2.0}, "a fraction of parameters"),
        ({}, "one of the keys"),
        ({"threshold": math.nan}, "budget must be"),
    ],
)
def test_a_budget_that_means_nothing_is_an_error(budget: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_modules(model_of(2, 3), budget=budget)


def test_zero_and_rank_deficient_weights_are_never_chosen() -> None:
    model = model_of(0, 3, math.inf, 2)
    for by in ("condition_number", "entropy_deficit", "stable_rank"):
        for largest in (None, True, False):
            selection = quiet(model, by=by, budget=4, largest=largest)
            assert set(indices(selection)) == {1, 3}
            told = {refusal.module: refusal.reason for refusal in selection.skipped}
            assert "0.weight" in told
            assert "2.weight" in told
    with pytest.raises(ValueError, match="can choose none of the 2 weights"):
        select_modules(model_of(0, math.inf))
    with pytest.raises(ValueError, match="its spectrum_snr is inf"):  # three equal values leave no noise
        select_modules(model_of(2, 3), by="spectrum_snr")


def test_equal_scores_go_by_name() -> None:
    assert indices(select_modules(model_of(3, 3, 3, 2), budget=3)) == [3, 0, 1]
    assert indices(select_modules(spectral_report(model_of(3, 3, 3, 2)), budget=3)) == [3, 0, 1]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, 2.0, 7.0, 1e3, 1e5, math.inf]), min_size=2, max_size=9),
    st.one_of(
        st.integers(1, 9), st.sampled_from([0.2, 0.5, {"parameters": 0.4}, {"parameters": 40}, {"threshold": 5.0}])
    ),
    st.sampled_from([None, "shape"]),
    st.randoms(use_true_random=False),
)
def test_the_certified_choice_is_that_of_brute_force(
    kappas: list[float], budget: Any, normalize: Any, random: Any
) -> None:
    shapes = [(4, 4), (4, 8), (8, 4), (3, 12)]
    model = nn.Sequential(*(layer(kappa, *random.choice(shapes)) for kappa in kappas))
    try:
        exact = quiet(model, budget=budget, normalize=normalize, certify=False)
    except ValueError as error:
        # Bounds above a threshold say that nothing is within it, and not whether anything has full rank.
        told = "can choose none|within the budget" if "can choose none" in str(error) else "within the budget"
        with pytest.raises(ValueError, match=told):
            quiet(model, budget=budget, normalize=normalize)
        return
    assert quiet(model, budget=budget, normalize=normalize).names == exact.names
    assert quiet(spectral_report(model), budget=budget, normalize=normalize).names == exact.names


def test_shape_normalisation_divides_out_what_random_numbers_have() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(*sides, bias=False) for sides in ((64, 64), (64, 256), (64, 64), (256, 64))))
    with torch.no_grad():
        model[1].weight[0] *= 20  # far worse than random numbers of its shape, and still below any square one
    assert indices(quiet(model, budget=2)) == [3, 1]
    assert 1 not in indices(select_modules(model, budget=3, normalize="shape"))
    for by in ("entropy_deficit", "stable_rank"):
        row = next(r for r in quiet(model, by=by, normalize="shape").rows if r.name == "3.weight")
        assert row.score == pytest.approx(1, rel=0.15)


def test_types_are_served_alike() -> None:
    assert type_of("blocks.11.attn.qkv.weight") == "blocks.*.attn.qkv.weight"
    assert type_of("3.fc1.weight") == "*.fc1.weight"
    model = nn.ModuleDict(
        {
            "wide": nn.ModuleList([layer(k, 4, 8) for k in (2, 3, 4)]),
            "square": nn.ModuleList([layer(k) for k in (30, 20, 10)]),
        }
    )
    assert select_modules(model, budget=2, normalize="type").names == ["square.2.weight", "wide.0.weight"]
    chosen = select_modules(model, budget=4, normalize="type")
    assert chosen.names == ["square.2.weight", "wide.0.weight", "square.1.weight", "wide.1.weight"]
    assert {row.group for row in chosen.rows} == {"square.*.weight", "wide.*.weight"}
    with pytest.raises(ValueError, match="threshold and normalize='type'"):
        select_modules(model, budget={"threshold": 3.0}, normalize="type")


def test_a_warning_says_where_shape_alone_explains_the_choice() -> None:
    torch.manual_seed(0)
    wide = [nn.Linear(16, 64) for _ in range(4)]
    square = [nn.Linear(64, 64) for _ in range(8)]
    model = nn.Sequential(*wide, *square)
    with pytest.warns(
        UserWarning, match=r"shape alone explains this choice .*all 3 are among the 4 weights .*64x16: 3"
    ):
        selection = select_modules(model, budget=3)
    assert len(selection.notes) == 1
    assert "note: shape alone" in selection.table()
    with pytest.warns(UserWarning, match="as high a score"):
        select_modules(model, budget=7, largest=True)
    assert not select_modules(model, budget=3, normalize="shape").notes  # and no warning, which would be an error
    assert not select_modules(nn.Sequential(*square), budget=3).notes
    assert not select_modules(model, budget=3, by="random").notes


def test_when_shape_explains() -> None:
    one, two = 3.0, 900.0
    assert shape_explains([one] * 4 + [two] * 8, [True] * 3 + [False] * 9, largest=False) is not None
    assert shape_explains([one] * 4 + [two] * 8, [True] * 4 + [False] * 8, largest=False) is not None
    assert shape_explains([one] * 4 + [two] * 8, [True] * 5 + [False] * 7, largest=False) is None  # both classes
    assert shape_explains([one] * 4 + [two] * 8, [False] * 11 + [True], largest=False) is None  # the other end
    assert shape_explains([one, two], [True, False], largest=False) is None  # one of two is chance
    assert shape_explains([900.0] * 4 + [950.0] * 8, [True] * 4 + [False] * 8, largest=False) is None  # near shapes
    assert shape_explains([one] * 5, [True] * 2 + [False] * 3, largest=False) is None


def test_chance_depends_on_the_seed_and_the_names_only() -> None:
    model = model_of(*range(2, 22))
    first = select_modules(model, by="random", budget=5, seed=1)
    assert first.names == select_modules(spectral_report(model), by="random", budget=5, seed=1).names
    assert set(first.names) != set(select_modules(model, by="random", budget=5, seed=2).names)


def test_depth_takes_the_last_and_largest_turns_it_round() -> None:
    model = model_of(*range(2, 14))
    assert indices(select_modules(model, by="depth", budget=2)) == [11, 10]
    assert indices(select_modules(model, by="depth", budget=2, largest=False)) == [0, 1]
    assert indices(select_modules(model, budget=2, largest=True)) == [11, 10]


def test_patterns_narrow_the_candidates() -> None:
    model = model_of(5, 2, 9, 3)
    assert select_modules(model, budget=1, modules=["0", "2"]).names == ["0.weight"]
    assert select_modules(model, budget=1, exclude="1").names == ["3.weight"]
    assert select_modules(spectral_report(model), budget=1, exclude="1").names == ["3.weight"]
    with pytest.raises(ValueError, match=r"select_modules\(exclude='head'\) names none of the 4 weights"):
        select_modules(model, exclude="head")
    with pytest.raises(ValueError, match="leaves none of the 4 weights"):
        select_modules(model, exclude="*")


def test_fused_parts_count_by_their_worst() -> None:
    model = nn.Module()
    model.qkv = nn.Linear(4, 12, bias=False)
    parts = [layer(2).weight, layer(40).weight, layer(3).weight]
    model.qkv.weight.data.copy_(torch.cat(parts))
    model.other = layer(30)
    assert select_modules(model, budget=1).names == ["qkv.weight"]
    chosen = select_modules(model, budget=1, parts="blocks")
    assert chosen.names == ["other.weight"]
    exact = select_modules(model, budget=2, parts="blocks")
    assert exact.rows[1].score == pytest.approx(40)
    for certify in (True, False):  # a block is square, the whole is not
        shaped = select_modules(model, budget=2, parts="blocks", normalize="shape", certify=certify)
        assert shaped.rows[1].score == pytest.approx(40 / (3.67 * 4))
    report = spectral_report(model)
    with pytest.raises(ValueError, match="was made with parts='whole', not 'blocks'"):
        select_modules(report, parts="blocks")


def test_experts_count_by_their_worst_or_their_mean() -> None:
    def stack(*kappas: float) -> Tensor:
        return torch.stack([layer(kappa).weight.detach() for kappa in kappas])

    model = nn.Module()
    for name, kappas in (("a", (2, 10)), ("b", (7, 7))):
        holder = nn.Module()
        holder.experts = nn.Module()
        holder.experts.down_proj = nn.Parameter(stack(*kappas))
        setattr(model, name, holder)
    assert select_modules(model, budget=1).names == ["b.experts.down_proj"]
    assert select_modules(model, budget=1, experts="mean").names == ["a.experts.down_proj"]


def test_a_threshold_that_nothing_meets_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no condition_number is within .*the lowest is .*\(1\.weight\)"):
        select_modules(model_of(5, 4), budget={"threshold": 2.0})


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"by": "kappa"}, "by must be one of condition_number, .*got 'kappa'"),
        ({"normalize": "rank"}, "normalize must be None, 'shape' or 'type'"),
        ({"by": "random", "normalize": "shape"}, "has no meaning for random, which does not depend on shape"),
        ({"by": "spectrum_snr", "normalize": "shape"}, "which has no known expectation"),
        ({"parts": "heads"}, "parts must be 'whole' or 'blocks'"),
        ({"experts": "min"}, "experts must be 'max' or 'mean'"),
    ],
)
def test_arguments_are_checked(named: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_modules(model_of(2, 3), **named)


def test_a_report_has_no_gradients() -> None:
    with pytest.raises(ValueError, match="runs the model, and got a SpectralReport"):
        select_modules(spectral_report(model_of(2, 3)), by="fisher", data=[1], loss=lambda m, b: torch.zeros(()))
