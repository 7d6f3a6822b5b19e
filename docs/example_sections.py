"""Lets the API reference show the ``Example:`` of a docstring as code; griffe knows ``Examples:`` alone."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class ExampleSections(Extension):
    """Renames the section while the documentation is built."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """One object of the package."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
