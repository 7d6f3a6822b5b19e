"""Swaps in timm, torchvision and transformers: the traps of each, and the table of coverage."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from benchmarks.swap_architectures import QUICK, architectures
from benchmarks.swap_coverage import measure
from lightning_entropy import CRReLU, swap_activations
from lightning_entropy.activation import register_activation

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")

ALL = architectures()
SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
IDS = torch.arange(3, 9)[None]


@pytest.fixture(autouse=True)
def quiet():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.mark.parametrize("architecture", [a for a in ALL if a.name in QUICK], ids=lambda a: f"{a.library}-{a.name}")
def test_every_activation_that_runs_is_swapped_or_named(architecture):
    row = measure(architecture)
    assert row.ran == row.swapped + row.refused + row.kept
    assert row.unexplained == 0
    assert row.same


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_activation_of_every_architecture():
    assert len(ALL) >= 40
    for architecture in ALL:
        row = measure(architecture)
        assert (row.name, row.unexplained, row.same) == (architecture.name, 0, True)


def test_the_lines_of_the_first_hour():
    model = timm.create_model("vit_tiny_patch16_224")
    report = swap_activations(model, old="gelu", new=CRReLU)
    assert str(report) == "CRReLU: 12 of 12 GELU swapped (blocks.*.mlp.act), +12 parameters; nothing refused"
    report.undo()
    assert isinstance(model.blocks[3].mlp.act, nn.GELU)


def test_norm_act_layers_of_timm_and_their_gates():
    model = timm.create_model("efficientnet_b0")
    report = swap_activations(model, new=CRReLU)
    assert len(report.swapped) == 49
    assert {k.old for k in report.kept} == {"Sigmoid"}
    assert isinstance(model.bn1.act, CRReLU)


@pytest.mark.parametrize(("name", "lines"), [("resnet18", 17), ("googlenet", 57), ("densenet121", 121)])
def test_torchvision_counts_and_zero_eps_is_relu(name, lines):
    arguments = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, **arguments).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(image)
        report = swap_activations(model, old="relu", new=lambda: CRReLU(0.0), example=image)
        assert torch.equal(model(image), before)
    assert sum(s.calls for s in report.swapped) == lines
    assert sum(s.calls > 0 for s in report.swapped) == lines
    assert not report.refused


def test_a_model_that_was_saved_whole_loads_whole(tmp_path):
    model = torchvision.models.densenet121().eval()
    swap_activations(model, old="relu", new=CRReLU, example=torch.randn(1, 3, 64, 64))
    torch.save(model, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(image), model(image))


def test_a_checkpoint_of_the_plain_model_loads_strictly():
    model = torchvision.models.resnet18()
    swap_activations(model, old="relu", new=CRReLU, example=torch.randn(1, 3, 64, 64))
    model.load_state_dict(torchvision.models.resnet18().state_dict(), strict=True)
    assert model.layer1[0].relu_2.eps == 0.01


@pytest.mark.parametrize(("model", "config", "field", "old"), [
    ("GPT2LMHeadModel", {}, "activation_function", "gelu"),
    ("BertForMaskedLM", {}, "hidden_act", "gelu"),
    ("LlamaForCausalLM", {"num_key_value_heads": 2}, "hidden_act", "silu"),
])  # fmt: skip
def test_saved_and_loaded_models_agree(model, config, field, old, tmp_path):
    kind = getattr(transformers, model)
    plain = kind(kind.config_class(**SMALL, **config)).eval()
    plain.save_pretrained(tmp_path / "plain")
    swapped = copy.deepcopy(plain)
    report = swap_activations(swapped, old=old, new=CRReLU)
    assert getattr(swapped.config, field) == "crrelu"
    with torch.no_grad():
        for i, parameter in enumerate(report.parameters()):
            parameter.fill_(0.1 * (i + 1))
    swapped.save_pretrained(tmp_path / "swapped")
    again, told = kind.from_pretrained(tmp_path / "swapped", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert torch.equal(again(input_ids=IDS).logits, swapped(input_ids=IDS).logits)
    # A checkpoint without eps: the initial value, and not whatever was in memory.
    late, told = kind.from_pretrained(tmp_path / "plain", config=swapped.config, output_loading_info=True)
    eps = [p for n, p in late.named_parameters() if n.endswith(".eps")]
    assert len(eps) == len(told["missing_keys"]) == report.added_parameters
    assert all(torch.equal(p, torch.tensor([0.01])) for p in eps)
    assert torch.equal(pickle.loads(pickle.dumps(again))(input_ids=IDS).logits, again(input_ids=IDS).logits)
    report.undo()
    assert getattr(swapped.config, field) == getattr(plain.config, field)
    assert torch.equal(swapped(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_what_no_configuration_describes_is_said(tmp_path):
    model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SMALL))
    report = swap_activations(model, old="gelu", new=CRReLU)
    assert {s.old for s in report.swapped} == {"GELUActivation", "gelu"}
    assert "from_pretrained builds the plain model" in report.note
    assert model.config.hidden_act == "gelu"


def test_gates_of_gated_mlps_are_swapped_only_by_name():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2))
    with pytest.raises(ValueError, match="scales another branch"):
        swap_activations(model, new=CRReLU)
    report = swap_activations(model, old="silu", new=CRReLU)
    assert {s.note for s in report.swapped} == {"scales another branch"}


def test_the_pooler_stays():
    model = transformers.BertModel(transformers.BertConfig(**SMALL))
    report = swap_activations(model, new=CRReLU)
    assert [(k.name, k.old) for k in report.kept] == [("pooler.activation", "Tanh")]


def test_registered_names():
    with pytest.raises(ValueError, match="of its own"):
        register_activation("gelu", nn.GELU)
    register_activation("test_leaky", lambda: nn.PReLU(init=0.3))
    made = transformers.activations.ACT2FN["test_leaky"]
    assert made.weight.item() == pytest.approx(0.3)
    assert transformers.activations.ACT2FN["test_leaky"].weight is not made.weight


def test_peft_freezes_the_new_parameters_unless_they_are_to_be_saved():
    peft = pytest.importorskip("peft")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2))
    report = swap_activations(model, old="silu", new=CRReLU)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["act_fn"], task_type="CAUSAL_LM")
    )
    trained = [n for n, p in wrapped.named_parameters() if p.requires_grad and n.endswith("eps")]
    assert len(trained) == report.added_parameters == 2
