"""Which activations a user means by a name, a class, a module with settings, or a function."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_entropy.surgery.activation_families import ALIASES, family_of_callable, family_of_class, is_gate


class OldActivation:
    """Says which activations are meant by one entry of ``old``.

    Args:
        spec: a family or class name, a module class, a module or a factory of one (matches equal settings), a plain
            function (matches calls and attributes only); None takes every family but gates.

    Raises:
        TypeError: if it is none of these.
    """

    def __init__(self, spec: Any) -> None:
        self.spec = spec
        self.family: str | None = None
        self.kind: type | None = None
        self.settings: str | None = None
        self.function: Any = None
        if spec is None:
            return
        if isinstance(spec, str):
            self.family = ALIASES.get(spec.lower(), spec.lower())
        elif isinstance(spec, type) and issubclass(spec, nn.Module):
            self.kind = spec
        elif isinstance(spec, nn.Module):
            self._like(spec)
        elif family_of_callable(spec) is not None:
            self.function = spec
        elif callable(spec):
            made = spec()
            if not isinstance(made, nn.Module):
                raise TypeError(f"old must be activations; the factory {spec!r} made {type(made).__name__}")
            self._like(made)
        else:
            raise TypeError(f"old must be a name, a module class, a factory or a function, got {spec!r}")

    def _like(self, module: nn.Module) -> None:
        self.kind, self.settings = type(module), _settings(module)

    def __str__(self) -> str:
        if self.spec is None:
            return "activation"
        if isinstance(self.spec, str):
            return self.spec
        return getattr(self.spec, "__name__", type(self.spec).__name__)

    def takes_module(self, module: nn.Module) -> bool:
        """Whether a module is meant."""
        family = family_of_class(type(module))
        if self.spec is None:
            return family is not None and not is_gate(family)
        if self.family is not None:
            named = any(base.__name__.lower() == str(self.spec).lower() for base in type(module).__mro__[:-2])
            return family == self.family or named
        if self.kind is None or not isinstance(module, self.kind):
            return False
        expected = family_of_class(self.kind)
        if expected is not None and family != expected:  # ReLU6 is a Hardtanh to Python
            return False
        return self.settings is None or (type(module) is self.kind and _settings(module) == self.settings)

    def takes_function(self, function: Any, family: str) -> bool:
        """Whether a function that is called or held is meant."""
        if self.spec is None:
            return not is_gate(family)
        if self.family is not None:
            return family == self.family
        if self.kind is not None:
            torchs = self.kind.__module__.startswith("torch.")
            return self.settings is None and torchs and family_of_class(self.kind) == family
        return self.function is not None and family_of_callable(self.function) == family


def _settings(module: nn.Module) -> str:
    text = module.extra_repr()
    return text.replace("inplace=True", "").strip(", ")


__all__ = ["OldActivation"]
