from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_entropy.surgery.lora import inject_lora, merge_lora
from lightning_entropy.surgery.lora_files import adapted_in, adapter_state_dict, save_adapter
from tests.surgery.test_lora import Net, encoder, fill

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def loaded(plain: nn.Module, folder: Path) -> nn.Module:
    """What plain peft makes of the file; in evaluation peft itself falls into torch's fast path."""
    mode = plain.training
    return peft.PeftModel.from_pretrained(plain, str(folder)).train(mode)


def test_plain_peft_computes_the_same(tmp_path: Path) -> None:
    model, x = Net(), torch.randn(3, 6)
    plain = copy.deepcopy(model)
    inject_lora(model, ["fc.weight", "blocks.1.0.weight"], rank=2, alpha=3, also_train="head.fc")
    expected = fill(model)(x)
    save_adapter(model, tmp_path / "adapter")
    other = loaded(plain, tmp_path / "adapter")
    assert torch.equal(other(x), expected)
    torch.testing.assert_close(other.merge_and_unload()(x), expected, rtol=1e-5, atol=1e-6)
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert named == r"fc|blocks\.1\.0"  # as a list, "fc" would be taken for head.fc too


def test_names_of_trained_modules_that_end_like_others(tmp_path: Path) -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.subhead, self.head, self.body = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.head(self.subhead(self.body(x)))

    model, x = Twins(), torch.randn(2, 3)
    plain = copy.deepcopy(model)
    inject_lora(model, ["body"], rank=1, also_train="head")
    expected = fill(model)(x)
    save_adapter(model, tmp_path)
    assert torch.equal(loaded(plain, tmp_path)(x), expected)


def test_attention(tmp_path: Path) -> None:
    model, x = encoder().double(), torch.randn(2, 5, 16).double()
    plain = copy.deepcopy(model)
    inject_lora(model, ["layers.0.self_attn.in_proj_weight", "layers.1.linear1.weight"], rank=2, norms=True)
    expected = fill(model)(x)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(loaded(plain, tmp_path)(x), expected)


def test_output_projections_that_peft_adds_twice_are_not_saved_for_it(tmp_path: Path) -> None:
    model = encoder()
    inject_lora(model, ["layers.0.self_attn.out_proj.weight"], rank=2)
    save_adapter(model, tmp_path / "untrained")
    fill(model)
    with pytest.raises(ValueError, match=r"layers.0.self_attn cannot be saved for peft.*twice.*merge_lora"):
        save_adapter(model, tmp_path / "trained")


def test_two_ranks_in_one_file(tmp_path: Path) -> None:
    model, x = Net(), torch.randn(3, 6)
    plain = copy.deepcopy(model)
    inject_lora(model, ["fc.weight", "blocks.10.0.weight"], rank=1, alpha=2)
    inject_lora(model, ["blocks.1.0.weight"], rank=3, alpha=5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    expected = fill(model)(x)
    save_adapter(model, tmp_path)
    assert torch.equal(loaded(plain, tmp_path)(x), expected)


def tiny(kind: str) -> tuple[nn.Module, list[str]]:
    transformers = pytest.importorskip("transformers")
    if kind == "bert":
        sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
        config = transformers.BertConfig(**sizes, num_attention_heads=2)
        return transformers.BertModel(config), ["encoder.layer.1.intermediate.dense.weight"]
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config), ["transformer.h.0.mlp.c_fc.weight", "transformer.h.1.attn.c_attn"]
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    experts = "model.layers.0.mlp.experts."
    names = [f"{experts}gate_up_proj", f"{experts}down_proj", "model.layers.1.self_attn.q_proj.weight"]
    return transformers.MixtralForCausalLM(config), names


@pytest.mark.parametrize("kind", ["bert", "gpt2", "mixtral"])
def test_models_of_transformers(kind: str, tmp_path: Path) -> None:
    model, names = tiny(kind)
    model.eval()
    plain = copy.deepcopy(model)
    x = torch.randint(0, 50, (2, 7))
    before = model(input_ids=x)[0]
    report = inject_lora(model, names, rank=2, alpha=4)
    assert len(report.changes) == len(names)
    assert torch.equal(model(input_ids=x)[0], before)
    fill(model)
    expected = model(input_ids=x)[0]
    assert not torch.allclose(expected, before)
    expected.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    save_adapter(model, tmp_path)
    assert torch.equal(loaded(copy.deepcopy(plain), tmp_path)(input_ids=x)[0], expected)
    merge_lora(model)
    torch.testing.assert_close(model(input_ids=x)[0], expected, rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) == set(plain.state_dict())
    report.undo()
    assert set(model.state_dict()) == set(plain.state_dict())


def test_stacks_of_experts_have_no_dropout() -> None:
    model, names = tiny("mixtral")
    report = inject_lora(model, names, rank=2, dropout=0.1)
    assert [change.module for change in report.changes] == ["model.layers.1.self_attn.q_proj"]
    assert all("pass dropout=0" in refusal.reason for refusal in report.refused)


def test_keys_tell_what_was_adapted() -> None:
    model = encoder()
    names = ["layers.0.self_attn", "layers.1.linear1"]
    inject_lora(model, names, rank=2)
    assert set(adapted_in(model.state_dict())) == {*names, "layers.0.self_attn.out_proj"}
    assert all(key.startswith("base_model.model.layers.") for key in adapter_state_dict(model))


def test_what_a_file_cannot_hold() -> None:
    with pytest.raises(ValueError, match="has no adapter to save"):
        adapter_state_dict(Net())
    model = Net()
    inject_lora(model, ["fc"], rank=1)
    model.fc.base_layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="trained under an adapter"):
        adapter_state_dict(model)
    model.fc.base_layer.weight.requires_grad_(False)
    model.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="scale is trained and belongs to the model itself"):
        adapter_state_dict(model)
