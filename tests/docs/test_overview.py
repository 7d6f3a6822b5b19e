from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback

import lightning_entropy

DOCS = Path(__file__).resolve().parents[2] / "docs"
CARDS = sorted(path for path in (DOCS / "methods").glob("*.md") if path.name != "index.md")


def test_the_table_of_methods_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    overview = runpy.run_path(str(DOCS / "overview.py"))
    assert overview["main"](["--check"]) == 0, f"{capsys.readouterr().out}run python docs/overview.py"


def test_every_method_has_a_card() -> None:
    cards = {yaml.safe_load(card.read_text(encoding="utf-8").split("---\n", 2)[1])["callback"] for card in CARDS}
    for room in ("attention", "activation", "finetuning", "localization"):
        for name, value in vars(getattr(lightning_entropy, room)).items():
            if not (isinstance(value, type) and issubclass(value, Callback)):
                continue
            assert f"lightning_entropy.{name}" in cards, f"{name} has no card in docs/methods"


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_a_card_has_its_parts(card: Path) -> None:
    headings = re.findall(r"^## (.*)$", card.read_text(encoding="utf-8"), re.MULTILINE)
    expected = ["What it computes", "As a function", "In a Trainer", "In YAML", "On the command line"]
    expected += ["Suggested values", "What was measured", "Limits", "Attribution"]
    assert [heading for heading in headings if heading in expected] == expected


def test_a_card_without_front_matter_is_named(tmp_path: Path) -> None:
    overview = runpy.run_path(str(DOCS / "overview.py"))
    (tmp_path / "bare.md").write_text("# Bare\n")
    with pytest.raises(ValueError, match=r"bare\.md must begin with front matter"):
        overview["front_matter"](tmp_path / "bare.md")
    (tmp_path / "half.md").write_text("---\ntitle: Half\n---\n")
    with pytest.raises(ValueError, match=r"half\.md: front matter lacks line, kind"):
        overview["front_matter"](tmp_path / "half.md")
