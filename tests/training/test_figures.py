from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from lightning_entropy.training.figures import figure_array, log_figure, write_figure
from lightning_entropy.training.lightning import Trainer, submodule


def drawing() -> Figure:
    figure = Figure(figsize=(3, 2), dpi=50)
    figure.subplots().plot([0, 1], [0, 1])
    return figure


class Recorder:
    """Stands in for a tracking client: it keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[object, ...], dict[str, object]]] = []

    def __getattr__(self, name: str) -> object:
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))

    def __getitem__(self, key: str) -> Recorder:
        self.calls.append(("[]", (key,), {}))
        return self


def logger_of(kind: str) -> object:
    def record_image(self: object, **kwargs: object) -> None:
        self.experiment.calls.append(("log_image", (), kwargs))  # type: ignore[attr-defined]

    base = type(kind, (), {"run_id": "run", "log_image": record_image})
    logger = type("Mine", (base,), {})()  # a user's subclass
    logger.experiment = Recorder()
    return logger


def test_array_has_the_size_of_the_figure_and_white_paper() -> None:
    array = figure_array(drawing())
    assert array.shape == (100, 150, 3)
    assert array.dtype == np.uint8
    assert (array[0, 0] == 255).all()


def test_equal_figures_are_equal_files(tmp_path: Path) -> None:
    for suffix in ("png", "svg", "pdf"):
        write_figure(drawing(), tmp_path / f"a.{suffix}")
        assert (tmp_path / f"a.{suffix}").stat().st_size > 0
    write_figure(drawing(), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    write_figure(drawing(), tmp_path / "c.png", dpi=100)
    with Image.open(tmp_path / "c.png") as image:
        assert image.size == (300, 200)


def test_a_csv_logger_gets_a_png_beside_its_files(tmp_path: Path) -> None:
    logger = submodule("loggers").CSVLogger(tmp_path, name="run", version=0)
    places = log_figure(logger, "aem/attention map", drawing(), step=7)
    expected = tmp_path / "run" / "version_0" / "figures" / "aem" / "attention_map" / "step=000007.png"
    assert places == [str(expected)]
    with Image.open(expected) as image:
        assert image.size == (150, 100)


def test_tensorboard_stores_the_image(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = submodule("loggers").TensorBoardLogger(tmp_path, name="run", version=0)
    assert log_figure(logger, "aem/attention", drawing(), step=3) == ["TensorBoardLogger"]
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    (image,) = events.Images("aem/attention")
    assert (image.step, image.width, image.height) == (3, 150, 100)


def test_a_trainer_hands_it_to_all_its_loggers(tmp_path: Path) -> None:
    loggers = submodule("loggers")
    trainer = Trainer(
        logger=[loggers.CSVLogger(tmp_path, name="csv"), loggers.TensorBoardLogger(tmp_path, name="board")],
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    places = log_figure(trainer, "curve", drawing())
    assert places[0].endswith("step=000000.png")
    assert places[1] == "TensorBoardLogger"


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("WandbLogger", "log_image"),
        ("MLFlowLogger", "log_figure"),
        ("CometLogger", "log_figure"),
        ("NeptuneLogger", "append"),
    ],
)
def test_each_tracking_service_is_called_its_own_way(kind: str, call: str) -> None:
    logger = logger_of(kind)
    figure = drawing()
    log_figure(logger, "aem/attention", figure, step=5)
    name, args, kwargs = logger.experiment.calls[-1]  # type: ignore[attr-defined]
    assert name == call
    if kind == "WandbLogger":
        assert kwargs["key"] == "aem/attention"
        assert kwargs["images"][0].shape == (100, 150, 3)
    elif kind == "MLFlowLogger":
        assert args == ("run", figure, "figures/aem/attention/step=000005.png")
    elif kind == "CometLogger":
        assert kwargs == {"figure_name": "aem/attention", "figure": figure, "step": 5}
    else:
        assert args == (figure,)
        assert kwargs == {"step": 5}


def test_a_logger_without_a_folder_is_named_in_a_warning() -> None:
    class Silent:
        pass

    with pytest.warns(UserWarning, match="Silent takes no figures"):
        assert log_figure(Silent(), "curve", drawing()) == []


def test_other_ranks_do_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submodule("utilities").rank_zero_only, "rank", 1)
    logger = submodule("loggers").CSVLogger(tmp_path, name="run")
    assert log_figure(logger, "curve", drawing()) == []
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("tag", ["", "a//b", "../a", "a/.", "/a"])
def test_a_tag_stays_in_its_folder(tag: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tag must be"):
        log_figure(submodule("loggers").CSVLogger(tmp_path), tag, drawing())


def test_the_figure_is_released_unless_it_is_kept(tmp_path: Path) -> None:
    logger = submodule("loggers").CSVLogger(tmp_path)
    figure = drawing()
    log_figure(logger, "curve", figure, close=False)
    assert figure.axes
    log_figure(logger, "curve", figure)
    assert not figure.axes


def test_pyplot_knows_nothing_of_it(tmp_path: Path) -> None:
    code = """
from matplotlib.figure import Figure
from lightning_entropy.training.figures import write_figure
figure = Figure(); figure.subplots().plot([0, 1]); write_figure(figure, "a.png")
import matplotlib.pyplot
assert matplotlib.pyplot.get_fignums() == []
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
