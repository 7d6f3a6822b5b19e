"""Puts something around the forward of one module object, so that it can be taken off again.

The module's class stays what it is. Unlike a pair of hooks, a ``with`` around the call is closed whatever is raised
inside; deep copies and pickles of the module carry it along, each with a wrapper of its own; ``torch.compile`` and
gradient checkpointing run it as part of the module.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch import nn

Wrapper = TypeVar("Wrapper", bound="InstanceForward")


class InstanceForward(ABC):
    """Stands in place of ``module.forward`` and calls what was there, inside :meth:`around`.

    Several may stand on one module and are removed in any order: one that is not the outermost becomes transparent.

    Args:
        module: the module whose forward is wrapped by :meth:`install`.
        name: its dotted name, for messages.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.name = name
        self.active = False
        self.original: Any = None

    @property
    def __signature__(self) -> inspect.Signature:
        own = type(self.module).forward.__get__(self.module)
        return inspect.signature(own if self.original is None else self.original)

    @abstractmethod
    def around(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        """The context in which the forward runs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward."""
        if not self.active:
            return self._inner(*args, **kwargs)
        with self.around(args, kwargs):
            return self._inner(*args, **kwargs)

    def _inner(self, *args: Any, **kwargs: Any) -> Any:
        if self.original is not None:
            return self.original(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def install(self) -> None:
        """Stand in place of the forward; does nothing where it stands already."""
        if not self.active:
            self.original = self.module.__dict__.get("forward")
            self.module.__dict__["forward"] = self
            self.active = True

    def remove(self) -> None:
        """Put back what was there, or become transparent under what was put on top since."""
        if not self.active:
            return
        self.active = False
        if self.module.__dict__.get("forward") is not self:
            return
        if self.original is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.original


def installed(module: nn.Module, kind: type[Wrapper]) -> Wrapper | None:
    """The active wrapper of a kind that stands on a module, outermost first."""
    forward = module.__dict__.get("forward")
    while isinstance(forward, InstanceForward):
        if isinstance(forward, kind) and forward.active:
            return forward
        forward = forward.original
    return None


__all__ = ["InstanceForward", "installed"]
