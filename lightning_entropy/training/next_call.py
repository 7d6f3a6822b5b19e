"""Acting around the next call of a method of one object, for hooks that Lightning gives to the module alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

_CONTEXTS = "_contexts_of_the_next_call"


def around_next_call(
    instance: Any, name: str, context: Callable[..., AbstractContextManager[Any]], *, arguments: bool = False
) -> Callable[[], None]:
    """Run the next call of ``instance.name(...)`` inside ``context()``, once.

    The method is shadowed on the instance (which Lightning counts as overridden) until it is called; then nothing of
    this is left. Contexts of several callers are left in the order in which they were asked for.

    Args:
        instance: any object with a ``__dict__``.
        name: the method.
        context: makes the context in which the call is to run.
        arguments: give ``context`` the arguments of the call.

    Returns:
        A function that withdraws the request; it may be called at any moment and more than once.

    Example:
        >>> from contextlib import contextmanager
        >>> class Door:
        ...     def open(self):
        ...         return "open"
        >>> @contextmanager
        ... def knocking():
        ...     print("knock")
        ...     yield
        >>> door = Door()
        >>> withdraw = around_next_call(door, "open", knocking)
        >>> door.open(), door.open()
        knock
        ('open', 'open')
    """
    shadow = instance.__dict__.get(name)
    if getattr(shadow, _CONTEXTS, None) is None:
        shadow = _shadow(instance, name)
    contexts: list[Callable[..., AbstractContextManager[Any]]] = getattr(shadow, _CONTEXTS)

    def make(*args: Any, **given: Any) -> AbstractContextManager[Any]:
        made: AbstractContextManager[Any] = context(*args, **given) if arguments else context()
        return made

    contexts.append(make)

    def withdraw() -> None:
        if make in contexts:
            contexts.remove(make)
            if not contexts:
                _uncover(instance, name, shadow)

    return withdraw


def _shadow(instance: Any, name: str) -> Callable[..., Any]:
    covered = instance.__dict__.get(name)
    target = getattr(instance, name)

    def shadow(
        *args: Any, **arguments: Any
    ) -> Any:  # a plain function: Lightning compares the code of overridden hooks
        contexts = getattr(shadow, _CONTEXTS)
        asked = list(contexts)
        contexts.clear()
        _uncover(instance, name, shadow)
        with ExitStack() as stack:
            for context in reversed(asked):
                stack.enter_context(context(*args, **arguments))
            return target(*args, **arguments)

    setattr(shadow, _CONTEXTS, [])
    shadow.covered = covered  # type: ignore[attr-defined]
    instance.__dict__[name] = shadow
    return shadow


def _uncover(instance: Any, name: str, shadow: Any) -> None:
    if instance.__dict__.get(name) is not shadow:
        return  # somebody covered it since; an empty shadow passes everything on
    if shadow.covered is None:
        del instance.__dict__[name]
    else:
        instance.__dict__[name] = shadow.covered


__all__ = ["around_next_call"]
