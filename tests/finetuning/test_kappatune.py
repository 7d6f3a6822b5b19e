from __future__ import annotations

from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.loggers import CSVLogger

from lightning_entropy import KappaTune, select_modules
from lightning_entropy.surgery import Selection
from lightning_entropy.training.before_fit import training_batches, training_loss
from tests.suite.running import same, trainer, weights
from tests.training.fine_tuning_modules import Classifier, data

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*num_workers.*")


def fit(callback: KappaTune, folder: Path, module=None, **options):
    seed_everything(3, verbose=False)
    module = Classifier() if module is None else module
    run = trainer([callback], folder, **options)
    run.fit(module, data())
    return module, run


@pytest.mark.parametrize(
    "options",
    [
        {"normalize": "shape"},
        {"by": "entropy_deficit", "budget": {"parameters": 0.5}, "normalize": "type"},
        {"by": "random", "seed": 4, "budget": 3},
        {"by": "condition_number", "normalize": "shape", "largest": True, "budget": 1},
        {"by": "depth", "exclude": "network.wide"},
        {"by": "stable_rank", "modules": "network.layers*"},
    ],
)
def test_it_trains_what_select_modules_chooses(options: dict, tmp_path: Path) -> None:
    callback = KappaTune(**options)
    module, _ = fit(callback, tmp_path)
    seed_everything(3, verbose=False)
    pristine = Classifier()
    options = {"budget": 0.2, **options}
    exclude = [options.pop("exclude")] if "exclude" in options else []
    heads = [] if "modules" in options else ["head"]  # not among the candidates then
    expected = select_modules(pristine, exclude=exclude + heads or None, **options)
    assert callback.chosen.selection.record() == expected.record()
    after, before = weights(module), weights(pristine)
    moved = {n for n in dict(module.named_parameters()) if not torch.equal(after[n], before[n])}
    assert moved == {*expected.names, "head.weight", "head.bias"}


def test_gradient_scores_are_those_of_the_first_batches(tmp_path: Path) -> None:
    callback = KappaTune(2, by="fisher", batches=2)
    fit(callback, tmp_path)
    seed_everything(3, verbose=False)
    module = Classifier()
    module.accuracy.reset()
    batches = [batch for batch, _ in zip(data(), range(2))]
    module.log = lambda *a, **k: None
    loss = lambda m, batch: m.training_step(batch, 0)  # noqa: E731
    expected = select_modules(module, by="fisher", budget=2, exclude="head", data=batches, loss=loss)
    assert callback.chosen.selection.names == expected.names
    found = [row.score for row in callback.chosen.selection.rows]
    assert found == pytest.approx([row.score for row in expected.rows])


def test_looking_at_data_counts_nothing(tmp_path: Path) -> None:
    module = Classifier()

    class Look(Callback):
        def setup(self, trainer, pl_module, stage) -> None:
            state = torch.get_rng_state()
            with training_batches(trainer, pl_module, 3) as batches:
                assert len(batches) == 3
                assert torch.equal(batches[0][0], next(iter(data()))[0])
                training_loss(pl_module, batches[0]).backward()
                assert pl_module.accuracy._update_count == 0
            pl_module.zero_grad()
            assert torch.equal(torch.get_rng_state(), state)

    trainer([Look()], tmp_path, max_epochs=1).fit(module, data())
    assert "log" not in vars(module)


def test_the_head_is_trained_and_no_candidate(tmp_path: Path) -> None:
    automatic, named = KappaTune(2, by="depth"), KappaTune(2, by="depth", head="network.wide")
    module, _ = fit(automatic, tmp_path)
    assert automatic.chosen.selection.names == ["network.wide.2.weight", "network.wide.0.weight"]
    assert module.head.weight.requires_grad
    module, _ = fit(named, tmp_path)
    assert named.chosen.selection.names[0] == "head.weight"
    assert module.network.wide[0].bias.requires_grad
    none = KappaTune(1, by="depth", head=None)
    module, _ = fit(none, tmp_path)
    assert none.chosen.selection.names == ["head.weight"]
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["head.weight"]


def test_the_selection_is_a_file_beside_the_logs_and_comes_back(tmp_path: Path) -> None:
    callback = KappaTune(2, normalize="shape", log_figures=True)
    first, run = fit(callback, tmp_path, logger=CSVLogger(tmp_path))
    path = Path(run.log_dir) / "kappatune_selection.json"
    assert Selection.load(path).names == callback.chosen.selection.names
    second, _ = fit(KappaTune(selection=path), tmp_path)
    assert same(weights(first), weights(second))


def test_budgets_keep_their_type_in_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    for budget in (7, 0.2, {"parameters": 0.1}, {"tensors": 3}):
        config = {"class_path": "lightning_entropy.KappaTune", "init_args": {"budget": budget}}
        built = parser.instantiate_classes(parser.parse_object({"callback": config})).callback
        assert built.budget == budget
        assert type(built.budget) is type(budget)
        if isinstance(budget, dict):
            assert [type(v) for v in built.budget.values()] == [type(v) for v in budget.values()]


def test_two_instances_train_the_union(tmp_path: Path) -> None:
    a = KappaTune(1, by="depth", modules="network.layers*", head=None)
    b = KappaTune(1, by="depth", modules="network.wide", head="head", mode="lora", rank=2, save="adapters")
    assert a.state_key != b.state_key
    seed_everything(3, verbose=False)
    module = Classifier()
    trainer([a, b], tmp_path).fit(module, data())
    adapters = [f"network.wide.2.lora_{ab}.default.weight" for ab in "AB"]
    trained = [n for n, p in module.named_parameters() if p.requires_grad]
    assert trained == ["network.layers.2.weight", *adapters, "head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"by": "kappa"}, "by must be one of"),
        ({"normalize": "size"}, "normalize must be"),
        ({"budget": 1.5}, "fraction of tensors"),
        ({"budget": 0}, "count of tensors"),
        ({"batches": 0}, "batches must be"),
        ({"modules": []}, "empty list"),
        ({"mode": "some"}, "mode must be"),
    ],
)
def test_arguments_are_checked_at_once(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        KappaTune(**options)
