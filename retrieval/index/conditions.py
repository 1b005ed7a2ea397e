"""Conditions on the metadata of a database: from text to an Arrow expression, and the rows that meet it.

The text is a Python expression of column names, numbers, texts, dates, lists, comparisons, `and`, `or` and `not`. It is
parsed into an expression and never executed, because the shell and the page pass on what their users write.
"""

import ast
import functools
import operator
import re
from collections.abc import Callable
from datetime import date, datetime
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from retrieval.errors import UserError

Expression: TypeAlias = Any
"""pyarrow.compute.Expression, which has no types."""
MAX_CHARACTERS = 1 << 20
"""Longest text of a condition: about 50,000 ids."""
MAX_COMPARISONS = 1_000
"""Most comparisons of a condition. Arrow evaluates nested expressions by recursion: about 9,000 overflow the stack."""
EXAMPLE = "width >= 768 and license in ['cc0', 'cc-by'] and 'sea' in caption"
UNKNOWN_COLUMN = re.compile(r"No match for FieldRef\.Name\((.*?)\) in .*")
"""Arrow's error for a column that a table does not have."""
MISSING = pc.scalar(pa.scalar(None, pa.bool_()))
"""The value of a comparison with a missing value. `not` does not change it, and a row with it is left out."""
TIMES: dict[str, Callable[[str], date]] = {"date": date.fromisoformat, "datetime": datetime.fromisoformat}
"""Functions in a condition that read a time from a text, by name."""
VALUES = "number, text, date('2021-01-31') or datetime('2021-01-31T12:00')"
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Expression]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def parse_condition(text: str) -> Expression:
    """The condition in a text, such as EXAMPLE. `'sea' in caption`: the column contains the text, in any case.

    `license is None`: the value is missing. Rows where a compared value is missing do not meet a condition.
    `date('2021-01-31')` and `datetime('2021-01-31T12:00')` are times.
    Raises UserError for other texts.
    """
    try:
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"{len(text):,} characters, at most {MAX_CHARACTERS:,} are allowed")
        node = ast.parse(text.strip(), mode="eval").body
        if (count := _comparisons(node)) > MAX_COMPARISONS:
            most = f"at most {MAX_COMPARISONS:,} are allowed"
            raise ValueError(f"{count:,} comparisons, {most}: write `column in [...]` for many values")
        return _condition(node)
    except (SyntaxError, ValueError, TypeError, OverflowError, RecursionError, MemoryError, pa.ArrowException) as error:
        shown = text if len(text) < 200 else f"{text[:200]}..."
        raise UserError(f"condition {shown!r}: {error}. Write it as in: {EXAMPLE}") from error


def parse_complement(text: str) -> Expression:
    """The condition of all rows that do not meet the one in a text, also those where a compared value is missing."""
    return ~pc.coalesce(parse_condition(text), pc.scalar(False))


def rows_that_meet(condition: Expression, metadata: pa.Table) -> npt.NDArray[np.bool_]:
    """Which rows meet a condition, (rows,). Raises UserError for unknown columns and values of another type."""
    try:
        meets = ds.dataset(metadata).to_table(columns={"meets": condition})["meets"]
        if meets.type not in (pa.bool_(), pa.null()):
            raise TypeError(f"its values are of type {meets.type}, expected truth values")
        return np.asarray(meets.cast(pa.bool_()).fill_null(False).to_numpy())
    except (pa.ArrowException, TypeError) as error:
        columns = ", ".join(f"{field.name} ({field.type})" for field in metadata.schema)
        reason = UNKNOWN_COLUMN.sub(r"there is no column \1", str(error).partition("\n")[0])
        raise UserError(f"condition {condition}: {reason}. The columns are {columns}.") from error


def _comparisons(node: ast.expr) -> int:
    """Comparisons in a condition; `a < b < c` is two."""
    if isinstance(node, ast.BoolOp):
        return sum(map(_comparisons, node.values))
    if isinstance(node, ast.UnaryOp):
        return _comparisons(node.operand)
    return len(node.ops) if isinstance(node, ast.Compare) else 0


def _condition(node: ast.expr) -> Expression:
    if isinstance(node, ast.BoolOp):
        combine = operator.and_ if isinstance(node.op, ast.And) else operator.or_
        return functools.reduce(combine, map(_condition, node.values))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return ~_condition(node.operand)
    if isinstance(node, ast.Compare):
        operands = [node.left, *node.comparators]
        parts = map(_comparison, operands, node.ops, operands[1:])
        return functools.reduce(operator.and_, parts)
    raise ValueError(f"{ast.unparse(node)} is no comparison")


def _comparison(left: ast.expr, comparison: ast.cmpop, right: ast.expr) -> Expression:
    if isinstance(comparison, (ast.In, ast.NotIn)):
        contained = _contained(left, right)
        return contained if isinstance(comparison, ast.In) else ~contained
    is_none = isinstance(right, ast.Constant) and right.value is None
    if is_none and isinstance(left, ast.Name) and isinstance(comparison, (ast.Is, ast.IsNot)):
        missing = pc.field(left.id).is_null()
        return missing if isinstance(comparison, ast.Is) else ~missing
    if type(comparison) not in COMPARISONS:
        raise ValueError("`is` and `is not` are for None")
    if not isinstance(left, ast.Name) and not isinstance(right, ast.Name):
        raise ValueError(f"{ast.unparse(left)} is compared with {ast.unparse(right)}, and neither is a column")
    return COMPARISONS[type(comparison)](_operand(left), _operand(right))


def _contained(left: ast.expr, right: ast.expr) -> Expression:
    if isinstance(right, ast.Name):
        part = _value(left)
        if not isinstance(part, str):
            raise ValueError(f"{ast.unparse(left)} in {right.id}: only texts can be contained in a column")
        return pc.match_substring(pc.field(right.id), part, ignore_case=True)
    if not isinstance(left, ast.Name) or not isinstance(right, (ast.List, ast.Tuple, ast.Set)):
        raise ValueError(
            f"{ast.unparse(left)} in {ast.unparse(right)}: wanted a column in a list, or a text in a column"
        )
    column = pc.field(left.id)
    values = [*map(_value, right.elts)]
    # Arrow compares no column with a list without values.
    return pc.if_else(column.is_valid(), column.isin(values) if values else pc.scalar(False), MISSING)


def _operand(node: ast.expr) -> Expression:
    if isinstance(node, ast.Name):
        return pc.field(node.id)
    value = _value(node)
    if not isinstance(value, (bool, int, float, str, date)):
        raise ValueError(f"{ast.unparse(node)} is no {VALUES}")
    return pc.scalar(value)


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in TIMES:
        if len(node.args) != 1 or node.keywords:
            raise ValueError(f"{ast.unparse(node)}: wanted one text, such as date('2021-01-31')")
        return TIMES[node.func.id](_value(node.args[0]))
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{ast.unparse(node)} is no {VALUES}") from None
