"""The recipes that come with the package: a configuration, its variants, and the classes that it
configures.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """One packaged configuration.

    Attributes:
        name: what ``--recipe`` takes; the file is ``NAME.yaml``.
        line: what it does, in a line.
        model: dotted path of the LightningModule that ``model:`` configures.
        data: dotted path of the LightningDataModule that ``data:`` configures.
        file: the configuration, where it is not a packaged one.
    """

    name: str
    line: str
    model: str = "lightning_entropy.recipes.MILClassifier"
    data: str = "lightning_entropy.data.SlideBags"
    file: Path | None = None

    @property
    def path(self) -> Path:
        """The configuration."""
        return self.file or _FOLDER / f"{self.name}.yaml"

    @property
    def variants_path(self) -> Path:
        """The named variants for ``compare``; the file may be absent."""
        return self.path.with_suffix(".variants.yaml")


RECIPES = (
    Recipe("mil", "slide features -> attention MIL with AEM, with the settings of AEM's authors"),
    Recipe("mil_digits", "bags of digit images with known instance labels: the benchmark of the documentation"),
    Recipe("mil_ucsb", "58 breast histology images (UCSB) in five folds"),
)


def find_recipe(name: str) -> Recipe:
    """The recipe of a name, or of a YAML file of one's own for ``MILClassifier`` and ``SlideBags``.

    Raises:
        ValueError: if there is none; the message lists those that there are.
    """
    for recipe in RECIPES:
        if recipe.name == name:
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
