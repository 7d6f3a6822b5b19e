"""Adapters in the inflection layers of a ViT: ``python examples/inflection_lora.py [--layers random]``.

The ViT learns the digits 0 to 4 and is then adapted to 5 to 9. Put your model and its checkpoint first.
"""

import argparse

import lightning as L
import timm
import torch
from torch.utils.data import DataLoader

from lightning_entropy import ImageSet, InflectionLoRA
from lightning_entropy.surgery import merge_lora


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"img_size": 8, "in_chans": 1, "patch_size": 2, "embed_dim": 64, "depth": 6, "num_heads": 4}
        self.model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes)

    def training_step(self, batch: list, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def test_step(self, batch: list, batch_idx: int) -> None:
        right = self.model(batch[0]).argmax(-1) == batch[1]
        self.log("test_accuracy", right.float().mean(), batch_size=len(right))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def digits(images: ImageSet, part: str, first: int) -> DataLoader:
    items = [(i["image"], i["label"] - first) for i in getattr(images, part) if 0 <= i["label"] - first < 5]
    return DataLoader(items, batch_size=32, shuffle=part == "train")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=15, help="of each task (%(default)s)")
    parser.add_argument("--layers", choices=["random", "all"], help="a control instead of the inflection layers")
    options = parser.parse_args(argv)
    L.seed_everything(0, verbose=False)
    module, images = Digits(), ImageSet("embedded:digits")
    images.setup()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    L.Trainer(max_epochs=options.epochs, **quiet).fit(module, digits(images, "train", 0))
    lora = InflectionLoRA(layers=options.layers, every_n_epochs=5)
    trainer = L.Trainer(max_epochs=options.epochs, callbacks=[lora], **quiet)
    trainer.fit(module, digits(images, "train", 5))
    print(lora.diagnosis_made)
    print("gradient, times that before the first step:", [round(reading.recovery, 2) for reading in lora.readings])
    merge_lora(module)  # a plain timm model again
    print(trainer.test(module, digits(images, "test", 5), verbose=False)[0])


if __name__ == "__main__":
    main()
