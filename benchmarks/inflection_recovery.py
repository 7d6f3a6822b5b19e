"""How much of a blocked gradient comes back when adapters are put into the layers that block it, and into others.

A small transformer learns the 8 x 8 digits of scikit-learn, a token a row. Then two of its eight layers are blocked:
queries and keys times 8 (attention saturates), a skip connection of 0.3 and branches times 1e-3 (what comes back
through them is almost nothing). InflectionLoRA finds them and trains; the controls train adapters in as many random
layers, in all layers, and the head alone. The factor is the geometric mean of G now / G at the start at the inputs of
the blocked layers and those below them, on held-out digits; beside it the same divided by the output error, and the
test accuracy.

    python benchmarks/inflection_recovery.py [--seeds 3] [--steps 150] [--lr 0.003]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_entropy import InflectionLoRA, set_verbosity
from lightning_entropy.finetuning import diagnose_layers
from lightning_entropy.surgery import train_only
from lightning_entropy.training.signal_recovery import signal_recovery

BLOCKED = (2, 5)


class Block(nn.Module):
    """Pre-norm, with a factor on its skip connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.skip = heads, 1.0
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = self.skip * x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.skip * x + self.mlp(self.norm2(x))


class Digits(LightningModule):
    """Rows of a digit in, ten logits out."""

    def __init__(self, lr: float, width: int = 32) -> None:
        super().__init__()
        self.lr = lr
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(torch.randn(8, width) * 0.1)
        self.blocks = nn.Sequential(*[Block(width, 4) for _ in range(8)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x) + self.position).mean(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


@torch.no_grad()
def block(model: Digits) -> None:
    for i in BLOCKED:
        layer: Any = model.blocks[i]
        for linear in (layer.query, layer.key):
            linear.weight.mul_(8)
            linear.bias.mul_(8)
        layer.skip = 0.3
        for linear in (layer.out, layer.mlp[2]):
            linear.weight.mul_(1e-3)


def fit(model: Digits, train: DataLoader, steps: int, callbacks: list[Any], folder: str) -> None:
    Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
    ).fit(model, train)


def run(arm: str, seed: int, options: argparse.Namespace, folder: str) -> tuple[float, float, float, str]:
    digits = load_digits()
    x, y = torch.tensor(digits.images / 16).float(), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    train = DataLoader(TensorDataset(x[:1200], y[:1200]), batch_size=32, shuffle=True, generator=generator)
    held = [[x[1200:1456], y[1200:1456]]]
    model = Digits(options.lr)
    fit(model, train, options.steps, [], folder)
    block(model)
    start = diagnose_layers(model, held, rule="intersection")
    chosen = [f"blocks.{i}" for i in BLOCKED]
    taken, callbacks = "", []
    if arm == "head":
        train_only(model, ["head.weight", "head.bias"])
    elif arm != "blocked":
        rules: dict[str, Any] = {
            "inflection": {},
            "random": {"layers": "random", "seed": seed},
            "all": {"layers": "all"},
        }
        callbacks = [InflectionLoRA(rule="intersection", rank=4, batches=4, **rules[arm])]
    if arm != "blocked":
        fit(model, train, options.steps, callbacks, folder)
        taken = ",".join(name.rpartition(".")[2] for name in callbacks[0].layers_taken) if callbacks else ""
    now = diagnose_layers(model, held, rule="decay")
    found = signal_recovery(start, now, chosen, options.steps)
    with torch.no_grad():
        accuracy = float((model.eval()(x[1456:]).argmax(1) == y[1456:]).double().mean())
    return found.recovery, found.relative_recovery, accuracy, taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=3e-3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    set_verbosity("error")
    warnings.simplefilter("ignore")
    print(f"layers {BLOCKED} of 8 blocked, {options.steps} steps, {options.seeds} seeds: median (least to most)")
    print(f"{'arm':11s} {'recovery':>24s} {'/ output error':>24s} {'test accuracy':>24s}  layers")
    with tempfile.TemporaryDirectory() as folder:
        for arm in ("blocked", "head", "random", "all", "inflection"):
            rows = [run(arm, seed, options, folder) for seed in range(options.seeds)]
            cells = []
            for i, style in enumerate((".2f", ".2f", ".3f")):
                values = [float(row[i]) for row in rows]  # type: ignore[arg-type]
                told = f"{statistics.median(values):{style}} ({min(values):{style}} to {max(values):{style}})"
                cells.append(f"{told:>24s}")
            print(f"{arm:11s} {' '.join(cells)}  {'; '.join(row[3] for row in rows)}", flush=True)


if __name__ == "__main__":
    main()
