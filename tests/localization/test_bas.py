from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_entropy import BackgroundActivationSuppression, ForegroundGenerator
from lightning_entropy.localization.image_labels import draw_label, find_labels
from tests.localization.user_modules import ImageClassifier, pictures
from tests.suite.running import first_gradients, loader, same, trainer, weights

NAME = "foreground_generator_pool_stage3"


def bas(**options: Any) -> BackgroundActivationSuppression:
    return BackgroundActivationSuppression(**{"split": "pool.stage3", "alpha": 0.5, "beta": 0.7, **options})


def fit(module: LightningModule, callbacks: list, folder: Path, batches: list | None = None, **options: Any):
    run = trainer(callbacks, folder, **options)
    run.fit(module, loader(pictures() if batches is None else batches))
    return run


# The independent reference: the scheme of a frozen deep copy, with the full generator, in float64.


class Reference(nn.Module):
    """Every map of a 3 x 3 convolution, and a tail that is copied anew in each step."""

    def __init__(self, net: nn.Module, generator: ForegroundGenerator) -> None:
        super().__init__()
        self.net = net
        self.conv = nn.Conv2d(8, 3, 3, padding=1).double()
        self.conv.load_state_dict({"weight": generator.weight.detach(), "bias": generator.bias.detach()})

    def losses(self, x: Tensor, y: Tensor, variant: str) -> dict[str, Tensor]:
        f = self.net.stage2(self.net.stage1(x))
        m = self.conv(f).sigmoid()[torch.arange(len(y)), y][:, None]
        copied = copy.deepcopy(self.net.stage3), copy.deepcopy(self.net.fc)
        for part in copied:
            part.requires_grad_(False)
        last = self.net.stage3(f)
        a = F.conv2d(last, self.net.fc.weight[:, :, None, None], self.net.fc.bias)
        left = copied[1](copied[0](f.detach() * (1 - m)).mean((2, 3)))
        s, left = a.mean((2, 3))[torch.arange(len(y)), y].detach(), left[torch.arange(len(y)), y]
        if variant == "extension":
            s, left = s.relu(), left.relu()
        ratio = torch.stack(
            [
                (b / (o + 1e-8) if (b <= o if variant == "extension" else b < o) else 0 * b + (variant == "extension"))
                for o, b in zip(s, left)
            ]
        )
        return {
            "task": F.cross_entropy(a.mean((2, 3)), y),
            "guidance": F.cross_entropy((a * F.avg_pool2d(m, 2)).mean((2, 3)), y),
            "ratio": ratio.mean(),
            "area": m.mean(),
        }


class Fixed(ImageClassifier):
    """A bias that makes the ratio matter: most logits of the label exceed those of the background."""

    def __init__(self, **options: Any) -> None:
        super().__init__(dropout=0.0, norm="batch", **options)
        self.pool.double()
        nn.init.constant_(self.pool.fc.bias, 0.5)


@pytest.mark.parametrize("variant", ["extension", "cvpr"])
@pytest.mark.parametrize("guide", [True, False])
def test_gradients_and_buffers_equal_those_of_a_deep_copy(variant: str, guide: bool, tmp_path: Path) -> None:
    """Oracle 3."""
    batch = pictures(count=1, batch_size=6, dtype=torch.float64)[0]
    seed_everything(1, verbose=False)
    module = Fixed()
    twin, plain = copy.deepcopy(module.pool), copy.deepcopy(module.pool)
    callback = bas(variant=variant, guide_classifier=guide)
    got = first_gradients(module, [callback], [batch], tmp_path, max_steps=1)

    reference = Reference(twin, ForegroundGenerator(8, 3).double())
    terms = reference.losses(batch["features"], batch["label"], variant)
    generator = list(reference.conv.parameters())
    assert all((g.abs() > 0).any() for g in torch.autograd.grad(terms["ratio"], generator, retain_graph=True))
    if guide:
        (terms["task"] + 0.5 * terms["guidance"] + terms["ratio"] + 0.7 * terms["area"]).backward()
    else:  # the guidance reaches what the map needs, and neither the tail nor the classifier
        tail = [*twin.stage3.parameters(), *twin.fc.parameters()]
        rest = [p for p in reference.parameters() if not any(p is t for t in tail)]
        (terms["task"] + terms["ratio"] + 0.7 * terms["area"]).backward(retain_graph=True)
        detached = _guidance_with_a_detached_map(reference, batch)
        for p, g in zip(rest, torch.autograd.grad(0.5 * detached, rest)):
            p.grad = p.grad + g
    wanted = {f"pool.{n}": p.grad for n, p in twin.named_parameters()}
    wanted |= {f"{NAME}.{n}": p.grad for n, p in reference.conv.named_parameters()}
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-13, msg=name)

    plain(batch["features"])
    buffers = dict(module.pool.named_buffers())
    for name, value in plain.named_buffers():
        assert torch.equal(buffers[name], value), f"{name} moved with the masked pass"


def _guidance_with_a_detached_map(reference: Reference, batch: dict) -> Tensor:
    x, y = batch["features"], batch["label"]
    net = copy.deepcopy(reference.net)  # its running statistics are not those under test
    net.stage1, net.stage2 = reference.net.stage1, reference.net.stage2
    f = net.stage2(net.stage1(x))
    m = reference.conv(f).sigmoid()[torch.arange(len(y)), y][:, None]
    a = F.conv2d(net.stage3(f), net.fc.weight[:, :, None, None], net.fc.bias).detach()
    return F.cross_entropy((a * F.avg_pool2d(m, 2)).mean((2, 3)), y)


@pytest.mark.parametrize("term", ["ratio", "area"])
def test_the_ratio_alone_gives_the_tail_no_gradient(term: str, tmp_path: Path) -> None:
    class NoTask(Fixed):
        def training_step(self, batch: dict, batch_idx: int) -> Tensor:
            return 0 * super().training_step(batch, batch_idx)

    batch = pictures(count=1, batch_size=6, dtype=torch.float64)[0]
    got = first_gradients(NoTask(), [bas(alpha=0, beta=0.0 if term == "ratio" else 3.0)], [batch], tmp_path)
    for name, gradient in got.items():
        if name.startswith(("pool.stage3", "pool.fc")):
            assert not gradient.any(), name
        else:
            assert gradient.any() or name == "pool.stage2.0.bias" or name == "pool.stage1.0.bias", name


def test_batch_norm_by_running_statistics(tmp_path: Path) -> None:
    batches = pictures(count=2, batch_size=4, dtype=torch.float64)
    by_batch = first_gradients(Fixed(), [bas()], batches, tmp_path)
    seed_everything(0, verbose=False)
    one, other = Fixed(), Fixed()
    other.load_state_dict(one.state_dict())
    by_batch = first_gradients(one, [bas()], batches, tmp_path)
    by_running = first_gradients(other, [bas(bn_mode="eval")], batches, tmp_path)
    key = f"{NAME}.weight"
    assert not torch.allclose(by_batch[key], by_running[key])
    assert one.pool.stage3[1].training
    assert other.pool.stage3[1].training


# The optimizer.


class Rates(ImageClassifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            [{"params": self.pool.parameters(), "lr": 0.02}, {"params": self.own(), "lr": 0.03}], momentum=0.9
        )
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)]

    def own(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if not name.startswith("pool")]


def test_the_generator_has_its_own_learning_rate(tmp_path: Path) -> None:
    run = fit(ImageClassifier(lr=0.02), [bas()], tmp_path, max_epochs=1)
    groups = run.optimizers[0].param_groups
    assert [(len(g["params"]), round(g["lr"], 6)) for g in groups] == [(14, 0.02), (2, 0.2)]
    run = fit(Rates(), [bas(lr_factor=5)], tmp_path, max_epochs=1)
    assert [(len(g["params"]), round(g["lr"], 6)) for g in run.optimizers[0].param_groups] == [(14, 0.002), (2, 0.015)]
    run = fit(ImageClassifier(), [bas(lr_factor=1)], tmp_path, max_epochs=1)
    assert [len(g["params"]) for g in run.optimizers[0].param_groups] == [16]
    assert torch.optim.Optimizer.add_param_group.__qualname__ == "Optimizer.add_param_group"


def test_a_generator_in_no_optimizer_is_an_error(tmp_path: Path) -> None:
    class Narrow(ImageClassifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.pool.parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match=f"no optimizer has the parameters of {NAME}"):
        fit(Narrow(), [bas()], tmp_path)


# Where it meets Lightning.


class Decreases(Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        self.seen.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("bas/")})


def test_it_logs_says_what_it_does_and_learns(tmp_path: Path, announced: list[str]) -> None:
    seed_everything(0, verbose=False)
    log = Decreases()
    batches = pictures(count=12, batch_size=8)
    module = ImageClassifier(dropout=0.0, lr=0.02)
    fit(module, [], tmp_path, batches, max_epochs=6)  # from scratch the map collapses before there are classes
    run = fit(module, [bas(beta=0.8), log], tmp_path, batches, max_epochs=8)
    assert set(log.seen[-1]) == {
        f"bas/{key}" for key in ("loss", "ratio", "area", "guidance", "exceeding_fraction", "dead_fraction")
    }
    last = log.seen[-1]
    assert last["bas/ratio"] + 0.5 * last["bas/guidance"] + 0.8 * last["bas/area"] == pytest.approx(
        last["bas/loss"], rel=1e-5
    )
    assert last["bas/dead_fraction"] < 0.2
    assert last["bas/ratio"] < 0.5
    assert any("1 of 1 classifier split (pool.stage3), +219 parameters" in line for line in announced)
    assert any(
        "split at pool.stage3 (8 channels), class map of 3 classes by fc; weight 1" in line for line in announced
    )
    callback = next(c for c in run.callbacks if isinstance(c, BackgroundActivationSuppression))
    batch = batches[0]
    maps, logits = callback.foreground_maps(batch["features"], labels=batch["label"])
    torch.testing.assert_close(logits, run.lightning_module.pool.eval()(batch["features"]))
    inside = batch["features"].gather(1, batch["label"][:, None, None, None].expand(-1, 1, 12, 12))
    bright = F.avg_pool2d(inside, 2) > 1
    assert maps[bright].mean() > maps[~bright].mean() + 0.2, "the map does not lie on the square"


def test_maps_at_inference(tmp_path: Path) -> None:
    callback, module = bas(), ImageClassifier()
    with pytest.raises(RuntimeError, match="has no model yet"):
        callback.foreground_maps(torch.zeros(1, 3, 12, 12))
    callback.operate(module)
    module.eval()
    x = pictures(count=1, batch_size=4)[0]["features"]
    generator = callback.generator
    assert generator is not None
    features = module.pool.stage2(module.pool.stage1(x))
    every = generator(features)
    logits = module.pool(x)
    torch.testing.assert_close(callback.foreground_maps(x, top_k=3)[0], every.mean(1, keepdim=True))
    one = every.gather(1, logits.argmax(1)[:, None, None, None].expand(-1, -1, 6, 6))
    torch.testing.assert_close(callback.foreground_maps(x)[0], one)
    labels = torch.tensor([2, 0, 1, 1])
    wanted = every[torch.arange(4), labels][:, None]
    torch.testing.assert_close(callback.foreground_maps(x, labels=labels)[0], wanted)


def test_a_checkpoint_predicts_with_its_maps(tmp_path: Path) -> None:
    class Predicts(ImageClassifier):
        def predict_step(self, batch: dict, batch_idx: int) -> Tensor:
            return self.pool(batch["features"])

    callback = bas()
    module = Predicts()
    run = fit(module, [callback], tmp_path)
    run.save_checkpoint(tmp_path / "bas.ckpt")
    later, fresh = bas(), Predicts()
    images = DataLoader(pictures(1), batch_size=None)
    trainer([later], tmp_path).predict(fresh, images, ckpt_path=str(tmp_path / "bas.ckpt"), weights_only=True)
    assert same(weights(module), weights(fresh))
    x = pictures(1)[0]["features"]
    module.eval()
    fresh.eval()
    torch.testing.assert_close(later.foreground_maps(x)[0], callback.foreground_maps(x)[0])


def test_two_processes_with_unlike_batches(tmp_path: Path) -> None:
    batches = pictures(count=2, batch_size=3, dtype=torch.float64)
    joint = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
    seed_everything(3, verbose=False)
    module = ImageClassifier(dropout=0.0).double()
    state = {k: v.clone() for k, v in module.state_dict().items()}
    strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo")
    apart = first_gradients(module, [bas()], batches, tmp_path, devices=2, strategy=strategy)
    module = ImageClassifier(dropout=0.0).double()
    module.load_state_dict(state)
    together = first_gradients(module, [bas()], [joint], tmp_path)
    for name, gradient in together.items():
        torch.testing.assert_close(apart[name], gradient, rtol=1e-6, atol=1e-9, msg=name)
    with pytest.raises(Exception, match="does not work with find_unused_parameters=True"):
        first_gradients(
            ImageClassifier(),
            [bas()],
            pictures(2),
            tmp_path,
            devices=1,
            strategy=DDPStrategy(start_method="spawn", process_group_backend="gloo", find_unused_parameters=True),
        )


@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_and_compile(compiled: bool, tmp_path: Path) -> None:
    torch._dynamo.reset()
    seed_everything(0, verbose=False)
    module = ImageClassifier(dropout=0.0, norm="batch")
    subject = torch.compile(module, backend="aot_eager") if compiled else module
    log = Decreases()
    fit(subject, [bas(), log], tmp_path, pictures(4, 4), precision="bf16-mixed")
    assert all(torch.isfinite(v).all() for v in weights(module).values())
    assert int(module.pool.stage3[1].num_batches_tracked) == 8
    exact = Decreases()
    seed_everything(0, verbose=False)
    fit(ImageClassifier(dropout=0.0, norm="batch"), [bas(), exact], tmp_path, pictures(4, 4))
    assert log.seen[0]["bas/loss"] == pytest.approx(exact.seen[0]["bas/loss"], rel=0.03)


def test_a_compiled_network_inside_a_module(tmp_path: Path) -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        seed_everything(0, verbose=False)
        module = ImageClassifier(dropout=0.0, norm="batch").double()
        if compiled:
            module.pool = torch.compile(module.pool, backend="aot_eager")
        batches = pictures(2, 4, dtype=torch.float64)
        got = first_gradients(module, [bas()], batches, tmp_path)
        results.append({k.replace("_orig_mod.", ""): v for k, v in got.items()})
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, msg=name)


def test_weight_zero_gives_the_generator_a_gradient_of_zero(tmp_path: Path) -> None:
    batches = pictures(1, 4, dtype=torch.float64)
    got = first_gradients(ImageClassifier(dropout=0.0).double(), [bas(weight=0)], batches, tmp_path)
    assert not got[f"{NAME}.weight"].any()
    seed_everything(0, verbose=False)


# Vision transformers: the tokens are the map.


class Tokens(ImageClassifier):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        timm = pytest.importorskip("timm")
        self.pool = timm.create_model(
            "vit_tiny_patch16_224", img_size=48, patch_size=12, depth=3, num_classes=3, global_pool="avg", **options
        )

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.pool(batch["features"]), batch["label"])


def test_a_vision_transformer_and_a_reader_of_its_attention(tmp_path: Path) -> None:
    from lightning_entropy import AttentionEntropyRegularizer

    batches = pictures(2, 2, side=48)
    log = Decreases()

    class Reads(Callback):
        values: list[float]

        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            self.values = [*getattr(self, "values", []), float(trainer.callback_metrics["entropy_regularizer/loss"])]

    seen = []
    for first in (True, False, None):
        seed_everything(0, verbose=False)
        module = Tokens()
        regularizer, reads = AttentionEntropyRegularizer(0.0), Reads()
        both = [bas(split="pool.blocks.1", input_shape=(3, 48, 48), lr_factor=1e-9), regularizer]
        callbacks = [regularizer] if first is None else both if first else both[::-1]
        run = trainer([*callbacks, reads, log], tmp_path, max_steps=1)
        run.fit(module, loader(batches))
        seen.append(reads.values[0])
    assert seen[0] == seen[1] == seen[2], "the masked pass was read by another method"
    assert 0 < log.seen[0]["bas/area"] < 1


# Labels.


def test_labels_are_found() -> None:
    x, y = torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 2, 1])
    assert torch.equal(find_labels((x, y), 4, 3), y)
    assert torch.equal(find_labels({"image": x, "label": y, "index": y + 7}, 4, 3), y)
    assert torch.equal(find_labels((x, {"a": y, "b": y + 1}), 4, 3, target="1.b"), y + 1)
    assert torch.equal(find_labels((x, y.int()), 4, 3, target=1), y)
    present = F.one_hot(y, 3)
    assert find_labels((x, present), 4, 3, multilabel=True).dtype == torch.bool
    with pytest.raises(ValueError, match=r"2 candidates \(1, 2\).*Pass target="):
        find_labels((x, y, y), 4, 3)
    with pytest.raises(ValueError, match=r"found none.*multilabel=True.*The batch holds 0 \(4, 3, 8, 8\) float32"):
        find_labels((x, present.float()), 4, 3)
    with pytest.raises(ValueError, match="target='label' is not in the batch"):
        find_labels((x, y), 4, 3, target="label")


def test_one_label_of_several_is_drawn_evenly_and_alike_for_one_seed() -> None:
    present = torch.tensor([[True, False, True, True]]).expand(3000, 4)
    drawn = draw_label(present, seed=(0, 1))
    assert torch.equal(drawn, draw_label(present, seed=(0, 1)))
    assert not torch.equal(drawn, draw_label(present, seed=(0, 2)))
    counts = torch.bincount(drawn, minlength=4)
    assert counts[1] == 0
    assert (counts[[0, 2, 3]] - 1000).abs().max() < 120


def test_several_labels_an_image(tmp_path: Path) -> None:
    class Several(ImageClassifier):
        def training_step(self, batch: dict, batch_idx: int) -> Tensor:
            return F.binary_cross_entropy_with_logits(self.pool(batch["features"]), batch["label"])

    batches = pictures(4, 4)
    for batch in batches:
        batch["label"] = F.one_hot(batch["label"], 3).float()
        batch["label"][0] = 0  # an image without a label
        batch["label"][1] = 1
    results = []
    for _ in range(2):
        seed_everything(0, verbose=False)
        module = Several(dropout=0.0)
        fit(module, [bas(multilabel=True, guide_classifier=False)], tmp_path, batches)
        results.append(weights(module))
    assert same(*results)
    for batch in batches:
        batch["label"] = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="multilabel=True"):
        fit(Several(), [bas()], tmp_path, batches)
    module = Several(dropout=0.0)
    fit(module, [bas(multilabel=True)], tmp_path, batches)
    assert all(torch.isfinite(v).all() for v in weights(module).values())


# Refusals.


def test_arguments() -> None:
    for options, error in [
        ({"alpha": -1}, "alpha must be finite"),
        ({"beta": float("nan")}, "beta must be finite"),
        ({"variant": "x"}, "variant must be one of"),
        ({"bn_mode": "train"}, "bn_mode must be one of batch, eval"),
        ({"lr_factor": 0}, "lr_factor must be"),
        ({"split": ""}, "split must name"),
        ({"weight": -1}, "weight must be"),
    ]:
        with pytest.raises(ValueError, match=error):
            bas(**options)


def test_errors_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"classes=5\): fc of SmallNet gives 3 logits"):
        fit(ImageClassifier(), [bas(classes=5)], tmp_path)
    with pytest.raises(ValueError, match=r"split='pool.stage9' names none.*Closest names: pool.stage3"):
        fit(ImageClassifier(), [bas(split="pool.stage9")], tmp_path)
    batches = pictures(1)
    batches[0]["label"] += 5
    with pytest.raises((ValueError, IndexError), match=r"Target \d is out of bounds|labels must be 0 to 2"):
        fit(ImageClassifier(), [bas()], tmp_path, batches)

    class Elsewhere(ImageClassifier):
        def training_step(self, batch: dict, batch_idx: int) -> Tensor:
            return self.pool.fc(batch["features"].mean((1, 2, 3), keepdim=True)[:, :, 0, 0].expand(-1, 12)).mean()

    with pytest.raises(MisconfigurationException, match=r"pool.stage3 did not run with gradient in this step"):
        fit(Elsewhere(), [bas()], tmp_path)


def test_undo_and_a_copy_of_the_callback(tmp_path: Path) -> None:
    import pickle

    module, callback = ImageClassifier(), bas()
    before = set(module.state_dict())
    fit(module, [callback], tmp_path, max_epochs=1)
    assert set(module.state_dict()) - before == {f"{NAME}.weight", f"{NAME}.bias"}
    copied = pickle.loads(pickle.dumps(callback))
    assert copied.backbone is None
    assert copied.beta == callback.beta
    assert callback.report is not None
    callback.report.undo()
    assert set(module.state_dict()) == before
