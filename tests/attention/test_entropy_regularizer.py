"""The regularizer in a Trainer: objectives move entropy as they say, thresholds learn, resume and refuse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_entropy import AttentionEntropyRegularizer
from lightning_entropy.observe import AttentionEntropyReader
from tests.suite.running import first_gradients, loader, same, trainer, weights
from tests.user_modules import TokenClassifier, bags


def heads_after(
    objective: str | None, tmp_path: Path, module: LightningModule | None = None, **options: Any
) -> list[Tensor]:
    torch.manual_seed(0)
    module = TokenClassifier(dropout=0.0, lr=0.02) if module is None else module
    callbacks = [] if objective is None else [AttentionEntropyRegularizer(20.0, objective=objective, **options)]
    trainer(callbacks, tmp_path, max_epochs=25).fit(module, loader(bags()))
    batch = bags()[0]
    with torch.no_grad(), AttentionEntropyReader(module) as reader:
        module.loss(batch)
    return [layer.per_head() for layer in reader.layers]


@pytest.mark.parametrize(
    ("objective", "target", "holds"),
    [
        ("maximize", None, lambda e: e.min() > 0.97),
        ("minimize", None, lambda e: e.mean() < 0.6),
        ("ceiling", 0.7, lambda e: e.max() < 0.8),
        ("target", 0.8, lambda e: (e - 0.8).abs().max() < 0.08),
        ("target", [0.7, 0.9], lambda e: (e - torch.tensor([0.7, 0.9])).abs().max() < 0.12),
        ("band", 0.6, lambda e: e.max() < 0.85),
        ("target", {"pool.layers.0.*": 0.9, "*": [0.7, 0.8]}, None),
    ],
)
def test_objectives_move_every_head(objective: str, target: Any, holds: Any, tmp_path: Path) -> None:
    layers = heads_after(objective, tmp_path, target=target)
    if holds is None:
        torch.testing.assert_close(layers[0], torch.tensor([0.9, 0.9]), atol=0.1, rtol=0)
        torch.testing.assert_close(layers[1], torch.tensor([0.7, 0.8]), atol=0.1, rtol=0)
    else:
        assert all(holds(e) for e in layers), layers


def test_a_floor_keeps_collapsing_heads_up(tmp_path: Path) -> None:
    def sharp() -> TokenClassifier:
        torch.manual_seed(0)
        module = TokenClassifier(dropout=0.0, lr=0.02)
        with torch.no_grad():
            for layer in module.pool.layers:
                layer.self_attn.in_proj_weight[:16] *= 4
        return module

    before = heads_after(None, tmp_path, sharp())
    after = heads_after("floor", tmp_path, sharp(), target=0.6)
    assert min(e.min() for e in before) < 0.45
    assert min(e.min() for e in after) > min(e.min() for e in before) + 0.05


def test_the_gradient_is_that_of_the_definition(tmp_path: Path) -> None:
    batch = bags(dtype=torch.float64)[0]
    torch.manual_seed(0)
    module = TokenClassifier(dropout=0.0).double()
    expected_module = TokenClassifier(dropout=0.0).double()
    expected_module.load_state_dict(module.state_dict())
    callback = AttentionEntropyRegularizer(0.7, objective="floor", target=0.99)
    got = first_gradients(module, [callback], [batch], tmp_path)

    maps: list[Tensor] = []
    mask = batch["mask"]
    x = expected_module.pool.embed(batch["features"])
    loss = expected_module.loss(batch)
    for layer in expected_module.pool.layers:
        maps.append(layer.self_attn(x, x, x, key_padding_mask=~mask, average_attn_weights=False)[1])
        x = layer(x, src_key_padding_mask=~mask)
    penalties = []
    for p in maps:
        h = -(p * torch.where(p > 0, p, 1.0).log()).sum(-1)
        e = (h / mask.sum(-1).double().log()[:, None, None]).mean(-1)
        penalties.append((0.99 - e).clamp(min=0).square().mean())
    (loss + 0.7 * torch.stack(penalties).mean()).backward()
    for name, parameter in expected_module.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-7, atol=1e-12, msg=name)


class Band(AttentionEntropyRegularizer):
    """The paper's setting."""

    def __init__(self, **options: Any) -> None:
        defaults = {"objective": "band", "target": 0.3, "normalize": False, "learnable": True, "threshold_lr": 0.01}
        super().__init__(0.05, **{**defaults, **options})


def test_thresholds_are_learned_towards_their_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = TokenClassifier(dropout=0.0)
    callback = Band()
    trainer([callback], tmp_path, max_epochs=3).fit(module, loader(bags()))
    assert callback.thresholds is not None
    thresholds = callback.thresholds.values
    assert list(thresholds) == ["pool.layers.0.self_attn", "pool.layers.1.self_attn"]
    for theta in thresholds.values():
        assert theta.shape == (2,)
        assert (theta > 0.35).all()  # heads are nearly uniform: the threshold rises to meet them
        assert not any(theta is p for p in module.parameters())


def test_the_first_step_of_a_threshold_is_that_of_adamw(tmp_path: Path) -> None:
    callback = Band(threshold_lr=0.02)
    torch.manual_seed(0)
    trainer([callback], tmp_path, max_steps=1, max_epochs=1).fit(TokenClassifier(dropout=0.0), loader(bags()))
    assert callback.thresholds is not None
    for theta in callback.thresholds.values.values():
        torch.testing.assert_close(theta.detach(), torch.full((2,), 0.32), atol=1e-5, rtol=0)


def test_thresholds_resume_bitwise_and_a_second_fit_begins_anew(tmp_path: Path) -> None:
    def run(callback: Band, epochs: int, **options: Any) -> tuple[dict, Any]:
        torch.manual_seed(0)
        module = TokenClassifier(dropout=0.0)
        run = trainer([callback], tmp_path, max_epochs=epochs)
        run.fit(module, loader(bags()), **options)
        return weights(module), run

    callback = Band()
    whole, _ = run(callback, 4)
    final = {k: v.detach().clone() for k, v in callback.thresholds.values.items()}
    again, _ = run(callback, 4)
    assert same(whole, again)
    half = Band()
    _, first = run(half, 2)
    first.save_checkpoint(tmp_path / "half.ckpt")
    later = Band()
    resumed, _ = run(later, 4, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert same(whole, resumed)
    for name, theta in later.thresholds.values.items():
        assert torch.equal(theta.detach(), final[name])


def test_logged_quantities(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = trainer(
        [AttentionEntropyRegularizer(0.1, objective="floor", target=0.9999)],
        tmp_path,
        max_epochs=1,
        logger=CSVLogger(tmp_path, name="", version=""),
    )
    run.fit(TokenClassifier(dropout=0.0), loader(bags()))
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    wanted = {f"entropy_regularizer/{k}" for k in ("loss", "entropy", "lowest_head", "highest_head", "outside")}
    assert wanted <= set(header)
    assert 0 < float(run.callback_metrics["entropy_regularizer/outside"]) <= 1
    lowest, mean, highest = (
        float(run.callback_metrics[f"entropy_regularizer/{k}"]) for k in ("lowest_head", "entropy", "highest_head")
    )
    assert lowest <= mean <= highest <= 1 + 1e-6


class FrozenFirst(TokenClassifier):
    def __init__(self, whole: bool) -> None:
        super().__init__(dropout=0.0)
        self.pool.embed.requires_grad_(False)
        for layer in self.pool.layers if whole else self.pool.layers[:1]:
            layer.requires_grad_(False)


def test_frozen_attention_is_left_out_and_said(tmp_path: Path, announced: list[str]) -> None:
    trainer([AttentionEntropyRegularizer(objective="maximize")], tmp_path).fit(FrozenFirst(False), loader(bags()))
    assert any("1 frozen attention left out: pool.layers.0.self_attn" in line for line in announced)
    with pytest.raises(Exception, match="carries no gradient"):
        trainer([AttentionEntropyRegularizer(objective="maximize")], tmp_path).fit(FrozenFirst(True), loader(bags()))


def test_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    class Reentrant(TokenClassifier):
        def loss(self, batch: dict[str, Tensor]) -> Tensor:
            from torch.utils.checkpoint import checkpoint

            x = batch["features"].requires_grad_()
            z = checkpoint(self.pool, x, batch["mask"], use_reentrant=True)
            return nn.functional.cross_entropy(self.head(z), batch["label"])

    with pytest.raises(Exception, match="use_reentrant=False works"):
        trainer([AttentionEntropyRegularizer()], tmp_path).fit(Reentrant(dropout=0.0), loader(bags()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "rise"}, "objective must be one of"),
        ({"objective": "floor", "learnable": True}, "a learned floor would"),
        ({"threshold_lr": 0.1}, "needs learnable=True"),
        ({"objective": "band", "reduction": "official_sum"}, "pass normalize=False"),
        ({"queries": 0}, "queries must be at least 1"),
        ({"target": {"*": 2.0}}, "between 0 and 1"),
    ],
)
def test_arguments_are_refused_at_once(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionEntropyRegularizer(**arguments)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ([0.1, 0.2, 0.3], "3 values for 2 heads of pool.layers.0.self_attn"),
        ({"pool.layers.0.*": 0.3}, "matches the attention 'pool.layers.1.self_attn'"),
        ({"*": 0.3, "blocks.*": 0.2}, "'blocks.*' matches none of the attentions"),
    ],
)
def test_targets_must_fit_the_model(target: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=message):
        trainer([AttentionEntropyRegularizer(target=target)], tmp_path).fit(TokenClassifier(), loader(bags()))


def test_official_sum_in_a_trainer(tmp_path: Path) -> None:
    batch = bags(dtype=torch.float64, batch_size=2)[0]
    values = []
    for copies in (1, 2):
        torch.manual_seed(0)
        module = TokenClassifier(dropout=0.0).double()
        callback = AttentionEntropyRegularizer(
            1e-3, objective="band", target=0.2, normalize=False, reduction="official_sum"
        )
        run = trainer([callback], tmp_path, max_steps=1, max_epochs=1)
        run.fit(module, loader([{k: torch.cat([v] * copies) for k, v in batch.items()}]))
        values.append(float(run.callback_metrics["entropy_regularizer/loss"]))
    assert values[1] == pytest.approx(2 * values[0])
    rows = 2 * 9 * (math.log(9) * 0.8) ** 2
    assert 0 < values[0] <= rows
