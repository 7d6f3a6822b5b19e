"""Public names are a promise: one that vanishes fails here until ``api_surface.json`` is changed too.

``python tests/test_api_surface.py`` writes the file; the difference is then a line of the commit to decide
on.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

RECORD = Path(__file__).with_name("api_surface.json")
MODULES = [
    "lightning_entropy",
    "lightning_entropy.attention",
    "lightning_entropy.data",
    "lightning_entropy.functional",
    "lightning_entropy.observe",
    "lightning_entropy.recipes",
    "lightning_entropy.training",
]


def surface() -> dict[str, list[str]]:
    return {name: sorted(import_module(name).__all__) for name in MODULES}


def recorded() -> dict[str, list[str]]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def test_no_public_name_has_vanished() -> None:
    now = surface()
    vanished = [f"{m}.{n}" for m, names in recorded().items() for n in names if n not in now.get(m, [])]
    assert not vanished, f"public names that are gone: {vanished}; decide, then run python tests/test_api_surface.py"


def test_every_public_name_is_recorded() -> None:
    before = recorded()
    new = [f"{m}.{n}" for m, names in surface().items() for n in names if n not in before.get(m, [])]
    assert not new, f"new public names: {new}; run python tests/test_api_surface.py to promise them"


def test_every_public_name_can_be_imported() -> None:
    for module, names in recorded().items():
        for name in names:
            assert hasattr(import_module(module), name), f"{module}.{name}"


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    for module in MODULES:
        assert not hasattr(import_module(module), "no_such_name")


if __name__ == "__main__":
    RECORD.write_text(json.dumps(surface(), indent=2) + "\n", encoding="utf-8")
