from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_entropy import __version__
from lightning_entropy.cli import COMMANDS, main
from lightning_entropy.recipes import MILClassifier
from lightning_entropy.recipes.checkpoints import latest_checkpoint
from lightning_entropy.recipes.predictions import write_predictions

SMALL = [
    "--data.options={train_bags: 8, val_bags: 6, test_bags: 8, bag_size: 12, witness_rate: 0.3}",
    "--model.hidden=4",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=1",
]
pytestmark = [
    # Lightning's own remark on evaluating in another folder than that of the training.
    pytest.mark.filterwarnings("ignore:.*The dirpath has changed.*"),
]


def fit(*more: str, epochs: int = 2, root: str = "run") -> int:
    return main(
        [
            "fit",
            "--recipe",
            "mil",
            f"--trainer.max_epochs={epochs}",
            f"--trainer.default_root_dir={root}",
            *SMALL,
            *more,
        ]
    )


def checkpoint(root: str, which: str = "last") -> dict[str, Any]:
    return torch.load(latest_checkpoint(root, which), weights_only=True)


def test_fit_test_validate_predict(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit() == 0
    config = yaml.safe_load(next(Path("run").glob("**/config.yaml")).read_text())
    assert config["model"]["hidden"] == 4
    assert config["trainer"]["callbacks"][0]["class_path"] == "lightning_entropy.AttentionEntropyMaximization"
    for command in ("validate", "test"):
        capsys.readouterr()
        root = "--trainer.default_root_dir=run"
        assert main([command, "--recipe", "mil", "--ckpt_path", "best", root, *SMALL]) == 0
        stage = {"validate": "val", "test": "test"}[command]
        assert f"{stage}/auc" in capsys.readouterr().out
    path = str(latest_checkpoint("run", "best"))
    arguments = ["--ckpt_path", path, "--predictions", "out/p.csv", "--data.predict_split", "test", *SMALL]
    assert main(["predict", "--recipe", "mil", *arguments]) == 0
    rows = list(csv.DictReader(Path("out/p.csv").read_text().splitlines()))
    assert len(rows) == 8
    assert rows[0]["slide"] == "test-000"
    probabilities = [float(v) for k, v in rows[0].items() if k.startswith("probability_")]
    assert sum(probabilities) == pytest.approx(1, abs=1e-5)
    assert rows[0]["prediction"] in ("without 9", "with 9")
    assert MILClassifier.load_from_checkpoint(path, weights_only=True).num_classes == 2


def test_a_second_run_and_the_saved_configuration(tmp_path: Path) -> None:
    assert fit(epochs=1) == 0
    assert fit(epochs=1) == 0
    saved = sorted(Path("run").glob("**/config.yaml"))
    assert len(saved) == 2
    again = ["fit", "--config", str(saved[0]), "--trainer.default_root_dir=third"]
    assert main(again) == 0
    ours, theirs = (checkpoint(root)["state_dict"] for root in ("run", "third"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_resume_is_bitwise_and_keeps_the_best_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit(epochs=4, root="whole") == 0
    original = MILClassifier.training_step

    def dies(self: MILClassifier, batch: Any, batch_index: int) -> Any:
        if self.current_epoch == 2 and batch_index == 3:
            raise RuntimeError("power cut")
        return original(self, batch, batch_index)

    monkeypatch.setattr(MILClassifier, "training_step", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(epochs=4, root="cut")
    monkeypatch.setattr(MILClassifier, "training_step", original)
    assert checkpoint("cut")["epoch"] == 1
    assert fit("--ckpt_path", "last", epochs=4, root="cut") == 0
    whole, resumed = checkpoint("whole"), checkpoint("cut")
    assert whole["epoch"] == resumed["epoch"] == 3
    assert whole["global_step"] == resumed["global_step"]
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][key]), key
    best = [latest_checkpoint(root, "best").name for root in ("whole", "cut")]
    assert best[0] == best[1]


def test_other_models_and_no_aem() -> None:
    pytest.importorskip("torchmil")
    assert fit("--model.model=torchmil:DSMIL", epochs=1) == 0
    assert main(["test", "--recipe=mil", "--ckpt_path=last", "--trainer.default_root_dir=run", *SMALL]) == 0
    assert fit("--trainer.callbacks=null", "--model.pooling=mean", epochs=1, root="mean") == 0


def test_recipes_lists_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^mil_ucsb +58 breast", out, re.MULTILINE)
    assert re.search(r"^vit-stability +a small ViT", out, re.MULTILINE)
    assert "--vary aem=off,constant,cosine,top_k,mean_pooling" in out
    assert main(["recipes", "--show", "mil"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["model"] == "abmil"
    assert main(["recipes", "--show", "vit-stability"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["images"] == "embedded:digits"


def test_compare(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", "--recipe", "mil_digits", "--vary", "aem=off,top_k", "--vary", "model.lr=1e-3"]
    arguments += ["--seeds", "1", "--output", "out", "--trainer.max_epochs", "1", *SMALL[:2]]
    assert main(arguments) == 0
    assert "top_k, lr=1e-3" in capsys.readouterr().out
    assert sorted(p.name for p in Path("out/runs").iterdir()) == ["off-lr-1e-3-seed0.json", "top_k-lr-1e-3-seed0.json"]
    assert main(arguments) == 0


def test_heatmap_is_handed_over(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["heatmap", "--help"])
    assert stop.value.code == 0
    assert "--checkpoint" in capsys.readouterr().out
    assert main(["heatmap", "--checkpoint", "no.ckpt", "--features", "no.h5"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ftt"], "Did you mean 'fit'"),
        (["fit"], "needs --recipe NAME"),
        (["fit", "--recipe"], "needs a value"),
        (["fit", "--recipe", "mill"], "Did you mean 'mil'"),
        (["test", "--recipe", "mil", "--ckpt_path", "best"], "no last.ckpt under"),
        (["recipes", "--show", "nothing"], "there are mil"),
        (["compare", "--vary", "aem"], "KEY=VALUE"),
        (["compare", "--vary", "aem=off", "--sedes", "3"], "--sedes"),
        (["compare", "--vary", "aem=off", "--model.lr"], "needs a value"),
        (["compare", "--vary", "aem=nothing"], "it has off"),
        (["compare", "--recipe", "x", "--vary", "aem=off"], "there is no recipe"),
    ],
)
def test_usage_errors_help(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["help"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert all(command in out for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-entropy {__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from lightning_entropy.cli import main; main(['--help']); main(['recipes']);"
        "heavy = {'torch', 'lightning', 'pytorch_lightning', 'matplotlib', 'torchmil'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_latest_checkpoint_follows_a_moved_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="fit first"):
        latest_checkpoint(tmp_path, "last")
    (tmp_path / "best.ckpt").touch()
    state = {"state_dict": {}, "callbacks": {"ModelCheckpoint{...}": {"best_model_path": "/elsewhere/best.ckpt"}}}
    torch.save(state, tmp_path / "last.ckpt")
    assert latest_checkpoint(tmp_path, "best") == tmp_path / "best.ckpt"
    (tmp_path / "best.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match="is gone"):
        latest_checkpoint(tmp_path, "best")
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    with pytest.raises(FileNotFoundError, match="use last"):
        latest_checkpoint(tmp_path, "best")


def test_predictions_name_classes_or_numbers(tmp_path: Path) -> None:
    batch = {"slide": ["b", "a"], "probabilities": torch.tensor([[0.2, 0.8], [0.75, 0.25]])}
    path = write_predictions([batch, batch], tmp_path / "p.csv")
    expected = "slide,prediction,probability_0,probability_1\na,0,0.750000,0.250000\nb,1,0.200000,0.800000\n"
    assert path.read_text().replace("\r\n", "\n") == expected
    with pytest.raises(ValueError, match="no prediction"):
        write_predictions([], tmp_path / "q.csv")


@pytest.mark.slow
def test_two_processes_report_what_one_reports() -> None:
    assert fit(epochs=1) == 0
    found = []
    for devices, strategy in (("1", "auto"), ("2", "ddp")):
        command = [sys.executable, "-m", "lightning_entropy.cli", "validate", "--recipe", "mil", "--ckpt_path", "last"]
        options = ["--trainer.default_root_dir=run", f"--trainer.devices={devices}", f"--trainer.strategy={strategy}"]
        done = subprocess.run([*command, *options, *SMALL], check=True, capture_output=True, text=True)
        rows = [line.split("│") for line in done.stdout.splitlines() if "val/" in line]
        found.append({row[1].strip(): float(row[2]) for row in rows})
    assert found[0].keys() == found[1].keys() >= {"val/auc", "val/entropy", "val/instance_auc"}
    assert found[1] == pytest.approx(found[0], abs=1e-5)


@pytest.mark.parametrize("first", ["", "import typing; typing.Optional[typing.Union[float, int]]; "])
def test_a_limit_of_one_batch_is_one_batch(first: str, tmp_path: Path) -> None:
    """typing's cache may turn the Trainer's int | float into float | int, by which 1 is parsed as 1.0: all batches."""
    code = (
        f"{first}from lightning_entropy.cli import main; main(['compare', '--recipe', 'none', '--vary', 'a=b'])\n"
        "from lightning_entropy.recipes.catalog import find_recipe\n"
        "from lightning_entropy.recipes.run_record import build\n"
        "trainer = {'limit_train_batches': 1, 'accelerator': 'cpu', 'logger': False}\n"
        "config = {'trainer': trainer, 'model': {}, 'data': {'images': 'embedded:digits'}}\n"
        "limit = build(find_recipe('vit'), config).trainer.limit_train_batches\n"
        "assert type(limit) is int and limit == 1, repr(limit)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_reader_that_has_seen_enough() -> None:
    command = [
        sys.executable,
        "-u",
        "-c",
        "import sys; from lightning_entropy.cli import main; sys.exit(main(['recipes']))",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()
        said = run.stderr.read()
    assert run.returncode == 141
    assert said == ""
