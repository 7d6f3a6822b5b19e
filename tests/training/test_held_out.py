from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_entropy.training.held_out import HeldOutBatch
from lightning_entropy.training.held_out_outputs import (
    batch_size_of,
    by_class,
    call_forward,
    embed_pair,
    embedding_of,
    token_likelihood,
)
from lightning_entropy.training.held_out_scores import make_score
from lightning_entropy.training.lightning import MisconfigurationException
from tests.finetuning.forgetting_cases import Language, token_batches


def language(kind: str) -> LightningModule:
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "causal":
        config = transformers.LlamaConfig(**size, intermediate_size=16, num_key_value_heads=2)
        return Language(transformers.LlamaForCausalLM(config))
    if kind == "masked":
        return Language(transformers.BertForMaskedLM(transformers.BertConfig(**size, intermediate_size=16)))
    if kind == "encoder":
        config = transformers.BertConfig(**size, intermediate_size=16)
        return Language(transformers.BertModel(config))
    return Language(transformers.BertForSequenceClassification(transformers.BertConfig(**size, intermediate_size=16)))


def by_hand(module: Any, batches: list[dict[str, Tensor]], *, following: bool) -> tuple[float, int]:
    """Token by token, from the logits."""
    total, count = 0.0, 0
    for batch in batches:
        logits = module(**batch).logits.double().log_softmax(-1)
        for row, labels in zip(logits, batch["labels"], strict=True):
            for t, label in enumerate(labels.tolist()):
                if label != -100 and not (following and t == 0):
                    total -= float(row[t - 1 if following else t, label])
                    count += 1
    return total, count


@pytest.mark.parametrize(("kind", "following"), [("causal", True), ("masked", False)])
@pytest.mark.parametrize("how", ["whole", "no loss", "loss only", "no labels"])
def test_perplexity_is_weighted_by_tokens(kind: str, following: bool, how: str) -> None:
    module = language(kind).eval()
    batches = token_batches()
    if kind == "masked":
        for i, batch in enumerate(batches):  # most labels ignored, and the inputs at the others are not the labels
            keep = torch.zeros_like(batch["labels"], dtype=torch.bool)
            keep[:, 1 : 3 + i] = True
            batch["labels"] = batch["labels"].masked_fill(~keep, -100)
            batch["input_ids"] = batch["input_ids"].masked_fill(keep, 39)
        if how == "no labels":
            pytest.skip("without labels the input is what is predicted")
    score = make_score("perplexity", module, owner="M", temperature=1.0)
    with torch.no_grad():
        expected, count = by_hand(module, batches, following=following)
        means = []
        for number, batch in enumerate(batches):
            if how == "no labels":
                batch = {k: v for k, v in batch.items() if k != "labels"}
            output = call_forward(module, batch, "M")
            if how != "no labels":
                means.append(float(output.loss))
            if how == "no loss":
                output = output.logits
            elif how == "loss only":
                output = {"loss": output.loss}
            score.update(HeldOutBatch(number, output, batch))
    values = score.compute()
    assert values["loss"] == pytest.approx(expected / count, rel=1e-5)
    assert values["perplexity"] == pytest.approx(torch.tensor(expected / count).exp().item(), rel=1e-4)
    if means:
        assert abs(sum(means) / len(means) - expected / count) > 1e-6, "the mean of the means is another number"


def test_a_loss_with_terms_of_its_own_does_not_decide() -> None:
    module = language("causal").eval()
    (batch,) = token_batches(1)
    with torch.no_grad():
        output = module(**batch)
        expected, count = by_hand(module, [batch], following=True)
    odd = {"logits": output.logits, "loss": output.loss + 5}
    score = token_likelihood(odd, batch, "M")
    assert int(score.counted) == count
    assert float(score.nll) == pytest.approx(expected, rel=1e-5)


def test_a_step_may_count_by_itself() -> None:
    score = token_likelihood({"nll": 6.0, "count": 3}, None, "M")
    assert float(score.mean()) == 2
    with pytest.raises(MisconfigurationException, match="needs logits"):
        token_likelihood(torch.zeros(2, 3), {"x": torch.zeros(2)}, "M")


def test_sequence_classification_of_transformers() -> None:
    module = language("classifier").eval()
    (batch,) = token_batches(1, labels=False)
    batch["labels"] = torch.tensor([0, 1])
    score = make_score("accuracy", module, owner="M", temperature=1.0)
    with torch.no_grad():
        output = call_forward(module, batch, "M")
        score.update(HeldOutBatch(0, output, batch))
    assert score.compute()["loss"] == pytest.approx(float(output.loss), rel=1e-5)
    assert score.compute()["accuracy"] == float((output.logits.argmax(-1) == batch["labels"]).double().mean())


def test_embeddings_are_means_over_the_tokens_that_exist() -> None:
    module = language("encoder").eval()
    first, second = token_batches(2, labels=False)
    with torch.no_grad():
        a, b = embed_pair(module, (first, second), "M")
        hidden = module(**first).last_hidden_state
    lengths = first["attention_mask"].sum(1).tolist()
    expected = torch.stack([hidden[i, :n].mean(0) for i, n in enumerate(lengths)])
    torch.testing.assert_close(a, expected)
    assert b.shape == a.shape
    assert embedding_of(torch.zeros(3, 2, 4), None).shape == (3, 4)
    assert embedding_of({"embeddings": torch.zeros(3, 4)}, None).shape == (3, 4)
    assert embedding_of(torch.zeros(3), None) is None
    with pytest.raises(MisconfigurationException, match="last_hidden_state of forward, got a tensor"):
        embed_pair(Calls(), ({"x": torch.zeros(2)}, {"x": torch.zeros(2)}), "M")


class Calls(LightningModule):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * x


class Whole(LightningModule):
    def forward(self, batch: Any) -> Tensor:
        return batch["x"] if isinstance(batch, dict) else batch[1]


def test_how_forward_is_called() -> None:
    x = torch.ones(2)
    assert torch.equal(call_forward(Calls(), {"x": x, "scale": 3.0, "name": "a"}, "M"), 3 * x)
    assert torch.equal(call_forward(Calls(), [x, "label"], "M"), x)
    assert torch.equal(call_forward(Calls(), x, "M"), x)
    assert torch.equal(call_forward(Whole(), {"x": x}, "M"), x)
    assert torch.equal(call_forward(Whole(), (0, x), "M"), x)
    with pytest.raises(MisconfigurationException, match="takes x, scale and would be called with scale="):
        call_forward(Calls(), {"scale": 2.0}, "M")


def test_logits_and_labels_in_all_layouts() -> None:
    labels = torch.randint(0, 3, (2, 4, 4))
    logits = torch.randn(2, 4, 4, 3)
    assert by_class(logits, labels)[0].shape == logits.shape
    torch.testing.assert_close(by_class(logits.movedim(-1, 1), labels)[0], logits)
    binary, integers = by_class(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(
        F.cross_entropy(binary, integers),
        F.binary_cross_entropy_with_logits(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0])),
    )
    assert by_class(torch.zeros(4, 1), torch.ones(4, dtype=torch.long))[0].shape == (4, 2)
    assert by_class(torch.zeros(4), torch.full((4,), 0.3)) is None
    assert by_class(torch.zeros(4, 3), torch.zeros(5, dtype=torch.long)) is None
    assert by_class(torch.zeros(4, 3), torch.zeros(4)) is None


def test_sums_are_exact_whatever_their_order() -> None:
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    scores = []
    for order in ((0, 1, 2), (2, 0, 1)):
        score = make_score(lambda output, batch: output, module, owner="M", temperature=1.0)
        for i in order:
            output = torch.tensor([[1e16, 1.0, -1e16][i]], dtype=torch.float64)
            score.update(HeldOutBatch(i, output, torch.zeros(1)))
        scores.append(score.compute())
    assert scores[0] == scores[1]
    assert next(iter(scores[0].values())) == pytest.approx(1 / 3)


def test_infinite_losses_are_not_hidden() -> None:
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    score = make_score("perplexity", module, owner="M", temperature=1.0)
    for number, nll in enumerate((1.0, float("inf"))):
        score.update(HeldOutBatch(number, {"nll": nll, "count": 1}, None))
    assert score.compute() == {"loss": float("inf"), "perplexity": float("inf")}


def test_batch_sizes() -> None:
    assert batch_size_of(torch.zeros(3, 2)) == 3
    assert batch_size_of({"text": ["a"], "x": torch.zeros(4)}) == 4
    assert batch_size_of([torch.zeros(5), torch.zeros(2)]) == 5
    assert batch_size_of("text") == 1
    assert batch_size_of(nn.Identity()) == 1
