from __future__ import annotations

from pathlib import Path

import pytest

from lightning_entropy.training.files import atomic_write


def test_a_file_is_whole_or_as_before(tmp_path: Path) -> None:
    target = tmp_path / "new" / "result.json"
    with atomic_write(target) as part:
        part.write_text("one")
        assert not target.exists()
    assert target.read_text() == "one"

    def fail() -> None:
        with atomic_write(target) as part:
            part.write_text("tw")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk"):
        fail()
    assert target.read_text() == "one"
    assert [p.name for p in target.parent.iterdir()] == ["result.json"]
