"""Finds, inside any module, the classifier that holds a named split, and splits it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_entropy.surgery.coarse_trace import CannotRun, CannotSplit, eagerly
from lightning_entropy.surgery.example_inputs import example_inputs
from lightning_entropy.surgery.split_backbone import SplitBackbone, split_backbone
from lightning_entropy.surgery.split_check import logits_of


def split_classifier(
    module: nn.Module,
    split: str,
    *,
    classifier: str | None = None,
    input_shape: tuple[int, int, int] | list[int] | None = None,
) -> tuple[SplitBackbone, str]:
    """Split the classifier that holds a module, wherever it is.

    Args:
        module: a module that holds a classifier, a LightningModule for one; unchanged.
        split: dotted name, from ``module``, of the module whose input is the split.
        classifier: dotted name of the linear layer that gives the logits; None: the last one that runs.
        input_shape: ``(channels, height, width)`` of images to check the split on; None: what the module says of
            itself (Lightning's ``example_input_array``, timm's configuration), or images of 224 x 224.

    Returns:
        The split, with names from the classifier, and the classifier's name in ``module``.

    Raises:
        ValueError: if a name does not exist (with the nearest ones), or the split is impossible (with the reason).

    Example:
        >>> from torchvision.models import resnet18
        >>> holder = nn.ModuleDict({"net": resnet18()})
        >>> halves, name = split_classifier(holder, "net.layer4", input_shape=(3, 64, 64))
        >>> name, halves.split, halves.classifier, halves.channels
        ('net', 'layer4', 'fc', 256)
    """
    names = {_written(name): name for name, _ in module.named_modules()}
    split = _existing(module, names, split, "split")
    wanted = None if classifier is None else _existing(module, names, classifier, "classifier")
    failures: list[str] = []
    for holder in _holders(split, wanted):
        model = _plain(module.get_submodule(holder))
        there = _below(split, holder)
        for example in _examples(model, input_shape):
            try:
                last = _last_linear(model, example)
            except Exception as error:  # whatever a forward raises on images that it was not made for
                text = str(error).splitlines()
                failures.append(f"{holder or type(module).__name__}: {text[0] if text else type(error).__name__}")
                continue
            chosen = _below(wanted, holder) if wanted else last
            if chosen is None:
                failures.append(f"{holder or type(module).__name__}: no linear layer gives its output")
                break
            inner = _common(there, chosen)  # trace no more than what holds both
            start = _input_of(model, inner, example)
            target = _plain(model.get_submodule(inner))
            try:
                names_inside = _below(there, inner), _below(chosen, inner)
                made = split_backbone(target, names_inside[0], classifier=names_inside[1], example=start)
            except CannotSplit as error:
                where = _written(split)
                raise CannotSplit(f"{type(target).__name__} cannot be split at {where}: {error}.") from error
            return made, ".".join(filter(None, (holder, inner)))
    shown = "\n  ".join(dict.fromkeys(failures)) or "no guess for images fits"
    raise CannotRun(
        f"no module that holds {_written(split)} could be run on images and gave logits; tried\n  {shown}\nPass "
        "input_shape=(channels, height, width), name the linear layer with classifier=, and let a module that holds "
        "both have a forward of images alone."
    )


def _written(name: str) -> str:
    """A name without what torch.compile put into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _existing(module: nn.Module, names: dict[str, str], name: str, argument: str) -> str:
    if name and _written(name) in names:
        return names[_written(name)]
    close = difflib.get_close_matches(name, [n for n in names if n], n=3, cutoff=0.4)
    children = ", ".join(n for n, _ in module.named_children())
    hint = f"Closest names: {', '.join(close)}." if close else f"Modules: {children}."
    raise ValueError(
        f"{argument}={name!r} names none of the {len(names) - 1} modules of {type(module).__name__}. {hint}"
    )


def _holders(split: str, classifier: str | None) -> list[str]:
    """Names of the modules that hold the split (and the classifier), the outermost first."""
    common = _common(split, classifier) if classifier else split.rpartition(".")[0]
    parts = common.split(".") if common else []
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def _common(a: str, b: str) -> str:
    """The innermost module that holds two others."""
    shared = []
    for one, other in zip(a.split(".")[:-1], b.split(".")[:-1]):
        if one != other:
            break
        shared.append(one)
    return ".".join(shared)


def _below(name: str, holder: str) -> str:
    """A name from a module that holds it, behind what torch.compile put around that one."""
    return name[len(holder) + 1 if holder else 0 :].removeprefix("_orig_mod.")


def _plain(module: nn.Module) -> nn.Module:
    return getattr(module, "_orig_mod", module)


def _examples(model: nn.Module, shape: tuple[int, int, int] | list[int] | None) -> Iterator[Tensor]:
    if shape is not None:
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        generator = torch.Generator("cpu").manual_seed(0)
        noise = torch.randn(2, *shape, generator=generator, device="cpu", dtype=torch.float32)
        yield noise.to(device=like.device, dtype=like.dtype)
        return
    guesses = [e.args[0] for e in example_inputs(model) if not e.name and len(e.args) == 1 and not e.kwargs]
    images = [g for g in guesses if isinstance(g, Tensor) and g.dim() == 4 and g.is_floating_point()]
    if getattr(model, "example_input_array", None) is None:
        images.sort(key=lambda image: image.shape[-1] < 128)  # a last map of one position would prove nothing
    yield from images


def _last_linear(model: nn.Module, example: Tensor) -> str | None:
    """The last linear layer or convolution that runs, if the model returns one row of scores an image."""
    ran: list[str] = []
    handles = [
        part.register_forward_hook(lambda m, args, output, name=name: ran.append(name))
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear | nn.Conv2d)
    ]
    try:
        output = logits_of(_evaluated(model, example))
    finally:
        for handle in handles:
            handle.remove()
    return ran[-1] if ran and output is not None and output.dim() == 2 else None


def _input_of(model: nn.Module, name: str, example: Tensor) -> Tensor:
    """What a module inside the model is given."""
    if not name:
        return example
    given: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, args: given.append(args[0]))
    try:
        _evaluated(model, example)
    finally:
        hook.remove()
    return given[0]


def _evaluated(model: nn.Module, example: Tensor) -> object:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return eagerly(lambda: model(example))
    finally:
        for module, mode in modes.items():
            module.training = mode


__all__ = ["split_classifier"]
