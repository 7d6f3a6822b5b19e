from __future__ import annotations

import copy
import json
import pickle

import pytest

from lightning_entropy.surgery import Change, Refusal, SurgeryReport
from lightning_entropy.surgery.report import name_patterns


def report(blocks: int = 12) -> SurgeryReport:
    return SurgeryReport("CRReLU", [Change(f"blocks.{i}.mlp.act", "GELU swapped") for i in range(blocks)], [], 12)


def test_it_is_one_line() -> None:
    done = report()
    assert str(done) == "CRReLU: 12 of 12 GELU swapped (blocks.*.mlp.act), +12 parameters; nothing refused"
    done.refused += [Refusal("head.0", "frozen"), Refusal("head.2", "frozen"), Refusal("", "tied")]
    done.changes.append(Change("stem", "ReLU swapped"))
    done.added_parameters = -3400
    assert str(done) == (
        "CRReLU: 12 of 16 GELU swapped (blocks.*.mlp.act), 1 of 16 ReLU swapped (stem), -3,400 parameters; "
        "refused: head.* (frozen); the module itself (tied)"
    )
    assert str(SurgeryReport("X")) == "X: nothing changed; nothing refused"


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        (["a.0.b", "a.1.b"], ["a.*.b"]),
        (["a.0.b.7", "a.1.b.7"], ["a.*.b.7"]),
        (["layer1.0.conv2", "layer3.1.conv2"], ["layer*.*.conv2"]),
        (["a", "b", "a"], ["a", "b"]),
        (["a.0"], ["a.0"]),
        ([], []),
    ],
)
def test_names_are_written_once_where_their_numbers_differ(names: list[str], patterns: list[str]) -> None:
    assert name_patterns(names) == patterns


def test_many_names_are_cut() -> None:
    done = SurgeryReport("X", [Change(letter, "changed") for letter in "abcdefgh"])
    assert "(a, b, c, d, e, f, and 2 more)" in str(done)


def test_undo_runs_backwards_and_once() -> None:
    done, calls = report(), []
    done.on_undo(lambda: calls.append("first"))
    done.on_undo(lambda: calls.append("second"))
    assert not done.undone
    done.undo()
    done.undo()
    assert calls == ["second", "first"]
    assert done.undone


def test_json_and_table() -> None:
    done = report(1)
    done.refused.append(Refusal("head", "frozen"))
    assert json.loads(done.to_json()) == {
        "method": "CRReLU",
        "changes": [{"module": "blocks.0.mlp.act", "what": "GELU swapped"}],
        "refused": [{"module": "head", "reason": "frozen"}],
        "added_parameters": 12,
        "undone": False,
    }
    assert done.table().splitlines() == [
        "module            CRReLU",
        "blocks.0.mlp.act  GELU swapped",
        "head              refused: frozen",
    ]


def test_a_copy_says_the_same_and_undoes_nothing() -> None:
    done, calls = report(), []
    done.on_undo(lambda: calls.append("undone"))
    for twin in (copy.deepcopy(done), pickle.loads(pickle.dumps(done))):
        assert str(twin) == str(done)
        twin.undo()
    assert not calls
