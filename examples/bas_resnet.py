"""Boxes from image labels, with BAS on a torchvision ResNet: ``python examples/bas_resnet.py``.

``--images`` takes a folder as in wsolevaluation, ``cub:ROOT`` and others (docs/data.md); then add ``--pretrained``.
"""

import argparse

import lightning as L
import torch
import torchvision
from torch import nn

from lightning_entropy import BackgroundActivationSuppression, LocalizationSet, MaxBoxAccuracyV2
from lightning_entropy.localization import class_maps, draw_localization, resize_maps
from lightning_entropy.training import WeightSchedule


class ResNet(L.LightningModule):
    def __init__(self, classes: int, pretrained: bool) -> None:
        super().__init__()
        self.net = torchvision.models.resnet18(weights="DEFAULT" if pretrained else None)
        self.net.fc = nn.Linear(self.net.fc.in_features, classes)
        self.net.layer4[0].conv1.stride = self.net.layer4[0].downsample[0].stride = (1, 1)  # a finer map

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch["image"]), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=5e-4)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", default="embedded:objects")
    parser.add_argument("--pretrained", action="store_true", help="weights of ImageNet, which are downloaded")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--count", type=int, help="images to train on and to validate on")
    options = parser.parse_args(argv)
    L.seed_everything(0, verbose=False)
    images = LocalizationSet(options.images, train_count=options.count, val_count=options.count)
    images.setup()
    module = ResNet(len(images.classes), options.pretrained)
    # First the classifier alone: where it has no evidence yet, there is nothing to localise.
    bas = BackgroundActivationSuppression("net.layer4", schedule=WeightSchedule("constant", begin=options.epochs // 2))
    trainer = L.Trainer(max_epochs=options.epochs, callbacks=[bas], logger=False, enable_checkpointing=False)
    trainer.fit(module, images.train_dataloader())
    module.eval()
    metrics = {"CAM": MaxBoxAccuracyV2(), "BAS": MaxBoxAccuracyV2()}
    for batch in images.val_dataloader():
        maps = {"CAM": class_maps(module.net, batch["image"], batch["label"], split="layer4")}
        maps["BAS"] = bas.foreground_maps(batch["image"], labels=batch["label"])[0]
        for name, metric in metrics.items():
            metric.update(resize_maps(maps[name], batch["image"].shape[-2:])[:, 0], batch["boxes"])
    print({name: round(metric.compute()["max_box_accuracy_v2"].item(), 3) for name, metric in metrics.items()})
    draw_localization(images.denormalize(batch["image"]), maps["BAS"], truth=batch["boxes"]).savefig("bas.png")


if __name__ == "__main__":
    main()
