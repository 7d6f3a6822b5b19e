from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_entropy.observe import weight_files
from lightning_entropy.observe.spectral_report import spectral_report
from lightning_entropy.observe.weight_files import file_weights


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "wte.weight": draw(20, 8),
        "h.10.attn.c_attn.weight": draw(8, 24),
        "h.2.attn.qkv.weight": draw(24, 8),
        "h.2.attn.qkv.bias": draw(24),
        "h.2.mlp.experts.gate_up_proj": draw(3, 12, 8),
        "h.2.mlp.experts.down_proj": draw(3, 8, 6).bfloat16(),
        "stem.weight": draw(6, 3, 3, 3),
        "pos": draw(1, 5, 8),
        "q.weight": torch.zeros(16, 1, dtype=torch.uint8),
        "s.weight": draw(8, 8).to(torch.float8_e4m3fn),
        "s.weight_scale_inv": draw(1, 1),
        "base_model.model.up.base_layer.weight": draw(8, 4),
        "base_model.model.up.lora_A.weight": draw(2, 4),
    }


def test_linear_maps_are_told_by_their_names_and_shapes(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    found = {weight.name: weight for weight in file_weights(tmp_path)}
    kinds = {name: weight.layout for name, weight in found.items() if weight.refusal is None}
    assert kinds == {
        "h.2.attn.qkv.weight": "linear",
        "h.2.mlp.experts.down_proj": "experts",
        "h.2.mlp.experts.gate_up_proj": "experts",
        "h.10.attn.c_attn.weight": "linear",
        "stem.weight": "conv",
        "up.weight": "linear",
    }
    assert list(kinds)[-3:] == ["h.10.attn.c_attn.weight", "stem.weight", "up.weight"]  # 10 after 2
    assert found["h.10.attn.c_attn.weight"].matrix_shape() == (24, 8)
    assert found["h.10.attn.c_attn.weight"].parts == found["h.2.attn.qkv.weight"].parts == 3
    assert found["h.2.mlp.experts.down_proj"].precision == "bfloat16"
    assert "table of embeddings" in str(found["wte.weight"].refusal)
    assert "no weight of a linear map" in str(found["pos"].refusal)
    assert "U8" in str(found["q.weight"].refusal)
    assert "scales of its own" in str(found["s.weight"].refusal)


def test_a_report_of_files_equals_that_of_the_numbers(tmp_path: Path) -> None:
    numbers = tensors()
    save_file(numbers, tmp_path / "model.safetensors")
    report = spectral_report(tmp_path / "model.safetensors", parts="blocks")
    for part in numbers["h.2.attn.qkv.weight"].chunk(3):
        s = torch.linalg.svdvals(part.double())
        assert report["h.2.attn.qkv.weight"].kappa >= float(s[0] / s[-1]) * (1 - 1e-6)
    s = torch.linalg.svdvals(numbers["stem.weight"].flatten(1).double())
    assert report["stem.weight"].kappa == pytest.approx(float(s[0] / s[-1]), rel=1e-6)


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({f"{i}.weight": torch.randn(32, 16) for i in range(6)}, tmp_path / "model.safetensors")
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    opening = weight_files.safe_open

    class Watched:
        def __init__(self, *arguments: Any, **named: Any) -> None:
            self.opened = opening(*arguments, **named)

        def __enter__(self) -> Watched:
            return self

        def __exit__(self, *error: object) -> None:
            self.opened.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.opened, name)

        def get_tensor(self, key: str) -> Tensor:
            nonlocal most
            gc.collect()
            value: Tensor = self.opened.get_tensor(key)
            alive.append(weakref.ref(value))
            most = max(most, sum(ref() is not None for ref in alive))
            return value

    monkeypatch.setattr(weight_files, "safe_open", Watched)
    assert len(spectral_report(tmp_path)) == len(alive) == 6  # each read once, too
    assert most == 1


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    save_file({"a.weight": torch.randn(4, 3)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b.weight": torch.randn(4, 3)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="has 2 safetensors files and not one index"):
        file_weights(tmp_path)
    places = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert [weight.name for weight in file_weights(tmp_path)] == ["a.weight", "b.weight"]
    assert [weight.name for weight in file_weights(index)] == ["a.weight", "b.weight"]
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names model-00002-of-00002\.safetensors, which is not beside it"):
        file_weights(tmp_path)


def test_what_is_no_such_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        file_weights(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match=r"has no safetensors file \(it has nothing\)"):
        file_weights(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"has no safetensors file \(it has model\.bin\)"):
        file_weights(tmp_path)
    with pytest.raises(ValueError, match="may run code when opened"):
        file_weights(tmp_path / "model.bin")
    (tmp_path / "half.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        file_weights(tmp_path / "half.safetensors")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="lacks a weight_map"):
        file_weights(tmp_path / "x.json")
    save_file({"norm.weight": torch.ones(3)}, tmp_path / "norm.safetensors")
    with pytest.raises(ValueError, match="found no weight of a linear layer"):
        spectral_report(tmp_path / "norm.safetensors")
