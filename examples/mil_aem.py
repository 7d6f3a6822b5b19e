"""AEM on an attention MIL classifier of one's own: ``python examples/mil_aem.py``.

Bags of digit images, a tenth of which decide the label. Put your classifier in the place of ``MyMIL`` and your loaders
in that of ``SlideBags``: a method of this package needs neither of its own.
"""

import argparse

import lightning as L
import torch
from torch import nn

from lightning_entropy import AttentionEntropyMaximization, SlideBags


class MyMIL(L.LightningModule):
    """A scored, weighted mean over the instances of a bag, and a linear layer."""

    def __init__(self, features: int, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(features, width), nn.ReLU())
        self.score, self.head = nn.Linear(width, 1), nn.Linear(width, 2)

    def forward(self, features: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
        x = self.body(features)
        scores = self.score(x)[..., 0].masked_fill(~exists, -torch.inf)
        return self.head((torch.softmax(scores, dim=-1)[:, None] @ x)[:, 0])

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch["features"], batch["mask"]), batch["label"])

    def test_step(self, batch: dict, batch_idx: int) -> None:
        right = self(batch["features"], batch["mask"]).argmax(-1) == batch["label"]
        self.log("test_accuracy", right.float().mean(), on_epoch=True, batch_size=len(right))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=5e-4, weight_decay=1e-4)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=50)
    options = parser.parse_args(argv)
    for weight in (0.0, 0.2):  # at weight 0 the run is that without the callback, which still reads the attention
        L.seed_everything(0, verbose=False)
        bags = SlideBags("embedded:digits")
        bags.setup()
        aem = AttentionEntropyMaximization(weight=weight)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = L.Trainer(max_epochs=options.epochs, accelerator="cpu", callbacks=[aem], **quiet)
        trainer.fit(module := MyMIL(bags.in_features), bags.train_dataloader())
        attended = trainer.callback_metrics["aem/effective_number"]
        accuracy = trainer.test(module, bags.test_dataloader(), verbose=False)[0]["test_accuracy"]
        print(f"weight {weight}: attends to {attended:.1f} instances of a bag, test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
