from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_entropy.surgery import (
    CannotSplit,
    SplitBackbone,
    SplitReader,
    frozen_call,
    split_backbone,
    split_classifier,
)
from lightning_entropy.surgery.map_layout import MapLayout, layout_of

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")


class Net(nn.Module):
    """A user's network; ``kind`` says what stands between the last map and the logits."""

    def __init__(self, kind: str = "mean", norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.kind = kind
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), norm(6), nn.ReLU(inplace=True))
        self.tail = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), norm(8), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.norm = nn.LayerNorm(8)
        self.hidden = nn.Linear(8, 8)
        self.fc = nn.Linear(8 * 16 if kind == "flatten" else 8, 5)
        self.weigh = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        image, stem = x, self.stem(x)
        x = self.tail(stem)
        if self.kind == "function":
            x = F.relu(x - 0.1, inplace=True)
        if self.kind == "flatten":
            return self.fc(x.flatten(1))
        if self.kind == "attention":
            return self.fc((x.flatten(2) * self.weigh(x).flatten(2).softmax(-1)).sum(2))
        if self.kind == "skip":
            x = x + image.mean((1, 2, 3), keepdim=True)
        if self.kind == "residual":  # around the split module: computed from the features at the split alone
            x = x + F.pad(F.avg_pool2d(stem, 2), (0, 0, 0, 0, 0, 2))
        z = x.amax((2, 3)) if self.kind == "max" else x.mean((2, 3))
        if self.kind == "norm":
            z = self.norm(z)
        if self.kind == "mlp":
            z = self.hidden(z).relu()
        out = self.fc(z)
        if self.kind == "twice":
            out = out + self.fc(self.tail(stem).mean((2, 3)))
        return out * 2 if self.kind == "scaled" else out.log_softmax(1) if self.kind == "log" else out


def images(count: int = 2, side: int = 16) -> Tensor:
    return torch.randn(count, 3, side, side)


def check(split: SplitBackbone, x: Tensor, out: Tensor, seen: SplitReader) -> None:
    """Oracle 6, from the outside: what is read in the model's forward gives its logits."""
    live = seen.last_map(seen.passes[0])
    scale = out.abs().max()
    torch.testing.assert_close(split.class_map(live).mean((2, 3)), out, rtol=0, atol=float(1e-4 * scale))
    torch.testing.assert_close(split.logits(live), out, rtol=0, atol=float(1e-4 * scale))
    again = split.last_map(seen.passes[0].features, frozen=True)
    torch.testing.assert_close(split.class_map(again).mean((2, 3)), out, rtol=0, atol=float(1e-4 * scale))
    weights = torch.rand(len(x), 1, *live.shape[2:])
    wanted = (split.class_map(live) * weights).mean((2, 3))
    torch.testing.assert_close(split.logits(live, weights), wanted, rtol=0, atol=float(1e-4 * scale))


FAMILIES = [
    ("torchvision", "resnet18", "layer4", {}),
    ("torchvision", "regnet_y_400mf", "trunk_output.block4", {}),
    ("torchvision", "mobilenet_v2", "features.14", {}),
    ("torchvision", "efficientnet_b0", "features.6", {}),
    ("torchvision", "convnext_tiny", "features.7", {}),
    ("torchvision", "densenet121", "features.denseblock4", {}),
    ("torchvision", "inception_v3", "Mixed_7a", {"init_weights": False}),
    ("torchvision", "googlenet", "inception5a", {"init_weights": False}),
    ("torchvision", "squeezenet1_0", "features.11", {}),
    ("torchvision", "shufflenet_v2_x0_5", "stage4", {}),
    ("torchvision", "swin_t", "features.6", {}),
    ("timm", "resnet18", "layer4", {}),
    ("timm", "regnety_002", "s4", {}),
    ("timm", "mobilenetv2_050", "blocks.6", {}),
    ("timm", "convnext_atto", "stages.3", {}),
    ("timm", "densenet121", "features.denseblock4", {}),
    ("timm", "vit_tiny_patch16_224", "blocks.9", {"global_pool": "avg"}),
    ("timm", "vit_tiny_patch16_224", "blocks.9", {"global_pool": "avg", "class_token": False}),
    ("timm", "swin_tiny_patch4_window7_224", "layers.3", {}),
]


@pytest.mark.parametrize(("library", "name", "where", "options"), FAMILIES, ids=lambda v: str(v)[:28])
def test_families(library: str, name: str, where: str, options: dict) -> None:
    if library == "timm":
        model = timm.create_model(name, num_classes=7, **options)
    else:
        model = torchvision.models.get_model(name, weights=None, num_classes=7, **options)
    side = 224 if "vit" in name or "swin" in name else 139 if "inception" in name else 96
    model.train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    made, held = split_classifier(nn.ModuleDict({"net": model}), f"net.{where}", input_shape=(3, side, side))
    assert model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()), "the check moved a buffer"
    assert (held, made.classes) == ("net", 7)
    model.eval()
    x = images(1, side)
    with torch.no_grad(), SplitReader(made, always=True) as seen:
        out = model(x)
    with torch.no_grad():
        check(made, x, out, seen)


REFUSED = [
    ("flatten", "no map enters fc"),
    ("attention", "not given the mean of the last map: what lies between the two \\(weigh\\) does not commute"),
    ("skip", "a skip connection across the split"),
    ("max", "max pooling"),
    ("mlp", r"not given the mean of the last map: what lies between the two \(hidden\)"),
    ("twice", "tail runs 2 times"),
    ("scaled", "something follows fc"),
]


@pytest.mark.parametrize(("kind", "reason"), REFUSED)
def test_refusals_give_the_reason(kind: str, reason: str) -> None:
    model = Net(kind)
    with pytest.raises(CannotSplit, match=reason):
        split_backbone(model, "tail", classifier="fc", example=images())
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", ["mean", "norm", "function", "log", "residual"])
def test_a_users_own(kind: str) -> None:
    torch.manual_seed(0)
    model = Net(kind)
    made = split_backbone(model, "tail", classifier="fc", example=images())
    model.eval()
    with torch.no_grad(), SplitReader(made, always=True) as seen:
        out = model(images())
    live = seen.last_map(seen.passes[0])
    scores = made.class_map(live).mean((2, 3))
    torch.testing.assert_close(scores.log_softmax(1) if kind == "log" else scores, out)


def test_refusals_in_libraries() -> None:
    for model, where, reason in [
        (timm.create_model("vit_tiny_patch16_224"), "blocks.9", "class token"),
        (timm.create_model("resnet18", global_pool="max"), "layer4", "max pooling"),
        (torchvision.models.mobilenet_v3_small(), "features.10", "between the pool and the classifier"),
        (torchvision.models.alexnet(), "features.8", "a flattened map"),
        (torchvision.models.resnet18(), "layer4.0.conv2", "a skip connection"),
        (torchvision.models.resnet18(), "fc", "are no map"),
        (torchvision.models.resnet18(), "avgpool", "nothing lies between"),
    ]:
        with pytest.raises(CannotSplit, match=reason):
            split_classifier(model, where, input_shape=(3, 224, 224))


def test_names_and_images() -> None:
    holder = nn.ModuleDict({"net": Net()})
    with pytest.raises(
        ValueError, match=r"split='net.tial' names none of the 14 modules of ModuleDict. Closest names: net.tail"
    ):
        split_classifier(holder, "net.tial")
    with pytest.raises(ValueError, match=r"classifier='net\.fx' names none"):
        split_classifier(holder, "net.tail", classifier="net.fx")
    with pytest.raises(CannotSplit, match=r"(?s)could be run on images.*expected input"):
        split_classifier(holder, "net.tail", input_shape=(4, 16, 16))
    made, name = split_classifier(nn.ModuleDict({"net": torch.compile(Net())}), "net.tail", classifier="net.fc")
    assert made.split == "tail"
    assert name in ("net", "net._orig_mod")


def test_a_forward_that_cannot_be_traced() -> None:
    class Branching(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else super().forward(-x)

    with pytest.raises(CannotSplit, match=r"forward of Branching cannot be traced by torch.fx \(TraceError"):
        split_backbone(Branching(), "tail", classifier="fc", example=images())


# The frozen call.


def test_a_frozen_call_equals_a_deep_copy_and_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = Net().double().tail[:3].train()
    x = torch.randn(4, 6, 8, 8, dtype=torch.float64, requires_grad=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    addresses = [p.data_ptr() for p in model.parameters()]
    out = frozen_call(model, x)
    out.square().sum().backward()
    got, x.grad = x.grad, None
    twin = copy.deepcopy(model).requires_grad_(False)
    wanted = twin(x)
    wanted.square().sum().backward()
    assert torch.equal(out, wanted)
    assert torch.equal(got, x.grad)
    assert all(p.grad is None for p in model.parameters())
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not torch.equal(twin[1].running_mean, model[1].running_mean), "the deep copy did move its own"


def test_a_frozen_call_in_eval_mode_uses_running_statistics() -> None:
    norm = nn.BatchNorm2d(3).train()
    norm.running_mean.fill_(2.0)
    x = torch.randn(1, 3, 1, 1)  # one number a channel: statistics of the batch do not exist
    out = frozen_call(norm, x, batch_norm="eval")
    torch.testing.assert_close(out, (x - 2) / (1 + norm.eps) ** 0.5)
    assert norm.training
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        frozen_call(norm, x)
    with pytest.raises(ValueError, match="batch_norm must be 'batch' or 'eval', got 'train'"):
        frozen_call(norm, x, batch_norm="train")
    assert norm.training


def test_a_frozen_call_keeps_old_weight_norm_and_hides_from_readers() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = nn.utils.weight_norm(nn.Linear(3, 3))
    model = nn.Sequential(nn.Linear(3, 3), layer)
    made_of = []
    from lightning_entropy.observe.interception import Handles

    handles = Handles()
    handles.before(model[0], lambda m, args, kwargs: made_of.append("reader"))
    model[0].register_forward_hook(lambda m, args, out: made_of.append("user"))
    x = torch.randn(2, 3)
    torch.testing.assert_close(frozen_call(model, x), layer(model[0](x)))
    assert made_of == ["user", "reader", "user"]
    assert isinstance(layer.weight, Tensor)
    assert layer.weight.requires_grad


# Oracle 7: one batch of both.


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda width: nn.GroupNorm(2, width)])
def test_one_batch_of_both_equals_two_calls(norm) -> None:
    model = Net(norm=norm).double()
    made = split_backbone(model, "tail", classifier="fc", example=images().double())
    features, masked = torch.randn(2, 3, 6, 8, 8, dtype=torch.float64)
    if norm is nn.BatchNorm2d:
        with pytest.raises(ValueError, match="1 batch normalisations of the tail"):
            made.class_maps_of_both(features, masked)
    model.eval()
    both = made.class_maps_of_both(features, masked)
    for got, given in zip(both, (features, masked)):
        torch.testing.assert_close(got, made.class_map(made.last_map(given)))


def test_layouts() -> None:
    for layout, shape in [
        (MapLayout("channels first"), (2, 5, 4, 4)),
        (MapLayout("channels last"), (2, 4, 4, 5)),
        (MapLayout("tokens", 0), (2, 16, 5)),
        (MapLayout("tokens", 3), (2, 19, 5)),
    ]:
        x = torch.randn(shape)
        assert layout_of(x, channels=5) == layout
        assert layout.to_map(x).shape == (2, 5, 4, 4)
        torch.testing.assert_close(layout.from_map(layout.to_map(x), x), x)
    # As many channels as rows, of images that are not square.
    assert layout_of(torch.zeros(2, 8, 8, 10), aspect=16 / 20) == MapLayout("channels first")
    assert layout_of(torch.zeros(2, 8, 10, 10), aspect=16 / 20) == MapLayout("channels last")
    assert layout_of(torch.zeros(2, 5, 1, 1), channels=5) is None
    assert layout_of(torch.zeros(2, 5)) is None
    assert layout_of("text") is None
    with pytest.raises(ValueError, match="do not form a square"):
        MapLayout("tokens").to_map(torch.zeros(1, 15, 2))
