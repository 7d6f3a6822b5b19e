"""A class like a given one, in which some call expressions of its methods call a submodule instead.

The source stays what it is: its methods are compiled again with the calls at given positions replaced, so control
flow, closures, nested functions, gradient checkpointing and ``torch.compile`` see ordinary Python. The class keeps its
name; instances that were pickled or deep-copied find it again through their original class.
"""

from __future__ import annotations
import __future__

import ast
import copy
from types import CellType, CodeType, FunctionType
from typing import Any, NamedTuple

from torch import nn

from lightning_entropy.surgery.call_sites import Position, enclosing_class, function_node, inner_function, methods
from lightning_entropy.surgery.rewritten_source import SourceEdit, SourceFile, remember

_ORIGINAL = "_class_before_rewrite"
_EDITS = "_rewritten_calls"
_FUTURE = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)


class Edit(NamedTuple):
    """A call that goes to a submodule: the method, the end of the call relative to it, and the submodule's name."""

    method: str
    line: int
    column: int
    attribute: str


_classes: dict[tuple[type, frozenset[Edit]], type] = {}


def original_class(kind: type) -> type:
    """The class as its author wrote it."""
    return kind.__dict__.get(_ORIGINAL, kind)


def edits_of(kind: type) -> frozenset[Edit]:
    """The calls that a class has replaced."""
    return kind.__dict__.get(_EDITS, frozenset())


def edit(kind: type, position: Position, attribute: str) -> Edit:
    """The edit that sends a call to ``self.<attribute>``; its line is counted from the head of the method.

    Raises:
        ValueError: if the source of the method is not at hand.
    """
    node = _definition(original_class(kind), position.method)
    return Edit(position.method, position.line - node.lineno, position.column, attribute)


def rewritten_class(kind: type, edits: frozenset[Edit]) -> type:
    """The class with these calls replaced, and no others; the original class for none.

    Args:
        kind: a module class, or what this function returned for it.
        edits: from :func:`edit`.

    Raises:
        ValueError: if a method cannot be compiled again: its source is not at hand or has changed, or a decorator
            holds it where it cannot be reached.
    """
    base = original_class(kind)
    if not edits:
        return base
    key = (base, edits)
    if key not in _classes:
        body: dict[str, Any] = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": _reduce,
            _ORIGINAL: base,
            _EDITS: edits,
        }
        for name in sorted({e.method for e in edits}):
            body[name] = _rewritten_method(base, name, [e for e in edits if e.method == name])
        _classes[key] = type(base)(base.__name__, (base,), body)
    return _classes[key]


def _reduce(self: nn.Module, protocol: Any) -> Any:
    kind = type(self)
    reduced = super(kind, self).__reduce_ex__(protocol)
    if getattr(reduced[0], "__name__", "") == "__newobj__" and reduced[1] == (kind,):
        return (_restore, (original_class(kind), tuple(sorted(edits_of(kind)))), *reduced[2:])
    return reduced


def _restore(base: type, edits: tuple[tuple[Any, ...], ...]) -> Any:
    kind = rewritten_class(base, frozenset(Edit(*e) for e in edits))
    return object.__new__(kind)


def _definition(base: type, method: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
    function = inner_function(methods(base).get(method))
    node = function_node(function.__code__) if function is not None else None
    if node is None:
        raise ValueError(f"the source of {base.__name__}.{method} is not at hand")
    return node


class _Replacer(ast.NodeTransformer):
    """Sends calls at given ends to submodules of ``self``."""

    def __init__(self, owner: str, targets: dict[tuple[int, int], str], source: SourceFile) -> None:
        self.owner, self.targets, self.source = owner, targets, source
        self.done: set[tuple[int, int]] = set()
        self.text: list[SourceEdit] = []  # the same, for the text

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        call = node.value
        end = _end(call)
        replaces = isinstance(call, ast.Call) and end in self.targets and not self._is_module_call(call)
        data = _input(call) if replaces and isinstance(call, ast.Call) else None
        whole = self.source.span(call)
        self.generic_visit(node)
        if not isinstance(data, ast.Name | ast.Attribute):
            return node
        # A call that overwrites its input and whose result is dropped: the input's name gets the result.
        target = copy.deepcopy(data)
        target.ctx = ast.Store()
        self.text = [e._replace(head=f"{ast.unparse(target)} = {e.head}") if e.call == whole else e for e in self.text]
        return ast.copy_location(ast.Assign([target], node.value), node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        end = _end(node)
        attribute = self.targets.get(end) if end is not None else None
        if attribute is None:
            return self.generic_visit(node)
        module_call = self._is_module_call(node)
        given: list[ast.AST] = [*node.args, *node.keywords] if module_call else [_input(node)]
        inside = self.source.span(given[0], given[-1])
        self.text.append(SourceEdit(self.source.span(node), inside, f"{self.owner}.{attribute}"))
        self.generic_visit(node)
        assert end is not None
        self.done.add(end)
        where = ast.Attribute(ast.Name(self.owner, ast.Load()), attribute, ast.Load())
        if module_call:
            return ast.copy_location(ast.Call(where, node.args, node.keywords), node)
        return ast.copy_location(ast.Call(where, [_input(node)], []), node)

    def _is_module_call(self, node: ast.Call) -> bool:
        func: ast.expr = node.func
        while isinstance(func, ast.Attribute):
            func = func.value
        return isinstance(func, ast.Name) and func.id == self.owner and bool(node.args or node.keywords)


def _end(node: ast.AST) -> tuple[int, int] | None:
    line, column = getattr(node, "end_lineno", None), getattr(node, "end_col_offset", None)
    return None if line is None or column is None else (line, column)


def _input(call: ast.Call) -> ast.expr:
    if call.args:
        return call.args[0]
    for keyword in call.keywords:
        if keyword.arg == "input":
            return keyword.value
    assert isinstance(call.func, ast.Attribute)  # a tensor's method
    return call.func.value


def _rewritten_method(base: type, name: str, edits: list[Edit]) -> Any:
    outer = methods(base)[name]
    inner = inner_function(outer)
    node = copy.deepcopy(_definition(base, name))
    assert inner is not None
    source = SourceFile(inner.__code__.co_filename)
    targets = {(node.lineno + e.line, e.column): e.attribute for e in edits}
    replacer = _Replacer(node.args.args[0].arg, targets, source)
    node.body = [replacer.visit(statement) for statement in node.body]
    if len(replacer.done) != len(edits):
        raise ValueError(f"the source of {base.__name__}.{name} is not what it was when its activations were swapped")
    text = source.rewritten(replacer.text)
    # A text that says something else is worse than none: then inspect and torch.jit.script say that they have none.
    filename = remember(source.filename, text if _says(text, node) else "")
    return _rewrapped(outer, inner, _compiled(node, inner, filename))


def _says(text: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return False
    same = [n for n in ast.walk(tree) if isinstance(n, type(node)) and (n.name, n.lineno) == (node.name, node.lineno)]
    return len(same) == 1 and [ast.dump(s) for s in same[0].body] == [ast.dump(s) for s in node.body]


def _compiled(node: ast.FunctionDef | ast.AsyncFunctionDef, function: FunctionType, filename: str) -> FunctionType:
    code = function.__code__
    owner = enclosing_class(code, node)
    node.decorator_list = []
    node.returns = None
    arguments = node.args
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
        if argument is not None:
            argument.annotation = None
    # Defaults are taken from the function that is there; these only keep their number.
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [None if d is None else ast.Constant(None) for d in arguments.kw_defaults]
    # Inside a class of the same name private names are mangled as before; free variables stay free.
    free = [name for name in code.co_freevars if name != "__class__"]
    assigned = [ast.Assign([ast.Name(name, ast.Store())], ast.Constant(None)) for name in free]
    tree = ast.parse(f"def _factory():\n  class {owner}:\n    pass")
    factory = tree.body[0]
    assert isinstance(factory, ast.FunctionDef)
    assert isinstance(factory.body[0], ast.ClassDef)
    factory.body[0].body = [node]
    factory.body[:0] = assigned
    ast.fix_missing_locations(tree)
    compiled = compile(tree, filename, "exec", flags=code.co_flags & _FUTURE, dont_inherit=True)
    mine = _find_code(compiled, node.name)
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    closure = tuple(cells[name] for name in mine.co_freevars)
    new = FunctionType(mine, function.__globals__, function.__name__, function.__defaults__, closure)
    new.__kwdefaults__ = function.__kwdefaults__
    new.__annotations__ = function.__annotations__
    new.__qualname__, new.__module__, new.__doc__ = function.__qualname__, function.__module__, function.__doc__
    new.__dict__.update({k: v for k, v in function.__dict__.items() if k != "__wrapped__"})
    return new


def _find_code(code: CodeType, name: str) -> CodeType:
    """The function of a name in ``factory -> class -> function``."""
    for depth in range(3):
        inner = [c for c in code.co_consts if isinstance(c, CodeType)]
        wanted = name if depth == 2 else None
        code = next(c for c in inner if wanted is None or c.co_name == wanted)
    return code


def _rewrapped(outer: Any, inner: FunctionType, new: FunctionType) -> Any:
    """The decorators of a function around another one: copies of their wrappers, with the cell exchanged."""
    if outer is inner:
        return new
    if not isinstance(outer, FunctionType) or not outer.__closure__:
        raise ValueError(f"a decorator of {inner.__qualname__} holds it where it cannot be reached")
    wrapped = outer.__wrapped__  # type: ignore[attr-defined]
    replaced = _rewrapped(wrapped, inner, new)
    cells = []
    found = False
    for cell in outer.__closure__:
        if cell.cell_contents is wrapped:
            cells.append(CellType(replaced))
            found = True
        else:
            cells.append(cell)
    if not found:
        raise ValueError(f"a decorator of {inner.__qualname__} holds it where it cannot be reached")
    copied = FunctionType(outer.__code__, outer.__globals__, outer.__name__, outer.__defaults__, tuple(cells))
    copied.__kwdefaults__ = outer.__kwdefaults__
    copied.__dict__.update(outer.__dict__)
    copied.__wrapped__ = replaced  # type: ignore[attr-defined]
    copied.__qualname__, copied.__module__, copied.__doc__ = outer.__qualname__, outer.__module__, outer.__doc__
    copied.__annotations__ = outer.__annotations__
    return copied


__all__ = ["Edit", "edit", "edits_of", "original_class", "rewritten_class"]
