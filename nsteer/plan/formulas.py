"""Turns the text of a formula over directions into nested lists, or says why it is none.

    0.5*happy - gloomy        a sum of multiples
    happy ⟂ gloomy            what of `happy` is at right angles to `gloomy`
    orthogonal(joy, sad, calm)     the same for the span of several
    unit(happy) + made.sad    at length 1; the emotion `sad` under the method `made`
    'my-direction' / 2        a label that is no Python name, in quotes

Python's own parser reads it and a short list of nodes is let through: nothing is evaluated.
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nsteer.errors import did_you_mean
from nsteer.science.axis import word

Tree = list
"""["name", *dotted] | ["scale", number, tree] | ["add", tree, tree] | ["without", tree, [tree, …]] | ["unit", tree]"""

LONGEST = 500
FORM = "a sum of multiples of directions (0.5*happy - gloomy), ⟂, orthogonal(…) or unit(…)"
PERPENDICULAR = ("⟂", "⊥")


class FormulaError(ValueError):
    """What is no formula, or a name in one that means nothing: what was found, what instead, and what to try."""

    def __init__(self, found: str, expected: str = FORM, hint: str = ""):
        super().__init__(f"expected {expected}, found {found}")
        self.found, self.expected, self.hint = found, expected, hint


def parse(text: str) -> Tree:
    """The formula as nested lists. Raises FormulaError."""
    if len(text) > LONGEST:
        raise FormulaError(f"{len(text)} characters", f"at most {LONGEST}")
    if "@" in text:
        raise FormulaError("'@'")
    spelled = text.strip()
    for sign in PERPENDICULAR:
        spelled = spelled.replace(sign, "@")  # binds like *
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, on what is refused below
            body = ast.parse(spelled, mode="eval").body
        tree = _read(body)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        if isinstance(error, FormulaError):
            raise
        raise FormulaError(repr(text)) from None
    if isinstance(tree, float):
        raise FormulaError(f"{text!r}, a number")
    return tree


def names(tree: Tree) -> Iterator[tuple[str, ...]]:
    """Every name in a formula, as what stands between its dots."""
    if tree[0] == "name":
        yield tuple(tree[1:])
    for operand in tree[1:]:
        if isinstance(operand, list):
            for branch in [operand] if operand and isinstance(operand[0], str) else operand:
                yield from names(branch)


def replaced(tree: Tree, leaf: Callable[[tuple[str, ...]], Any]) -> Any:
    """The formula with `leaf(dotted)` in place of every name."""
    kind, *operands = tree
    if kind == "name":
        return leaf(tuple(operands))
    if kind == "scale":
        return [kind, operands[0], replaced(operands[1], leaf)]
    if kind == "without":
        return [kind, replaced(operands[0], leaf), [replaced(operand, leaf) for operand in operands[1]]]
    return [kind, *(replaced(operand, leaf) for operand in operands)]


def meaning(
    dotted: tuple[str, ...],
    *,
    directions: Iterable[str],
    methods: Iterable[str],
    emotions: Iterable[str],
    scales: Iterable[str],
) -> tuple[str, ...]:
    """What a name stands for: ("direction", name), ("vector", method, emotion) or ("axis", method, scale).

    A direction comes before an emotion, an emotion before a scale of the ratings. Raises FormulaError.
    """
    directions, methods, emotions, scales = map(list, (directions, methods, emotions, scales))
    *before, last = dotted
    if not before and last in directions:
        return ("direction", last)
    if before and before[0] not in methods:
        raise FormulaError(repr(before[0]), "a method of this plan", did_you_mean(before[0], methods))
    if last not in emotions and last not in scales:
        known = [*emotions, *scales, *([] if before else directions)]
        what = (
            word("an emotion or a scale of ratings")
            if before or not directions
            else word("a direction, an emotion or a scale of ratings")
        )
        raise FormulaError(repr(last), f"{what} of this plan", did_you_mean(last, known))
    if not before and len(methods) != 1:
        hint = f"{methods[0]}.{last}" if methods else "name methods, whose vectors it takes"
        raise FormulaError(f"{last!r} of {len(methods)} methods", "one method, named before it", hint)
    return ("vector" if last in emotions else "axis", before[0] if before else methods[0], last)


def _read(node: ast.expr) -> Any:
    """A tree, or a float."""
    if isinstance(node, ast.BinOp):
        return _operation(node, type(node.op), _read(node.left), _read(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        sign, inner = -1.0 if isinstance(node.op, ast.USub) else 1.0, _read(node.operand)
        return sign * inner if isinstance(inner, float) else _scaled(sign, inner)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _call(node, node.func.id, [_vector(_read(argument), argument) for argument in node.args])
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return _number(float(node.value), node)
    return ["name", *_name(node)]


def _name(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Constant):
        return [*_name(node.value), node.attr]
    raise FormulaError(_text(node))


def _operation(node: ast.BinOp, kind: type, left: Any, right: Any) -> Any:
    numbers = isinstance(left, float), isinstance(right, float)
    if kind in (ast.Add, ast.Sub) and not any(numbers):
        return ["add", left, right if kind is ast.Add else _scaled(-1.0, right)]
    if kind is ast.MatMult and not any(numbers):
        return ["without", left, [right]]
    if kind is ast.Mult and all(numbers):
        return _number(left * right, node)
    if kind is ast.Mult and any(numbers):
        return _scaled(left, right) if numbers[0] else _scaled(right, left)
    if kind is ast.Div and numbers[1] and right != 0:
        return _number(left / right, node) if numbers[0] else _scaled(_number(1 / right, node), left)
    raise FormulaError(_text(node))


def _number(value: float, node: ast.expr) -> float:
    if not math.isfinite(value):
        raise FormulaError(_text(node))
    return value


def _scaled(factor: float, tree: Tree) -> Tree:
    return tree if factor == 1.0 else ["scale", factor, tree]


def _call(node: ast.Call, name: str, inner: list[Tree]) -> Tree:
    if name == "unit" and len(inner) == 1:
        return ["unit", inner[0]]
    if name == "orthogonal" and len(inner) >= 2:
        return ["without", inner[0], inner[1:]]
    raise FormulaError(_text(node))


def _vector(tree: Any, node: ast.expr) -> Tree:
    if isinstance(tree, float):
        raise FormulaError(_text(node), "a direction")
    return tree


def _text(node: ast.expr) -> str:
    return repr(ast.unparse(node).replace("@", PERPENDICULAR[0]))
