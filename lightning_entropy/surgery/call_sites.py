"""Where the methods of a module class call activations: ``F.relu(x)``, ``x.relu_()``, and ``self.act(x)`` by position.

The source is parsed, and names are looked up where the function would look them up (its globals and closure), so that
``from torch.nn.functional import relu as r`` is seen and a local variable called ``relu`` is not taken for it.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import linecache
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from lightning_entropy.surgery.activation_families import METHODS, family_of_callable

# Keyword arguments of activations that change no value.
_IN_PLACE = "inplace"


@dataclass(frozen=True)
class Position:
    """A call expression in a method: its end in the file, which no other call expression shares."""

    method: str
    line: int
    column: int


@dataclass(frozen=True)
class CallSite:
    """One call expression.

    Attributes:
        position: where it is.
        form: ``"function"``, ``"method"`` (of a tensor) or ``"module"`` (``self.<attribute>(...)``).
        label: as it is written, for example ``F.relu``.
        family: of the activation; empty for ``"module"``.
        attribute: the attribute of ``self``, dotted, for ``"module"``.
        function: what is called, for ``"function"``.
        settings: further arguments, expressions without a call; evaluated on the instance.
        in_place: whether the input is overwritten.
        problem: why it cannot be rewritten, or None.
        line: where it starts.
    """

    position: Position
    form: str
    label: str
    family: str = ""
    attribute: str = ""
    function: Any = None
    settings: tuple[tuple[str | None, str], ...] = ()
    in_place: bool = False
    problem: str | None = None
    line: int = 0


def inner_function(function: Any) -> FunctionType | None:
    """The function under decorators that say what they wrap."""
    function = inspect.unwrap(function) if callable(function) else None
    return function if isinstance(function, FunctionType) else None


def methods(kind: type[nn.Module]) -> dict[str, Any]:
    """The methods of a module class that its author wrote, by name, as attribute lookup finds them."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if base is nn.Module or base is object or base.__module__.split(".")[0] == "torch":
            continue
        for name, value in base.__dict__.items():
            if name not in found and name not in ("__init__", "__new__") and inner_function(value) is not None:
                found[name] = value
    # A method of torch's own base that hides nothing stays out; one that an author's class overrides is kept.
    return {name: value for name, value in found.items() if inspect.getattr_static(kind, name, None) is value}


@functools.cache
def _parsed(filename: str, text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except SyntaxError:
        return None


def function_node(code: CodeType) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The definition of a function in its file; None where the source is not at hand."""
    lines = linecache.getlines(code.co_filename)
    tree = _parsed(code.co_filename, "".join(lines)) if lines else None
    if tree is None:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == code.co_name:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            if code.co_firstlineno in (first, node.lineno):
                return node
    return None


def enclosing_class(code: CodeType, node: ast.AST) -> str:
    """The name of the class in whose body a function is defined, for the mangling of private names."""
    parts = code.co_qualname.split(".") if hasattr(code, "co_qualname") else []
    if len(parts) > 1 and parts[-2] != "<locals>":
        return parts[-2]
    tree = _parsed(code.co_filename, "".join(linecache.getlines(code.co_filename)))
    for parent in ast.walk(tree) if tree is not None else ():
        if isinstance(parent, ast.ClassDef) and node in parent.body:
            return parent.name
    return "_"


_MISSING = object()


def _resolve(node: ast.expr, function: FunctionType, bound: set[str]) -> Any:
    """What a dotted name means in a function; ``_MISSING`` for local names and other expressions."""
    if isinstance(node, ast.Attribute):
        value = _resolve(node.value, function, bound)
        return _MISSING if value is _MISSING else getattr(value, node.attr, _MISSING)
    if not isinstance(node, ast.Name) or node.id in bound:
        return _MISSING
    if node.id in function.__code__.co_freevars:
        cell = (function.__closure__ or ())[function.__code__.co_freevars.index(node.id)]
        try:
            return cell.cell_contents
        except ValueError:  # not yet assigned
            return _MISSING
    return function.__globals__.get(node.id, getattr(builtins, node.id, _MISSING))


def _bound_names(node: ast.AST) -> set[str]:
    """Names that a function, or one nested in it, binds itself."""
    names: set[str] = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store | ast.Del):
            names.add(child.id)
        elif isinstance(child, ast.arg):
            names.add(child.arg)
        elif isinstance(child, ast.FunctionDef | ast.ClassDef) and child is not node:
            names.add(child.name)
        elif isinstance(child, ast.ImportFrom | ast.Import):
            names.update((alias.asname or alias.name).split(".")[0] for alias in child.names)
    return names


def _chain(node: ast.expr, root: str) -> str | None:
    """``a.b`` for ``self.a.b``; None for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if isinstance(node, ast.Name) and node.id == root and parts else None


def _shadowed(node: ast.AST, owner: str, nested: list[ast.AST]) -> bool:
    for function in nested:
        arguments = getattr(function, "args", None)
        if isinstance(arguments, ast.arguments) and any(
            a.arg == owner for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        ):
            return True
    return False


def _calls(node: ast.AST, nested: tuple[ast.AST, ...] = ()) -> Iterator[tuple[ast.Call, bool, list[ast.AST]]]:
    """Call expressions, whether one is a statement of its own, and the functions it is nested in."""
    for child in ast.iter_child_nodes(node):
        inside = (*nested, child) if isinstance(child, ast.FunctionDef | ast.Lambda) else nested
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            yield child.value, True, list(inside)
            yield from _calls(child.value, inside)
        else:
            if isinstance(child, ast.Call):
                yield child, False, list(inside)
            yield from _calls(child, inside)


def _true(node: ast.expr | None) -> bool:
    """Whether an argument may be true: anything but a constant that is not."""
    return node is not None and not (isinstance(node, ast.Constant) and not node.value)


def _site_of(
    call: ast.Call, statement: bool, method: str, owner: str, function: FunctionType, bound: set[str]
) -> CallSite | None:
    position = Position(method, call.end_lineno or 0, call.end_col_offset or 0)
    label = ast.unparse(call.func)
    target = _resolve(call.func, function, bound)
    family = None if target is _MISSING else family_of_callable(target)
    if family is not None and not isinstance(target, type):
        return _function_site(call, statement, position, label, family, target)
    attribute = _chain(call.func, owner)
    if attribute is not None and (call.args or call.keywords):
        return CallSite(position, "module", label, attribute=attribute, line=call.lineno)
    func = call.func
    if isinstance(func, ast.Attribute) and func.attr in METHODS and not call.args and not call.keywords:
        base = func.value
        if target is not _MISSING or (isinstance(base, ast.Name) and base.id == owner):
            return None
        in_place = func.attr.endswith("_")
        problem = _statement_problem(base, in_place) if statement else None
        return CallSite(
            position, "method", f"x.{func.attr}()", METHODS[func.attr], in_place=in_place, problem=problem,
            line=call.lineno,
        )  # fmt: skip
    return None


def _statement_problem(base: ast.expr, in_place: bool) -> str | None:
    if not in_place:
        return "its result is not used"
    if isinstance(base, ast.Name | ast.Attribute):
        return None
    return "it overwrites an expression that cannot be assigned to"


def _function_site(
    call: ast.Call, statement: bool, position: Position, label: str, family: str, target: Any
) -> CallSite:
    given = {k.arg: k.value for k in call.keywords}
    data = call.args[0] if call.args else given.pop("input", None)
    problem = None
    if data is None or isinstance(data, ast.Starred) or None in given:
        problem = "its arguments are unpacked from a sequence"
    rest = [(None, node) for node in call.args[1:]] + list(given.items())
    name = getattr(target, "__name__", "")
    takes_flag = family in ("relu", "relu6", "silu", "mish", "hardswish", "selu", "hardsigmoid")
    flag = given.get(_IN_PLACE)
    if flag is None and takes_flag and len(call.args) > 1:
        flag = call.args[1]
        rest = [pair for pair in rest if pair[1] is not flag]
    in_place = name.endswith("_") or _true(flag)
    settings = tuple((k, ast.unparse(v)) for k, v in rest if k != _IN_PLACE)
    if problem is None and any(isinstance(n, ast.Call) for _, v in rest for n in ast.walk(v)):
        problem = "its settings are computed when it runs"
    if problem is None and statement and data is not None:
        problem = _statement_problem(data, in_place)
    return CallSite(
        position, "function", label, family, function=target, settings=settings, in_place=in_place, problem=problem,
        line=call.lineno,
    )  # fmt: skip


@functools.cache
def call_sites(kind: type[nn.Module]) -> tuple[CallSite, ...]:
    """The calls in a class's methods of activations, and of anything that is an attribute of ``self``.

    Example:
        >>> from torchvision.models.densenet import DenseNet
        >>> [site.label for site in call_sites(DenseNet) if site.form == "function"]
        ['F.relu']
    """
    found: list[CallSite] = []
    for name, value in methods(kind).items():
        function = inner_function(value)
        node = function_node(function.__code__) if function is not None else None
        if function is None or node is None or not node.args.args:
            continue
        owner = node.args.args[0].arg
        bound = _bound_names(node)
        # By their ends: an inner call is evaluated before the one that it is in.
        calls = sorted(_calls(node), key=lambda c: (c[0].end_lineno or 0, c[0].end_col_offset or 0))
        for call, statement, nested in calls:
            if not _shadowed(node, owner, nested):
                site = _site_of(call, statement, name, owner, function, bound)
                if site is not None:
                    found.append(site)
    return tuple(found)


__all__ = ["CallSite", "Position", "call_sites", "enclosing_class", "function_node", "inner_function", "methods"]
