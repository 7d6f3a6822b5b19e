"""Small transformers whose blocked layers are known, and what the diagnosis is compared with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_entropy.finetuning import LayerDiagnosis

Batch = dict[str, Tensor]
QUANTITIES = ("entropy", "entropy_nats", "gradient", "input_gradient", "relative_gradient", "parameter_gradient")


class Block(nn.Module):
    """A pre- or post-norm block with separate projections."""

    def __init__(self, width: int, heads: int, pre: bool) -> None:
        super().__init__()
        self.heads, self.pre, self.skip = heads, pre, 1.0
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.pre:
            x = self.skip * x + self.attend(self.norm1(x), mask)
            return self.skip * x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attend(x, mask))
        return self.norm2(x + self.mlp(x))


class Encoder(nn.Module):
    """Features in, logits out; keeps its hidden states."""

    def __init__(
        self, depth: int = 8, width: int = 32, heads: int = 4, pre: bool = True, batch_norm: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width, heads, pre) for _ in range(depth))
        self.norm = nn.BatchNorm1d(width) if batch_norm else nn.Identity()
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(width, 3)
        self.hidden: list[Tensor] = []

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        self.hidden = [self.embed(x)]
        for block in self.blocks:
            self.hidden.append(block(self.hidden[-1], mask))
        pooled = (self.hidden[-1] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.head(self.drop(self.norm(pooled)))


class Classifier(LightningModule):
    """A user's LightningModule that logs, keeps a metric, and counts."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.net = Encoder(**options)
        self.accuracy = MulticlassAccuracy(3)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        z = self.net(batch["x"], batch["mask"])
        self.accuracy(z, batch["y"])
        self.log("accuracy", self.accuracy)
        return F.cross_entropy(z, batch["y"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def saturate(model: Encoder, layers: tuple[int, ...], factor: float = 8.0) -> Encoder:
    """Scale queries and keys."""
    with torch.no_grad():
        for i in layers:
            for linear in (model.blocks[i].query, model.blocks[i].key):
                linear.weight.mul_(factor)
                linear.bias.mul_(factor)
    return model


def block_gradient(model: Encoder, layers: tuple[int, ...]) -> Encoder:
    """A weak skip and branches that give almost nothing: what comes back through them is almost nothing too."""
    with torch.no_grad():
        for i in layers:
            model.blocks[i].skip = 0.3
            for linear in (model.blocks[i].out, model.blocks[i].mlp[2]):
                linear.weight.mul_(1e-3)
    return model


def batches(
    count: int = 2, size: int = 16, tokens: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Batch]:
    """Padded batches."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        x = torch.randn(size, tokens, 8, generator=generator, dtype=dtype)
        lengths = torch.randint(tokens // 2, tokens + 1, (size,), generator=generator)
        mask = torch.arange(tokens) < lengths[:, None]
        out.append({"x": x, "mask": mask, "y": torch.randint(0, 3, (size,), generator=generator)})
    return out


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"], batch["mask"]), batch["y"])


def padded(batch: Batch, extra: int) -> Batch:
    """The batch with more tokens that do not exist."""
    x, mask = batch["x"], batch["mask"]
    more = torch.randn(len(x), extra, x.shape[-1], dtype=x.dtype)
    return {**batch, "x": torch.cat([x, more], 1), "mask": F.pad(mask, (0, extra))}


def model(seed: int = 0, **options: Any) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(**{"depth": 3, **options}).eval()


def close(a: LayerDiagnosis, b: LayerDiagnosis, rel: float = 1e-6) -> None:
    assert a.layers == b.layers
    for one, other in zip(a.rows, b.rows):
        for name in QUANTITIES:
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=rel), (one.layer, name)
