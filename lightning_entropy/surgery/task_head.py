"""Finds the layer that a task put on a pretrained network."""

from __future__ import annotations

from torch import nn

from lightning_entropy.surgery.transformers_config import is_pretrained_model

_NAMES = {"head", "heads", "classifier", "classification_head", "fc", "last_linear"}
_TRANSFORMERS = {"classifier", "score", "qa_outputs", "classification_head", "cls_classifier"}


def task_heads(model: nn.Module) -> list[str]:
    """The names of modules that are the head of a task, by what libraries call it.

    timm's ``get_classifier()``, the heads of transformers' models for classification and questions, and modules called
    ``head``, ``heads``, ``classifier``, ``classification_head``, ``fc`` or ``last_linear`` that belong to the model or
    to a network in it. A language model's ``lm_head`` was pretrained and is none. Which of them are fresh cannot be
    told from a model.

    Args:
        model: any module.

    Returns:
        Names of modules with parameters, none inside another; possibly none.

    Example:
        >>> task_heads(nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)}))
        ['head']
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: list[str] = []
    for name, module in model.named_modules():
        parent, _, own = name.rpartition(".")
        outside = name.count(".") <= 1 and not any(part.isdigit() for part in name.split("."))
        of_library = own in _TRANSFORMERS and is_pretrained_model(model.get_submodule(parent))
        if of_library or (own in _NAMES and outside):
            found.append(name)
        told = getattr(module, "get_classifier", None)
        if callable(told) and type(module).__module__.startswith("timm."):
            heads = told()
            found += [names[id(h)] for h in (heads if isinstance(heads, tuple | list) else [heads]) if id(h) in names]
    found = [
        name for name in dict.fromkeys(found) if name and any(True for _ in model.get_submodule(name).parameters())
    ]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


__all__ = ["task_heads"]
