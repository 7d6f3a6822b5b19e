"""A LightningModule that knows nothing of lightning_entropy: rows of digit images, read by a transformer.

    lightning-entropy diagnose --model examples.own_module.RowTransformer

diagnoses it as it is built; with ``--checkpoint`` as it was trained.
"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class RowTransformer(L.LightningModule):
    """Eight rows of eight pixels are eight tokens; their mean decides the digit."""

    def __init__(self, width: int = 64, depth: int = 4, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.02 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(images) + self.position).mean(1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def train_dataloader(self) -> DataLoader:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32) / 16
        return DataLoader(TensorDataset(images, torch.tensor(digits.target)), batch_size=64, shuffle=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


if __name__ == "__main__":
    trainer = L.Trainer(max_epochs=5, logger=False, enable_checkpointing=False)
    trainer.fit(RowTransformer())
    trainer.save_checkpoint("rows.ckpt")
