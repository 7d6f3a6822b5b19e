from __future__ import annotations

import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torchmetrics import Metric, MetricCollection

from lightning_entropy.functional import scale_boxes
from lightning_entropy.localization import (
    GTKnownLocalization,
    MaxBoxAccuracy,
    MaxBoxAccuracyV2,
    PixelAveragePrecision,
    SegmentationIoU,
    TopKLocalization,
)
from tests.localization.official_evaluator import average_precision, boxes_at, iou, normalized

BOX = torch.tensor([[1, 2, 4, 5]])


def data(count: int = 20, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    rng = np.random.default_rng(seed)
    maps = torch.nn.functional.interpolate(
        torch.from_numpy(rng.random((count, 1, 4, 4))), size=(14, 12), mode="bicubic"
    )
    maps[0] = 0
    maps[1] = maps[1].round()
    boxes = []
    for _ in range(count):
        first = rng.integers(0, 7, (rng.integers(1, 3), 2))
        boxes.append(torch.from_numpy(np.concatenate((first, first + rng.integers(2, 6, first.shape)), axis=1)))
    return maps, boxes


def accuracies(
    maps: torch.Tensor, boxes: list[torch.Tensor], *, contours: str, least: float, interval: float
) -> np.ndarray:
    """Share of located images at each threshold, one threshold after the other."""
    shares = []
    for threshold in np.arange(0, 1, interval):
        right = 0
        for one, truth in zip(maps[:, 0].numpy(), boxes):
            found = boxes_at(normalized(one), threshold, contours=contours)
            right += max(iou(a, b) for a in found for b in truth.tolist()) >= least
        shares.append(right / len(boxes))
    return np.array(shares)


@pytest.mark.parametrize(
    "backend", ["numpy", pytest.param("opencv", marks=pytest.mark.skipif(not find_spec("cv2"), reason="needs OpenCV"))]
)
def test_box_accuracies_are_those_of_the_slow_evaluator(backend: Any) -> None:
    maps, boxes = data()
    v1 = MaxBoxAccuracy(interval=0.02, backend=backend)
    v2 = MaxBoxAccuracyV2(interval=0.02, backend=backend)
    for start in range(0, len(maps), 7):
        for metric in (v1, v2):
            metric.update(maps[start : start + 7], boxes[start : start + 7])
    curve = accuracies(maps, boxes, contours="largest", least=0.5, interval=0.02)
    assert v1.compute()["max_box_accuracy"].item() == pytest.approx(curve.max())
    np.testing.assert_array_equal(v1.correct[0].numpy(), np.rint(curve * len(maps)))
    best = []
    for row, least in enumerate((0.3, 0.5, 0.7)):
        curve = accuracies(maps, boxes, contours="all", least=least, interval=0.02)
        np.testing.assert_array_equal(v2.correct[row].numpy(), np.rint(curve * len(maps)))
        best.append(curve.max())
    values = v2.compute()
    assert values["max_box_accuracy_v2"].item() == pytest.approx(np.mean(best))
    assert values["max_box_accuracy_70"].item() == pytest.approx(best[2])
    assert 0 <= values["threshold_30"] < 1


def test_a_threshold_is_fitted_on_one_set_and_used_on_another() -> None:
    (val_maps, val_boxes), (test_maps, test_boxes) = data(seed=1), data(seed=2)
    val, test = MaxBoxAccuracyV2(interval=0.02), MaxBoxAccuracyV2(interval=0.02)
    val.update(val_maps, val_boxes)
    test.update(test_maps, test_boxes)
    best = test.compute()
    test.threshold = val.fit_threshold()
    fixed = test.compute()
    assert set(fixed) == {name.replace("max_", "") for name in best}
    for row, least in enumerate((0.3, 0.5, 0.7)):
        curve = accuracies(val_maps, val_boxes, contours="all", least=least, interval=0.02)
        chosen = val.threshold[row]
        assert curve[round(chosen / 0.02)] == curve.max()
        there = accuracies(test_maps, test_boxes, contours="all", least=least, interval=0.02)
        assert fixed[f"box_accuracy_{100 * least:g}"].item() == pytest.approx(there[round(chosen / 0.02)])
        assert fixed[f"box_accuracy_{100 * least:g}"] <= best[f"max_box_accuracy_{100 * least:g}"]
    kept = val.threshold
    val.reset()
    assert val.threshold == kept
    alone = MaxBoxAccuracyV2(threshold=kept)
    alone.update(test_maps, test_boxes)
    assert alone.compute()["box_accuracy_v2"] == fixed["box_accuracy_v2"]
    val.threshold = None
    assert val.threshold is None


def test_of_equally_good_thresholds_the_middle_one_is_taken() -> None:
    maps = torch.zeros(1, 8, 8)
    maps[0, 2:5, 1:4] = 1
    maps[0, 6, 6] = 0.3
    metric = MaxBoxAccuracy(interval=0.1)
    metric.update(maps, [BOX])
    assert metric.fit_threshold() == pytest.approx((0.5,))  # right at every threshold
    with pytest.raises(ValueError, match="no image has been seen"):
        MaxBoxAccuracy().fit_threshold()


def test_gt_known_at_the_best_threshold_is_max_box_accuracy() -> None:
    maps, boxes = data()
    known, best = GTKnownLocalization(), MaxBoxAccuracy()
    fixed = GTKnownLocalization(threshold=0.2)
    for metric in (known, best, fixed):
        metric.update(maps, boxes)
    assert known.compute()["gt_known"] == best.compute()["max_box_accuracy"]
    assert fixed.compute()["threshold"].item() == pytest.approx(0.2)
    curve = accuracies(maps, boxes, contours="largest", least=0.5, interval=0.2)
    assert fixed.compute()["gt_known"].item() == pytest.approx(curve[1])


def test_top_k_needs_class_and_box() -> None:
    maps, boxes = data()
    logits = torch.randn(len(maps), 6)
    target = torch.randint(6, (len(maps),))
    metric = TopKLocalization(k=(1, 3), interval=0.05)
    shared = TopKLocalization(k=(1, 3), interval=0.05, shared_threshold=True)
    for one in (metric, shared):
        one.update(maps[:9], boxes[:9], logits[:9], target[:9])
        one.update(maps[9:], boxes[9:], logits[9:], target[9:])
    located = np.zeros((len(maps), 20))
    for n in range(len(maps)):
        located[n] = accuracies(maps[n : n + 1], boxes[n : n + 1], contours="largest", least=0.5, interval=0.05)
    values = metric.compute()
    for k in (1, 3):
        right = (logits.topk(k).indices == target[:, None]).any(1).numpy()
        assert values[f"top{k}"].item() == pytest.approx((located * right[:, None]).mean(0).max())
        place = round(shared.compute()[f"top{k}_threshold"].item() / 0.05)
        assert located.mean(0)[place] == located.mean(0).max()
        assert shared.compute()[f"top{k}"].item() == pytest.approx((located * right[:, None]).mean(0)[place])
    assert values["gt_known"].item() == pytest.approx(located.mean(0).max())
    assert values["top1"] <= values["top3"] <= values["gt_known"]


def test_equal_logits_and_nan_are_not_counted_as_right() -> None:
    maps = torch.zeros(3, 8, 8)
    maps[:, 2:5, 1:4] = 1
    logits = torch.tensor([[1.0, 1.0], [1.0, 1.0], [torch.nan, 1.0]])
    metric = TopKLocalization(k=1, threshold=0.5)
    metric.update(maps, [BOX] * 3, logits, torch.tensor([0, 1, 1]))
    assert metric.compute()["top1"].item() == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match=r"logits must be \(B, K\)"):
        metric.update(maps, [BOX] * 3, logits[:2], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="k must be"):
        TopKLocalization(k=0)


def test_images_without_a_box() -> None:
    maps, boxes = data(4)
    boxes[2] = torch.zeros(0, 4)
    with pytest.raises(ValueError, match=r"images \[2\] of the batch have no true box.*without_box=\"skip\""):
        MaxBoxAccuracy().update(maps, boxes)
    skipping = TopKLocalization(k=1, without_box="skip")
    logits, target = torch.eye(4), torch.arange(4)
    skipping.update(maps, boxes, logits, target)
    others = [0, 1, 3]
    plain = TopKLocalization(k=1)
    plain.update(maps[others], [boxes[n] for n in others], logits[others], target[others])
    assert skipping.total == 3
    assert torch.equal(skipping.correct, plain.correct)
    skipping.update(maps[:1], [torch.zeros(0, 4)], logits[:1], target[:1])
    skipping.update(maps[:0], [], logits[:0], target[:0])
    assert skipping.total == 3


def test_one_box_an_image_may_be_a_tensor_and_fractions_are_cut() -> None:
    maps, _ = data(3)
    whole, cut = MaxBoxAccuracy(), MaxBoxAccuracy()
    whole.update(maps, torch.tensor([[1, 2, 5, 9]] * 3))
    cut.update(maps, torch.tensor([[1.9, 2.2, 5.7, 9.99]] * 3))
    assert torch.equal(whole.correct, cut.correct)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([torch.tensor([[1, 2, 3]])], r"boxes\[0\] must have the shape \(n, 4\)"),
        ([torch.tensor([[5, 2, 3, 4]])], "x0 <= x1"),
        ([BOX, BOX], "1 maps need as many entries of boxes, got 2"),
    ],
)
def test_wrong_boxes_are_named(boxes: list[torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaxBoxAccuracyV2().update(torch.rand(1, 8, 8), boxes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"iou": 0}, "iou must be"),
        ({"interval": 2}, "interval must be"),
        ({"threshold": 1.5}, "threshold must be"),
        ({"contours": "biggest"}, "contours must be one of"),
        ({"without_box": "drop"}, "without_box must be one of"),
        ({"backend": "scipy"}, "backend must be one of"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaxBoxAccuracy(**arguments)


def test_a_threshold_that_is_not_counted_at_is_refused() -> None:
    metric = MaxBoxAccuracyV2(interval=0.1)
    with pytest.raises(ValueError, match=r"pass threshold=0\.25 to its constructor"):
        metric.threshold = 0.25
    with pytest.raises(ValueError, match="has 3 accuracies, got 2 thresholds"):
        metric.threshold = (0.1, 0.2)


def filled(metric: Metric, *, seed: int = 0) -> Metric:
    maps, boxes = data(6, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, 2, (6, 14, 12), generator=generator)
    if isinstance(metric, PixelAveragePrecision):
        metric.update(maps, masks)
    elif isinstance(metric, SegmentationIoU):
        metric.update(torch.randint(0, 2, (6, 14, 12), generator=generator), masks)
    elif isinstance(metric, TopKLocalization):
        metric.update(maps, boxes, torch.randn(6, 4, generator=generator), torch.arange(6) % 4)
    else:
        metric.update(maps, boxes)
    return metric


ALL = [
    MaxBoxAccuracy,
    MaxBoxAccuracyV2,
    GTKnownLocalization,
    TopKLocalization,
    PixelAveragePrecision,
    lambda: SegmentationIoU(2),
]


@pytest.mark.parametrize("make", ALL)
def test_states_are_integers_that_add_up(make: Any) -> None:
    whole = filled(filled(make()), seed=1)
    first, second = filled(make()), filled(make(), seed=1)
    for name, value in whole.metric_state.items():
        assert value.dtype == torch.long
        if name != "protocol":
            assert torch.equal(value, first.metric_state[name] + second.metric_state[name])
    copy = pickle.loads(pickle.dumps(whole))
    assert copy.compute() == whole.compute()
    assert whole.half().compute() == copy.compute()
    whole.reset()
    assert all(not value.any() for name, value in whole.metric_state.items() if name != "protocol")


@pytest.mark.parametrize("make", ALL)
def test_every_metric_draws_itself(make: Any, tmp_path: Path) -> None:
    metric = filled(make())
    figure, axes = metric.plot()
    assert axes in figure.axes
    figure.savefig(tmp_path / "curve.png")
    again, same = metric.plot(ax=axes)
    assert (again, same) == (figure, axes)


def test_a_collection_does_not_take_two_protocols_for_one() -> None:
    collection = MetricCollection(
        {"contour": MaxBoxAccuracy(), "pixels": MaxBoxAccuracy(contours="largest_component"), "v2": MaxBoxAccuracyV2()}
    )
    square = torch.zeros(1, 8, 8)
    square[0, 2:5, 1:4] = 1
    comb = torch.zeros(1, 8, 8)
    comb[0, 0:2, 0:2] = comb[0, 4] = 1
    for maps in (square, comb):  # the first one has equal counts in both
        collection.update(maps, [torch.tensor([[0, 4, 7, 5]]) if maps is comb else BOX])
    values = collection.compute()
    assert values["pixels_max_box_accuracy"] == 1
    assert values["contour_max_box_accuracy"] == 0.5


def two_processes(rank: int, file: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    for make in ALL:
        metric = filled(make(), seed=rank)
        if rank == 1:
            filled(metric, seed=2)  # unlike amounts
        whole = filled(filled(filled(make()), seed=1), seed=2)
        got, expected = metric.compute(), whole.compute()
        assert got.keys() == expected.keys()
        for name in got:
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0, equal_nan=True)
        if hasattr(metric, "fit_threshold"):
            assert metric.fit_threshold() == whole.fit_threshold()
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    mp.spawn(two_processes, args=(str(tmp_path / "rendezvous"),), nprocs=2)


class Localizer(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.val_metric, self.test_metric = MaxBoxAccuracy(interval=0.05), MaxBoxAccuracy(interval=0.05)

    def validation_step(self, batch: Any, index: int) -> None:
        self.val_metric.update(batch["map"], batch["box"])

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"val/{name}": value for name, value in self.val_metric.compute().items()})
        self.test_metric.threshold = self.val_metric.fit_threshold()
        self.val_metric.reset()

    def test_step(self, batch: Any, index: int) -> None:
        self.test_metric.update(batch["map"], batch["box"])

    def on_test_epoch_end(self) -> None:
        self.log_dict({f"test/{name}": value for name, value in self.test_metric.compute().items()})


def test_in_a_trainer_the_threshold_comes_from_validation() -> None:
    def loader(seed: int) -> Any:
        maps, boxes = data(8, seed=seed)
        items = [{"map": one, "box": truth[0]} for one, truth in zip(maps, boxes)]
        return torch.utils.data.DataLoader(items, batch_size=3)

    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    module = Localizer()
    (val,) = trainer.validate(module, loader(0), verbose=False)
    (test,) = trainer.test(module, loader(1), verbose=False)
    assert set(val) == {"val/max_box_accuracy", "val/threshold"}
    assert test["test/threshold"] == pytest.approx(module.test_metric.threshold[0])
    assert 0 <= test["test/box_accuracy"] <= 1
    assert not any("metric" in name for name in module.state_dict())


def test_pixel_average_precision_is_that_of_the_slow_evaluator() -> None:
    rng = np.random.default_rng(0)
    maps, _ = data(5)
    masks = torch.from_numpy(rng.choice([0, 1, 255], (5, 14, 12)))
    metric = PixelAveragePrecision()
    metric.update(maps[:2], masks[:2, None])
    metric.update(maps[2:], masks[2:])
    area, counts = average_precision([normalized(one) for one in maps[:, 0].numpy()], masks.numpy())
    np.testing.assert_array_equal(metric.histograms.numpy(), counts)
    values = metric.compute()
    assert values["pixel_average_precision"].item() == pytest.approx(area, rel=1e-6)
    scores = np.stack([normalized(one) for one in maps[:, 0].numpy()])
    truth, known = masks.numpy() == 1, masks.numpy() != 255
    ious = [((scores >= t) & truth).sum() / (((scores >= t) | truth) & known).sum() for t in np.arange(0, 1, 0.001)]
    assert values["peak_iou"].item() == pytest.approx(max(ious))
    assert values["threshold"].item() == pytest.approx(int(np.argmax(ious)) * 0.001)
    empty = PixelAveragePrecision()
    empty.update(maps, torch.zeros(5, 14, 12))
    with pytest.raises(ValueError, match="no pixel belongs to an object"):
        empty.compute()


def mean_iou(predicted: np.ndarray, truth: np.ndarray, classes: int) -> float:
    known = truth != 255
    each = []
    for c in range(classes):
        either = ((predicted == c) | (truth == c)) & known
        if either.any():
            each.append(((predicted == c) & (truth == c) & known).sum() / either.sum())
    return float(np.mean(each))


def test_segmentation_iou() -> None:
    rng = np.random.default_rng(0)
    truth = rng.choice([0, 1, 2, 255], (4, 9, 9))
    predicted = rng.choice([0, 1, 2], (4, 9, 9))
    metric = SegmentationIoU(4)  # the class 3 is nowhere
    metric.update(torch.from_numpy(predicted[:1]), torch.from_numpy(truth[:1]))
    metric.update(
        torch.nn.functional.one_hot(torch.from_numpy(predicted[1:]), 4).movedim(-1, 1), torch.from_numpy(truth[1:])
    )
    values = metric.compute()
    assert values["miou"].item() == pytest.approx(mean_iou(predicted, truth, 4))
    assert values["iou_3"].isnan()
    with pytest.raises(ValueError, match=r"target must be 0 to 3 \(or 255"):
        metric.update(torch.from_numpy(predicted), torch.from_numpy(truth) + 3)
    with pytest.raises(ValueError, match="prediction must be"):
        metric.update(torch.from_numpy(predicted)[:, :3], torch.from_numpy(truth))
    with pytest.raises(ValueError, match="num_classes"):
        SegmentationIoU(1)


def test_the_background_threshold_is_chosen_over_all_images() -> None:
    rng = np.random.default_rng(0)
    maps, truth = rng.random((4, 2, 9, 9)).round(1), rng.choice([0, 1, 2, 255], (4, 9, 9))
    thresholds = [0.2, 0.5, 0.6, 0.9]
    metric = SegmentationIoU(3, background_thresholds=thresholds)
    for n in range(4):
        metric.update(torch.from_numpy(maps[n : n + 1]), torch.from_numpy(truth[n : n + 1]))
    each = []
    for threshold in thresholds:
        stacked = np.concatenate((np.full((4, 1, 9, 9), threshold), maps), axis=1)
        each.append(mean_iou(stacked.argmax(1), truth, 3))
    values = metric.compute()
    assert values["miou"].item() == pytest.approx(max(each))
    assert values["threshold"].item() == pytest.approx(thresholds[int(np.argmax(each))])
    with pytest.raises(ValueError, match="must ascend"):
        SegmentationIoU(3, background_thresholds=[0.5, 0.2])


def blood_cells(shared_data: Path, part: str) -> list[tuple[str, torch.Tensor]]:
    folder = shared_data / "wsol_bccd" / part
    found: dict[str, list[list[int]]] = {}
    for line in (folder / "localization.txt").read_text().split():
        name, *corners = line.split(",")
        found.setdefault(name, []).append([int(corner) for corner in corners])
    return [(name, torch.tensor(boxes)) for name, boxes in sorted(found.items())]


def test_real_boxes_against_their_own_masks_and_the_whole_image(shared_data: Path) -> None:
    """A filled box is found exactly; nine of a hundred windows are covered by a whole-image box (data README)."""
    cells = blood_cells(shared_data, "train") + blood_cells(shared_data, "val") + blood_cells(shared_data, "test")
    boxes = [scale_boxes(box, image_size=(160, 160), map_size=(160, 160)) for _, box in cells]
    own, whole = MaxBoxAccuracyV2(interval=0.1), GTKnownLocalization(threshold=0.5)
    maps = torch.zeros(len(boxes), 160, 160)
    for one, ((x0, y0, x1, y1), *_) in zip(maps, (box.tolist() for box in boxes)):
        one[y0:y1, x0:x1] = 1
    own.update(maps, boxes)
    assert own.compute()["max_box_accuracy_v2"] == 1
    maps = torch.ones(len(boxes), 160, 160)
    maps[:, 0, 0] = 0
    whole.update(maps, boxes)
    assert whole.compute()["gt_known"].item() == pytest.approx(0.09, abs=0.02)
