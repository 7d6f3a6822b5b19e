"""AEM on models that nobody edited: which distribution is read, and that its gradient is the definition's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_entropy import AttentionEntropyMaximization
from lightning_entropy.observe import AttentionReader, AttentionRecord
from lightning_entropy.training import WeightSchedule
from lightning_entropy.training.lightning import MisconfigurationException
from tests.suite.running import first_gradients, loader, trainer
from tests.user_modules import BagClassifier, bags

torchmil_models = pytest.importorskip("torchmil.models")
WEIGHT = 0.3
SIZES = [10, 4, 7]


class Torchmil(LightningModule):
    """A user's LightningModule around a torchmil model, with torchmil's own loss."""

    def __init__(self, name: str, scorers: list[str], adjacency: bool = False, **options) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model = getattr(torchmil_models, name)(in_shape=(6,), **options).double()
        self.scorers, self.adjacency = scorers, adjacency
        self.scores: list[Tensor] = []
        self.masks: list[Tensor] = []

    def inputs(self, batch: dict) -> list[Tensor]:
        x, mask = batch["features"], batch["mask"]
        return [x, torch.eye(x.shape[1]).double().expand(len(x), -1, -1), mask] if self.adjacency else [x, mask]

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        _, losses = self.model.compute_loss(batch["label"], *self.inputs(batch))
        return sum(losses.values())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class ByDefinition(Torchmil):
    """The same with AEM written out by hand, from the scorers' outputs and the masks they were called with."""

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        self.scores.clear()
        self.masks.clear()
        handles = []
        for name in self.scorers:
            pool = self.model.get_submodule(name)
            handles.append(pool.fc2.register_forward_hook(lambda m, a, out: self.scores.append(out[..., 0])))
            handles.append(pool.register_forward_pre_hook(lambda m, a: self.masks.append(a[1])))
        loss = super().training_step(batch, batch_idx)
        for handle in handles:
            handle.remove()
        if not self.scorers:  # no scorer to hook: DSMIL returns attention after the softmax, SmABMIL before it
            attention = self.model(*self.inputs(batch), return_att=True)[1].reshape(3, 10)
            if self.adjacency:
                attention = attention.masked_fill(batch["mask"] == 0, -torch.inf).softmax(1)
            rows = [a[m != 0] for a, m in zip(attention, batch["mask"])]
            return loss + WEIGHT * torch.stack([(r * r.log()).sum() for r in rows]).mean()
        rows = []
        for scores, mask in zip(self.scores, self.masks):
            for s, m in zip(scores, torch.ones_like(scores) if mask is None else mask):
                if (m != 0).any():
                    log_a = s[m != 0].log_softmax(0)
                    rows.append((log_a.exp() * log_a).sum())
        return loss + WEIGHT * torch.stack(rows).mean()


def batch(mask_dtype: torch.dtype, padded: bool = True) -> dict:
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(3, 10, 6, generator=generator, dtype=torch.float64)
    sizes = torch.tensor(SIZES if padded else [10, 10, 10])
    mask = torch.arange(10) < sizes[:, None]
    return {
        "features": features * mask[..., None],
        "mask": mask.to(mask_dtype),
        "label": torch.tensor([1, 0, 1]),
    }


MODELS = {
    "ABMIL": ("ABMIL", ["pool"], {}, "model.pool"),
    "gated ABMIL": ("ABMIL", ["pool"], {"gated": True}, "model.pool"),
    "SmABMIL": ("SmABMIL", [], {"adjacency": True}, "model.pool"),
    "CLAM_SB": ("CLAM_SB", ["pool"], {"k_sample": 2}, "model.pool"),
    "DSMIL": (
        "DSMIL",
        [],
        {},
        "",
    ),  # compute_loss calls self.forward, past every hook: read in the step itself
    "DTFDMIL": ("DTFDMIL", ["attention_pool"], {"n_groups": 2}, "model.attention_pool"),
    "TransformerABMIL": ("TransformerABMIL", ["pool"], {}, "model.pool"),
}


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8], ids=["bool", "uint8"])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_on_unmodified_torchmil(name: str, mask_dtype: torch.dtype, tmp_path: Path) -> None:
    cls, scorers, options, place = MODELS[name]
    # DTFD draws its groups from numpy's global state, and a wholly masked pseudo-bag gives it NaN logits.
    data = [batch(mask_dtype, padded=name != "DTFDMIL")]
    seen: list[str] = []

    def gradients(kind: type[Torchmil], callbacks: list) -> dict:
        import numpy

        numpy.random.seed(0)  # noqa: NPY002 (the state that torchmil draws from)
        torch.manual_seed(2)
        return first_gradients(kind(cls, scorers, **options), callbacks, data, tmp_path)

    class Spy(AttentionEntropyMaximization):
        def attention_term(self, records):
            seen.extend(record.module for record in records)
            return super().attention_term(records)

    got = gradients(Torchmil, [Spy(WEIGHT)])
    expected = gradients(ByDefinition, [])
    plain = gradients(Torchmil, [])
    assert set(seen) == {place}
    assert any(not torch.allclose(got[k], plain[k]) for k in got), "the term has no effect"
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-7, atol=1e-12, msg=key)


@pytest.mark.parametrize("modules", [None, "model.layers.0*"])
def test_transmil_is_refused_with_the_reason(modules: str | None, tmp_path: Path) -> None:
    class TransMIL(Torchmil):
        def inputs(self, batch: dict) -> list[Tensor]:
            return [batch["features"]]

    callbacks = [AttentionEntropyMaximization(modules=modules)]
    with pytest.raises(ValueError, match=r"(?s)Nystrom.*product is not a distribution over instances"):
        first_gradients(TransMIL("TransMIL", []), callbacks, [batch(torch.bool)], tmp_path)


class MultiheadPool(LightningModule):
    """A learnable query over the instances by ``nn.MultiheadAttention``, as its users write it."""

    def __init__(self, by_hand: bool = False, separate: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.by_hand = by_hand
        self.query = nn.Parameter(torch.randn(1, 1, 8).double())
        self.attention = nn.MultiheadAttention(
            8, 4, batch_first=True, kdim=6 if separate else None, vdim=6 if separate else None
        ).double()
        self.embed = nn.Identity() if separate else nn.Linear(6, 8).double()
        self.head = nn.Linear(8, 2).double()

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        x = self.embed(batch["features"])
        query = self.query.expand(len(x), -1, -1)
        z, weights = self.attention(
            query,
            x,
            x,
            key_padding_mask=batch["mask"] == 0,
            need_weights=self.by_hand,
            average_attn_weights=False,
        )
        loss = nn.functional.cross_entropy(self.head(z[:, 0]), batch["label"])
        if self.by_hand:
            p = weights.clamp(min=1e-300)
            loss = loss + WEIGHT * (weights * p.log()).sum(-1).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("separate", [False, True], ids=["one projection", "kdim"])
def test_multihead_attention_pooling(separate: bool, tmp_path: Path) -> None:
    data = [batch(torch.bool)]
    aem = AttentionEntropyMaximization(WEIGHT)
    got = first_gradients(MultiheadPool(separate=separate), [aem], data, tmp_path)
    expected = first_gradients(MultiheadPool(by_hand=True, separate=separate), [], data, tmp_path)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-7, atol=1e-10, msg=key)


class DotProductPool(MultiheadPool):
    """Pooling by ``scaled_dot_product_attention`` with a float mask."""

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        x = self.embed(batch["features"])
        q = self.query.expand(len(x), -1, -1)
        bias = torch.zeros(batch["mask"].shape).double().masked_fill(batch["mask"] == 0, -torch.inf)[:, None]
        if self.by_hand:
            p = ((q @ x.transpose(1, 2)) / math.sqrt(8) + bias).softmax(-1)
            z = p @ x
        else:
            z = nn.functional.scaled_dot_product_attention(q, x, x, attn_mask=bias)
        loss = nn.functional.cross_entropy(self.head(z[:, 0]), batch["label"]) + 0 * self.attention.in_proj_weight.sum()
        for p_unused in self.attention.parameters():
            loss = loss + 0 * p_unused.sum()
        if self.by_hand:
            loss = loss + WEIGHT * (p * p.clamp(min=1e-300).log()).sum(-1).mean()
        return loss


def test_scaled_dot_product_pooling_in_the_step_itself(tmp_path: Path) -> None:
    data = [batch(torch.bool)]
    got = first_gradients(DotProductPool(), [AttentionEntropyMaximization(WEIGHT)], data, tmp_path)
    expected = first_gradients(DotProductPool(by_hand=True), [], data, tmp_path)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-7, atol=1e-10, msg=key)


class TwoSoftmaxes(BagClassifier):
    """CLAM's habit: attention and class probabilities by softmax over dim 1 in one forward; logits returned."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(self.width, 1)
        self.net = nn.Identity()

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        x = batch["features"][0]
        logits = self.net(self.score(x).T)
        a = torch.nn.functional.softmax(logits, dim=1)
        y = self.head(a @ x)
        self.probabilities = torch.nn.functional.softmax(y, dim=1)
        return nn.functional.cross_entropy(y, batch["label"][:1])


def test_class_softmax_beside_the_attention_is_not_read(tmp_path: Path) -> None:
    shapes = []

    class Spy(AttentionEntropyMaximization):
        def attention_term(self, records):
            shapes.extend(tuple(r.logits.shape) for r in records)
            return super().attention_term(records)

    trainer([Spy()], tmp_path).fit(TwoSoftmaxes(), loader(bags(4)))
    assert shapes == [(1, 9)] * 8  # 4 bags, 2 epochs; never the (1, 2) of the classes


def test_user_function_gives_the_same_gradient(tmp_path: Path) -> None:
    def attention(outputs: dict, batch: dict) -> Tensor:
        return outputs["net"]

    def run(**options) -> dict:
        torch.manual_seed(0)
        return first_gradients(TwoSoftmaxes(), [AttentionEntropyMaximization(0.3, **options)], bags(2), tmp_path)

    by_function, automatic = run(modules=attention), run()
    for key, value in automatic.items():
        torch.testing.assert_close(by_function[key], value)


def test_records_of_what_is_no_distribution_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sums to 0\.5"):
        AttentionRecord.from_probabilities(torch.full((1, 4), 0.125))
    with pytest.raises(ValueError, match="negative entries"):
        AttentionRecord.from_probabilities(torch.tensor([[1.5, -0.5]]))


def test_probabilities_give_the_gradient_of_their_logits() -> None:
    s = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    from_p = AttentionRecord.from_probabilities(s.softmax(-1)).entropy().sum()
    direct = AttentionRecord.from_logits(s).entropy().sum()
    torch.testing.assert_close(torch.autograd.grad(from_p, s)[0], torch.autograd.grad(direct, s)[0])


class TwoPools(BagClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(self.width, 1, batch_first=True)

    def loss(self, batch: dict) -> Tensor:
        x = batch["features"]
        z = self.attention(x[:, :1], x, x, need_weights=False)[0][:, 0]
        return nn.functional.cross_entropy(self.head(self.pool(x, batch["mask"]) + z), batch["label"])


def test_ambiguous_match_names_the_candidates(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)2 different attentions.*attention \(MultiheadAttention\)"):
        trainer([AttentionEntropyMaximization()], tmp_path).fit(TwoPools(), loader(bags()))
    trainer([AttentionEntropyMaximization(modules="pool")], tmp_path).fit(TwoPools(), loader(bags()))


def test_pattern_that_matches_nothing_names_the_nearest(tmp_path: Path) -> None:
    callbacks = [AttentionEntropyMaximization(modules="pol")]
    with pytest.raises(ValueError, match=r"modules='pol'\) matched 0 of 7 modules.*\nClosest names: pool"):
        trainer(callbacks, tmp_path).fit(BagClassifier(), loader(bags()))


def test_one_pattern_without_a_match_among_several(tmp_path: Path) -> None:
    callbacks = [AttentionEntropyMaximization(modules=["pool", "nothing*"])]
    with pytest.raises(ValueError, match=r"nothing\*"):
        trainer(callbacks, tmp_path).fit(BagClassifier(), loader(bags()))


def test_frozen_attention_is_an_error(tmp_path: Path) -> None:
    module = BagClassifier()
    module.pool.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match="carries no gradient"):
        trainer([AttentionEntropyMaximization()], tmp_path).fit(module, loader(bags()))


class Manual(BagClassifier):
    """Manual optimization; ``ending`` is the last operation of the loss."""

    def __init__(self, ending: str) -> None:
        super().__init__(dropout=0.0)
        self.automatic_optimization = False
        self.ending = ending

    def training_step(self, batch: dict, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = self.loss(batch)
        loss = {"plain": lambda x: x, "exp": torch.exp, "sqrt": torch.sqrt, "sigmoid": torch.sigmoid}[self.ending](loss)
        optimizer.zero_grad()
        if self.ending == "plain":
            self.manual_backward(loss, retain_graph=True)
            optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


@pytest.mark.parametrize("ending", ["plain", "exp", "sqrt", "sigmoid"])
def test_manual_optimization(ending: str, tmp_path: Path) -> None:
    def gradients(weight: float) -> dict:
        torch.manual_seed(0)
        module = Manual(ending).double()
        return first_gradients(module, [AttentionEntropyMaximization(weight)], bags(1, dtype=torch.float64), tmp_path)

    none, one, two = gradients(0.0), gradients(0.5), gradients(1.0)
    assert not torch.allclose(none["pool.score.2.weight"], one["pool.score.2.weight"])
    for key in none:  # linear in the weight, so the term was added once and not lost
        torch.testing.assert_close(two[key] - none[key], 2 * (one[key] - none[key]), msg=key)
    torch.manual_seed(0)
    module = BagClassifier(dropout=0.0).double()
    automatic = first_gradients(module, [AttentionEntropyMaximization(0.5)], bags(1, dtype=torch.float64), tmp_path)
    if ending == "plain":
        for key in automatic:
            torch.testing.assert_close(automatic[key], one[key])


def test_manual_backward_that_lightning_does_not_see(tmp_path: Path) -> None:
    class Bare(Manual):
        def training_step(self, batch: dict, batch_idx: int) -> None:
            self.loss(batch).backward()
            self.optimizers().step()

    with pytest.raises(MisconfigurationException, match=r"self\.manual_backward\(loss\)"):
        trainer([AttentionEntropyMaximization()], tmp_path).fit(Bare("plain"), loader(bags()))


def test_loss_scaler(tmp_path: Path) -> None:
    """fp16 mixed precision with a scaler, on the CPU: gradients after unscaling are those of float32."""
    from lightning.pytorch.plugins import MixedPrecision

    class Fp16(MixedPrecision):
        def __init__(self) -> None:
            self.precision, self.device = "16-mixed", "cpu"
            self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

        def forward_context(self):
            return torch.autocast("cpu", enabled=False)

    def gradients(**options) -> dict:
        torch.manual_seed(0)
        return first_gradients(
            BagClassifier(dropout=0.0), [AttentionEntropyMaximization(0.5)], bags(2), tmp_path, **options
        )

    scaled, plain = gradients(plugins=[Fp16()]), gradients()
    for key in plain:
        torch.testing.assert_close(scaled[key], plain[key], rtol=1e-4, atol=1e-6, msg=key)


def test_gradient_checkpointing(tmp_path: Path) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(BagClassifier):
        reentrant = False

        def loss(self, batch: dict) -> Tensor:
            x = batch["features"].requires_grad_()
            z = checkpoint(self.pool, x, batch["mask"], use_reentrant=self.reentrant)
            return nn.functional.cross_entropy(self.head(z), batch["label"])

    class Reentrant(Checkpointed):
        reentrant = True

    def gradients(kind: type[BagClassifier]) -> dict:
        torch.manual_seed(0)
        module = kind(dropout=0.0) if kind is BagClassifier else kind()
        return first_gradients(module, [AttentionEntropyMaximization(0.5)], bags(2), tmp_path)

    plain, kept = gradients(BagClassifier), gradients(Checkpointed)
    for key in plain:
        torch.testing.assert_close(kept[key], plain[key], msg=key)
    with pytest.raises(MisconfigurationException, match="use_reentrant=False"):
        gradients(Reentrant)


def test_late_built_models(tmp_path: Path) -> None:
    class Late(BagClassifier):
        def __init__(self, hook: str) -> None:
            super().__init__()
            self.hook = hook
            del self.pool

        def build(self, hook: str) -> None:
            from tests.user_modules import BagPool

            if hook == self.hook and not hasattr(self, "pool"):
                self.pool = BagPool(self.width)

        def setup(self, stage: str) -> None:
            self.build("setup")

        def configure_model(self) -> None:
            self.build("configure_model")

    for hook in ("setup", "configure_model"):
        run = trainer([AttentionEntropyMaximization(modules="pool")], tmp_path)
        run.fit(Late(hook), loader(bags()))
        assert run.callback_metrics["aem/entropy"] > 0


def test_bags_of_one_instance_are_skipped(tmp_path: Path) -> None:
    ones = [{**b, "features": b["features"][:, :1], "mask": b["mask"][:, :1]} for b in bags(3)]
    data = [*ones, *bags(3)]
    run = trainer([AttentionEntropyMaximization()], tmp_path, max_epochs=1)
    run.fit(BagClassifier(), loader(data))
    assert run.callback_metrics["aem/entropy"] > 0
    again = trainer([AttentionEntropyMaximization()], tmp_path, max_epochs=1)
    again.fit(BagClassifier(), loader([*bags(2), *ones]))
    assert again.callback_metrics["aem/entropy"] == 0


def test_quantities_and_schedule_are_logged(tmp_path: Path) -> None:
    seen: list[dict] = []

    class Watch(AttentionEntropyMaximization):
        def on_train_batch_end(self, trainer, pl_module, *rest) -> None:
            super().on_train_batch_end(trainer, pl_module, *rest)
            seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    trainer([Watch(0.2, schedule="cosine")], tmp_path, max_epochs=4).fit(BagClassifier(), loader(bags()))
    weights = [s["aem/weight"] for s in seen]
    assert weights[::8] == pytest.approx([0.1 * (1 + math.cos(math.pi * t / 4)) for t in range(4)])
    last = seen[-1]
    assert last["aem/loss"] == pytest.approx(-last["aem/entropy"], rel=1e-5)
    assert 0 < last["aem/normalized_entropy"] <= 1
    assert 1 <= last["aem/effective_number"] <= 9
    assert last["aem/top1_mass"] <= last["aem/top10_mass"] <= 1 + 1e-6
    assert last["aem/collapsed_fraction"] == 0


def test_collapse_is_said(tmp_path: Path) -> None:
    module = BagClassifier(lr=0.0)
    module.pool.score = nn.Linear(module.width, 1)
    nn.init.constant_(module.pool.score.weight, 1e3)
    with pytest.warns(UserWarning, match="effective number of attended instances"):
        trainer([AttentionEntropyMaximization()], tmp_path, max_epochs=4).fit(module, loader(bags()))


def test_says_once_what_it_reads(tmp_path: Path, announced: list[str]) -> None:
    callback = AttentionEntropyMaximization(0.1, schedule="cosine")
    trainer([callback], tmp_path, max_epochs=3).fit(BagClassifier(), loader(bags()))
    assert announced == [
        "AttentionEntropyMaximization: reading 1 attention (pool, softmax over 9 instances, from logits); "
        "weight 0.1 -> 0 (cosine, 3 epochs)"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -0.1}, r"weight must be finite and >= 0, got -0\.1"),
        ({"weight": float("nan")}, "weight must be finite"),
        ({"schedule": "cosin"}, "schedule must be one of constant, linear, cosine, warmup, got 'cosin'"),
        ({"top_k": 0}, "at least 1, got 0"),
        ({"target": 2.0}, r"target must be a normalised entropy in \(0, 1\], got 2\.0"),
        ({"reduction": "median"}, "reduction must be"),
        ({"modules": []}, "at least one pattern"),
    ],
)
def test_bad_arguments_are_refused_at_once(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionEntropyMaximization(**options)


def test_endless_run_needs_a_length(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the length of the run"):
        trainer([AttentionEntropyMaximization(schedule="cosine")], tmp_path, max_epochs=-1).fit(
            BagClassifier(), loader(bags())
        )
    by_hand = WeightSchedule("cosine", unit="step", length=5)
    trainer([AttentionEntropyMaximization(schedule=by_hand)], tmp_path, max_epochs=-1, max_steps=9).fit(
        BagClassifier(), loader(bags())
    )


def test_reading_does_not_change_the_output() -> None:
    module = BagClassifier().eval()
    batch = bags(1)[0]
    plain = module.pool(batch["features"], batch["mask"])
    with AttentionReader(module.pool) as reader:
        read = module.pool(batch["features"], batch["mask"])
    assert torch.equal(plain, read)
    assert len(reader.records) == 1
    assert torch.equal(reader.records[0].mask[:, 0], batch["mask"])
