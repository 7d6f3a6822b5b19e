from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_entropy.activation import CRReLU


def net(act: Callable[[], nn.Module] = CRReLU) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), act(), nn.Linear(8, 8), act(), nn.Linear(8, 2))


def written_out(x: Tensor, eps: Tensor) -> Tensor:
    return torch.relu(x) + eps * x * torch.exp(-x.square() / 2)


def test_it_is_the_formula_with_a_parameter_of_one_element() -> None:
    act = CRReLU(0.3)
    assert [(name, p.shape, p.dtype) for name, p in act.named_parameters()] == [("eps", (1,), torch.float32)]
    assert list(act.state_dict()) == ["eps"]
    x = torch.randn(3, 4, 5, requires_grad=True)
    torch.testing.assert_close(act(x), written_out(x, act.eps))
    got = torch.autograd.grad(act(x).sin().sum(), (x, act.eps))
    for a, b in zip(got, torch.autograd.grad(written_out(x, act.eps).sin().sum(), (x, act.eps)), strict=True):
        torch.testing.assert_close(a, b)
    assert act(torch.tensor(1.0)).shape == ()
    assert CRReLU(inplace=True)(x).shape == x.shape


def test_eps_learns_and_may_turn_negative() -> None:
    act = CRReLU()
    optimizer = torch.optim.Adam(act.parameters(), lr=0.01)
    x = torch.randn(200)
    for _ in range(30):
        optimizer.zero_grad()
        (act(x) - written_out(x, torch.tensor(-0.1))).square().mean().backward()
        optimizer.step()
    assert act.eps.item() == pytest.approx(-0.1, abs=0.03)


@pytest.mark.parametrize(("channel_dim", "shape"), [(-1, (2, 5, 3)), (1, (2, 3, 4, 4)), (-3, (2, 3, 4, 4))])
def test_one_eps_for_each_channel(channel_dim: int, shape: tuple[int, ...]) -> None:
    act = CRReLU(scope="channel", channels=3, channel_dim=channel_dim)
    with torch.no_grad():
        act.eps.copy_(torch.tensor([0.1, -0.4, 2.0]))
    x = torch.randn(shape)
    y = act(x)
    for c in range(3):
        torch.testing.assert_close(
            y.select(channel_dim, c), written_out(x.select(channel_dim, c), act.eps[c]), atol=1e-6, rtol=1e-5
        )
    y.sum().backward()
    others = [d for d in range(len(shape)) if d != channel_dim % len(shape)]
    torch.testing.assert_close(act.eps.grad, (x * torch.exp(-x.square() / 2)).sum(others))


def test_channels_taken_from_the_first_input() -> None:
    model = net(partial(CRReLU, 0.2, scope="channel"))
    assert isinstance(model[1].eps, UninitializedParameter)
    assert "from the first input" in repr(model)
    twin = copy.deepcopy(model)
    fresh = pickle.loads(pickle.dumps(model.state_dict()))
    twin.load_state_dict(fresh)  # no size on either side
    model(torch.randn(4, 6))
    assert model[1].eps.tolist() == pytest.approx([0.2] * 8)
    assert type(model[1].eps) is nn.Parameter
    twin.load_state_dict(model.state_dict())  # takes the size of the checkpoint
    assert torch.equal(twin(torch.ones(1, 6)), model(torch.ones(1, 6)))
    model.load_state_dict(fresh)  # a checkpoint from before the first input leaves eps as it is
    assert model[1].eps.shape == (8,)
    assert net(partial(CRReLU, scope="channel")).bfloat16()(torch.randn(1, 6).bfloat16()).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match=r"size mismatch for 1\.eps"):
        net(partial(CRReLU, scope="channel", channels=8)).load_state_dict(
            {**model.state_dict(), "1.eps": torch.zeros(5)}
        )


def test_one_eps_for_all() -> None:
    holder = CRReLU(0.3, scope="global")
    model = net(partial(CRReLU, scope="global", holder=holder))
    assert model[1].eps is model[3].eps is holder.eps
    assert sum(name.endswith("eps") for name, _ in model.named_parameters()) == 1
    assert [name for name in model.state_dict() if name.endswith("eps")] == ["1.eps", "3.eps"]
    x = torch.randn(5, 6)
    model(x).sum().backward()
    separate = net(partial(CRReLU, 0.3))
    separate(x).sum().backward()
    torch.testing.assert_close(holder.eps.grad, separate[1].eps.grad + separate[3].eps.grad)
    for changed in (copy.deepcopy(model), model.double(), model.float()):
        assert changed[1].eps is changed[3].eps
    assert CRReLU(scope="global").eps is not CRReLU(scope="global").eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_model_keeps_eps_wide(dtype: torch.dtype) -> None:
    act = CRReLU(0.01 + 2**-20, mu=0.1 + 2**-20, sigma=0.7)
    before = [t.clone() for t in (act.eps, act.mu, act.sigma)]
    model = nn.Sequential(nn.Linear(4, 4), act).to(dtype)
    assert model[0].weight.dtype == dtype
    for old, new in zip(before, (act.eps, act.mu, act.sigma), strict=True):
        assert new.dtype == torch.float32
        assert torch.equal(old, new)  # not rounded on the way
    y = model(torch.randn(2, 4, dtype=dtype))
    assert y.dtype == dtype
    y.sum().backward()
    assert act.eps.grad.dtype == torch.float32
    assert act.double().eps.dtype == torch.float64
    assert act.half().eps.dtype == torch.float32
    assert act.to("meta").eps.device.type == "meta"
    assert act.to_empty(device="cpu").eps.device.type == "cpu"


def test_small_steps_are_not_lost_in_bfloat16() -> None:
    act = CRReLU().bfloat16()
    optimizer = torch.optim.Adam(act.parameters(), lr=1e-5)
    act(torch.full((8,), 0.5, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert act.eps.item() == pytest.approx(0.01 - 1e-5, abs=1e-8)


@pytest.mark.parametrize("old", [nn.ReLU, nn.GELU])
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_of_the_old_activation_loads_strictly(old: Callable[[], nn.Module], assign: bool) -> None:
    model = net(partial(CRReLU, 0.25, mu=0.1))
    model.load_state_dict(net(old).state_dict(), strict=True, assign=assign)
    assert model[1].eps.item() == 0.25
    assert model[1].mu.item() == pytest.approx(0.1)
    lazy = net(partial(CRReLU, scope="channel"))
    lazy.load_state_dict(net(old).state_dict(), strict=True, assign=assign)
    assert isinstance(lazy[1].eps, UninitializedParameter)
    with pytest.raises(RuntimeError, match="Missing key"):
        net().load_state_dict({name: v for name, v in net().state_dict().items() if name != "0.weight"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        net().load_state_dict({**net().state_dict(), "1.other": torch.zeros(1)})


def test_the_checkpoints_of_others() -> None:
    state = net(nn.ReLU).state_dict()
    model = net()
    model.load_state_dict({**state, "1.lr": torch.tensor(0.5), "3.lr": torch.tensor(-0.25)})  # a scalar called lr
    assert [model[1].eps.tolist(), model[3].eps.tolist()] == [[0.5], [-0.25]]
    model.load_state_dict({**state, "1.eps": torch.tensor(0.125), "3.eps": torch.tensor([0.75])})
    assert [model[1].eps.tolist(), model[3].eps.tolist()] == [[0.125], [0.75]]
    half = {**state, "1.eps": torch.tensor([0.5]).bfloat16(), "3.eps": torch.tensor([0.25]).half()}
    model.load_state_dict(half, assign=True)
    assert model[1].eps.dtype == model[3].eps.dtype == torch.float32
    channels = net(partial(CRReLU, scope="channel", channels=8))
    channels.load_state_dict({**state, "1.eps": torch.tensor([0.5]), "3.eps": torch.arange(8.0)})
    assert channels[1].eps.tolist() == [0.5] * 8
    assert channels[3].eps.tolist() == list(range(8))


def test_a_calibrated_checkpoint_brings_its_bump() -> None:
    calibrated, plain = net(partial(CRReLU, mu=0.2, sigma=0.5)), net()
    assert [n for n in calibrated.state_dict() if n.startswith("1.")] == ["1.eps", "1.mu", "1.sigma"]
    plain.load_state_dict(calibrated.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(plain(x), calibrated(x))
    with pytest.raises(RuntimeError, match=r"Missing key.*1\.mu"):
        calibrated.load_state_dict(net().state_dict())


def test_copies_and_pickles() -> None:
    holder = CRReLU(0.4, scope="channel", channels=8, mu=0.1, sigma=0.5)
    model, x = nn.Sequential(nn.Linear(6, 8), holder), torch.randn(3, 6)
    expected = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), expected)
        assert twin[1].eps is not holder.eps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scope": "layer"}, "scope must be one of site, channel, global, got 'layer'"),
        ({"eps": float("nan")}, "eps must be finite, got nan"),
        ({"sigma": 0.0}, r"sigma must be finite and > 0, got \[0.0\]"),
        ({"mu": float("inf")}, "mu must be finite, got"),
        ({"channels": 3}, 'goes with scope="channel", got 3'),
        ({"channels": 0, "scope": "channel"}, "channels must be >= 1"),
        ({"holder": CRReLU()}, 'holder goes with scope="global"'),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CRReLU(**arguments)


def test_a_bump_for_each_channel_has_as_many_values() -> None:
    act = CRReLU(scope="channel", channels=3)
    act.set_bump(torch.zeros(3), 2.0)
    assert act(torch.randn(2, 3)).shape == (2, 3)
    with pytest.raises(ValueError, match="sigma must have 1 or 3 values, got 2"):
        act.set_bump(0.0, torch.ones(2))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"mu": 0.2, "sigma": 0.5},
    {"scope": "channel", "channels": 4, "channel_dim": 1},
    {"scope": "channel", "channels": 4, "channel_dim": 1, "mu": 0.1, "sigma": 2.0},
]


@pytest.mark.parametrize("arguments", SETTINGS, ids=lambda a: "-".join(a) or "plain")
def test_exports(arguments: dict[str, Any]) -> None:
    act = CRReLU(0.3, **arguments)
    x = torch.cat([torch.randn(2, 4, 5), torch.full((1, 4, 5), float("-inf")), torch.full((1, 4, 5), 7e4)])
    expected = act(x)
    exported = torch.export.export(act, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # scripting itself is deprecated
        scripted = torch.jit.script(act)
        traced = torch.jit.trace(act, x)
        buffer = io.BytesIO()
        torch.jit.save(scripted, buffer)
        buffer.seek(0)
        scripted = torch.jit.load(buffer)
    torch.testing.assert_close(scripted(x), expected)
    torch.testing.assert_close(traced(x[:1]), expected[:1])
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Identity(), act))
    assert torch.equal(graph(x), expected)
    assert [node.name for node in graph.graph.nodes if "relu" in node.name] == ["crrelu"]
    graph(x).sum().backward()
    assert act.eps.grad is not None


@pytest.mark.parametrize("arguments", SETTINGS, ids=lambda a: "-".join(a) or "plain")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    act = CRReLU(0.3, **arguments)
    x = torch.randn(2, 4, 5, dtype=dtype, requires_grad=True)
    torch.compiler.reset()  # its limit on recompilations is for all modules of a class
    compiled = torch.compile(act, fullgraph=True, backend="aot_eager" if arguments else "inductor")
    grad = torch.randn(2, 4, 5, dtype=dtype)
    got = torch.autograd.grad(compiled(x), (x, act.eps), grad)
    for a, b in zip(got, torch.autograd.grad(act(x), (x, act.eps), grad), strict=True):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert compiled(x).dtype == dtype
    extremes = torch.tensor([float("inf"), float("-inf"), 6e4, -6e4], dtype=dtype, requires_grad=True)
    if "scope" not in arguments:
        (slope,) = torch.autograd.grad(compiled(extremes).sum(), extremes)
        assert slope.tolist() == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("arguments", SETTINGS, ids=lambda a: "-".join(a) or "plain")
def test_onnx(arguments: dict[str, Any], dynamo: bool, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    if dynamo:
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    from onnx.reference import ReferenceEvaluator

    act, x = CRReLU(0.3, **arguments).eval(), torch.randn(2, 4, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(act, (x,), str(tmp_path / "act.onnx"), dynamo=dynamo, input_names=["x"])
    model = onnx.load(tmp_path / "act.onnx")
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    (got,) = ReferenceEvaluator(model).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), act(x), atol=1e-6, rtol=1e-5)


def test_gradient_checkpointing_and_two_uses() -> None:
    from torch.utils.checkpoint import checkpoint

    act, x = CRReLU(0.3), torch.randn(9, requires_grad=True)
    act(act(x)).sum().backward()
    assert act.eps.grad is not None
    expected, act.eps.grad = act.eps.grad.clone(), None
    checkpoint(lambda v: act(act(v)), x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(act.eps.grad, expected)


def test_timm_takes_it_as_a_layer() -> None:
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", act_layer=CRReLU, img_size=32, depth=2)
    resnet = timm.create_model("resnet18", act_layer=CRReLU)  # passes inplace=True
    for model in (vit, resnet):
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        eps = [p for name, p in model.named_parameters() if name.endswith(".eps")]
        assert eps
        assert all(p.grad is not None for p in eps)
    from timm.optim import param_groups_weight_decay

    groups = param_groups_weight_decay(vit, 0.05)
    undecayed = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert all(id(p) in undecayed for name, p in vit.named_parameters() if name.endswith(".eps"))


def test_a_subclass_of_tensor_takes_the_formula() -> None:
    class Marked(Tensor):
        pass

    x = torch.randn(5)
    y = CRReLU(0.3)(x.as_subclass(Marked))
    assert type(y) is Marked
    torch.testing.assert_close(y.as_subclass(Tensor), CRReLU(0.3)(x))
