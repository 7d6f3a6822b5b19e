"""Models of transformers by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_entropy.data.pretrained import pretrained_source
from lightning_entropy.extras import require
from lightning_entropy.training.lightning import rank_zero_warn


@contextmanager
def _quietly(transformers: Any) -> Iterator[None]:
    """Without progress bars, and without the table of weights that were left over."""
    logging = transformers.utils.logging
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_pretrained(name: str, *, kind: str, owner: str, options: Mapping[str, Any] | None = None) -> nn.Module:
    """Load a model of transformers in float32, in training mode.

    Args:
        name: an id on the Hub, a folder, or ``"package:NAME"``; see :func:`~lightning_entropy.data.pretrained_source`.
        kind: the class of transformers that loads it: ``"AutoModel"`` (an encoder, without its pooler) or
            ``"AutoModelForCausalLM"``.
        owner: who asks, for the error.
        options: more arguments of ``from_pretrained``.

    Raises:
        ImportError: if transformers (extra ``finetuning``) or the package of the model is not installed.
        ValueError: if there is no such model.
    """
    transformers = require("transformers", extra="finetuning")
    source = pretrained_source(name)
    given = {"dtype": "float32", **(options or {})}
    try:
        with _quietly(transformers):
            if kind == "AutoModel":
                given |= _no_pooler(transformers, transformers.AutoConfig.from_pretrained(source))
            loader = getattr(transformers, kind)
            model, found = loader.from_pretrained(source, output_loading_info=True, **given)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{owner}: transformers cannot load {name!r} with {given}: {error}") from error
    missing = sorted(found["missing_keys"])
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        rank_zero_warn(
            f"{owner}: {name!r} has no weights for {shown}: {len(missing)} tensors start from random numbers."
        )
    loaded: nn.Module = model
    return loaded.train()


def _no_pooler(transformers: Any, config: Any) -> dict[str, Any]:
    """Leave out a pooler that nothing would train: DDP waits for the gradient of every parameter."""
    made = transformers.MODEL_MAPPING.get(type(config), None)
    made = made[0] if isinstance(made, (tuple, list)) else made
    takes = made is not None and "add_pooling_layer" in inspect.signature(made.__init__).parameters
    return {"add_pooling_layer": False} if takes else {}


__all__ = ["load_pretrained"]
