"""The size of the image that a model is given, known to the modules inside it while they run."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from lightning_entropy.surgery.instance_forward import InstanceForward


class InputArea:
    """Height times width of the input of the outermost watched module that was given an image.

    Outside a forward, and while gradient checkpointing recomputes a part of one, it is that of the last forward.
    """

    def __init__(self) -> None:
        self.area: int | None = None
        self.inside = False

    def watch(self, model: nn.Module, names: Iterable[str]) -> list[InstanceForward]:
        """Watch every module that contains one of the named ones; ``remove()`` the result to stop."""
        above = {".".join(name.split(".")[:i]) for name in names for i in range(len(name.split(".")))}
        watches: list[InstanceForward] = [_Watch(model.get_submodule(n), n, self) for n in sorted(above)]
        for watch in watches:
            watch.install()
        return watches


class _Scope(AbstractContextManager[None]):
    def __init__(self, shared: InputArea, area: int | None) -> None:
        self.shared, self.area = shared, area
        self.outermost = False

    def __enter__(self) -> None:
        if self.area is not None and not self.shared.inside:
            self.outermost = self.shared.inside = True
            if self.shared.area != self.area:
                self.shared.area = self.area

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.outermost:
            self.shared.inside = False


class _Watch(InstanceForward):
    def __init__(self, module: nn.Module, name: str, shared: InputArea) -> None:
        super().__init__(module, name)
        self.shared = shared

    def around(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        """A scope in which the area is that of the first image among the arguments."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point():
                return _Scope(self.shared, value.shape[-2] * value.shape[-1])
        return _Scope(self.shared, None)


__all__ = ["InputArea"]
