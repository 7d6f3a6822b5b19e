"""From a batch to logits, labels, a loss or embeddings, for modules that know nothing of who asks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_entropy.functional.likelihood import SummedLikelihood, summed_nll
from lightning_entropy.training.lightning import LightningModule, MisconfigurationException

Step = str | Callable[[Any, Any], Any]
Forward = Callable[[LightningModule, Any, str], Any]
STEP_HOOK = "old_task_step"
LABELS = ("labels", "label", "target", "targets", "y")
_IGNORED = -100  # what torch's cross-entropy ignores
_LOGS = ("training_step", "validation_step", "test_step", "predict_step")


def check_step(step: Step | None, owner: str) -> None:
    """Refuse what cannot be a step.

    Raises:
        ValueError: if it is the name of one of Lightning's steps, or neither a name nor a function.
    """
    if step in _LOGS:
        raise ValueError(
            f"{owner}: step={step!r} would add the old task's batches to what the new task logs and counts. Name a "
            "method that returns the output and logs nothing."
        )
    if not (step is None or callable(step) or (isinstance(step, str) and step)):
        raise ValueError(f"{owner}: step must be a function (module, batch) or the name of a method, got {step!r}")


def bind_step(
    step: Step | None, module: LightningModule, owner: str, *, forward: Forward | None = None
) -> Callable[[Any], Any]:
    """What runs a batch.

    Args:
        step: a function ``(module, batch)``; the name of a method of the module that takes a batch; None: the module's
            ``old_task_step``, else its forward.
        module: the module.
        owner: the name in messages.
        forward: how the module's forward is called; None: :func:`call_forward`.

    Raises:
        MisconfigurationException: if the module has no such method, or no forward.
    """
    if callable(step):
        function = step
        return lambda batch: function(module, batch)
    name = step or STEP_HOOK
    method = getattr(module, name, None)
    if callable(method):
        return method  # type: ignore[no-any-return]
    if step is not None:
        raise MisconfigurationException(f"{owner}: {type(module).__name__} has no method {step!r} (step={step!r}).")
    if type(module).forward is LightningModule.forward:
        raise MisconfigurationException(
            f"{owner} needs to run {type(module).__name__} on a batch, and it defines neither forward nor {STEP_HOOK}. "
            "Pass step=function(module, batch) that returns the output."
        )
    run = forward or call_forward
    return lambda batch: run(module, batch, owner)


def call_forward(module: LightningModule, batch: Any, owner: str) -> Any:
    """The module's forward on a batch.

    Of a mapping the entries that it takes by name (all where it takes ``**kwargs``), of a list or tuple the first,
    anything else whole; the batch itself where its first parameter is called ``batch``.

    Raises:
        MisconfigurationException: if forward cannot be called so.
    """
    signature = inspect.signature(type(module).forward)
    parameters = list(signature.parameters.values())[1:]
    args: tuple[Any, ...] = (batch,)
    kwargs: dict[str, Any] = {}
    named_batch = bool(parameters) and parameters[0].name == "batch"
    whole = named_batch and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    if isinstance(batch, Mapping) and not whole:
        everything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        named = {p.name for p in parameters}
        kwargs = {k: v for k, v in batch.items() if everything or k in named}
        args = () if kwargs else args
    elif isinstance(batch, list | tuple) and batch and not whole:
        args = (batch[0],)
    try:
        signature.bind(module, *args, **kwargs)
    except TypeError as error:
        given = ", ".join([*(type(a).__name__ for a in args), *(f"{k}=" for k in kwargs)])
        raise MisconfigurationException(
            f"{owner}: {type(module).__name__}.forward takes {', '.join(p.name for p in parameters)} and would be "
            f"called with {given}: {error}. Pass step=function(module, batch), or define {STEP_HOOK}(batch)."
        ) from error
    return module(*args, **kwargs)


def entry(value: Any, *names: str) -> Any:
    """The first of the names that a mapping or an object has."""
    for name in names:
        found = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
        if found is not None:
            return found
    return None


def labels_of(output: Any, batch: Any) -> Tensor | None:
    """The labels: of an output that brings them, else of the batch by name, or its second element."""
    found = entry(output, *LABELS) if isinstance(output, Mapping) else None
    if found is None:
        found = entry(batch, *LABELS)
    if found is None and isinstance(batch, list | tuple) and len(batch) > 1:
        found = batch[1]
    return found if isinstance(found, Tensor) else None


def logits_of(output: Any) -> Tensor | None:
    """The logits: a tensor, an entry or attribute of that name, or the first tensor of a tuple."""
    if isinstance(output, Tensor):
        return output
    found = entry(output, "logits")
    if found is None and isinstance(output, list | tuple) and output:
        found = output[0]
    return found if isinstance(found, Tensor) else None


def loss_of(output: Any) -> Tensor | None:
    """A scalar loss that the output brings."""
    found = entry(output, "loss")
    return found if isinstance(found, Tensor) and found.numel() == 1 else None


def by_class(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
    """Logits ``(..., classes)`` and labels ``(...)``; None where they do not belong together.

    Classes may be in the second dimension, as in segmentation. One logit a label, ``(N,)`` or ``(N, 1)``, is a binary
    classifier: it becomes the logits ``(0, z)``.
    """
    if labels.shape == logits.shape or (labels.shape == logits.shape[:-1] and logits.shape[-1] == 1):
        z = logits.reshape(labels.shape)
        if labels.is_floating_point() and not bool(((labels == 0) | (labels == 1)).all()):
            return None
        return torch.stack([torch.zeros_like(z), z], -1), labels.long()
    if labels.is_floating_point():
        return None
    if logits.shape[:-1] == labels.shape:
        return logits, labels
    if logits.ndim > 2 and logits.shape[:1] + logits.shape[2:] == labels.shape:
        return logits.movedim(1, -1), labels
    return None


def token_likelihood(output: Any, batch: Any, owner: str) -> SummedLikelihood:
    """Summed negative log-likelihood of the tokens of a batch.

    ``nll`` (a sum) and ``count`` if the output is a mapping with both. Else from logits and labels; without labels, the
    ``input_ids`` where ``attention_mask`` allows. Whether position *t* predicts label *t* or *t + 1* is what the
    output's own loss agrees with; without one, labels that are the input are those of the next token.

    Raises:
        MisconfigurationException: if there is nothing to score.
    """
    if isinstance(output, Mapping) and "nll" in output and "count" in output:
        return SummedLikelihood(torch.as_tensor(output["nll"]).double(), torch.as_tensor(output["count"]))
    ids, labels, logits, loss = entry(batch, "input_ids"), labels_of(output, batch), logits_of(output), loss_of(output)
    if labels is None and isinstance(ids, Tensor):
        mask = entry(batch, "attention_mask")
        labels = ids if mask is None else ids.masked_fill(mask == 0, _IGNORED)
    scored = None if labels is None or logits is None else by_class(logits, labels)
    if labels is None or (scored is None and loss is None):
        raise MisconfigurationException(
            f"{owner}: metric='perplexity' needs logits (tokens x vocabulary) and labels. The step gave "
            f"{described(output)}, of the batch {described(batch)}. Pass step=function(module, batch) that returns "
            "{'logits': ..., 'labels': ...} or {'nll': summed nats, 'count': tokens}."
        )
    counts = labels != _IGNORED
    its_own = isinstance(ids, Tensor) and ids.shape == labels.shape and bool((labels == ids)[counts].all())
    if scored is None:
        assert loss is not None
        count = (counts[..., 1:] if its_own else counts).sum()
        return SummedLikelihood(loss.double() * count, count)
    logits, labels = scored
    if labels.ndim < 2 or labels.shape[-1] < 2:
        return summed_nll(logits, labels)
    likely = summed_nll(logits, labels, next_token=its_own)
    if loss is None or _agree(likely, loss):
        return likely
    other = summed_nll(logits, labels, next_token=not its_own)
    return other if _agree(other, loss) else likely  # a loss with terms of its own says nothing


def _agree(score: SummedLikelihood, loss: Tensor) -> bool:
    mean, own = float(score.mean()), float(loss)
    return abs(mean - own) <= 0.01 * max(1.0, abs(own))  # the loss may be a bfloat16


def embedding_of(output: Any, inputs: Any) -> Tensor | None:
    """``(N, D)``: a tensor or ``embeddings``, else the hidden states' mean over the tokens that exist."""
    found = output if isinstance(output, Tensor) else entry(output, "embeddings", "sentence_embedding")
    if found is None:
        found = entry(output, "last_hidden_state")
    if not isinstance(found, Tensor) or found.ndim not in (2, 3):
        return None
    if found.ndim == 2:
        return found
    mask = entry(inputs, "attention_mask")
    weight = found.new_ones(found.shape[:2]) if mask is None else mask.to(found.dtype)
    weight = weight.float() if found.dtype != torch.float64 else weight
    return (found * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp(min=1)


def embed_pair(module: LightningModule, batch: Any, owner: str) -> tuple[Tensor, Tensor]:
    """The embeddings of both halves of a batch ``(first, second)`` by the module's forward.

    Raises:
        MisconfigurationException: if the batch has no two halves, or forward gives no embeddings.
    """
    if not (isinstance(batch, list | tuple) and len(batch) == 2):
        raise MisconfigurationException(
            f"{owner}: metric='retrieval' needs batches (first, second), got {described(batch)}. Or pass "
            "step=function(module, batch) that returns a pair of embeddings (N, D)."
        )
    sides = []
    for half in batch:
        output = call_forward(module, half, owner)
        embedding = embedding_of(output, half)
        if embedding is None:
            raise MisconfigurationException(
                f"{owner}: metric='retrieval' needs embeddings (N, D), hidden states (N, T, D) or last_hidden_state of "
                f"forward, got {described(output)}. Pass step=function(module, batch) that returns a pair of them."
            )
        sides.append(embedding)
    return sides[0], sides[1]


def batch_size_of(value: Any) -> int:
    """Length of the first tensor in a batch; 1 without one."""
    found = _first_tensor(value)
    return 1 if found is None or not found.ndim else len(found)


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((found for found in map(_first_tensor, inner) if found is not None), None)


def described(value: Any) -> str:
    """A value's kind and shape, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {', '.join(described(v) for v in value) or 'nothing'}"
    return f"a {type(value).__name__}"


__all__ = [
    "STEP_HOOK",
    "Step",
    "batch_size_of",
    "bind_step",
    "by_class",
    "call_forward",
    "check_step",
    "described",
    "embed_pair",
    "embedding_of",
    "entry",
    "labels_of",
    "logits_of",
    "loss_of",
    "token_likelihood",
]
