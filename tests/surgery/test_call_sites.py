"""Which call expressions are activations, and the classes in which they are sent to submodules."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import relu as r

from lightning_entropy.surgery.call_sites import call_sites
from lightning_entropy.surgery.rewritten_class import edit, edits_of, original_class, rewritten_class


def doubled(function):
    @functools.wraps(function)
    def wrapper(self, x):
        return 2 * function(self, x)

    return wrapper


class Written(nn.Module):
    scale: float = 0.3

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()
        self.__secret = 5.0

    def forward(self, x, *, again: bool = True):
        """Uses an alias, a local name that is no activation, a private name and a nested function."""
        relu = torch.neg
        x = relu(x)
        x = r(x, inplace=True) + self.__secret

        def inner(y):
            return self.act(F.leaky_relu(y, negative_slope=self.scale))

        x = inner(x - 6)
        x.relu_()
        return self.act(x) + self.helper(x) if again else x

    @doubled
    def helper(self, x):
        return super().extra_repr() + x.sigmoid() if isinstance(x, str) else torch.tanh(input=x)


def site(kind, label):
    return next(s for s in call_sites(kind) if s.label == label)


def test_names_are_looked_up_where_the_function_looks_them_up():
    found = [(s.label, s.family, s.form) for s in call_sites(Written) if s.form != "module"]
    assert found == [
        ("r", "relu", "function"),
        ("F.leaky_relu", "leaky_relu", "function"),
        ("x.relu_()", "relu", "method"),
        ("x.sigmoid()", "sigmoid", "method"),
        ("torch.tanh", "tanh", "function"),
    ]
    assert site(Written, "r").in_place
    assert site(Written, "F.leaky_relu").settings == (("negative_slope", "self.scale"),)
    assert len([s for s in call_sites(Written) if s.attribute == "act"]) == 2


@pytest.mark.parametrize("label", ["r", "F.leaky_relu", "x.relu_()", "torch.tanh"])
def test_a_call_goes_to_a_submodule_and_nothing_else_changes(label):
    model = Written()
    x = torch.randn(50)
    expected = model(x)
    where = site(Written, label)
    model.add_module("other", nn.Identity())
    model.__class__ = rewritten_class(Written, frozenset({edit(Written, where.position, "other")}))
    assert isinstance(model, Written)
    assert type(model).__name__ == "Written"
    functions = {
        "r": F.relu,
        "F.leaky_relu": lambda y: F.leaky_relu(y, 0.3),
        "x.relu_()": F.relu,
        "torch.tanh": torch.tanh,
    }
    ran = []
    model.other.forward = lambda y: ran.append(label) or functions[label](y)
    assert torch.equal(model(x), expected)
    assert ran == [label]


class Long(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        y = F.relu(
            torch.relu(x - 1) + 1,
            inplace=True,
        )
        y.relu_()
        return (
            self.act(y),
            self.act(  # twice on a line
                y - 2
            ),
            "é",
            F.relu(y),
        )


def test_the_text_of_a_rewritten_method_is_what_runs(recwarn):
    model = Long()
    calls = [s for s in call_sites(Long) if s.form != "module" or s.attribute == "act"]
    edits = set()
    for i, call in enumerate(calls):
        model.add_module(f"a{i}", nn.ReLU())
        edits.add(edit(Long, call.position, f"a{i}"))
    model.__class__ = rewritten_class(Long, frozenset(edits))
    assert len(calls) == 6
    text = inspect.getsource(type(model).forward)
    assert "relu(" not in text.replace(".relu_", "")
    assert "y = self.a2(y)" in text
    assert len(text.splitlines()) == len(inspect.getsource(Long.forward).splitlines())
    x = torch.randn(9)
    scripted = torch.jit.script(model)
    for i in range(6):  # the original method would not see this
        setattr(model, f"a{i}", nn.Identity())
    assert not torch.equal(model(x)[3], scripted(x)[3])
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x)[3], model(x)[3])
    with pytest.raises(TypeError) as error:
        model("text")
    assert "self.a0(x - 1)" in str(error.getrepr())


def test_copies_and_pickles_find_the_class_again():
    model = Written()
    model.add_module("other", nn.Softplus())
    wanted = frozenset({edit(Written, site(Written, "torch.tanh").position, "other")})
    model.__class__ = rewritten_class(Written, wanted)
    x = torch.randn(5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert torch.equal(other(x), model(x))
    assert edits_of(type(model)) == wanted
    assert original_class(type(model)) is Written
    assert rewritten_class(type(model), frozenset()) is Written


def test_a_position_that_is_not_there_is_an_error():
    wanted = edit(Written, site(Written, "torch.tanh").position, "other")._replace(line=1000)
    with pytest.raises(ValueError, match="not what it was"):
        rewritten_class(Written, frozenset({wanted}))


def test_a_decorator_that_hides_its_function_is_an_error():
    registry = {}

    def hidden(function):
        registry["f"] = function

        @functools.wraps(function)
        def wrapper(self, x):
            return registry["f"](self, x)

        return wrapper

    class Hidden(nn.Module):
        @hidden
        def forward(self, x):
            return F.relu(x)

    where = site(Hidden, "F.relu")
    with pytest.raises(ValueError, match="cannot be reached"):
        rewritten_class(Hidden, frozenset({edit(Hidden, where.position, "a")}))
