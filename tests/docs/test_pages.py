"""The pages name what there is, and the gallery's figures are those that its script makes."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_entropy.cli import COMMANDS
from lightning_entropy.recipes.catalog import RECIPES
from lightning_entropy.training.lightning import LightningModule

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def gallery() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "gallery.py"))


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "recipes.md"], ids=lambda page: page.name)
def test_it_names_every_recipe(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [recipe.name for recipe in RECIPES if f"`{recipe.name}`" not in text] == []


def test_readme_names_every_command_and_example() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if "cli.py" in line)
    assert re.findall(r"\w+", line.partition("lightning-entropy")[2]) == list(COMMANDS)
    left_out = {"demo.py", "own_module.py"}  # make demo; docs/diagnose.md
    examples = {path.name for pattern in ("*.py", "*.ipynb") for path in (ROOT / "examples").glob(pattern)} - left_out
    assert examples == set(re.findall(r"^\| `examples/(\S+)`", text, re.MULTILINE))


def test_which_one_leads_to_every_card() -> None:
    text = (DOCS / "which_one.md").read_text(encoding="utf-8")
    cards = {path.name for path in (DOCS / "methods").glob("*.md")} - {"index.md", "eafo.md"}  # eafo derives, for study
    assert cards - set(re.findall(r"methods/(\w+\.md)", text)) == set()


def test_the_first_page_needs_eight_lines_at_most() -> None:
    block = re.search(
        r"^```python\n(.*?)^```$", (DOCS / "index.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert block is not None
    assert len([line for line in block[1].splitlines() if line.strip()]) <= 8


def test_every_picture_of_the_gallery_has_its_commands(gallery: dict[str, Any]) -> None:
    made = gallery["figures"]()
    shown = re.findall(r"^!\[[^\]]+\]\(figures/(\w+)\.png\)$", (DOCS / "gallery.md").read_text(encoding="utf-8"), re.M)
    assert [figure.name for figure in made] == shown
    for figure in made:
        assert figure.commands
        assert all(command[0] in COMMANDS for command in figure.commands)


def test_committed_pictures_are_small(gallery: dict[str, Any]) -> None:
    for path in (DOCS / "figures").glob("*.png"):
        assert path.stat().st_size < gallery["MOST_BYTES"], f"{path.name}: {path.stat().st_size:,} bytes"


def test_noise_is_made_small_too(gallery: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.randint(0, 256, (600, 1200, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.numpy())
    assert len(gallery["small"](image)) < 150_000
    monkeypatch.setitem(gallery["small"].__globals__, "MOST_BYTES", 10_000)
    with pytest.raises(ValueError, match=r"\(1200, 600\) is larger than 10,000 bytes in every size"):
        gallery["small"](image)


def test_several_pictures_become_a_sheet(gallery: dict[str, Any], tmp_path: Path) -> None:
    for i in range(5):
        Image.new("RGB", (10, 6), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    found = gallery["sheet"](sorted(tmp_path.glob("*.png")))
    assert found.size == (40, 12)
    assert [found.getpixel(place) for place in ((0, 0), (35, 3), (5, 9))] == [(0, 0, 0), (120, 0, 0), (160, 0, 0)]
    assert found.getpixel((15, 9)) == (255, 255, 255)


class Rows(LightningModule):
    """A module of a user, for one figure."""

    def __init__(self) -> None:
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.encoder(batch).square().mean()

    def train_dataloader(self) -> list[Tensor]:
        return [torch.randn(4, 5, 8) for _ in range(2)]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


@pytest.mark.filterwarnings("ignore:diagnose_layers. Attention entropy is flat")
def test_a_figure_is_made_from_its_commands(
    gallery: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "gallery.md"
    page.write_text(
        "<!-- figure: figures/one.png from out/report.html#1 -->\n"
        "<!-- figure: figures/two.png from out/report.html#99 -->\n"
        "```console\n"
        "$ lightning-entropy diagnose --model tests.docs.test_pages.Rows --accelerator cpu --output out\n"
        "```\n"
    )
    one, two = gallery["figures"](page)
    assert one == ("one", "out/report.html", 1, two.commands)
    (tmp_path / "figures").mkdir()
    monkeypatch.setitem(gallery["make"].__globals__, "DOCS", tmp_path)
    target = gallery["make"](one, tmp_path / "runs")
    with Image.open(target) as image:
        assert image.width > 200
    with pytest.raises(ValueError, match=r"holds \d+ pictures, not 99"):
        gallery["make"](two, tmp_path / "runs")  # repeats nothing
