"""Small changes to a source, each of which a good test suite has to notice."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from typing import NamedTuple

_OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}


class Mutant(NamedTuple):
    """A source with one change.

    Attributes:
        line: Where it was changed.
        before: The statement or expression that was changed, as it was.
        after: As it is now.
        tree: The whole source, changed.
    """

    line: int
    before: str
    after: str
    tree: ast.Module


def mutants(source: str) -> Iterator[Mutant]:
    """Yield every mutant of a source.

    Operators are exchanged (``<`` for ``<=``, ``+`` for ``-``), conditions and flags are negated,
    numbers are one more, strings are others, calls whose result nobody uses are left out. What only
    people or type checkers read stays: docstrings, annotations, texts of errors, assertions.
    """
    count = len(list(ast.walk(ast.parse(source))))
    for index in range(count):
        for choice in range(len(_changes(*_at(source, index)[1:]))):
            tree, node, skipped = _at(source, index)
            shown = _shown(tree, node)
            before = ast.unparse(shown)
            _changes(node, skipped)[choice]()
            ast.fix_missing_locations(tree)
            yield Mutant(getattr(node, "lineno", 0), before, ast.unparse(shown), tree)


def _shown(tree: ast.Module, node: ast.AST) -> ast.AST:
    """Return what says more than a node: the argument whose value it is."""
    arguments = (each for each in ast.walk(tree) if isinstance(each, ast.keyword))
    return next((each for each in arguments if each.value is node), node)


def _at(source: str, index: int) -> tuple[ast.Module, ast.AST, bool]:
    """Parse anew; return the tree, one of its nodes, and whether that is left alone."""
    tree = ast.parse(source)
    node = list(ast.walk(tree))[index]
    return tree, node, node in set(_left_alone(tree))


def _left_alone(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        parts: list[ast.AST | None] = []
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr):
            parts = [node]
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            parts = [node]
        elif isinstance(node, ast.AnnAssign | ast.arg):
            parts = [node.annotation]
        elif isinstance(node, ast.FunctionDef):
            parts = [node.returns]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            parts = [node]
        for part in parts:
            if part is not None:
                yield from ast.walk(part)


def _changes(node: ast.AST, skipped: bool) -> list[Callable[[], None]]:
    """Return functions that each change ``node`` in place."""
    if skipped:
        return []
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign):
        other = _OPERATORS.get(type(node.op))
        return [] if other is None else [_setting(node, "op", other())]
    if isinstance(node, ast.Compare):
        return [
            _setting(node, "ops", [*node.ops[:k], _OPERATORS[type(op)](), *node.ops[k + 1 :]])
            for k, op in enumerate(node.ops)
        ]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return [_setting(node, "op", ast.UAdd())]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return [_setting(node, "operand", ast.UnaryOp(ast.Not(), node.operand))]
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        return [_setting(node, "test", ast.UnaryOp(ast.Not(), node.test))]
    if isinstance(node, ast.comprehension):
        return [
            _setting(node, "ifs", [*node.ifs[:k], ast.UnaryOp(ast.Not(), one), *node.ifs[k + 1 :]])
            for k, one in enumerate(node.ifs)
        ]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return [_setting(node, "value", ast.Constant(None))]
    if isinstance(node, ast.Constant):
        other_value = _other(node.value)
        return [] if other_value is None else [_setting(node, "value", other_value)]
    return []


def _setting(node: ast.AST, field: str, value: object) -> Callable[[], None]:
    return lambda: setattr(node, field, value)


def _other(value: object) -> object:
    """Another constant of the same type; None if there is none."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return f"{value}?" if isinstance(value, str) else None
