"""Optional dependencies: imported when they are used, and named with their extra when they are absent."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: dotted name of the module, for example ``"h5py"``.
        extra: the extra of this package that installs it, for example ``"mil"``.

    Returns:
        The imported module.

    Raises:
        ImportError: if it is not installed; the message is the one line that installs it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # the package is there, and something that it imports is not
        raise ImportError(
            f'{module} is needed here and is not installed: pip install "lightning-entropy[{extra}]"'
        ) from error
