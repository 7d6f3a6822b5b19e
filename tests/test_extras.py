from __future__ import annotations

import sys
import types

import pytest

from lightning_entropy.extras import require


def test_the_module_is_returned() -> None:
    assert require("math", extra="mil").pi > 3


def test_absence_is_one_line_that_installs() -> None:
    with pytest.raises(ImportError, match=r'pip install "lightning-entropy\[mil\]"'):
        require("a_module_that_nobody_has", extra="mil")


def test_a_broken_dependency_is_not_mistaken_for_an_absent_one(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("import something_it_needs\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="something_it_needs"):
        require("broken_package", extra="mil")
    assert isinstance(sys.modules.get("math"), types.ModuleType)
