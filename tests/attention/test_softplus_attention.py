"""LSSA and LSSAR in models: timm by surgery, transformers by name, and a Trainer."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_entropy.attention.softplus_attention import (
    SoftplusAttention,
    register_softplus_attention,
    use_softplus_attention,
)
from lightning_entropy.functional.softplus_attention import lssa_attention, lssar_attention


def gpt2(name: str = "sdpa") -> nn.Module:
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = t.GPT2Config(
        vocab_size=50,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=None,
        attn_implementation=name,
    )
    return t.GPT2LMHeadModel(config).eval()


def llama(name: str = "sdpa") -> nn.Module:
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = t.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation=name,
    )
    return t.LlamaForCausalLM(config).eval()


def ids(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(1, 50, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _registered() -> None:
    pytest.importorskip("transformers")
    assert register_softplus_attention() == ("lssa", "lssar")


@pytest.mark.parametrize("name", ["lssa", "lssar"])
@pytest.mark.parametrize("build", [gpt2, llama])
def test_the_name_and_the_surgery_are_the_same_attention(build: Any, name: str) -> None:
    with torch.no_grad():
        named, operated = build(name), build()
        report = use_softplus_attention(operated, variant=name)
        assert len(report.changes) == 2
        plain = build()(ids()).logits
        got = named(ids()).logits
        torch.testing.assert_close(operated(ids()).logits, got)
        assert not torch.allclose(got, plain, atol=1e-4)
        report.undo()
        assert torch.equal(operated(ids()).logits, plain)


@pytest.mark.parametrize("name", ["lssa", "lssar"])
@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("how", ["name", "surgery"])
def test_generation_with_a_cache_equals_the_whole_forward(build: Any, name: str, how: str) -> None:
    model = build(name if how == "name" else "sdpa")
    if how == "surgery":
        use_softplus_attention(model, variant=name)
    prompt = ids(1, 5)
    with torch.no_grad():
        out = model.generate(
            prompt, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        whole = model(out.sequences).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, 4:-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lssa", "lssar"])
def test_padding_on_the_left_is_as_if_it_were_not_there(name: str) -> None:
    model = llama(name)
    tokens = ids(1, 7)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens], 1)
    both = torch.cat([padded, ids(1, 11)])
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        alone = model(tokens).logits[0]
        out = model(both, attention_mask=mask).logits
    assert out.isfinite().all()
    torch.testing.assert_close(out[0, 4:], alone, rtol=1e-4, atol=1e-5)


def test_bidirectional_models_see_every_key() -> None:
    t = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    kept: list[tuple[Tensor, ...]] = []

    def watch(*args: Any) -> Tensor:
        kept.append(args)
        return lssa_attention(*args)

    model = t.ViTModel(t.ViTConfig(image_size=32, patch_size=8, attn_implementation="lssa", **sizes)).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.AttentionInterface()["lssa"], "attention", watch)
        model(pixel_values=torch.randn(2, 3, 32, 32))
    ((_, key, _, mask, _, causal, *_),) = kept
    assert (key.shape[-2], mask, causal) == (17, None, False)


def test_t5_with_its_position_bias() -> None:
    t = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    torch.manual_seed(0)
    config = t.T5Config(decoder_start_token_id=0, attn_implementation="lssar", **sizes)
    model = t.T5Model(config).eval()
    config2 = t.T5Config(decoder_start_token_id=0, attn_implementation="sdpa", **sizes)
    twin = t.T5Model(config2).eval()
    twin.load_state_dict(model.state_dict())
    use_softplus_attention(twin)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    inputs = {"input_ids": ids(), "attention_mask": mask, "decoder_input_ids": ids(2, 5)}
    torch.testing.assert_close(model(**inputs).last_hidden_state, twin(**inputs).last_hidden_state)


def test_what_softplus_attention_has_no_place_for_is_refused() -> None:
    t = pytest.importorskip("transformers")
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r'attn_implementation="lssa": Linear passes softcap'):
        t.AttentionInterface()["lssa"](nn.Linear(1, 1), x, x, x, None, softcap=5.0)


def test_trains_by_name() -> None:
    model = llama("lssar").train()
    model(ids(), labels=ids()).loss.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("variant", ["lssa", "lssar"])
def test_timm(variant: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1).eval()
    x = torch.randn(2, 3, 32, 32)
    block = model.blocks[0]
    with torch.no_grad():
        plain = model.forward_features(x)
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        q, k, v = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, 3, 64)).permute(2, 0, 3, 1, 4)
        attention = lssa_attention if variant == "lssa" else lssar_attention
        mixed = tokens + block.ls1(block.attn.proj(attention(q, k, v).transpose(1, 2).flatten(2)))
        expected = model.norm(mixed + block.ls2(block.mlp(block.norm2(mixed))))
        report = use_softplus_attention(model, variant=variant)
        torch.testing.assert_close(model.forward_features(x), expected)
        report.undo()
        assert torch.equal(model.forward_features(x), plain)


def test_multi_head_attention_returns_its_weights() -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    use_softplus_attention(module)
    x = torch.randn(2, 9, 8)
    out, weights = module(x, x, x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9))
    assert (weights == 0).any()  # re-weighting leaves keys out
    assert out.shape == x.shape


class Vision(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 2)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.layer(batch[0]).mean(1)), batch[1])

    test_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader() -> Any:
    g = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(8, 6, 8, generator=g), torch.randint(0, 2, (8,), generator=g))
    return torch.utils.data.DataLoader(data, batch_size=4)


def trainer(tmp_path: Any, *callbacks: Any, **options: Any) -> L.Trainer:
    return L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_in_a_trainer(tmp_path: Any) -> None:
    callback, module = SoftplusAttention(power=3), Vision()
    run = trainer(tmp_path, callback)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert callback.report is not None
    assert [c.module for c in callback.report.changes] == ["layer.self_attn"]
    run.test(module, loader(), verbose=False)
    plain = Vision()
    plain.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
    x = torch.randn(1, 6, 8)
    with torch.no_grad():
        assert not torch.allclose(module.eval().layer(x), plain.eval().layer(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "softplus"}, "variant must be one of lssa, lssar, got 'softplus'"),
        ({"power": 0}, "power must be finite and at least 1, got 0"),
        ({"offset_rows": -1}, "offset_rows must not be negative"),
    ],
)
def test_refuses_arguments_at_once(arguments: dict[str, Any], message: str) -> None:
    for make in (SoftplusAttention, lambda **a: use_softplus_attention(nn.Linear(1, 1), **a)):
        with pytest.raises(ValueError, match=message):
            make(**arguments)


def test_nothing_to_attach_to() -> None:
    with pytest.raises(ValueError, match="SoftplusAttention found no attention in Sequential"):
        use_softplus_attention(nn.Sequential(nn.Linear(2, 2)))
