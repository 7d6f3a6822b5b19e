from __future__ import annotations

from pathlib import Path

import pytest

from lightning_entropy.recipes.catalog import RECIPES, Recipe, find_recipe
from lightning_entropy.recipes.run_record import build, fingerprint, quiet
from lightning_entropy.recipes.variants import changed, parse_value, read_yaml, variants, with_seed

MIL = find_recipe("mil")


def test_every_packaged_variant_can_be_built() -> None:
    for recipe in RECIPES:
        base = read_yaml(recipe.path)
        for section, named in read_yaml(recipe.variants_path).items():
            for name, changes in variants(recipe, {section: list(named)}).items():
                config = changed(base, {**with_seed(changes, 0), "trainer.accelerator": "cpu", "trainer.logger": False})
                with quiet():
                    parts = build(recipe, config)
                attached = [type(c).__name__ for c in parts.trainer.callbacks]  # type: ignore[attr-defined]
                off = name in ("off", "mean_pooling", "0") or not recipe.name.startswith("mil")
                assert ("AttentionEntropyMaximization" in attached) != off, (recipe.name, section, name)


def test_variants_multiply() -> None:
    found = variants(MIL, {"aem": ["off", "cosine"], "model.lr": ["1e-4", 2e-4]})
    assert list(found) == ["off, lr=1e-4", "off, lr=0.0002", "cosine, lr=1e-4", "cosine, lr=0.0002"]
    assert found["off, lr=1e-4"]["model.lr"] == 1e-4
    assert variants(MIL, {}) == {"mil": {}}


def test_callbacks_are_changed_removed_and_added() -> None:
    base = read_yaml(MIL.path)
    name = "callbacks.AttentionEntropyMaximization"
    first = changed(base, {f"{name}.top_k": 5})["trainer"]["callbacks"][0]
    assert first["init_args"] == {"weight": 0.1, "schedule": "cosine", "top_k": 5}
    removed = changed(base, {name: None})
    assert [c["class_path"] for c in removed["trainer"]["callbacks"]] == ["ModelCheckpoint"] * 2
    added = changed(removed, {f"trainer.{name}": {"weight": 1.0}})["trainer"]["callbacks"][-1]
    assert added == {"class_path": f"lightning_entropy.{name.partition('.')[2]}", "init_args": {"weight": 1.0}}
    assert base == read_yaml(MIL.path)  # a copy was changed


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ({"aem": ["of"]}, "it has off, constant"),
        ({"eam": ["off"]}, "it has aem, weight, model"),
        ({"aem": ["off", "off"]}, "given twice"),
    ],
)
def test_unknown_variants_are_named(vary: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        variants(MIL, vary)


def test_wrong_keys_are_named() -> None:
    with pytest.raises(ValueError, match="not a mapping"):
        changed({"model": {"lr": 1}}, {"model.lr.x": 2})
    with pytest.raises(ValueError, match="null or a mapping"):
        changed({}, {"callbacks.EarlyStopping": 3})


def test_values_are_read_as_they_look() -> None:
    found = [parse_value(text) for text in ("1e-3", "3", "true", "null", "[1, 2]", "name")]
    assert found == [1e-3, 3, True, None, [1, 2], "name"]


def test_recipes_are_found_by_name_or_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'mil_digits'"):
        find_recipe("mil_digit")
    with pytest.raises(ValueError, match="does not exist"):
        find_recipe("nowhere.yaml")
    own = tmp_path / "own.yaml"
    own.write_text("- 1\n")
    assert find_recipe(str(own)) == Recipe("own", "a file of the user", file=own)
    with pytest.raises(ValueError, match="must hold a mapping"):
        read_yaml(own)


def test_a_wrong_setting_is_an_error_with_its_name() -> None:
    config = changed(read_yaml(MIL.path), {"model.learning_rate": 1})
    with pytest.raises(ValueError, match="learning_rate"):
        build(MIL, config)


def test_fingerprints_depend_on_values_and_not_on_order() -> None:
    assert fingerprint({"a": 1, "b": {"c": 2, "d": 3}}) == fingerprint({"b": {"d": 3, "c": 2}, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
