r"""Splits an unmodified classifier into a head, a tail and a class map.

    F = head(x),    A = classify(tail(F)),    logits = mean of A over its positions

The head is never called: the features F and the last map are read in the model's own forward (see
:class:`SplitReader`), and the tail is the model's own modules, run once more on other features. A linear classifier
behind an average pool commutes with it, so A is the classifier applied at each position. A layer norm between the two
commutes as well once its scale is taken from the pooled features. What does not commute is refused: every split
checks that its class map, averaged, equals the model's logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lightning_entropy.surgery.coarse_trace import (
    CannotSplit,
    RunGraph,
    boundary,
    call_of,
    coarse_graph,
    computed_from,
    cut,
    eagerly,
    first_input,
)
from lightning_entropy.surgery.frozen_call import frozen_call
from lightning_entropy.surgery.map_layout import MapLayout, layout_of


@dataclass(frozen=True)
class SplitBackbone:
    """A classifier that is split at the input of one of its modules; made by :func:`split_backbone`.

    Args:
        model: the classifier, unmodified.
        split: dotted name of the module whose input is the split.
        classifier: dotted name of the linear layer that gives the logits.
        norm: dotted name of a layer norm between the pool and the classifier, or None.
        classes: number of classes.
        channels: channels of the features at the split.
        tail: features at the split -> last map, as they are laid out.
        anchors: modules from whose outputs the last map follows by functions; ``""`` stands for the features at the
            split.
        finish: their outputs -> last map.
        layout: of the features at the split.
        map_layout: of the last map.
    """

    model: nn.Module
    split: str
    classifier: str
    norm: str | None
    classes: int
    channels: int
    tail: fx.GraphModule
    anchors: tuple[str, ...]
    finish: fx.GraphModule
    layout: MapLayout
    map_layout: MapLayout

    def last_map(self, features: Tensor, *, frozen: bool = False, batch_norm: str = "batch") -> Tensor:
        """The last map ``(B, C, h, w)`` of features at the split, laid out as they are there.

        Args:
            features: what enters the split module.
            frozen: no gradient reaches the tail's weights, and its buffers do not move; see
                :func:`lightning_entropy.surgery.frozen_call.frozen_call`.
            batch_norm: see there.
        """
        out = frozen_call(self.tail, features, batch_norm=batch_norm) if frozen else self.tail(features)
        return self.map_layout.to_map(out)

    def class_map(self, last_map: Tensor, *, frozen: bool = False) -> Tensor:
        """The class map ``(B, classes, h, w)``, whose mean over its positions are the logits."""
        weight, bias = self._weights(frozen)
        if weight is None:
            return last_map
        z = self.normalized(last_map, last_map.mean((2, 3), keepdim=True), frozen=frozen)
        return F.conv2d(z, weight[:, :, None, None], bias)

    def logits(self, last_map: Tensor, weights: Tensor | None = None, *, frozen: bool = False) -> Tensor:
        r"""The mean of ``class_map * weights`` over the positions, without computing the class map.

        .. math:: \\overline{A w} = W \\overline{z w} + b \\overline{w}

        Args:
            last_map: ``(B, C, h, w)``.
            weights: ``(B, 1, h, w)``; None: 1, which gives the logits.
            frozen: detach the classifier.
        """
        weight, bias = self._weights(frozen)
        pooled = last_map.mean((2, 3), keepdim=True)
        if weight is None:
            return (last_map if weights is None else last_map * weights).mean((2, 3))
        if weights is None:
            return F.linear(self.normalized(pooled, pooled, frozen=frozen).flatten(1), weight, bias)
        z = self.normalized(last_map, pooled, frozen=frozen)
        out = F.linear((z * weights).mean((2, 3)), weight)
        return out if bias is None else out + bias * weights.mean((2, 3))

    def class_maps_of_both(self, features: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Class maps of plain and masked features from one batch of twice the size, without gradient to the weights.

        It saves nothing but calls, for frozen backbones and evaluation.

        Raises:
            ValueError: if batch normalisation is in training mode, since it would mix the statistics of both.
        """
        training = [n for n, m in self.tail.named_modules() if isinstance(m, _BATCH_NORM) and m.training]
        if training:
            raise ValueError(
                f"{len(training)} batch normalisations of the tail ({', '.join(training[:3])}) are in training mode "
                "and would normalise both halves by common statistics. Call last_map twice, or use eval()."
            )
        maps = self.class_map(self.last_map(torch.cat([features, masked]), frozen=True), frozen=True)
        return maps[: len(features)], maps[len(features) :]

    def _weights(self, frozen: bool) -> tuple[Tensor | None, Tensor | None]:
        if self.classifies_positions:
            return None, None
        layer = self.model.get_submodule(self.classifier)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        weight, bias = layer.weight.flatten(1), layer.bias
        if frozen:
            return weight.detach(), None if bias is None else bias.detach()
        return weight, bias

    @property
    def classifies_positions(self) -> bool:
        """Whether the classifier is a convolution before the pool, so that the last map is the class map."""
        return self.classifier in {node.target for node in self.tail.graph.nodes if node.op == "call_module"}

    def normalized(self, maps: Tensor, pooled: Tensor, *, frozen: bool = False) -> Tensor:
        """The layer norm of pooled features, applied to maps with the scale of the pooled ones."""
        if self.norm is None:
            return maps
        norm: Any = self.model.get_submodule(self.norm)
        wide = pooled.float() if pooled.dtype in (torch.float16, torch.bfloat16) else pooled
        scale = torch.rsqrt(wide.var(1, keepdim=True, unbiased=False) + norm.eps)
        z = (maps - maps.mean(1, keepdim=True)) * scale
        if norm.weight is not None:
            weight = norm.weight.detach() if frozen else norm.weight
            z = z * weight.view(1, -1, 1, 1)
        if norm.bias is not None:
            bias = norm.bias.detach() if frozen else norm.bias
            z = z + bias.view(1, -1, 1, 1)
        return z


_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def split_backbone(model: nn.Module, split: str, *, classifier: str, example: Tensor) -> SplitBackbone:
    """Split a classifier at the input of one of its modules, and check the split on an example.

    Args:
        model: any classifier whose forward torch.fx can trace down to the two modules; its state does not change.
        split: dotted name of the module whose input is split off: ``"layer4"`` of a ResNet, ``"blocks.9"`` of a ViT.
        classifier: dotted name of the linear layer or 1 x 1 convolution that gives the logits.
        example: images that the model can be run on; square where features are tokens.

    Returns:
        The split.

    Raises:
        CannotSplit: a ValueError with the reason: a flattened map, another pool than the average, a class token, a
            skip connection across the split, layers between the pool and the classifier, a forward that cannot be
            traced.

    Reference:
        Class maps of classifiers with average pooling: Learning Deep Features for Discriminative Localization,
        arXiv 1512.04150.

    Example:
        >>> net = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3),
        ...     nn.ReLU(),
        ...     nn.Conv2d(8, 8, 3),
        ...     nn.AdaptiveAvgPool2d(1),
        ...     nn.Flatten(),
        ...     nn.Linear(8, 2),
        ... )
        >>> halves = split_backbone(net, "2", classifier="5", example=torch.randn(2, 3, 12, 12))
        >>> halves.channels, halves.classes
        (8, 2)
    """
    from lightning_entropy.surgery.split_check import check_pool, check_split  # they need SplitBackbone

    for name in (split, classifier):
        model.get_submodule(name)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        graph = coarse_graph(model, [split, classifier])
        at_split, at_classifier = call_of(graph, split), call_of(graph, classifier)
        start = first_input(at_split)
        behind = computed_from(start)
        if at_classifier not in behind:
            raise CannotSplit(f"{classifier} does not depend on the input of {split}: is the split behind it?")
        run = RunGraph(model, graph)
        eagerly(lambda: run.run(example))
        features = run.values[start.name]
        said: Any = getattr(model, "num_prefix_tokens", None)  # timm
        prefix = said if isinstance(said, int) else None
        is_image = example.dim() == 4 and example.shape[1] < min(example.shape[2:])
        aspect = example.shape[2] / example.shape[3] if is_image else None
        layout = layout_of(features, prefix, aspect=aspect)
        if layout is None:
            raise CannotSplit(f"the features at {split} are no map: {_shape(features)}")
        end, map_layout, norm = _last_map(graph, run, model, behind, at_classifier, prefix)
        if end is start:
            raise CannotSplit(f"nothing lies between {split} and the pool: split earlier")
        edges = boundary(end, start)
        made = SplitBackbone(
            model=model,
            split=split,
            classifier=classifier,
            norm=norm,
            classes=_classes(model.get_submodule(classifier)),
            channels=layout.to_map(features).shape[1],
            tail=cut(graph, [start], end, model),
            anchors=tuple("" if node is start else str(node.target) for node in edges),
            finish=cut(graph, edges, end, model),
            layout=layout,
            map_layout=map_layout,
        )
        given = run.values[first_input(at_classifier).name]
        calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
        with torch.no_grad():
            check_pool(made, run.values[end.name], given, calls)
        eagerly(lambda: check_split(made, example))
        return made
    finally:
        for module, mode in modes.items():
            module.training = mode


def _last_map(
    graph: fx.Graph, run: RunGraph, model: nn.Module, behind: set[fx.Node], at_classifier: fx.Node, prefix: int | None
) -> tuple[fx.Node, MapLayout, str | None]:
    """The last value with positions, how it is laid out, and the layer norm between it and the classifier."""
    layer = model.get_submodule(at_classifier.target)  # type: ignore[arg-type]
    if layout_of(run.values[at_classifier.name], channels=_classes(layer)) is not None:  # a class map, not yet pooled
        after = computed_from(at_classifier)
        maps = [n for n in graph.nodes if n in after and layout_of(run.values[n.name], channels=_classes(layer))]
        return maps[-1], MapLayout("channels first"), None
    width = int(layer.weight.shape[1])  # type: ignore[union-attr, index, arg-type]
    order = list(graph.nodes)
    before = order[: order.index(at_classifier)]
    found = [(n, how) for n in before if n in behind and (how := layout_of(run.values[n.name], prefix, width))]
    if not found:
        given = run.values[first_input(at_classifier).name]
        raise CannotSplit(
            f"no map enters {at_classifier.target}: it takes {_shape(given)}, and no value of {width} channels "
            "with positions precedes it (a flattened map, or layers between the pool and the classifier, have no class "
            "map; nor do images so small that one position is left). Put an average pool and one linear layer there"
        )
    end, how = found[-1]
    norms = [
        str(n.target)
        for n in before[before.index(end) + 1 :]
        if n.op == "call_module" and isinstance(model.get_submodule(str(n.target)), nn.LayerNorm)
    ]
    return end, how, norms[-1] if norms else None


def _classes(layer: nn.Module) -> int:
    if isinstance(layer, nn.Linear | nn.Conv2d):
        return int(layer.weight.shape[0])
    raise CannotSplit(f"the classifier must be a linear layer or a 1 x 1 convolution, got {type(layer).__name__}")


def _shape(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


__all__ = ["CannotSplit", "SplitBackbone", "split_backbone"]
