r"""When two shapes are the same answer.

Order, brackets, units, names and the value of plain arithmetic are decided here. Only pairs of expressions that these
leave open go to `algebra`, so no computer algebra can mistake an interval for a point or 0.3333 for 1/3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import Protocol

from langchain_earlyexit.lab.notation import is_expression
from langchain_earlyexit.lab.shapes import Atom, Group, Matrix, Named, Relation, Shape, Words, plain_words, read


class Algebra(Protocol):
    """Whether two expressions (cleaned LaTeX) are equal, or, as sides of `... = 0`, have the same solutions.

    None for not known here.
    """

    def __call__(self, gold: str, answer: str, *, as_equations: bool = False) -> bool | None: ...


def unknown(gold: str, answer: str, *, as_equations: bool = False) -> bool | None:
    """The algebra that knows only what is spelled alike, and what is no expression."""
    if gold == answer:
        return True
    return None if is_expression(gold) and is_expression(answer) else False


def same(gold: Shape, answer: Shape, algebra: Algebra) -> bool | None:
    """Whether two shapes are one answer; None where that hangs on what `algebra` does not know."""
    if isinstance(gold, Named | Relation) and isinstance(answer, Named | Relation):
        return _same_statement(gold, answer, algebra)
    if isinstance(gold, Named):
        return same(gold.value, answer, algebra)
    if isinstance(answer, Named):
        return same(gold, answer.value, algebra)
    if isinstance(gold, Relation) or isinstance(answer, Relation):
        return False
    if isinstance(gold, Words) or isinstance(answer, Words):
        return _spelled(gold) == _spelled(answer) != ""
    if isinstance(gold, Matrix) and isinstance(answer, Matrix):
        return _same_matrix(gold, answer, algebra)
    if isinstance(gold, Atom) and isinstance(answer, Atom):
        return _same_atom(gold, answer, algebra)
    return _same_group(_vector(gold), _vector(answer), algebra)


def _spelled(shape: Shape) -> str:
    return plain_words(shape.text) if isinstance(shape, Words | Atom) else ""


def _same_statement(gold: Named | Relation, answer: Named | Relation, algebra: Algebra) -> bool | None:
    if isinstance(gold, Named) and isinstance(answer, Named):
        if gold.name == answer.name:
            return same(gold.value, answer.value, algebra)
        if (value := _renamed(answer, gold.name)) is not None:
            return same(gold.value, value, algebra)
        if _has_value(gold) or _has_value(answer):
            return False  # x = 5 and y = 5
    one, other = _zero(gold), _zero(answer)
    if one and other:
        return algebra(one, other, as_equations=True)
    if isinstance(gold, Relation) and isinstance(answer, Relation) and gold.sign == answer.sign:
        return _all([algebra(gold.left, answer.left), algebra(gold.right, answer.right)])
    return False


def _has_value(shape: Named) -> bool:
    return isinstance(shape.value, Atom) and shape.value.value is not None


def _zero(statement: Named | Relation) -> str:
    """What an equation says is zero; "" for what is no equation."""
    if isinstance(statement, Named):
        return f"{statement.name}-({statement.right})" if statement.right else ""
    return f"{statement.left}-({statement.right})" if statement.sign == "=" else ""


def _renamed(answer: Named, name: str) -> Shape | None:
    """The value of `f(x) = ...` written with the argument that `name` has, f(n); None if they are not one function."""
    ours, theirs = (re.fullmatch(r"(.+)\(([A-Za-z])\)", text) for text in (answer.name, name))
    if not ours or not theirs or ours.group(1) != theirs.group(1) or not answer.right:
        return None
    if re.search(rf"(?<![A-Za-z\\]){theirs.group(2)}(?![A-Za-z])", answer.right):
        return None  # its letter has another meaning here
    return read(re.sub(rf"(\\[A-Za-z]+)|{ours.group(2)}", lambda m: m.group(1) or theirs.group(2), answer.right))


def _same_matrix(gold: Matrix, answer: Matrix, algebra: Algebra) -> bool | None:
    if gold.determinant != answer.determinant or [len(row) for row in gold.rows] != [len(row) for row in answer.rows]:
        return False
    pairs = zip(chain(*gold.rows), chain(*answer.rows), strict=True)
    return _all([same(one, other, algebra) for one, other in pairs])


def _vector(shape: Shape) -> Shape:
    """A matrix of one row or column as a point, anything else as it is."""
    if isinstance(shape, Matrix) and not shape.determinant:
        if len(shape.rows) == 1:
            return Group("()", shape.rows[0])
        if all(len(row) == 1 for row in shape.rows):
            return Group("()", tuple(row[0] for row in shape.rows))
    return shape


def _same_group(gold: Shape, answer: Shape, algebra: Algebra) -> bool | None:
    if not isinstance(gold, Group) or not isinstance(answer, Group) or len(gold.items) != len(answer.items):
        return False
    table = [[same(one, other, algebra) for other in answer.items] for one in gold.items]
    if gold.free and answer.free and (gold.kind == "∪") == (answer.kind == "∪"):
        return _matching(table)
    # A point is accepted without its brackets, and a list in the brackets of a point, in the same order.
    if gold.kind == answer.kind or {gold.kind, answer.kind} == {"()", ","}:
        return _all([table[at][at] for at in range(len(table))])
    return False


def _same_atom(gold: Atom, answer: Atom, algebra: Algebra) -> bool | None:
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    if gold.base or answer.base:
        # the base is what a unit is: it may go unsaid, in digits that are the same
        return gold.text == answer.text and (not gold.base or not answer.base or gold.base == answer.base)
    if gold.value is not None and answer.value is not None:
        if gold.value == answer.value:
            return True
        if gold.percent != answer.percent:  # 8% is 0.08, and is also written 8 where percent are asked for
            return gold.value == answer.value / 100 if answer.percent else gold.value / 100 == answer.value
        return False
    if gold.text == answer.text:
        return True
    if gold.text.isalpha() and answer.text.isalpha():
        if len(gold.text) == len(answer.text) == 1:
            return False
        if gold.text.casefold() == answer.text.casefold():
            return True  # words too short to be told from letters: "no" and "No"
    return algebra(gold.text, answer.text)


def _all(verdicts: Sequence[bool | None]) -> bool | None:
    if False in verdicts:
        return False
    return None if None in verdicts else True


def _matching(table: list[list[bool | None]]) -> bool | None:
    """Whether rows and columns can be paired off: surely, surely not, or None if it hangs on an unknown."""
    if _pairs_off([[entry is True for entry in row] for row in table]):
        return True
    return None if _pairs_off([[entry is not False for entry in row] for row in table]) else False


def _pairs_off(table: list[list[bool]]) -> bool:
    taken_by: dict[int, int] = {}

    def place(row: int, tried: set[int]) -> bool:
        for column, fits in enumerate(table[row]):
            if fits and column not in tried:
                tried.add(column)
                if column not in taken_by or place(taken_by[column], tried):
                    taken_by[column] = row
                    return True
        return False

    return all(place(row, set()) for row in range(len(table)))
