from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_entropy import BackgroundActivationSuppression
from lightning_entropy.cli import main
from lightning_entropy.data import LocalizationSet
from lightning_entropy.recipes import ImageLocalizer, compare
from lightning_entropy.recipes.catalog import find_recipe
from lightning_entropy.recipes.run_record import build
from lightning_entropy.recipes.variants import changed, read_yaml, variants
from lightning_entropy.training import WeightSchedule
from lightning_entropy.training.lightning import Trainer
from tests.data.localization_folders import voc

NET = {"widths": [6, 8, 12], "depth": 1}
COUNTS: dict[str, Any] = {"train_count": 16, "val_count": 6, "test_count": 6}
TINY: dict[str, Any] = {
    "trainer.max_epochs": 2,
    "model.backbone_kwargs": NET,
    "model.maps": ["cam", "cam_mean", "bas", "bas_mean", "centre_gaussian"],
    "data.batch_size": 8,
    **{f"data.{name}": count for name, count in COUNTS.items()},
}


def images(**options: Any) -> LocalizationSet:
    return LocalizationSet(batch_size=8, **{**COUNTS, **options})


def localizer(**options: Any) -> ImageLocalizer:
    return ImageLocalizer(backbone_kwargs=NET, **options)


def trainer(*callbacks: Any, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    chosen = {"max_epochs": 1, "accelerator": "cpu", "enable_model_summary": False, **quiet, **options}
    return Trainer(callbacks=list(callbacks), **chosen)


def suppression(**options: Any) -> BackgroundActivationSuppression:
    return BackgroundActivationSuppression("net.stages.2", **options)


def predicted(run: Trainer, module: ImageLocalizer, *, datamodule: LocalizationSet) -> dict[str, Any]:
    """The first batch."""
    batches: Any = run.predict(module, datamodule=datamodule)
    return batches[0]  # type: ignore[no-any-return]


def test_classifiers_are_compared_by_their_maps(tmp_path: Path) -> None:
    late = {"callbacks.BackgroundActivationSuppression.schedule": {"kind": "constant", "begin": 1}}
    vary = {"training": ["bas", "ce", "has"]}
    recipe = find_recipe("wsol")
    config = changed(read_yaml(recipe.path), late)  # what the packaged configuration says, but one epoch
    assert config["trainer"]["callbacks"][0]["init_args"]["schedule"]["begin"] == 1
    found = compare("wsol", vary=vary, seeds=1, output=tmp_path, overrides=TINY, show=False)
    assert found.independent
    bas, ce, has = found.runs
    for run in found.runs:
        for name in ("cam", "cam_mean", "centre_gaussian"):
            for score in ("gt_known", "top1_loc", "max_box_v2", "pxap"):
                assert 0 <= run["metrics"][f"{name}/{score}"] <= 1
            assert len(run["curves"][f"val/{name}/gt_known"]) == 2
        for score in ("gt_known", "top1_loc"):
            assert run["metrics"][score] <= 1
    assert "bas/gt_known" in bas["metrics"]
    assert "bas/gt_known" not in ce["metrics"]
    # What knows nothing is the same for all, and BAS, which begins after these epochs, has not moved the classifier.
    for score in ("gt_known", "max_box_v2", "pxap"):
        values = {run["metrics"][f"centre_gaussian/{score}"] for run in found.runs}
        assert len(values) == 1
    assert bas["curves"]["train/loss"] == ce["curves"]["train/loss"] != has["curves"]["train/loss"]
    assert bas["metrics"]["cam/pxap"] == ce["metrics"]["cam/pxap"]
    assert (tmp_path / "wsol.png").stat().st_size > 10_000
    assert list(json.loads((tmp_path / "wsol.json").read_text())) == vary["training"]
    assert "GT-known" in str(found.table().columns[0]._cells)


@pytest.mark.filterwarnings("ignore:.*The dirpath has changed.*")
def test_fit_test_and_predict(capsys: pytest.CaptureFixture[str]) -> None:
    small = [f"--{key}={value}" for key, value in TINY.items() if key != "model.maps"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=run", "--trainer.default_root_dir=run"]
    common = ["--recipe", "wsol", *small, *quiet, *logger, "--model.overlays=3"]
    assert main(["fit", *common]) == 0
    pictures = list(Path("run").rglob("figures/val/localization/*.png"))
    assert len(pictures) == 1  # of the last epoch alone: localize_every_n_epochs is 6
    assert main(["test", *common, "--ckpt_path", "last"]) == 0
    assert "test/bas_mean/gt_known" in capsys.readouterr().out
    assert main(["predict", *common, "--ckpt_path", "last"]) == 0
    assert "predictions: predictions.csv, predictions.json, predictions" in capsys.readouterr().out
    lines = Path("predictions.csv").read_text().splitlines()
    assert len(lines) == 1 + 16 + 6 + 6
    coco = json.loads(Path("predictions.json").read_text())
    assert len(coco["images"]) == 28
    assert all((one["height"], one["width"]) == (64, 64) for one in coco["images"])
    for one in coco["annotations"]:
        x, y, width, height = one["bbox"]
        assert x >= 0
        assert y >= 0
        assert x + width <= 64
        assert y + height <= 64
    assert len(list(Path("predictions").glob("*.png"))) == 3


def plateaus(inner: float, *, size: int = 16) -> Tensor:
    """A map that is 1 on a square of 4, ``inner`` on the square of 8 around it, and 0 outside."""
    maps = torch.zeros(size, size)
    maps[4:12, 4:12] = inner
    maps[6:10, 6:10] = 1
    return maps


class Given(nn.Module):
    """Logits whose class map is the image's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Conv2d(3, 3, 1), nn.Linear(3, 2)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.body(image).mean((2, 3)))


def test_cam_is_the_last_layer_at_every_position() -> None:
    net = Given()
    module = ImageLocalizer(net, split="body", in_channels=3, num_classes=2, image_size=8)
    pictures, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])
    found = module.score_maps(pictures, labels=labels, names=["cam", "cam_mean", "cam_top1", "grad_cam"])
    weight, bias = net.fc.weight, net.fc.bias
    whole = torch.einsum("kc,bchw->bkhw", weight, net.body(pictures)) + bias[:, None, None]
    torch.testing.assert_close(found["cam"][:, 0], whole[torch.arange(4), labels], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["cam_mean"][:, 0], whole.mean(1), rtol=1e-4, atol=1e-5)
    likeliest = net(pictures).argmax(1)
    torch.testing.assert_close(found["cam_top1"][:, 0], whole[torch.arange(4), likeliest], rtol=1e-4, atol=1e-5)
    several = module.score_maps(pictures, labels=torch.tensor([[0, 1]] * 4), names=["cam"])["cam"]
    torch.testing.assert_close(several, whole.detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="needs BackgroundActivationSuppression"):
        module.score_maps(pictures, names=["bas"])
    with pytest.raises(ValueError, match="needs split= for CAM, a module of Given"):
        ImageLocalizer(Given(), in_channels=3, num_classes=2, image_size=8).score_maps(pictures, names=["cam"])


class Fixed(ImageLocalizer):
    """Whose maps are known: on validation images the outer square is the object's, on test images the inner one is."""

    def score_maps(self, images: Tensor, **options: Any) -> dict[str, Tensor]:
        return {"cam": plateaus(0.5).expand(len(images), 1, 16, 16)}


class Two(LocalizationSet):
    """Two images in each split, whose boxes are the outer square in validation and the inner one in testing."""

    def __init__(self, *, val: tuple[int, ...] = (4, 12), test: tuple[int, ...] = (6, 10)) -> None:
        super().__init__()
        self.corners = {"val": val, "test": test}

    image_size = 16
    num_classes = 2
    multilabel = False

    def setup(self, stage: str | None = None) -> None:
        pass

    def _loader(self, split: str) -> Any:
        low, *high = self.corners[split] or (0,)
        box = torch.tensor([[low, low, high[0], high[0]]]).float() if high else torch.zeros(0, 4)
        batch = {
            "image": torch.zeros(2, 3, 16, 16),
            "label": torch.tensor([0, 1]),
            "name": ["a", "b"],
            "boxes": [box, torch.zeros(0, 4)],
        }
        batches: Any = [batch]
        return DataLoader(batches, batch_size=None) if self.corners[split] else []

    def val_dataloader(self) -> Any:
        return self._loader("val")

    def test_dataloader(self) -> Any:
        return self._loader("test")

    def predict_dataloader(self) -> Any:
        return self._loader("test")


def fixed() -> Fixed:
    return Fixed(Given(), split="body", in_channels=3, num_classes=2, image_size=16, maps=["cam"], interval=0.1)


def test_thresholds_are_those_of_the_validation_images() -> None:
    module, run = fixed(), trainer()
    (value,) = run.test(module, datamodule=Two(), verbose=False)
    # A threshold below .5 gives the square of 8 pixels: right in validation, 64 to 16 pixels in testing.
    assert value["test/cam/gt_known"] == 0
    assert module.threshold("cam") < 0.5
    (value,) = run.test(module, datamodule=Two(val=(6, 10)), verbose=False)
    assert value["test/cam/gt_known"] == 1
    assert value["test/cam/max_box_v2"] == 1  # true boxes have exclusive edges, as those of the protocol have
    assert module.threshold("cam") >= 0.5
    batch = predicted(run, module, datamodule=Two(val=(6, 10)))
    assert batch["boxes"][0].tolist() == [[6, 6, 10, 10]]
    assert module.threshold("cam_mean") == 0.2  # which no validation image has said


def test_without_validation_boxes() -> None:
    run = trainer()
    with pytest.warns(UserWarning, match="the thresholds of cam are the best ones of the test images"):
        (value,) = run.test(fixed(), datamodule=Two(val=()), verbose=False)
    assert value["test/cam/gt_known"] == 1
    kept = fixed()
    kept.on_load_checkpoint({"localization_thresholds": {"cam": [0.3, [0.3, 0.3, 0.3]]}})
    (value,) = run.test(kept, datamodule=Two(val=()), verbose=False)
    assert value["test/cam/gt_known"] == 0
    state: dict[str, Any] = {}
    kept.on_save_checkpoint(state)
    assert state == {"localization_thresholds": {"cam": [0.3, [0.3, 0.3, 0.3]]}}
    (value,) = run.test(fixed(), datamodule=Two(val=(0,), test=(0,)), verbose=False)  # nowhere a box
    assert sorted(value) == ["test/accuracy", "test/loss"]


def test_the_generator_is_trained_after_the_classifier() -> None:
    bas = suppression(schedule=WeightSchedule(begin=1))
    module, run = localizer(localize_every_n_epochs=0), trainer(bas, max_epochs=1)
    run.fit(module, datamodule=images())
    assert bas.generator is not None
    fresh = suppression()
    fresh.operate(localizer(in_channels=3, num_classes=4, image_size=64))
    torch.testing.assert_close(bas.generator.weight, fresh.generator.weight)  # type: ignore[union-attr]
    run.fit_loop.max_epochs = 2
    run.fit(module, datamodule=images())
    assert not torch.allclose(bas.generator.weight, fresh.generator.weight)  # type: ignore[union-attr]


def test_rates_of_sgd() -> None:
    module = localizer(optimizer="sgd", lr=0.001, weight_decay=5e-4, head_lr_factor=10.0, decay_epochs=[1])
    run = trainer(suppression())
    run.fit(module, datamodule=images())
    rates = {id(p): group["initial_lr"] for group in run.optimizers[0].param_groups for p in group["params"]}
    decays = {group["weight_decay"] for group in run.optimizers[0].param_groups}
    found = {name: rates[id(p)] for name, p in module.named_parameters()}
    assert found["net.stages.0.0.weight"] == 0.001
    assert found["net.stages.0.1.bias"] == 0.002
    assert found["net.fc.weight"] == pytest.approx(0.01)
    assert found["net.fc.bias"] == pytest.approx(0.02)
    assert found["foreground_generator_net_stages_2.weight"] == pytest.approx(0.01)
    assert found["foreground_generator_net_stages_2.bias"] == pytest.approx(0.02)
    assert decays == {5e-4}
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(
        run.optimizers[0].param_groups[0]["initial_lr"] / 10
    )


@pytest.mark.parametrize("augmentation", ["hide_and_seek", "cutmix"])
def test_augmentations_change_training_alone(augmentation: str) -> None:
    losses = []
    for name in ("none", augmentation):
        torch.manual_seed(3)
        module = localizer(augmentation=name, localize_every_n_epochs=0, lr=0.0)
        run = trainer()
        run.fit(module, datamodule=images())
        losses.append([float(run.callback_metrics[key]) for key in ("train/loss", "val/accuracy")])
    assert losses[0][0] != losses[1][0]
    assert losses[0][1] == losses[1][1]


def test_cutmix_has_no_map() -> None:
    with pytest.raises(ValueError, match="mixes the labels of an image"):
        trainer(suppression()).fit(localizer(augmentation="cutmix"), datamodule=images())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"maps": ["cam", "eigen_cam"]}, "there is no map 'eigen_cam'"),
        ({"predicted_map": "bas_top0"}, "there is no map"),
        ({"augmentation": "mixup"}, "augmentation must be one of"),
        ({"augmentation": "none", "augmentation_kwargs": {"p": 1}}, "takes no options"),
        ({"optimizer": "adam"}, "optimizer must be"),
        ({"decay_epochs": [3], "decay": "cosine"}, "leave warmup_steps and decay alone"),
        ({"head_lr_factor": 0.0}, "head_lr_factor"),
        ({"pictures": -1}, "pictures must be"),
        ({"backbone": Given(), "pretrained": True}, "exists already"),
        ({"backbone": "resnet50"}, "must be small_bn_cnn, timm:NAME or torchvision:NAME"),
        ({"backbone": "torchvision:resnet5"}, "torchvision cannot make 'resnet5'"),
        ({"backbone": "timm:resnet5"}, "timm cannot make 'resnet5'"),
        ({"backbone_kwargs": {"widths": [3]}}, "two widths or more"),
        ({"pretrained": True}, "no pretrained weights"),
    ],
)
def test_bad_arguments(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ImageLocalizer(**{"in_channels": 3, "num_classes": 2, "image_size": 32, **options})


def test_sizes_come_from_the_data() -> None:
    with pytest.raises(ValueError, match="needs in_channels: the Trainer has no datamodule"):
        localizer().configure_model()
    with pytest.raises(RuntimeError, match="built by a Trainer"):
        localizer()(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("name", ["wsol", "wsol-cub", "wsol-ilsvrc"])
def test_every_variant_can_be_configured(name: str) -> None:
    recipe = find_recipe(name)
    base = changed(read_yaml(recipe.path), {"trainer.logger": False, "trainer.accelerator": "cpu"})
    for section, named in read_yaml(recipe.variants_path).items():
        for changes in variants(recipe, {section: list(named)}).values():
            parts = build(recipe, changed(base, changes))
            assert isinstance(parts.model, ImageLocalizer)
            callbacks: Any = parts.trainer.callbacks  # type: ignore[attr-defined]
            found = [c for c in callbacks if isinstance(c, BackgroundActivationSuppression)]
            for callback in found if name == "wsol" else []:
                assert callback.schedule.begin == 12


def test_blood_cells(shared_data: Path) -> None:
    bas = suppression()
    module = localizer(pictures=1, maps=["cam", "bas", "whole_image"])
    data = LocalizationSet(str(shared_data / "wsol_bccd"), image_size=32, batch_size=16, val_count=20, test_count=20)
    run = trainer(bas, limit_train_batches=2)
    run.fit(module, datamodule=data)
    (value,) = run.test(module, datamodule=data, verbose=False)
    assert {"test/cam/gt_known", "test/bas/max_box_v2", "test/whole_image/top1_loc"} <= value.keys()
    assert not any(name.endswith("pxap") for name in value)  # boxes alone
    batch = predicted(run, module, datamodule=data)
    assert batch["size"][0].tolist() == [160, 160]
    assert all(float(boxes.max()) <= 160 for boxes in batch["boxes"] if len(boxes))


def test_segmentation_from_several_labels(tmp_path: Path) -> None:
    voc(tmp_path, train=10, val=3)
    bas = suppression(multilabel=True, guide_classifier=False, alpha=0.2)
    module = localizer(maps=["cam", "cam_mean", "bas", "centre_gaussian"], pictures=1)
    data = LocalizationSet(f"voc:{tmp_path}", image_size=32, batch_size=4)
    run = trainer(bas, logger=CSVLogger("run"))
    run.fit(module, datamodule=data)
    assert len(list(Path("run").rglob("figures/val/localization/*.png"))) == 1
    (value,) = run.test(module, datamodule=data, verbose=False)
    assert sorted(value) == ["test/accuracy", "test/bas/miou", "test/cam/miou", "test/loss"]  # those of one class each
    assert 0 < value["test/bas/miou"] < 1
    assert 0 < module.threshold("bas") < 1
    batch = predicted(run, module, datamodule=data)
    assert batch["probabilities"].shape[1] == 20
