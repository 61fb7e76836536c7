r"""What an answer is: a list, an interval, a point, a matrix, something with a name, words, or one expression.

`readings` parses LaTeX as models and data sets write it. It understands all text somehow: what is nothing else is an
expression of its own spelling. How two shapes compare is the matter of `compare.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Final

from langchain_earlyexit.lab.notation import CURRENCY, DEGREE, ROW, clean, closing, exact, split, stripped


@dataclass(frozen=True, slots=True)
class Atom:
    """One expression. `value` is known for plain arithmetic only; `unit` is "" for none and for an unknown one."""

    text: str
    value: Fraction | None = None
    unit: str = ""
    percent: bool = False
    base: str = ""


@dataclass(frozen=True, slots=True)
class Words:
    """An answer in words: lower case, single spaces."""

    text: str


@dataclass(frozen=True, slots=True)
class Group:
    """Several answers. `kind` is "," (a list), "{}" or "∪", in any order; or "()", "[)" and so on, ":", in this one."""

    kind: str
    items: tuple[Shape, ...]

    @property
    def free(self) -> bool:
        """Whether the order of the items means nothing."""
        return self.kind in (",", "{}", "∪")


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of entries; a determinant is not the matrix of its entries."""

    determinant: bool
    rows: tuple[tuple[Shape, ...], ...]


@dataclass(frozen=True, slots=True)
class Named:
    r"""A value and its name: `x = 5`, `f(x) = 2x`, `x > 2`, `x \in [0, 1)`. `right` is empty if it is no equation."""

    name: str
    value: Shape
    right: str = ""


@dataclass(frozen=True, slots=True)
class Relation:
    """An equation or inequality that does not give a name its value."""

    sign: str
    left: str
    right: str


Shape = Atom | Words | Group | Matrix | Named | Relation

_DEEPEST: Final = 12  # brackets in brackets; deeper is an expression
_THOUSANDS: Final = re.compile(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")


@lru_cache(maxsize=4096)
def readings(raw: str) -> tuple[Shape, ...]:
    """The shapes an answer may have: one, or two where "100,200" may be a number or a list."""
    text = clean(raw)
    number = text if text.startswith(("(", "[", r"\{")) else _THOUSANDS.sub(lambda m: m.group().replace(",", ""), text)
    if number == text or re.search(r",0\d\d", text):
        return (read(number),)
    return read(number), read(text)


def read(text: str, depth: int = 0) -> Shape:
    """The shape of cleaned text."""
    text = stripped(text)
    if (inner := _all_text(text)) is not None:
        shape = read(inner, depth)
        word = isinstance(shape, Atom) and len(shape.text) > 1 and shape.text.isalpha()
        return Words(plain_words(inner)) if word else shape
    if depth > _DEEPEST:
        return Atom(text)
    text = _AND_OR.sub(", ", text)
    parts = [part for part in split(text, ",", ";")[0] if part]
    if len(parts) > 1:
        return _listed([read(part, depth + 1) for part in parts])
    parts, found = split(text, r"\cup")
    if found:
        return Group("∪", tuple(read(part, depth + 1) for part in parts))
    parts, found = split(text, *_SIGNS)
    if found:
        return _related(text, parts, found, depth)
    if not text.startswith(r"\{") and _PLUS_MINUS.search(text):
        return _listed([read(_with_signs(text, plus, minus), depth + 1) for plus, minus in ("+-", "-+")])
    return _bracketed(text, depth) or _matrix(text, depth) or _ratio(text, depth) or _atom(text)


_AND_OR: Final = re.compile(
    r",? ?\\text\{(?:and|or|,)\}|,? ?(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\(?:land|lor)(?![A-Za-z])"
)
_SIGNS: Final = ("=", "<", ">", r"\leq", r"\geq", r"\neq", r"\in", r"\approx", r"\equiv")
_PLUS_MINUS: Final = re.compile(r"\\(pm|mp)(?![A-Za-z]) ?")


def _with_signs(text: str, plus: str, minus: str) -> str:
    signed = _PLUS_MINUS.sub(lambda m: plus if m.group(1) == "pm" else minus, text)
    return signed.removeprefix("+")


def _listed(items: Sequence[Shape]) -> Shape:
    """A list, flat. One name before the first value, or before all of them, is the name of the list."""
    names = [item.name for item in items if isinstance(item, Named)]
    if names and len(set(names)) == 1 and isinstance(items[0], Named) and len(names) in (1, len(items)):
        return Named(names[0], _listed([item.value if isinstance(item, Named) else item for item in items]))
    return Group(",", _flat(items))


def _flat(items: Sequence[Shape]) -> tuple[Shape, ...]:
    flat: list[Shape] = []
    for item in items:
        flat.extend(item.items if isinstance(item, Group) and item.kind == "," else [item])
    return tuple(flat)


_NAME: Final = re.compile(
    r"(?:\\?[A-Za-z]+(?:'|_\w|_\{[^{}]*\})*|\\text\{[^{}]*\}|\|[A-Z]{2}\||\\(?:angle|overline)\{? ?[A-Z]+\}?)"
    r"(?:\([A-Za-z](?:, ?[A-Za-z])*\))?|\([A-Za-z](?:, ?[A-Za-z])+\)"
)
_NO_NAME: Final = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|log|ln|pi|infty)(?![A-Za-z])|[ei]")
_FLIPPED: Final = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq"}


def _is_name(text: str) -> bool:
    return bool(_NAME.fullmatch(text)) and not _NO_NAME.match(text)


def _related(text: str, parts: list[str], signs: list[str], depth: int) -> Shape:
    """A value with its name, an interval for an inequality that bounds a name, else a relation."""
    if set(signs) == {"="}:
        if _is_name(parts[0]):
            return Named(parts[0], read(parts[-1], depth + 1), parts[-1])
        if len(parts) == 2 and _is_name(parts[1]) and exact(parts[0]) is not None:
            return Named(parts[1], read(parts[0], depth + 1), parts[0])
    if signs == [r"\in"] and _is_name(parts[0]):
        return Named(parts[0], read(parts[1], depth + 1))
    if all(sign in _FLIPPED for sign in signs):
        if len(parts) == 2 and _is_name(parts[0]) != _is_name(parts[1]):
            # x > 2 is read as the chain 2 < x < infinity, x < 2 as -infinity < x < 2
            named_first = _is_name(parts[0])
            sign = signs[0] if named_first else _FLIPPED[signs[0]]
            name, bound = parts if named_first else (parts[1], parts[0])
            lower = sign in (">", r"\geq")
            parts = [bound, name, r"\infty"] if lower else [r"-\infty", name, bound]
            signs = [_FLIPPED[sign], "<"] if lower else ["<", sign]
        if len(parts) == 3 and _is_name(parts[1]) and (signs[0] in ("<", r"\leq")) == (signs[1] in ("<", r"\leq")):
            if signs[0] in (">", r"\geq"):
                parts, signs = parts[::-1], [_FLIPPED[sign] for sign in reversed(signs)]
            kind = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
            return Named(parts[1], Group(kind, (read(parts[0], depth + 1), read(parts[2], depth + 1))))
    return Relation(signs[0], parts[0], parts[1]) if len(parts) == 2 else Atom(text)


def _bracketed(text: str, depth: int) -> Shape | None:
    opening = r"\{" if text.startswith(r"\{") else text[:1]
    if opening not in ("(", "[", r"\{"):
        return None
    close = closing(text, 0)
    end = text[close:] if close is not None else ""
    if end not in (")", "]", r"\}"):
        return None
    items = _flat([read(part, depth + 1) for part in split(text[len(opening) : close], ",", ";")[0] if part])
    if opening == r"\{":
        return items[0] if len(items) == 1 else Group("{}", items)
    if len(items) > 1:
        return Group(opening + end, items)
    return items[0] if items and opening + end == "()" else None


_MATRIX: Final = re.compile(r"\\begin\{([pbvBV]?)(?:small)?matrix\}(.*)\\end\{[pbvBV]?(?:small)?matrix\}", re.DOTALL)


def _matrix(text: str, depth: int) -> Shape | None:
    found = _MATRIX.fullmatch(text)
    if not found:
        return None
    rows = [split(row, "&")[0] for row in split(found.group(2), ROW)[0] if row]
    return Matrix(found.group(1) in ("v", "V"), tuple(tuple(read(entry, depth + 1) for entry in row) for row in rows))


def _ratio(text: str, depth: int) -> Shape | None:
    parts, found = split(text, ":")
    return Group(":", tuple(read(part, depth + 1) for part in parts)) if found and all(parts) else None


_UNITS: Final = {
    spelling: unit
    for unit, spellings in {
        "cm": "cm centimeter centimetre", "mm": "mm millimeter millimetre", "km": "km kilometer kilometre",
        "m": "m meter metre", "in": "in inch inche", "ft": "ft foot feet", "mi": "mi mile", "yd": "yd yard",
        "kg": "kg kilogram", "g": "g gram", "lb": "lb pound", "oz": "oz ounce", "s": "s sec second",
        "min": "min minute", "h": "h hr hour", "day": "day", "week": "week", "month": "month", "year": "yr year",
        "$": "dollar usd buck", "cent": "cent", "deg": "degree deg", "rad": "radian rad", "l": "liter litre",
        "ml": "ml milliliter millilitre", "mph": "mph",
    }.items()
    for spelling in spellings.split()
}  # fmt: skip
_POWERS: Final = {"square": "^2", "sq": "^2", "squared": "^2", "cubic": "^3", "cu": "^3", "cubed": "^3"}
_TEXT_AFTER: Final = re.compile(r"(?P<value>.+?)(?P<unit>(?:[ /]?\\text\{[^{}]*[A-Za-z][^{}]*\}(?:\^\{?\d\}?)?)+)")
_WORDS_AFTER: Final = re.compile(r"(?P<value>.*[\d})!]) ?(?P<unit>[A-Za-z]{2,}\.?(?:[ /][A-Za-z]+\.?)*(?:\^\{?\d\}?)?)")


def unit_name(text: str) -> str:
    r"""One name for a unit: "square inches", `\text{in}^2` and "sq. in." are `in^2`; "" for one that is not known."""
    said = re.sub(r"\\text\{|[{}.]", " ", text.casefold()).replace("/", " per ")
    names, power = [], ""
    for word in re.sub(r"\^ ?(\d)", r" ^\1 ", said).split():
        if word in _POWERS or word.startswith("^"):
            power = _POWERS.get(word, word)
        elif word == "per":
            names.append("/")
        elif (known := _UNITS.get(word) or _UNITS.get(word.removesuffix("s"))) is not None:
            names.append(known)
        else:
            return ""
    return "".join(names) + power


def _atom(text: str) -> Shape:
    core, unit = text, ""
    if CURRENCY in (core.lstrip("-")[:1], core[-1:]):
        core, unit = core.replace(CURRENCY, "", 1), "$"
    run = _TEXT_AFTER.fullmatch(core)
    if run is None and (run := _WORDS_AFTER.fullmatch(core)) and exact(stripped(run.group("value"))) is None:
        run = None
    if run:
        core, unit = stripped(run.group("value")), unit_name(run.group("unit")) or unit
    percent = core.endswith("%")
    core = stripped(core.rstrip("% "))
    if core.endswith(DEGREE) and DEGREE not in core[:-1] and not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", core):
        core, unit = stripped(core[:-1]), "deg"
    if based := re.fullmatch(r"([0-9A-F]+)_\{?(\d+)\}?", core):
        return Atom(based.group(1), exact(based.group(1)) if based.group(2) == "10" else None, base=based.group(2))
    value = exact(core)
    if value is None and _WORDS.fullmatch(core) and re.search(r"[A-Za-z]{4}|\\text", core):
        return Words(plain_words(core))
    return Atom(core, value, unit, percent)


_WORDS: Final = re.compile(r"(?:[A-Za-z]|\\text\{)(?:[\w .,'\"-]|\\text\{|\})*")


def _all_text(text: str) -> str | None:
    r"""What stands in a `\text{}` that holds all of the answer."""
    return text[6:-1] if text.startswith(r"\text{") and closing(text, 5) == len(text) - 1 else None


def plain_words(text: str) -> str:
    """Lower case, single spaces, no commands, hyphens or quotes."""
    said = re.sub(r"\\text|[{}\"'-]", " ", text.casefold())
    return " ".join(said.split()).strip(" .,;:!")
