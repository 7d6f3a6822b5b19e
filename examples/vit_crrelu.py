"""CRReLU in the place of every GELU of a timm ViT: ``python examples/vit_crrelu.py [--images FOLDER]``.

FOLDER holds a folder of images for each class (or ``train``, ``val`` and ``test`` with those); without it, digits.
"""

import argparse

import lightning as L
import timm
import torch
from torch import nn

from lightning_entropy import CRReLU, ImageSet, swap_activations


class ViT(L.LightningModule):
    """Any model of timm with a cross-entropy."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(batch["image"]), batch["label"])

    def test_step(self, batch: dict, batch_idx: int) -> None:
        right = self.model(batch["image"]).argmax(-1) == batch["label"]
        self.log("test_accuracy", right.float().mean(), on_epoch=True, batch_size=len(right))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", default="embedded:digits")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args(argv)
    small = {"patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4}  # for digits of 8 x 8 pixels
    sizes = small if options.images == "embedded:digits" else {}
    for activation in ("GELU", "CRReLU"):
        L.seed_everything(0, verbose=False)
        images = ImageSet(options.images, batch_size=64)
        images.setup()
        inputs = {"img_size": images.image_size, "in_chans": images.in_channels, "num_classes": images.num_classes}
        model = timm.create_model(options.model, **inputs, **sizes)
        if activation == "CRReLU":
            print(swap_activations(model, old="gelu", new=CRReLU))
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = L.Trainer(max_epochs=options.epochs, **quiet)
        trainer.fit(module := ViT(model), images.train_dataloader())
        accuracy = trainer.test(module, images.test_dataloader(), verbose=False)[0]["test_accuracy"]
        print(f"{activation}: test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
