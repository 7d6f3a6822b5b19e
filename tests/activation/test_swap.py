"""swap_activations: complete or named, and nothing else changes."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_entropy import CRReLU, swap_activations
from lightning_entropy.surgery import activation_trace


class Leaky(nn.Module):
    """An activation with one parameter, that equals ReLU at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return torch.where(x > 0, x, self.slope * x)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.use_second = True

    def middle(self, x):
        return torch.relu(self.two(x))

    def forward(self, x):
        x = F.relu(self.one(x), inplace=True)
        if self.use_second:
            x = checkpoint(self.middle, x, use_reentrant=False) if x.requires_grad else self.middle(x)
        return self.three(x).relu_()


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.two(self.act(self.one(x))) + x)


def helper(x):
    return F.relu(x)


class Helped(Repeated):
    def forward(self, x):
        return helper(self.one(x)) + self.act(x)


class InPlace(nn.Module):
    """Its skip connection sees what the activation wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.fc, self.plain = nn.ReLU(inplace=True), nn.Linear(6, 6), nn.ReLU()

    def forward(self, x):
        x = x + 0
        return self.plain(self.fc(self.act(x)) + x)


@pytest.fixture
def x():
    return torch.randn(4, 6)


def state(model):
    return [(n, type(m)) for n, m in model.named_modules()], {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("build", [Functional, Repeated, lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU())])
def test_equal_function_equal_output_and_undo_restores_everything(build, x):
    model = build()
    before, classes = model(x), state(model)
    report = swap_activations(model, old="relu", new=Leaky)
    assert torch.equal(model(x), before)
    assert {type(m) for _, m in model.named_modules() if isinstance(m, Leaky)} == {Leaky}
    assert report.added_parameters == len(report.swapped) == len(report.parameters())
    report.undo()
    report.undo()
    assert torch.equal(model(x), before)
    assert state(model)[0] == classes[0]
    assert list(state(model)[1]) == list(classes[1])
    assert report.parameters() == []


def test_calls_of_functions_get_parameters_of_their_own(x):
    model = Functional()
    report = swap_activations(model, old="relu", new=Leaky)
    assert [(s.name, s.old, s.order, s.calls, s.parameters) for s in report.swapped] == [
        ("relu_2", "F.relu", 0, 1, 1),
        ("relu", "torch.relu", 1, 1, 1),  # named in the order of the source
        ("relu_3", "x.relu_()", 2, 1, 1),
    ]
    assert sorted(k for k in model.state_dict() if "slope" in k) == ["relu.slope", "relu_2.slope", "relu_3.slope"]
    with torch.no_grad():
        for i, parameter in enumerate(report.parameters()):
            parameter.fill_(0.1 * (i + 1))
    expected = F.leaky_relu(model.one(x), 0.1)
    expected = F.leaky_relu(model.three(F.leaky_relu(model.two(expected), 0.2)), 0.3)
    assert torch.allclose(model(x), expected)


def test_without_columns_of_calls_the_same_is_swapped(x, monkeypatch):
    """As on Python 3.10, where only lines are known: calls of one module on one line share an activation then."""
    monkeypatch.setattr(activation_trace, "_call_of", lambda frame: (frame.f_lineno, (frame.f_lineno, None)))
    report = swap_activations(Functional(), old="relu", new=Leaky)
    assert [(s.old, s.calls) for s in report.swapped] == [("F.relu", 1), ("torch.relu", 1), ("x.relu_()", 1)]
    model = Repeated()
    before = model(x)
    assert [(s.name, s.calls) for s in swap_activations(model, old="relu", new=Leaky).swapped] == [("act", 2)]
    assert torch.equal(model(x), before)


def test_control_flow_stays(x):
    model = Functional()
    swap_activations(model, old="relu", new=Leaky)
    model.use_second = False
    assert torch.equal(model(x), F.relu(model.three(F.relu(model.one(x)))))


def test_checkpointed_recomputation_runs_the_new_activation(x):
    model = Functional()
    swap_activations(model, old="relu", new=lambda: nn.PReLU(init=0.3))
    x.requires_grad_()
    model(x).square().sum().backward()
    kept = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model(x.detach()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(kept[name], parameter.grad, atol=1e-6), name


def test_compiled_and_copied(x):
    model = Functional()
    swap_activations(model, old="relu", new=lambda: nn.PReLU(init=0.3))
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), expected, atol=1e-6)


def test_a_swap_after_compilation_is_seen(x):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    report = swap_activations(compiled, old="relu", new=nn.Identity)
    assert torch.allclose(compiled(x), model[0](x))
    report.undo()
    assert torch.allclose(compiled(x), F.relu(model[0](x)))


def test_one_module_called_at_two_lines_is_split_unless_shared(x):
    model = Repeated()
    report = swap_activations(model, old="relu", new=Leaky)
    assert [(s.name, s.calls) for s in report.swapped] == [("act", 1), ("act_2", 1)]
    report.undo()
    report = swap_activations(model, old="relu", new=Leaky, share=True)
    assert [(s.name, s.calls) for s in report.swapped] == [("act", 2)]
    assert "2 times" in report.swapped[0].note


def test_one_object_at_several_places(x):
    act = nn.ReLU()
    build = lambda: nn.Sequential(nn.Linear(6, 6), act, nn.Linear(6, 6), act)  # noqa: E731
    report = swap_activations(build(), old="relu", new=Leaky)
    assert [(s.name, s.order, s.parameters) for s in report.swapped] == [("1", 0, 1), ("3", 1, 1)]
    model = build()
    report = swap_activations(model, old="relu", new=Leaky, share=True)
    assert model[1] is model[3]
    assert [s.parameters for s in report.swapped] == [1, 0]
    assert report.added_parameters == 1


def test_a_loop_has_one_call_and_says_how_often_it_runs(x):
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = F.relu(layer(x))
            return x

    (record,) = swap_activations(Loop(), old="relu", new=Leaky).swapped
    assert record.calls == 3
    assert "3 times" in record.note


def test_a_helper_function_is_refused_by_name(x):
    report = swap_activations(Helped(), old="relu", new=Leaky)
    (refused,) = report.refused
    assert "the function helper calls it (test_swap.py:" in refused.reason
    assert refused.old == "relu"
    assert "1 refused" in str(report)
    assert [s.name for s in report.swapped] == ["act"]


def test_a_method_without_source_is_refused_by_name(x):
    scope = {"nn": nn, "F": F}
    exec("class Typed(nn.Module):\n  def forward(self, x):\n    return F.relu(x) + self.act(x)", scope)
    model = scope["Typed"]()
    model.act = nn.ReLU()
    report = swap_activations(model, old="relu", new=Leaky, example=x)
    assert [s.name for s in report.swapped] == ["act"]
    assert "the source of forward, which calls it (<string>:3), is not at hand" in report.refused[0].reason


def test_in_place_dependence_is_refused_by_name(x):
    model = InPlace()
    before = model(x)
    report = swap_activations(model, old="relu", new=Leaky)
    assert [(r.name, "differs when it does not overwrite" in r.reason) for r in report.refused] == [("act", True)]
    assert [s.name for s in report.swapped] == ["plain"]
    assert torch.equal(model(x), before)


def test_a_dropped_in_place_call_keeps_its_effect(x):
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            x = self.fc(x)
            x.relu_()
            F.gelu(x)
            return x

    model = Dropped()
    report = swap_activations(model, old=("relu", "gelu"), new=Leaky)
    assert [s.old for s in report.swapped] == ["x.relu_()"]
    assert "its result is not used" in report.refused[0].reason
    assert torch.equal(model(x), F.relu(model.fc(x)))


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.ReLU(), F.gelu])
def test_encoder_layers_run_the_new_activation_in_evaluation(activation):
    old = activation if isinstance(activation, str) else "gelu" if activation is F.gelu else "relu"
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=activation, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    tokens, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    report = swap_activations(model, old=old, new=nn.Hardswish)
    assert len(report.swapped) == 2
    slow = model.train()(tokens, src_key_padding_mask=mask)
    with torch.no_grad():
        fast = model.eval()(tokens, src_key_padding_mask=mask)
    assert torch.allclose(slow[~mask], fast[~mask], atol=1e-5)
    report.undo()
    assert model.layers[0].activation_relu_or_gelu == (1 if old == "relu" else 2)
    assert model.use_nested_tensor


def test_decoder_layers():
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2)
    assert len(swap_activations(model, old=nn.ReLU, new=Leaky).swapped) == 2


def test_scripted_parts_are_named_and_a_scripted_model_is_an_error():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    with pytest.raises(RuntimeError, match="scripted"):
        swap_activations(scripted, old="relu", new=Leaky)
    report = swap_activations(nn.Sequential(scripted, nn.ReLU()), old="relu", new=Leaky, example=torch.randn(2, 6))
    assert [s.name for s in report.swapped] == ["1"]
    assert any("script" in r.reason for r in report.refused)


def test_recurrent_layers_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.RNN(4, 4, nonlinearity="relu"))
    (refused,) = swap_activations(model, old="relu", new=Leaky).refused
    assert refused.reason == "it is part of RNN"


def test_gates_are_kept_unless_they_are_named():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.act, self.squeeze = nn.Linear(6, 6), nn.Linear(6, 6), nn.SiLU(), nn.Sigmoid()

        def forward(self, x):
            return torch.tanh(self.act(self.gate(x)) * self.up(x)) * self.squeeze(x) + F.relu(x)

    report = swap_activations(Gated(), new=Leaky)
    assert [s.old for s in report.swapped] == ["F.relu"]
    assert {(k.name, k.old) for k in report.kept} == {("act", "SiLU"), ("squeeze", "Sigmoid"), ("", "tanh")}
    report = swap_activations(Gated(), old="silu", new=Leaky)
    assert [(s.name, s.note) for s in report.swapped] == [("act", "scales another branch")]
    assert len(swap_activations(Gated(), old=("sigmoid", nn.Tanh), new=nn.Identity).swapped) == 2


def test_nothing_swapped_is_an_error_with_an_inventory():
    with pytest.raises(ValueError, match=r"swapped nothing in Sequential: no gelu(.|\n)*ReLU: 1 \(1\)"):
        swap_activations(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), old="gelu", new=Leaky)
    with pytest.raises(ValueError, match="no activation that is known"):
        swap_activations(nn.Linear(2, 2), new=Leaky)


def test_a_pattern_without_a_match_is_an_error():
    with pytest.raises(ValueError, match="matched 0 of"):
        swap_activations(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), old="relu", new=Leaky, modules="blocks.*")


def test_patterns_choose(x):
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    report = swap_activations(model, old="relu", new=Leaky, modules="1")
    assert [s.name for s in report.swapped] == ["1.1"]
    assert [(k.name, k.reason) for k in report.kept] == [("0.1", "outside modules=")]
    assert [s.name for s in swap_activations(model, old="relu", new=Leaky, modules=["0.*"]).swapped] == ["0.1"]


def test_twice_is_once(x):
    model = Functional()
    first = swap_activations(model, old="relu", new=Leaky)
    second = swap_activations(model, old="relu", new=Leaky)
    assert not second.swapped
    assert sorted(second.already) == sorted(s.name for s in first.swapped)
    assert "3 swapped before" in str(second)
    third = swap_activations(model, old=Leaky, new=nn.ReLU)
    assert len(third.swapped) == 3


def test_undone_in_any_order(x):
    class Two(nn.Module):
        def forward(self, x):
            return F.relu(x) + F.gelu(x)

    model = Two()
    first = swap_activations(model, old="relu", new=Leaky, example=x)
    second = swap_activations(model, old="gelu", new=Leaky, example=x)
    first.undo()
    assert list(model._modules) == ["gelu"]
    assert torch.equal(model(x), F.relu(x) + F.relu(x))
    second.undo()
    assert type(model) is Two


def test_old_as_class_settings_function_and_tuple():
    build = lambda: nn.Sequential(nn.GELU(), nn.GELU("tanh"), nn.ReLU6(), nn.Hardtanh(), nn.ReLU())  # noqa: E731
    names = lambda **k: [s.name for s in swap_activations(build(), example=torch.randn(3), **k).swapped]  # noqa: E731
    assert names(old=nn.GELU, new=Leaky) == ["0", "1"]
    assert names(old=nn.GELU("tanh"), new=Leaky) == ["1"]
    assert names(old=lambda: nn.GELU("tanh"), new=Leaky) == ["1"]
    assert names(old=nn.Hardtanh, new=Leaky) == ["3"]
    assert names(old=("gelu", nn.ReLU6), new=Leaky) == ["0", "1", "2"]
    with pytest.raises(ValueError, match="swapped nothing"):
        names(old=F.relu, new=Leaky)  # a function means calls
    model = build()
    swap_activations(model, old=("gelu", "relu"), new=(nn.SiLU, F.mish), example=torch.randn(3))
    assert isinstance(model[0], nn.SiLU)
    assert repr(model[4]) == "FunctionActivation(mish)"


@pytest.mark.parametrize(("old", "new", "error"), [
    ((), Leaky, "empty"), (("relu", "gelu"), (Leaky,), "same length"), (3, Leaky, "old must be"),
    ("relu", 3, "new must be"), ("relu", dict, "new must be"), ("relu", lambda: 3, "made int"),
    ("relu", "no_such", "no_such"), ("relu", "torch.nn.NoSuch", "cannot be imported"),
])  # fmt: skip
def test_arguments_are_refused(old, new, error):
    with pytest.raises((ValueError, TypeError), match=error):
        swap_activations(nn.Sequential(nn.ReLU()), old=old, new=new)


def test_mode_hooks_and_device_carry_over(x):
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Dropout()).eval()
    seen = []
    handle = model[1].register_forward_hook(lambda m, a, o: seen.append(type(m).__name__))
    swap_activations(model, old="relu", new=Leaky)
    assert not model[1].training
    seen.clear()
    model(x)
    assert seen == ["Leaky"]
    handle.remove()
    model(x)
    assert seen == ["Leaky"]


def test_the_dry_run_leaves_the_model_as_it_was(x):
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5)).train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    swap_activations(model, old="relu", new=nn.SiLU)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), drawn)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training
    assert not model[1].training
    assert all(p.grad is None for p in model.parameters())


def test_sites_that_do_not_run_are_named(x):
    class Sometimes(Functional):
        def forward(self, x):
            return torch.relu(x) if self.training else F.relu(self.one(x))

    notes = {s.old: s.note for s in swap_activations(Sometimes(), old="relu", new=Leaky).swapped}
    assert notes["F.relu"] == ""
    assert "did not run" in notes["torch.relu"]


def test_without_a_forward_the_report_says_so(x):
    report = swap_activations(Repeated(), old="relu", new=Leaky, example=False)
    assert [s.name for s in report.swapped] == ["act", "act_2"]
    assert report.swapped[0].calls is None
    assert "not run: example=False" in str(report)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(6, 6), nn.ReLU()

        def forward(self, x, y, z):
            return self.act(self.fc(x)) + y + z

    assert "pass example=" in swap_activations(Odd(), old="relu", new=Leaky).note
    report = swap_activations(Odd(), old="relu", new=Leaky, example={"x": x, "y": x, "z": x})
    assert report.swapped[0].calls == 1


def test_an_optimizer_that_exists_is_extended_or_the_call_refuses(x):
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(RuntimeError, match="AdamW holds parameters of Sequential"):
        swap_activations(model, old="relu", new=Leaky)
    assert isinstance(model[1], nn.ReLU)
    assert not swap_activations(model, old="relu", new=nn.SiLU).undo()  # nothing to train
    report = swap_activations(model, old="relu", new=Leaky, optimizer=optimizer)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    model(x).sum().backward()
    optimizer.step()
    assert model[1].slope != 0
    report.undo()
    assert [len(g["params"]) for g in optimizer.param_groups] == [4]


def test_a_scheduled_optimizer_is_extended_only_in_a_group_without_decay(x):
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(RuntimeError, match="scheduler"):
        swap_activations(model, old="relu", new=Leaky, optimizer=optimizer)
    assert isinstance(model[1], nn.ReLU)
    free = torch.optim.SGD([{"params": [model[0].weight]}, {"params": [model[0].bias], "weight_decay": 0}],
                           lr=0.1, weight_decay=0.1)  # fmt: skip
    del optimizer, scheduler
    scheduler = torch.optim.lr_scheduler.StepLR(free, 1)
    swap_activations(model, old="relu", new=Leaky, optimizer=[free])
    assert len(free.param_groups) == 2
    free.step()
    scheduler.step()


def test_groups_without_weight_decay_in_torch_timm_and_transformers(tmp_path):
    timm_optim = pytest.importorskip("timm.optim")
    transformers = pytest.importorskip("transformers")
    from lightning_entropy.training.weight_decay import without_weight_decay

    def decays(optimizer, parameters):
        ids = {id(p) for p in parameters}
        return {g["weight_decay"] for g in optimizer.param_groups if any(id(p) in ids for p in g["params"])}

    def swapped():
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
        return model, swap_activations(model, old="relu", new=Leaky)

    model, report = swapped()
    with without_weight_decay(report.parameters):
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    assert decays(optimizer, report.parameters()) == {0.0}
    model, report = swapped()
    optimizer = timm_optim.create_optimizer_v2(model, opt="adamw", weight_decay=0.1)
    assert decays(optimizer, report.parameters()) == {0.0}
    model, report = swapped()
    arguments = transformers.TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to=[])
    trainer = transformers.Trainer(model, args=arguments)
    with without_weight_decay(report.parameters):
        optimizer = trainer.create_optimizer()
    assert decays(optimizer, report.parameters()) == {0.0}
    assert decays(optimizer, [model[0].weight]) == {0.1}


@pytest.mark.parametrize("new", ["crrelu", CRReLU, CRReLU(), lambda: CRReLU(0.01), "lightning_entropy.CRReLU"])
def test_crrelu_by_name_class_module_factory_and_path(new, x):
    model = Functional()
    report = swap_activations(model, old="relu", new=new)
    assert [s.new for s in report.swapped] == ["CRReLU"] * 3
    assert len({id(p) for p in report.parameters()}) == 3
    model.bfloat16()
    assert model.relu.eps.dtype == torch.float32
    plain = Functional().state_dict()
    assert model.load_state_dict(plain, strict=True).missing_keys == []


def test_crrelu_of_zero_is_relu_to_the_bit(x):
    model = Functional()
    before = model(x)
    swap_activations(model, old="relu", new=lambda: CRReLU(0.0))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("new", [CRReLU(scope="global"), lambda: CRReLU(scope="global")])
def test_global_scope_is_one_parameter(new, x):
    model = Functional()
    report = swap_activations(model, old="relu", new=new)
    assert report.added_parameters == 1
    assert model.relu.eps is model.relu_3.eps
    again = Functional()
    assert swap_activations(again, old="relu", new=new).parameters()[0] is not model.relu.eps
    model(x).sum().backward()
    assert model.relu.eps.grad is not None


def test_channel_scope_takes_its_size_from_the_example(x):
    report = swap_activations(Functional(), old="relu", new=CRReLU(scope="channel"))
    assert report.added_parameters == 18
    report = swap_activations(Functional(), old="relu", new=CRReLU(scope="channel"), example=False)
    assert "run the model once before its optimizer is made" in report.note


def test_report(x):
    model = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(6, 6), nn.GELU())))
    report = swap_activations(model, old="gelu", new=Leaky)
    assert str(report) == "Leaky: 3 of 3 GELU swapped (*), +3 parameters; nothing refused"
    assert report.table().splitlines()[0].split() == ["order", "name", "old", "new", "parameters", "calls"]
    assert json.loads(report.to_json())["swapped"][0] == {
        "name": "1", "old": "GELU", "new": "Leaky", "parameters": 1, "order": 0, "calls": 1, "note": "",
    }  # fmt: skip
    assert str(pickle.loads(pickle.dumps(report))) == str(report)


def test_no_warning_and_no_gradient_left(x):
    model = Functional()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap_activations(model, old="relu", new=Leaky, example=x)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_lightning_module_without_a_trainer() -> None:
    from lightning.pytorch import LightningModule

    class Regression(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            self.log("loss", self.trainer.current_epoch)
            return self(batch).mean()

    report = swap_activations(Regression(), old="relu", new="crrelu")
    assert [record.name for record in report.swapped] == ["net.1"]
