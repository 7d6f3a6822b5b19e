from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_entropy.observe import AttentionReader, AttentionRecord, read_attention
from lightning_entropy.observe.selection import instance_counts
from tests.user_modules import BagPool


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BagPool(6, branches=2)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax(self.head(self.pool(x, mask)), -1)


def example() -> tuple[Tensor, Tensor]:
    mask = torch.arange(9) < torch.tensor([9, 4, 6])[:, None]
    return torch.randn(3, 9, 6), mask


def test_one_forward_is_read_exactly() -> None:
    net, (x, mask) = Net(), example()
    plain = net(x, mask)
    output, records = read_attention(net, x, mask)
    assert torch.equal(output, plain)
    (record,) = records
    assert (record.module, record.source, record.axis) == ("pool", "softmax", 1)
    assert record.before_dropout
    assert record.logits.shape == (3, 2, 9)
    expected = net.pool.score(x).masked_fill(~mask[..., None], -torch.inf).softmax(1).transpose(1, 2)
    torch.testing.assert_close(record.weights(), expected)
    h = -(expected * expected.clamp(min=1e-45).log()).sum(-1)
    torch.testing.assert_close(record.entropy(), h)
    torch.testing.assert_close(record.entropy(normalize=True), h / mask.sum(1)[:, None].log())
    assert record.rows == 6


def test_nothing_stays_on_the_module() -> None:
    net, (x, mask) = Net(), example()
    read_attention(net, x, mask)
    for module in net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert torch._C._len_torch_function_stack() == 0


def test_an_exception_inside_the_forward_unwinds_the_mode() -> None:
    net, (x, mask) = Net(), example()
    with pytest.raises(RuntimeError), AttentionReader(net) as reader:
        net(x, mask[:, :3])
    assert torch._C._len_torch_function_stack() == 0
    assert not net.pool._forward_hooks
    assert reader.sites is None


def test_after_the_first_forward_only_the_chosen_module_is_hooked() -> None:
    net, (x, mask) = Net(), example()
    reader = AttentionReader(net)
    reader.attach()
    for _ in range(3):
        reader.start({"x": x, "mask": mask})
        net(x, mask)
        reader.stop()
        assert len(reader.records) == 1
        assert reader.records[0].logits.requires_grad
    assert net.pool._forward_hooks
    assert not net.head._forward_hooks
    assert not net.pool.score._forward_hooks
    reader.detach()
    reader.detach()
    assert not net.pool._forward_hooks


def test_a_caught_exception_leaves_reading_intact() -> None:
    """A training step that survives an out-of-memory error in one forward goes on being read."""
    net, (x, mask) = Net(), example()
    reader = AttentionReader(net)
    reader.attach()
    reader.start([x, mask])
    net(x, mask)
    assert len(reader.records) == 1
    reader.start([x, mask])
    with pytest.raises(RuntimeError):
        net(x, mask[:, :3])
    net(x, mask)
    reader.stop()
    assert len(reader.records) == 1
    assert torch._C._len_torch_function_stack() == 0
    reader.detach()


def test_two_readers_on_one_module() -> None:
    net, (x, mask) = Net(), example()
    readers = [AttentionReader(net), AttentionReader(net, "pool")]
    for reader in readers:
        reader.attach()
    for _ in range(3):
        for reader in readers:
            reader.start([x, mask])
        net(x, mask)
        for reader in reversed(readers):
            reader.stop()
        assert [len(r.records) for r in readers] == [1, 1]
    assert torch._C._len_torch_function_stack() == 0


def test_copies_of_the_module_are_not_read() -> None:
    net, (x, mask) = Net(), example()
    reader = AttentionReader(net)
    reader.attach()
    for clone in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        reader.start([x, mask])
        clone(x, mask)
        assert not [c for c in reader._calls if c.site]
        reader.stop()
    reader.detach()


@pytest.mark.parametrize("fill", [-torch.inf, torch.finfo(torch.float32).min, -1e9])
def test_every_way_of_masking_counts_as_masked(fill: float) -> None:
    logits = torch.tensor([[1.0, 2.0, fill, 1e4, -1e4]])
    record = AttentionRecord.from_logits(logits)
    assert record.mask.tolist() == [[True, True, False, True, True]]
    half = AttentionRecord.from_logits(torch.tensor([[1.0, torch.finfo(torch.float16).min]]).half())
    assert half.mask.tolist() == [[True, False]]


@pytest.mark.parametrize(
    "call",
    [
        lambda s: torch.softmax(s, 1),
        lambda s: s.softmax(dim=1),
        lambda s: nn.functional.softmax(s, dim=1, dtype=torch.float32),
        lambda s: torch.special.softmax(s, 1),
        lambda s: nn.Softmax(dim=1)(s),
        lambda s: nn.functional.softmax(input=s, dim=1),
    ],
    ids=["torch", "method", "functional", "special", "module", "keywords"],
)
def test_every_spelling_of_softmax(call) -> None:
    class Spelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return (call(self.score(x)) * x).sum(1)

    _, records = read_attention(Spelled(), torch.randn(2, 7, 6))
    assert [r.logits.shape for r in records] == [(2, 1, 7)]


class Pooling(nn.Module):
    """MultiheadAttention as pooling, in any of the ways it can be called."""

    def __init__(self, batch_first: bool = True, **options) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.query = nn.Parameter(torch.randn(1, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)

    def forward(self, x: Tensor, padding: Tensor | None = None, weights: bool = False):
        q = self.query.expand(len(x), -1, -1)
        if not self.batch_first:
            x, q = x.transpose(0, 1), q.transpose(0, 1)
        return self.attention(q, x, x, padding, need_weights=weights, average_attn_weights=False)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"bias": False}, {"dropout": 0.5}])
def test_multihead_attention_is_read_in_all_its_paths(train: bool, options: dict) -> None:
    net = Pooling(**options).train(train)
    x = torch.randn(3, 10, 8)
    padding = torch.arange(10) >= torch.tensor([10, 4, 7])[:, None]
    _, records = read_attention(net, x, padding)
    assert [r.source for r in records] == ["multi_head_attention"]
    expected = net.eval()(x, padding, weights=True)[1]
    torch.testing.assert_close(records[0].weights(), expected, rtol=1e-4, atol=1e-6)


def test_extra_keys_are_no_instances() -> None:
    net = Pooling(add_zero_attn=True)
    with pytest.raises(ValueError, match="extra keys"):
        read_attention(net, torch.randn(2, 10, 8))


def test_self_attention_is_not_held_and_not_chosen() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).train()
    reader = AttentionReader(layer)
    with pytest.raises(ValueError, match=r"self-attention over 10 x 10 pairs"), reader:
        layer(torch.randn(2, 10, 8))
    assert all(call.logits is None for call in reader._calls)


def test_a_model_without_attention_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"(?s)No softmax.*pass modules=function\(outputs, batch\)"):
        read_attention(nn.Sequential(nn.Linear(6, 2)), torch.randn(4, 6), modules="0")


def test_instance_counts_of_common_batches() -> None:
    x = torch.zeros(2, 50, 7)
    assert instance_counts({"features": x, "mask": torch.ones(2, 50, dtype=torch.bool), "y": torch.zeros(2)}) == {50}
    assert instance_counts([torch.zeros(31, 7), torch.zeros(44, 7)]) == {31, 44}
    assert instance_counts(torch.zeros(12, 3, 28, 28)) == {12}
    assert instance_counts((torch.zeros(1, 9, 3, 28, 28), 3)) == {9}
    assert instance_counts(None, "text", 4) == set()

    class Graph:
        def __init__(self) -> None:
            self.x = torch.zeros(17, 4)

    assert instance_counts(Graph()) == {17}


def test_function_must_return_attention() -> None:
    net, (x, mask) = Net(), example()
    _, records = read_attention(net, x, mask, modules=lambda outputs, batch: [outputs["pool"]])
    assert records[0].source == "function"
    with pytest.raises(TypeError, match="must return logits, an AttentionRecord, or a list of these, got NoneType"):
        read_attention(net, x, mask, modules=lambda outputs, batch: None)


def test_compiled_forward_is_read_without_graph_breaks() -> None:
    torch._dynamo.reset()
    net, (x, mask) = Net(), example()
    reader = AttentionReader(net)
    reader.attach()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        reader.start([x, mask])
        compiled(x, mask)
        reader.stop()
        (record,) = reader.records
        expected = net.pool.score(x).masked_fill(~mask[..., None], -torch.inf).softmax(1).transpose(1, 2)
        torch.testing.assert_close(record.weights(), expected)
    reader.detach()


def test_attention_in_the_step_is_told_from_a_softmax_elsewhere() -> None:
    class Inner(nn.Module):
        def forward(self, s: Tensor) -> Tensor:
            return torch.softmax(s, 1)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.inner = nn.Linear(6, 1), Inner()

        def forward(self, x: Tensor) -> Tensor:
            self.inner(torch.zeros(2, 3, 1))  # the same operation over something else
            return (torch.softmax(self.score(x), 1) * x).sum(1)

    net, x = Outer(), torch.randn(2, 7, 6)
    reader = AttentionReader(net)
    reader.attach()
    for _ in range(3):
        reader.start(x)
        net(x)
        net(x)
        reader.stop()
        assert [r.instances for r in reader.records] == [7, 7]
    reader.detach()


def test_two_forwards_before_a_backward_are_both_read() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.head = nn.Linear(6, 1), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            a = torch.softmax(self.score(x).T, dim=1)
            return torch.softmax(self.head(a @ x), dim=1)

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Both()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.net(x.flip(0))

    holder, x = Holder(), torch.randn(7, 6)
    reader = AttentionReader(holder)
    reader.attach()
    for _ in range(3):
        reader.start(x)
        holder(x)
        reader.stop()
        assert [r.instances for r in reader.records] == [7, 7]
    reader.detach()


def test_attention_called_by_keywords() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 1, 6))

        def forward(self, x: Tensor) -> Tensor:
            q = self.query.expand(len(x), -1, -1)
            return nn.functional.scaled_dot_product_attention(query=q, value=x, key=x, scale=0.5)

    model, x = Keywords(), torch.randn(2, 7, 6)
    _, (record,) = read_attention(model, x)
    expected = (0.5 * model.query @ x.transpose(1, 2)).softmax(-1)
    torch.testing.assert_close(record.weights(), expected)
