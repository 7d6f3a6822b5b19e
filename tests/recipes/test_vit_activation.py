from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from lightning_entropy import ActivationSwap, CRReLU, ImageSet, ViTClassifier
from lightning_entropy.activation.catalog import ACTIVATIONS
from lightning_entropy.cli import main
from lightning_entropy.recipes import compare
from lightning_entropy.recipes.catalog import find_recipe
from lightning_entropy.recipes.run_record import build, quiet
from lightning_entropy.recipes.variants import changed, read_yaml, variants
from lightning_entropy.training.lightning import seed_everything
from tests.recipes.bag_cases import quiet_trainer

SMALL: dict[str, Any] = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
SIZES: dict[str, Any] = {"image_size": 8, "in_channels": 1, "num_classes": 10}
TINY: dict[str, Any] = {"trainer.max_epochs": 1, "trainer.limit_train_batches": 2, "model.model_kwargs": SMALL}


def small(**options: Any) -> ViTClassifier:
    seed_everything(0, verbose=False)
    return ViTClassifier(**{"model_kwargs": SMALL, **options})


def count(module: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(each, kind) for each in module.modules())


def fit(path: Path, module: ViTClassifier, *callbacks: Any) -> ViTClassifier:
    trainer = quiet_trainer(path, limit_train_batches=4, limit_val_batches=0, callbacks=list(callbacks))
    trainer.fit(module, datamodule=ImageSet())
    return module


@pytest.mark.parametrize(
    ("name", "swapped"), [("vit_tiny_patch16_224", 12), ("deit_tiny_patch16_224", 12), ("tnt_s_patch16_224", 24)]
)
def test_the_models_of_the_paper_get_the_activation(name: str, swapped: int, announced: list[str]) -> None:
    module = ViTClassifier(name, activation="crrelu", image_size=32, in_channels=3, num_classes=10)
    assert f"CRReLU: {swapped} of {swapped} GELU swapped" in announced[-1]
    assert (count(module, CRReLU), count(module, nn.GELU)) == (swapped, 0)
    module.eval()
    assert module(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_weights_and_random_numbers_are_those_of_the_plain_run() -> None:
    plain, after = small(**SIZES), torch.rand(3)
    for name in ("relu", "crrelu", "poly_norm"):
        swapped = small(**SIZES, activation=name)
        assert torch.equal(torch.rand(3), after)
        assert count(swapped, nn.GELU) == 0
        found = swapped.state_dict()
        assert all(torch.equal(value, found[key]) for key, value in plain.state_dict().items())
    relu = small(**SIZES, activation="relu")
    with torch.no_grad():
        image, block = torch.randn(3, 5, 16), relu.net.blocks[0].mlp  # type: ignore[union-attr, index]
        assert torch.equal(block(image), block.fc2(F.relu(block.fc1(image))))  # type: ignore[operator, union-attr]


def test_the_argument_trains_as_the_callback_does(tmp_path: Path) -> None:
    options: dict[str, Any] = {"lr": 5e-3, "weight_decay": 0.1}
    argument = fit(tmp_path, small(activation="crrelu", **options))
    callback = fit(tmp_path, small(**options), ActivationSwap(old="gelu", new="crrelu"))
    eps = [module.eps for module in argument.modules() if isinstance(module, CRReLU)]
    assert len(eps) == 2
    assert all(abs(float(e.detach()) - 0.01) > 1e-4 for e in eps)
    other = callback.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in argument.state_dict().items())


def test_weight_decay_is_for_matrices(tmp_path: Path) -> None:
    module = fit(tmp_path, small(activation="prelu", weight_decay=0.1, **SIZES))
    groups = module.trainer.optimizers[0].param_groups
    named = {id(p): name.removeprefix("net.") for name, p in module.named_parameters()}
    decayed, kept = ({named[id(p)] for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert decayed | kept == set(named.values())
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    matrices = {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers}
    assert decayed == matrices | {"patch_embed.proj.weight", "head.weight"}
    assert {"pos_embed", "cls_token", "blocks.0.mlp.act.weight", "norm.weight"} <= kept
    plain = fit(tmp_path, small(**SIZES))
    assert len(plain.trainer.optimizers[0].param_groups) == 1


def test_label_smoothing_is_of_the_training_loss_alone(tmp_path: Path) -> None:
    module, images = small(label_smoothing=0.3, **SIZES), ImageSet(batch_size=100)
    found = quiet_trainer(tmp_path).test(module, datamodule=images, verbose=False)[0]
    batches: list[Any] = list(images.test_dataloader())
    with torch.no_grad():
        losses = [F.cross_entropy(module.eval()(b["image"]), b["label"], reduction="sum").item() for b in batches]
    assert found["test/loss"] == pytest.approx(sum(losses) / len(images.test), rel=1e-5)
    batch = batches[0]
    module.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    target = 0.7 * F.one_hot(batch["label"], 10) + 0.03
    expected = -(target * module(batch["image"]).log_softmax(1)).sum(1).mean()
    assert module.training_step(batch, 0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_checkpoint_knows_its_activation(tmp_path: Path) -> None:
    module = small(activation="crrelu", decay="cosine", warmup_steps=2)
    module = fit(tmp_path, module)
    module.trainer.save_checkpoint(tmp_path / "v.ckpt")
    again = ViTClassifier.load_from_checkpoint(tmp_path / "v.ckpt", weights_only=True)
    image = torch.randn(2, 1, 8, 8)
    assert torch.equal(again.eval()(image), module.eval()(image))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "crelu"}, "Closest: crrelu"),
        ({"activation": "relu", "model": nn.Identity(), "model_kwargs": None}, "this one exists already"),
        ({"activation": "relu", "model_kwargs": {**SMALL, "act_layer": "silu"}, **SIZES}, "(?i)gelu"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize("name", ["vit", "vit-folders"])
def test_variants_name_activations_of_the_catalog(name: str) -> None:
    recipe = find_recipe(name)
    named = read_yaml(recipe.variants_path)["activation"]
    assert next(iter(named)) == "gelu"
    assert set(named) <= set(ACTIVATIONS)
    assert named.pop("gelu") == {}
    for activation, changes in named.items():
        assert changes == {"callbacks.ActivationSwap": {"old": "gelu", "new": activation}}


def test_compare_gives_a_table_and_figures(tmp_path: Path) -> None:
    options: dict[str, Any] = {"seeds": 2, "overrides": TINY, "show": False}
    found = compare("vit", vary={"activation": ["gelu", "relu", "crrelu"]}, output=tmp_path, **options)
    assert found.variants == ["gelu", "relu", "crrelu"]
    assert len({run["metrics"]["loss"] for run in found.runs}) == 6
    assert all(("activation/eps_mean" in run["curves"]) == (run["variant"] == "crrelu") for run in found.runs)
    for name in ("results.csv", "intervals.png", "curves.png"):
        assert (tmp_path / name).stat().st_size > 100


def test_the_model_of_a_folder_takes_a_step(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(2):
                pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / label / f"{i}.png")
    recipe = find_recipe("vit-folders")
    both = variants(recipe, {"model": ["deit_tiny_patch16_224"], "activation": ["crrelu"]})
    changes = next(iter(both.values()))
    shorter = {"data.images": str(tmp_path), "data.image_size": 32, "data.num_workers": 0, "trainer.max_epochs": 1}
    quickly = {"trainer.accelerator": "cpu", "trainer.logger": False, "trainer.default_root_dir": str(tmp_path)}
    with quiet():
        trainer, module, data = build(recipe, changed(read_yaml(recipe.path), {**changes, **shorter, **quickly}))
        trainer.fit(module, datamodule=data)
    assert trainer.global_step == 1
    assert count(module, CRReLU) == 12
    assert trainer.callback_metrics["val/loss"].isfinite()


@pytest.mark.filterwarnings("ignore:.*The dirpath has changed.*")
def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    quickly = ["--model.model_kwargs={patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}", "--trainer.logger=false"]
    quickly += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    quickly += ["--trainer.default_root_dir=run", "--trainer.limit_train_batches=2", "--trainer.max_epochs=1"]
    assert main(["fit", "--recipe", "vit", "--activation", "crrelu", *quickly]) == 0
    assert main(["test", "--recipe", "vit", "--activation=crrelu", "--ckpt_path", "best", *quickly]) == 0
    assert "test/accuracy" in capsys.readouterr().out
    state = torch.load(next(Path("run").rglob("last*.ckpt")), weights_only=True)
    assert sum(name.endswith("act.eps") for name in state["state_dict"]) == 2
    assert state["hyper_parameters"]["activation"] == "crrelu"
    assert main(["fit", "--recipe", "vit", "--activation", "crelu"]) == 2
    assert "Closest: crrelu" in capsys.readouterr().err
    assert main(["fit", "--recipe", "mil", "--activation", "relu"]) == 2
    assert "--activation is for the recipes of vision transformers, not for mil" in capsys.readouterr().err
