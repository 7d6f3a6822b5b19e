from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_entropy.localization import class_maps
from lightning_entropy.surgery import split_classifier
from tests.localization.user_modules import ImageClassifier, SmallNet

METHODS = ("cam", "cam_mean", "grad_cam", "layer_cam")


def small(norm: str = "batch", dtype: torch.dtype = torch.float64) -> tuple[SmallNet, Tensor, Tensor]:
    torch.manual_seed(3)
    net = SmallNet(0.5, norm=norm).to(dtype)
    images = torch.randn(4, 3, 16, 20, dtype=dtype)
    net(images)  # so that batch normalisation has statistics
    return net, images, torch.tensor([2, 0, 1, 1])


def last_map(net: SmallNet, images: Tensor) -> Tensor:
    net.eval()
    with torch.no_grad():
        return net.stage3(net.stage2(net.stage1(images)))


def test_cam_is_the_classifier_at_every_position() -> None:
    net, images, labels = small()
    maps = class_maps(net, images, labels, method="cam", split="stage3")
    a = last_map(net, images)
    expected = torch.stack(
        [net.fc.bias[y] + sum(net.fc.weight[y, k] * f[k] for k in range(12)) for f, y in zip(a, labels)]
    )
    assert maps.shape == (4, 1, 4, 5)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps[:, 0].double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        maps.mean((1, 2, 3)).double(), net(images).gather(1, labels[:, None])[:, 0], atol=1e-6, rtol=1e-6
    )
    every = torch.arange(3).expand(4, 3)
    all_maps = class_maps(net, images, every, method="cam", split="stage3")
    torch.testing.assert_close(
        class_maps(net, images, labels, method="cam_mean", split="stage3"), all_maps.mean(1, keepdim=True)
    )
    assert torch.equal(all_maps[torch.arange(4), labels], maps[:, 0])


@pytest.mark.parametrize("method", ["cam", "grad_cam", "layer_cam"])
def test_without_labels_it_is_the_mean_over_the_likeliest(method: str) -> None:
    net, images, _ = small()
    net.eval()
    top = net(images).topk(2, 1).indices
    each = class_maps(net, images, top, method=method, split="stage3")
    torch.testing.assert_close(
        class_maps(net, images, method=method, split="stage3", top_k=2), each.mean(1, keepdim=True)
    )
    torch.testing.assert_close(class_maps(net, images, method=method, split="stage3"), each[:, :1])


@pytest.mark.parametrize("layer", ["stage1", "stage2"])
@pytest.mark.parametrize("method", ["grad_cam", "layer_cam"])
def test_gradients_are_those_of_finite_differences(method: str, layer: str) -> None:
    """Each activation of the layer is moved by itself, in float64."""
    net, images, _ = small()
    images = images[:1]
    maps = class_maps(net, images, torch.tensor([[0, 1, 2]]), method=method, layer=layer)
    net.eval()
    parts = [net.stage1, net.stage2, net.stage3]
    at = {"stage1": 1, "stage2": 2}[layer]
    with torch.no_grad():
        a = images
        for part in parts[:at]:
            a = part(a)

        def scores(x: Tensor) -> Tensor:
            for part in parts[at:]:
                x = part(x)
            return net.fc(x.mean((2, 3)))

        moved = torch.eye(a.numel(), dtype=a.dtype).view(-1, *a.shape[1:]) * 1e-5
        gradient = ((scores(a + moved) - scores(a - moved)) / 2e-5).T.reshape(3, *a.shape[1:])
        weight = gradient.mean((2, 3), keepdim=True) if method == "grad_cam" else gradient.clamp(min=0)
        expected = (weight * a).sum(1).clamp(min=0)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(maps[0].double(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("layer", ["layer3", "layer4", "layer3.1.bn2"])
def test_grad_cam_is_that_of_captum(layer: str) -> None:
    attr = pytest.importorskip("captum.attr")
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net, images, labels = resnet18(num_classes=6), torch.randn(3, 3, 64, 64), torch.tensor([5, 0, 2])
    net(images)
    net.eval()
    maps = class_maps(net, images, labels, method="grad_cam", layer=layer)
    expected = attr.LayerGradCam(net, net.get_submodule(layer)).attribute(images, labels, relu_attributions=True)
    torch.testing.assert_close(maps, expected.detach(), atol=1e-6, rtol=1e-5)


def test_grad_cam_at_the_last_map_is_cam_without_bias_and_negatives() -> None:
    net, images, labels = small()
    cam = class_maps(net, images, labels, method="cam", split="stage3")
    grad = class_maps(net, images, labels, method="grad_cam", split="stage3")
    bias = net.fc.bias.detach()[labels].view(4, 1, 1, 1).float()
    torch.testing.assert_close(grad, (cam - bias).relu() / 20)
    torch.testing.assert_close(class_maps(net, images, labels, method="grad_cam", layer="stage3"), grad)
    torch.testing.assert_close(
        class_maps(net, images, labels, method="layer_cam", layer="stage3"),
        class_maps(net, images, labels, method="layer_cam", split="stage3"),
    )


@pytest.mark.parametrize("method", METHODS)
def test_an_image_has_its_map_whatever_it_is_batched_with(method: str) -> None:
    net, images, labels = small()
    together = class_maps(net, images, labels, method=method, split="stage2")
    alone = [class_maps(net, images[i : i + 1], labels[i : i + 1], method=method, split="stage2") for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone))


def state(net: nn.Module) -> tuple:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules()]
    modes = [m.training for m in net.modules()]
    frozen = [p.requires_grad for p in net.parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    return hooks, modes, frozen, grads, {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_model_is_as_it_was(method: str, mode: type) -> None:
    where = "layer" if method == "layer_cam" else "split"
    net, images, labels = small()
    net.train()
    net.stage1.eval()
    net.stage2.requires_grad_(False)
    F.cross_entropy(net(images), labels).backward()
    before = state(net)
    expected = class_maps(net, images, labels, method=method, **{where: "stage3"})
    with mode():
        given = images * 1, labels * 1  # made there, as a loader's batch is
        maps = class_maps(net, *given, method=method, **{where: "stage3"})
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    after = state(net)
    assert torch.equal(maps, expected)
    assert not maps.requires_grad
    assert before[:3] == after[:3]
    assert all(a is b or torch.equal(a, b) for a, b in zip(before[3], after[3]))
    assert all(torch.equal(a, b) for a, b in zip(before[4].values(), after[4].values()))
    assert torch.equal(before[5], after[5])
    net(images)  # still usable after inference mode


@pytest.mark.parametrize("shape", [(2, 8, 8, 10), (2, 8, 10, 10), (2, 10, 8, 8)])
def test_which_axes_are_the_image_is_told_from_its_sides(shape: tuple) -> None:
    """Channels may be as many as rows."""
    net = nn.Sequential(nn.Conv2d(3, shape[1], 1), nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.randn(2, 3, *shape[2:])
    assert class_maps(net, images, method="layer_cam", layer="0").shape[2:] == shape[2:]


def test_a_split_made_once_gives_the_same() -> None:
    net, images, labels = small()
    made, _ = split_classifier(net, "stage3", input_shape=(3, 16, 20))
    for method in METHODS:
        maps = class_maps(net, images, labels, method=method, split="stage3")
        assert torch.equal(class_maps(net, images, labels, method=method, split=made), maps)


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_classifier(whole: bool) -> None:
    """Compiled before the maps are asked for, so that its code knows nothing of hooks."""
    net, images, labels = small("group")
    plain = {m: class_maps(net, images, labels, method=m, split="stage3") for m in METHODS}
    finer = class_maps(net, images, labels, method="layer_cam", layer="stage2")
    if whole:
        compiled: nn.Module = torch.compile(net, backend="eager")
        prefix = ""
    else:
        compiled, prefix = nn.Sequential(torch.compile(net, backend="eager")), "0."
    compiled.eval()
    before = compiled(images)
    for method in METHODS:
        torch.testing.assert_close(
            class_maps(compiled, images, labels, method=method, split=f"{prefix}stage3"), plain[method]
        )
    torch.testing.assert_close(class_maps(compiled, images, labels, method="layer_cam", layer=f"{prefix}stage2"), finer)
    assert torch.equal(compiled(images), before)


def test_a_lightning_module_without_forward() -> None:
    module = ImageClassifier()
    images, labels = torch.randn(2, 3, 12, 12), torch.tensor([0, 2])
    maps = class_maps(module, images, labels, split="pool.stage3")
    assert torch.equal(maps, class_maps(module.pool, images, labels, split="stage3"))


def test_a_lightning_module_whose_forward_prepares_the_images() -> None:
    class Prepared(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = SmallNet(0.0)

        def forward(self, images: Tensor) -> Tensor:
            return self.net(images - 0.5)

    torch.manual_seed(0)
    module, images, labels = Prepared(), torch.rand(2, 3, 12, 12), torch.tensor([0, 2])
    for method in METHODS:
        maps = class_maps(module, images, labels, method=method, split="net.stage3")
        torch.testing.assert_close(maps, class_maps(module.net, images - 0.5, labels, method=method, split="stage3"))


def test_what_follows_the_layer_may_work_in_place() -> None:
    torch.manual_seed(0)
    parts = [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    ]
    net, images = nn.Sequential(*parts), torch.randn(2, 3, 6, 6)
    before = net[0](images).detach()
    maps = class_maps(net, images, torch.tensor([0, 1]), method="layer_cam", layer="0")
    weight = net[4].weight.detach()[:, :, None, None] / 36
    expected = (((before > 0) * weight[:, :]).relu() * before).sum(1, keepdim=True).relu()
    torch.testing.assert_close(maps, expected)


def test_a_transformer_gives_the_map_of_its_patches() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=64, depth=3, global_pool="avg")
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([4, 1])
    net.eval()
    cam = class_maps(net, images, labels, split="blocks.2")
    torch.testing.assert_close(cam.mean((1, 2, 3)), net(images).gather(1, labels[:, None])[:, 0], atol=1e-4, rtol=1e-3)
    for method in ("grad_cam", "layer_cam"):
        maps = class_maps(net, images, labels, method=method, layer="blocks.1")
        assert maps.shape == (2, 1, 4, 4)
        assert maps.min() >= 0
        assert maps.max() > 0


def test_a_classifier_that_cannot_be_split_has_grad_cam() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 3))
    images = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="no map"):
        class_maps(net, images, split="1")
    assert class_maps(net, images, method="grad_cam", layer="1").shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "score_cam", "split": "stage3"}, "method must be one of cam, cam_mean, grad_cam, layer_cam"),
        ({"split": "stage3", "top_k": 0}, "top_k must be at least 1, got 0"),
        ({"method": "cam"}, "needs split="),
        ({"method": "grad_cam"}, "needs either layer="),
        ({"method": "grad_cam", "layer": "stage3", "split": "stage3"}, "needs either layer="),
        ({"method": "grad_cam", "layer": "stag"}, r"layer='stag' names no module of SmallNet. Modules: stage1, stage2"),
        ({"method": "grad_cam", "layer": "fc"}, "is no map"),
        ({"split": "stage3", "labels": torch.tensor([0, 1, 2])}, r"labels must be \(4,\) or \(4, n\), got \(3,\)"),
        ({"split": "stage3", "labels": torch.tensor([0, 1, 2, 3])}, "labels must be 0 to 2, got 0 to 3"),
        ({"method": "layer_cam", "layer": "stage1", "labels": torch.full((4,), -1)}, "labels must be 0 to 2, got -1"),
    ],
)
def test_what_it_refuses(options: dict, message: str) -> None:
    net, images, labels = small()
    with pytest.raises(ValueError, match=message):
        class_maps(net, images, options.pop("labels", labels), **options)
    with pytest.raises(ValueError, match="images must be floating point"):
        class_maps(net, images[0], labels, split="stage3")
