"""The recipes that come with the package: a configuration, its variants, and the classes that it configures."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """One packaged configuration.

    Attributes:
        name: what ``--recipe`` takes; the file is ``NAME.yaml``.
        line: what it does, in a line.
        model: dotted path of the LightningModule that ``model:`` configures.
        data: dotted path of the LightningDataModule that ``data:`` configures.
        select: what a comparison tests, the ``"best"`` checkpoint or the ``"last"`` epoch, where it is not told.
        by_step: shell patterns of the logged names whose value at every logged step a comparison keeps.
        report: dotted path of a module with ``summarize(record)``, more metrics of a run from its record, and
            ``draw(comparison)`` and ``numbers(comparison)``, one more figure of a comparison and what it shows; and
            where wanted ``observed(trainer)``, more entries of a record from the Trainer after its fit, and
            ``across(records)``, more metrics of every run from the records of all.
        file: the configuration, where it is not a packaged one.
    """

    name: str
    line: str
    model: str = "lightning_entropy.recipes.MILClassifier"
    data: str = "lightning_entropy.data.SlideBags"
    select: Literal["best", "last"] = "best"
    by_step: tuple[str, ...] = ()
    report: str | None = None
    file: Path | None = None

    @property
    def path(self) -> Path:
        """The configuration."""
        return self.file or _FOLDER / f"{self.name.replace('-', '_')}.yaml"

    @property
    def variants_path(self) -> Path:
        """The named variants for ``compare``; the file may be absent."""
        return self.path.with_suffix(".variants.yaml")

    @property
    def report_files(self) -> list[str]:
        """Names of the files that the report adds to a comparison's folder: the figure, and its numbers."""
        return [f"{self.path.stem}.png", f"{self.path.stem}.json"] if self.report else []

    def activation_options(self, name: str) -> list[str]:
        """Options of the command line that give the recipe's model another activation.

        Raises:
            ValueError: if the recipe's model takes none, or there is none of that name.
        """
        if not self.model.endswith(".ViTClassifier"):
            raise ValueError(f"--activation is for the recipes of vision transformers, not for {self.name}")
        from lightning_entropy.activation.swap_rules import named_activation  # this module is read before torch is

        named_activation(name)
        return ["--model.activation", name]


RECIPES = (
    Recipe("mil", "slide features -> attention MIL with AEM, with the settings of AEM's authors"),
    Recipe("mil_digits", "bags of digit images with known instance labels: the benchmark of the documentation"),
    Recipe("mil_ucsb", "58 breast histology images (UCSB) in five folds"),
    Recipe(
        "vit-stability",
        "a small ViT at a learning rate where its attention collapses, and what is said to help",
        model="lightning_entropy.recipes.ViTClassifier",
        data="lightning_entropy.data.ImageSet",
        select="last",
        by_step=("train/loss_step", "attention_entropy/*"),
        report="lightning_entropy.recipes.stability",
    ),
    Recipe(
        "vit",
        "a small ViT on digit images, with any activation",
        model="lightning_entropy.recipes.ViTClassifier",
        data="lightning_entropy.data.ImageSet",
        select="last",
    ),
    Recipe(
        "vit-folders",
        "ViT-Tiny, DeiT-Tiny or TNT-Small on images of your own, in the manner of DeiT, with any activation",
        model="lightning_entropy.recipes.ViTClassifier",
        data="lightning_entropy.data.ImageSet",
        select="last",
    ),
    Recipe(
        "kappatune-text",
        "MiniLM learns the sentiment of sentences: what KappaTune, LoRA and full fine-tuning forget",
        model="lightning_entropy.recipes.TextClassifier",
        data="lightning_entropy.data.TextSet",
        select="last",
        report="lightning_entropy.recipes.forgetting",
    ),
    Recipe(
        "inflection-text",
        "MiniLM learns a source and then a target task: LoRA in inflection layers, against random layers and others",
        model="lightning_entropy.recipes.TransferClassifier",
        data="lightning_entropy.data.TextSet",
        select="last",
        report="lightning_entropy.recipes.inflection",
    ),
    Recipe(
        "kappatune-lm",
        "a decoder reads a novel: the same arms, and the perplexity of other text; for a GPU",
        model="lightning_entropy.recipes.CausalLM",
        data="lightning_entropy.data.TextStream",
        select="last",
        report="lightning_entropy.recipes.forgetting",
    ),
    Recipe(
        "wsol",
        "localization from image labels: CAM, Hide-and-Seek, CutMix and BAS on generated objects with exact boxes",
        model="lightning_entropy.recipes.ImageLocalizer",
        data="lightning_entropy.data.LocalizationSet",
        select="last",
        by_step=("bas/*",),
        report="lightning_entropy.recipes.localization_report",
    ),
    Recipe(
        "wsol-cub",
        "the same for CUB-200-2011, with the settings of BAS where a stock network allows them; for a GPU",
        model="lightning_entropy.recipes.ImageLocalizer",
        data="lightning_entropy.data.LocalizationSet",
        select="last",
        report="lightning_entropy.recipes.localization_report",
    ),
    Recipe(
        "wsol-ilsvrc",
        "the same for ILSVRC; for GPUs",
        model="lightning_entropy.recipes.ImageLocalizer",
        data="lightning_entropy.data.LocalizationSet",
        select="last",
        report="lightning_entropy.recipes.localization_report",
    ),
)


def find_recipe(name: str) -> Recipe:
    """The recipe of a name, or of a YAML file of one's own for ``MILClassifier`` and ``SlideBags``.

    Raises:
        ValueError: if there is none; the message lists those that there are.
    """
    for recipe in RECIPES:
        if recipe.name.replace("-", "_") == name.replace("-", "_"):
            return recipe
    if name.endswith((".yaml", ".yml")):
        if Path(name).is_file():
            return Recipe(Path(name).stem, "a file of the user", file=Path(name))
        raise ValueError(f"recipe file {name!r} does not exist")
    names = [recipe.name for recipe in RECIPES]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"there is no recipe {name!r}; there are {', '.join(names)} (or give a .yaml file).{hint}")


__all__ = ["RECIPES", "Recipe", "find_recipe"]
