"""Conditions over the columns and scores of rows, as a person writes them: `num_tokens < 800 and ifd < 1`.

The grammar is that of Python's expressions, of which comparisons, `and`, `or`, `not`, arithmetic, `in`, `is None` and `len(…)`
are taken; nothing is ever evaluated by Python. Where a value is missing a comparison is neither true nor false, as in SQL.
"""

import ast
import operator
import re
import sys
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from ..core.errors import UserError, unknown_name
from ..core.text import shortened

Kind = Literal["number", "text", "truth", "any"]  # "any": a value of `meta`, which is taken for what it is compared with
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
NAMED = re.compile(r"([A-Za-z][\w-]*):\s+(?=\S)")
GRAMMAR = "a condition like `num_tokens < 800 and (ifd < 1 or source == 'a.jsonl')`"


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition: what it is called, its text, what it says of a table with the columns `names`, and its one comparison, if it is one."""

    name: str
    text: str
    names: tuple[str, ...]
    truth: pl.Expr
    compared: tuple[pl.Expr, float] | None  # the value and the number that it is held against


def parse_condition(text: str, kinds: Mapping[str, Kind], to_be_had: Container[str] = ()) -> Condition:
    """Read a condition, with `NAME: ` before it or without, over columns of these kinds; `meta.KEY` stands for any key of meta.

    Raises UserError, in one line, for what is no condition and for an unknown column, with the nearest known one, or with how it is
    had where it is a score `to_be_had`.
    """
    named = NAMED.match(text)
    body = text[named.end() :] if named else text
    place = f"where {shortened(body, 80)!r}"
    try:
        tree = ast.parse(body.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        hint = "; equality is written ==" if re.search(r"[^=!<>]=[^=]", body) else ""
        raise UserError(f"{place}: expected {GRAMMAR}{hint}") from None
    reader = _Reader(place, kinds, to_be_had)
    try:
        truth, kind = reader.read(tree)
    except RecursionError:
        raise UserError(f"{place}: nested too deeply") from None
    if kind != "truth":
        if kind == "any":
            raise UserError(f"{place}: may hold anything; compare it, as {body.strip()} == True")
        raise UserError(f"{place}: is a {kind}, which is neither true nor false; expected {GRAMMAR}")
    return Condition(named[1] if named else body.strip(), body.strip(), tuple(reader.names), truth, reader.single(tree))


class _Reader:
    """Turns the tree of an expression into one of polars, and notes the columns that it needs."""

    def __init__(self, place: str, kinds: Mapping[str, Kind], to_be_had: Container[str]) -> None:
        self.place, self.kinds, self.to_be_had = place, kinds, to_be_had
        self.names: dict[str, None] = {}

    def read(self, node: ast.expr) -> tuple[pl.Expr, Kind]:
        if isinstance(node, ast.BoolOp):
            parts = [self.of_kind(each, "truth") for each in node.values]
            together = parts[0]
            for part in parts[1:]:
                together = together & part if isinstance(node.op, ast.And) else together | part
            return together, "truth"
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.of_kind(node.operand, "truth"), "truth"
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self.of_kind(node.operand, "number"), "number"
        if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            return self.calculated(node), "number"
        if isinstance(node, ast.Compare):
            return self.compare(node), "truth"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "len" and len(node.args) == 1:
            return self.of_kind(node.args[0], "text").str.len_chars().cast(pl.Float64), "number"
        if isinstance(node, ast.Constant):
            return self.constant(node.value)
        if isinstance(node, ast.Name | ast.Attribute):
            return self.column(node)
        raise UserError(f"{self.place}: {ast.unparse(node)[:60]!r} is not understood; expected {GRAMMAR}")

    def of_kind(self, node: ast.expr, wanted: Kind) -> pl.Expr:
        found, kind = self.read(node)
        if kind == "any" and wanted == "number":
            return found.cast(pl.Float64, strict=False).fill_nan(None)
        if kind not in (wanted, "any"):
            raise UserError(f"{self.place}: {ast.unparse(node)[:60]!r} is a {kind}, expected a {wanted}")
        return found

    def calculated(self, node: ast.BinOp) -> pl.Expr:
        """Return the value of a calculation, none where there is none: of a division by 0, or of what is no number."""
        left, right = self.of_kind(node.left, "number"), self.of_kind(node.right, "number")
        if isinstance(node.op, ast.Div):
            right = pl.when(right != 0).then(right)
        found: pl.Expr = ARITHMETIC[type(node.op)](left, right)
        return found.fill_nan(None)

    def compare(self, node: ast.Compare) -> pl.Expr:
        left, together = node.left, None
        for relation, right in zip(node.ops, node.comparators, strict=True):
            one = self.relation(left, relation, right)
            together = one if together is None else together & one
            left = right
        assert together is not None
        return together

    def relation(self, left: ast.expr, relation: ast.cmpop, right: ast.expr) -> pl.Expr:
        if isinstance(relation, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise UserError(f"{self.place}: `is` stands before None alone; equality is written ==")
            value = self.read(left)[0]
            return value.is_null() if isinstance(relation, ast.Is) else value.is_not_null()
        if isinstance(relation, ast.In | ast.NotIn):
            inside = self.contained(left, right)
            return ~inside if isinstance(relation, ast.NotIn) else inside
        one, other = self.read(left)[1], self.read(right)[1]
        if one != other and "any" not in (one, other):
            raise UserError(f"{self.place}: {ast.unparse(left)[:60]} is a {one}, {ast.unparse(right)[:60]} a {other}")
        wanted: Kind = "text" if one == other == "any" else other if one == "any" else one
        found: pl.Expr = COMPARISONS[type(relation)](self.of_kind(left, wanted), self.of_kind(right, wanted))
        return found

    def contained(self, left: ast.expr, right: ast.expr) -> pl.Expr:
        if isinstance(right, ast.Tuple | ast.List):
            values = [each.value if isinstance(each, ast.Constant) else None for each in right.elts]
            texts, numbers = [v for v in values if isinstance(v, str)], [float(v) for v in values if isinstance(v, int | float)]
            if not values or len(values) not in (len(texts), len(numbers)):
                raise UserError(f"{self.place}: after `in` expected texts or numbers, as ('a', 'b'), or a column of texts")
            return self.of_kind(left, "text" if texts else "number").is_in(texts or numbers)
        return self.of_kind(right, "text").str.contains(self.of_kind(left, "text"), literal=True)

    def constant(self, value: object) -> tuple[pl.Expr, Kind]:
        if isinstance(value, bool):
            return pl.lit(value), "truth"
        if isinstance(value, int | float):
            if abs(value) > sys.float_info.max:
                raise UserError(f"{self.place}: a number is too large")
            return pl.lit(float(value)), "number"
        if isinstance(value, str):
            return pl.lit(value), "text"
        raise UserError(f"{self.place}: {value!r} stands only after `is`; expected {GRAMMAR}")

    def column(self, node: ast.expr) -> tuple[pl.Expr, Kind]:
        name = ast.unparse(node)
        if name.startswith("meta."):
            self.names[name] = None
            return pl.col(name), "any"
        if name not in self.kinds and name in self.to_be_had:
            raise UserError(f"{self.place}: the rows have no score {name!r} yet; `sftkit curate score RUN --with {name}` adds it")
        if name not in self.kinds:
            raise unknown_name("column", name, [*self.kinds, "meta.KEY"], self.place)
        self.names[name] = None
        return pl.col(name), self.kinds[name]

    def single(self, tree: ast.expr) -> tuple[pl.Expr, float] | None:
        """Return the value and the number of a condition that is one comparison with a number."""
        if not isinstance(tree, ast.Compare) or len(tree.ops) != 1 or type(tree.ops[0]) not in COMPARISONS:
            return None
        for value, number in ((tree.left, tree.comparators[0]), (tree.comparators[0], tree.left)):
            sign = -1.0 if isinstance(number, ast.UnaryOp) and isinstance(number.op, ast.USub) else 1.0
            bare = number.operand if isinstance(number, ast.UnaryOp) else number
            if isinstance(bare, ast.Constant) and isinstance(bare.value, int | float) and not isinstance(value, ast.Constant):
                return self.of_kind(value, "number"), sign * float(bare.value)
        return None
