"""What a text classifier has learned before: a source task, trained once for equal settings and kept as a file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_entropy.data.open_source import check_arguments
from lightning_entropy.data.split_items import draw_items
from lightning_entropy.data.text_source import TextSource, open_texts
from lightning_entropy.data.texts import pad_number
from lightning_entropy.data.token_batches import PadTexts, TextBatch, TextDataset
from lightning_entropy.extras import require
from lightning_entropy.files import atomic_write
from lightning_entropy.recipes.classifier import WarmUp
from lightning_entropy.verbosity import announce

Logits = Callable[[TextBatch], Tensor]


@dataclass(frozen=True)
class SourceTask:
    """The task that a classifier is trained on before its own.

    Attributes:
        texts: labelled texts, as :func:`~lightning_entropy.data.text_source.open_texts` reads them.
        count: how many of them, each class in its share.
        epochs: how often each is seen; 0 for no source task.
        lr: learning rate of the whole model, with AdamW.
        max_length: longest text in tokens; what is over is cut.
        batch_size: texts in a batch.
        seed: of the drawing and of the order.

    Raises:
        ValueError: if a value is out of its range.
    """

    texts: str
    count: int = 320
    epochs: int = 1
    lr: float = 1e-4
    max_length: int = 32
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        least = (("count", self.count, 1), ("epochs", self.epochs, 0), ("max_length", self.max_length, 3))
        more = (("batch_size", self.batch_size, 1), ("seed", self.seed, 0))
        check_arguments(least=tuple((f"source_{name}", value, low) for name, value, low in least + more), words=())
        if not (math.isfinite(self.lr) and self.lr >= 0):
            raise ValueError(f"source_lr must be finite and >= 0, got {self.lr}")

    @property
    def steps(self) -> int:
        """Optimizer steps, of as many texts as there are."""
        return self.epochs * math.ceil(self.count / self.batch_size)

    def drawn(self) -> tuple[TextSource, list[int]]:
        """The texts, and which of them are trained on.

        Raises:
            ValueError: if they have no labels.
        """
        source = open_texts(self.texts)
        if not source.classes:
            raise ValueError(f"source_texts {self.texts!r} have no labels")
        among = [i for i, split in enumerate(source.splits or ["train"] * len(source.texts)) if split == "train"]
        return source, draw_items(source.labels, among, self.count, seed=self.seed)


def train_on_source(
    module: nn.Module,
    task: SourceTask,
    *,
    tokenizer: Any,
    logits: Logits,
    num_classes: int,
    cache: str | Path | None = None,
) -> dict[str, float]:
    """Train all of a module on the source task, or read the weights of an earlier training with equal settings.

    Equal means: the settings of the task, its texts, the module's weights before it, and the versions of torch and
    transformers; a hash of these is the name of the file. The file is written whole or not at all. Two processes that
    start together both train, and write the same. The random states are afterwards as before, so that what follows does
    not depend on whether the file was there.

    Args:
        module: changed in place; it keeps its mode and its device.
        task: what it is trained on.
        tokenizer: of transformers.
        logits: from a batch, by the module.
        num_classes: of the module.
        cache: folder of the files; None keeps none.

    Returns:
        ``loss`` and ``accuracy``, the means over the last epoch of the source task as it was trained; empty where it
        has no epoch.

    Raises:
        ValueError: if the texts cannot be used, have another number of classes, or the loss is not finite.
    """
    if task.epochs == 0:
        return {}
    source, indices = task.drawn()
    if len(source.classes) != num_classes:
        raise ValueError(
            f"the source task {task.texts!r} has {len(source.classes)} classes and the target task {num_classes}: the "
            "head is kept, so that both must have as many"
        )
    file = None if cache is None else Path(cache) / f"{_name(module, task, source, indices)}.safetensors"
    if file is not None and file.is_file():
        found = _read(module, file)
        announce(f"source task: {task.steps} steps on {task.texts} are in {file} already")
        return found
    data = TextDataset(source, indices=indices, tokenizer=tokenizer, max_length=task.max_length)
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
    modes = [(part, part.training) for part in module.modules()]
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(task.seed)
        module.train()
        found = _train(module, task, data, pad=pad_number(tokenizer), logits=logits)
    for part, mode in modes:
        part.training = mode
    told = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
    announce(f"source task: {task.epochs} epochs of {len(data)} texts of {task.texts}: {told} in the last")
    if file is not None:
        _write(module, file, {**asdict(task), **found})
    return found


def _train(module: nn.Module, task: SourceTask, data: TextDataset, *, pad: int, logits: Logits) -> dict[str, float]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    place = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=task.lr, weight_decay=0.0)
    scheduler = LambdaLR(optimizer, WarmUp(max(1, min(task.steps // 5, 10))))
    order = torch.Generator().manual_seed(task.seed)
    collate = PadTexts(pad).labelled
    losses: list[Tensor] = []
    right: list[Tensor] = []
    for _ in range(task.epochs):
        losses, right = [], []
        for chosen in torch.randperm(len(data), generator=order).split(task.batch_size):
            batch = collate([data[i] for i in chosen.tolist()])
            for key in ("input_ids", "attention_mask", "label"):
                batch[key] = batch[key].to(place)  # type: ignore[literal-required]
            found = logits(batch)
            each = F.cross_entropy(found.float(), batch["label"], reduction="none")
            optimizer.zero_grad(set_to_none=True)
            each.mean().backward()
            optimizer.step()
            scheduler.step()
            losses.append(each.detach())
            right.append(found.detach().argmax(dim=1) == batch["label"])
    optimizer.zero_grad(set_to_none=True)
    loss = float(torch.cat(losses).mean())
    if not math.isfinite(loss):
        raise ValueError(f"the loss of the source task became {loss}: a smaller source_lr than {task.lr:g} may help")
    return {"loss": loss, "accuracy": float(torch.cat(right).float().mean())}


def _name(module: nn.Module, task: SourceTask, source: TextSource, indices: list[int]) -> str:
    """A hash of all that the trained weights depend on."""
    transformers = require("transformers", extra="finetuning")
    texts = [(source.texts[i], source.labels[i]) for i in indices]
    settings = [asdict(task), texts, torch.__version__, transformers.__version__]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:20]


def _read(module: nn.Module, file: Path) -> dict[str, float]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stored:
        module.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
        told = json.loads(stored.metadata()["source_task"])
    return {name: told[name] for name in ("loss", "accuracy")}


def _write(module: nn.Module, file: Path, told: dict[str, Any]) -> None:
    from safetensors.torch import save

    weights = {name: value.detach().cpu().clone().contiguous() for name, value in module.state_dict().items()}
    with atomic_write(file) as temporary:
        # save_file hides a full disk.
        temporary.write_bytes(save(weights, metadata={"source_task": json.dumps(told)}))


__all__ = ["SourceTask", "train_on_source"]
