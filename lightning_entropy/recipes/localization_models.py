"""Image classifiers by name that background activation suppression can split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_entropy.extras import require

SMALL = "small_bn_cnn"
_HEADS = ("fc", "classifier", "head", "heads")  # torchvision's names of what gives the logits


class SmallCNN(nn.Module):
    """Convolutions with batch normalisation, an average pool and a linear layer: enough for small images.

    Every stage but the last halves the resolution; ``stages.N``, the last one, is where it is split.

    Args:
        in_channels: of the images.
        classes: number of classes.
        widths: channels of the stages.
        depth: convolutions of a stage.

    Raises:
        ValueError: if there are fewer than two stages, or no convolution.

    Example:
        >>> net = SmallCNN(3, 4)
        >>> net(torch.zeros(2, 3, 64, 64)).shape, net.split
        (torch.Size([2, 4]), 'stages.2')
    """

    def __init__(self, in_channels: int, classes: int, *, widths: Sequence[int] = (32, 48, 96), depth: int = 2) -> None:
        super().__init__()
        if len(widths) < 2 or depth < 1:
            raise ValueError(f"small_bn_cnn needs two widths or more and a depth >= 1, got {list(widths)} and {depth}")
        channels = [in_channels, *widths]
        self.stages = nn.Sequential(
            *(
                _stage(before, width, depth, stride=1 if width_is_last else 2)
                for before, width, width_is_last in zip(channels, widths, [*[False] * (len(widths) - 1), True])
            )
        )
        self.split = f"stages.{len(widths) - 1}"
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``(B, classes)`` of images ``(B, C, H, W)``."""
        logits: Tensor = self.fc(self.pool(self.stages(image)).flatten(1))
        return logits


def _stage(before: int, width: int, depth: int, *, stride: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number in range(depth):
        convolution = nn.Conv2d(before if number == 0 else width, width, 3, stride if number == 0 else 1, 1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)


def make_classifier(
    name: str,
    *,
    in_channels: int,
    classes: int,
    pretrained: bool = False,
    options: dict[str, Any] | None = None,
    owner: str = "ImageLocalizer",
) -> nn.Module:
    """A classifier by name.

    Args:
        name: ``"small_bn_cnn"``, ``"timm:NAME"`` or ``"torchvision:NAME"``.
        in_channels: of the images.
        classes: number of classes.
        pretrained: with the weights that timm or torchvision downloads; the classifier itself starts anew.
        options: more arguments of the model.
        owner: who asks, for errors.

    Raises:
        ValueError: if there is no such model, or it cannot be made so.
        ImportError: if the library is not installed.
    """
    library, _, inner = name.partition(":")
    given = dict(options or {})
    if name == SMALL:
        if pretrained:
            raise ValueError(f"{owner}: {SMALL} has no pretrained weights; leave pretrained=False or name another one")
        return SmallCNN(in_channels, classes, **given)
    if library == "timm" and inner:
        timm = require("timm", extra="vision")
        make = lambda: timm.create_model(  # noqa: E731
            inner, pretrained=pretrained, in_chans=in_channels, num_classes=classes, **given
        )
    elif library == "torchvision" and inner:
        if in_channels != 3:
            raise ValueError(f"{owner}: models of torchvision take 3 channels, the images have {in_channels}")
        make = lambda: _torchvision(inner, classes, pretrained, given)  # noqa: E731
    else:
        raise ValueError(f"{owner}: backbone must be {SMALL}, timm:NAME or torchvision:NAME, got {name!r}")
    try:
        made: nn.Module = make()
    except (RuntimeError, TypeError, AssertionError, ValueError, KeyError) as error:
        raise ValueError(f"{owner}: {library} cannot make {inner!r} with {given}: {error}") from error
    return made


def _torchvision(name: str, classes: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    models = require("torchvision.models", extra="vision")
    if not pretrained:
        fresh: nn.Module = models.get_model(name, weights=None, num_classes=classes, **options)
        return fresh
    made: nn.Module = models.get_model(name, weights="DEFAULT", **options)
    head = next((part for part in _HEADS if isinstance(getattr(made, part, None), nn.Module)), None)
    linear = [] if head is None else [n for n, m in made.named_modules() if n.startswith(head) and _is_linear(m)]
    if not linear:
        raise ValueError("its classifier is not a linear layer; use timm, or pass a module of your own")
    parent, _, last = linear[-1].rpartition(".")
    setattr(made.get_submodule(parent), last, nn.Linear(made.get_submodule(linear[-1]).in_features, classes))  # type: ignore[arg-type]
    return made


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


__all__ = ["SMALL", "SmallCNN", "make_classifier"]
