"""JSON schemas a grammar can keep: what is refused when one is bound, and what is tidied before it is compiled.

A keyword that cannot be enforced is an error that names it and its place, never ignored: a promise that holds only
for the other keywords would be none.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Iterator, Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from functools import cache
from typing import Any, Final
from urllib.parse import unquote

from llguidance import LLMatcher, LLTokenizer

Schema = Mapping[str, Any]

COMPILE: Final[Any] = {
    # As chat templates and `json.dumps` write JSON: what models were trained on, and no endless whitespace.
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    # Without \uXXXX: a letter is written as itself, and half a surrogate pair cannot be.
    "json_allowed_escapes": 'nrbtf\\"',
}
"""How llguidance writes JSON."""

_IN_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_IN_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_ALONE = ("items", "additionalProperties")

_UNENFORCED = (
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "dependentRequired", "dependentSchemas",
    "dependencies", "propertyNames", "unevaluatedProperties", "unevaluatedItems", "additionalItems", "$dynamicRef",
    "$recursiveRef", "disallow", "extends", "divisibleBy",
)  # fmt: skip

_ANY_NAME: Final[tuple[Any, ...]] = (True, {}, {"type": "string"})
"""`propertyNames` that ask for nothing: names are strings. TypeScript's schema libraries write them."""

_ANY_TEXT = ("path", "password", "binary")
"""Formats that any text has: pydantic writes them for `Path`, `SecretStr` and `bytes`."""

_BOUNDS = (("minimum", "exclusiveMinimum", ROUND_CEILING), ("maximum", "exclusiveMaximum", ROUND_FLOOR))
"""Inclusive and exclusive keyword of each side, and the way inside."""

_KEPT_DIGITS = 15
"""Significant digits of a bound that the grammar compiler reads as it is written: of more it may take a neighbour."""

_KEPT_POWER = 22
"""Power of ten to which it reads those digits exactly."""

_NEXT_TO_ZERO = 1e-16
"""Bound that stands for an excluded zero: bounded numbers have no exponent, and end with their 17th digit."""

_WITH_NUMBERS = ("const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


def checked(schema: Any, what: str) -> dict[str, Any]:
    """`schema` made ready to be compiled.

    Objects that list properties and do not say whether there may be others have no others: what a grammar then lets
    through is valid all the same, and ends.

    Args:
        schema: a JSON schema, Draft 2020-12.
        what: what it is the schema of, for the error.

    Raises:
        ValueError: no schema, or one with a keyword that cannot be enforced; the keyword and its path are named.
    """
    if not isinstance(schema, Mapping):
        raise ValueError(f"the schema of {what} must be a JSON schema as a dict, not {type(schema).__name__}")
    for path, part in parts(schema):
        reason = _unenforced(part)
        if reason is not None:
            raise ValueError(_refusal(what, path, reason))
    closing = not any(_is_intersected(part) for _, part in parts(schema))
    tidy: dict[str, Any] = _tidied(schema, closing=closing)
    problem = _problem(tidy)
    if problem:
        path, problem = _blame(tidy, tidy, "#", problem)
        raise ValueError(_refusal(what, path, problem))
    return tidy


def strictly(schema: Schema) -> dict[str, Any]:
    """A schema in whose objects every listed property must stand: OpenAI's `strict`."""
    whole = copy.deepcopy(dict(schema))
    for _, part in parts(whole):
        if isinstance(part, dict) and isinstance(part.get("properties"), Mapping):
            part["required"] = list(part["properties"])
    return whole


def _refusal(what: str, path: str, reason: str) -> str:
    return (
        f"the schema of {what} cannot be enforced while decoding: at {path}, {reason}. Leave it out of the schema and "
        "check it in your own code, or say it with other keywords"
    )


def parts(schema: Any, path: str = "#") -> Iterator[tuple[str, Schema]]:
    """Every schema within a schema, itself first, with its path."""
    if not isinstance(schema, Mapping):  # True, False
        return
    yield path, schema
    for key in _IN_MAPS:
        inner = schema.get(key)
        if isinstance(inner, Mapping):
            for name, part in inner.items():
                yield from parts(part, f"{path}/{key}/{name}")
    for key in _IN_LISTS:
        inner = schema.get(key)
        if isinstance(inner, list | tuple):
            for index, part in enumerate(inner):
                yield from parts(part, f"{path}/{key}/{index}")
    for key in _ALONE:
        yield from parts(schema.get(key), f"{path}/{key}")


def _unenforced(part: Schema) -> str | None:
    """What the grammar compiler would refuse without saying where, or pass over."""
    for key in _UNENFORCED:
        if key in part and not (key == "propertyNames" and part[key] in _ANY_NAME):
            return f"the keyword {key!r} is not supported"
    if part.get("uniqueItems"):
        return "the keyword 'uniqueItems' is not supported"
    if isinstance(part.get("$ref"), str) and not _points_to_a_part(part["$ref"]):
        return f"the keyword '$ref' holds {part['$ref']!r}, where no schema stands: put what it names under '$defs'"
    if isinstance(part.get("items"), list | tuple):
        return "the keyword 'items' holds a list (draft 7); use 'prefixItems'"
    for key in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(part.get(key), bool):
            return f"the keyword {key!r} is a boolean (draft 4); give the bound itself"
    for key in _WITH_NUMBERS:
        rounded = next((number for number in _integers(part.get(key)) if _is_rounded(number)), None)
        if rounded is not None:
            return f"the keyword {key!r} holds {rounded}, an integer beyond 2**53 that would be rounded"
    least = part.get("minProperties", 0)
    if isinstance(least, int) and least > max(1, len(part.get("required", ()))):
        # The grammar counts properties but does not keep the names of unlisted ones apart.
        return f"the keyword 'minProperties' asks for {least}, more than 'required' names"
    if part.get("patternProperties") and part.get("additionalProperties") is False and _is_used_up(part):
        # The grammar would go on to a further property, and find no name for it.
        return "the keyword 'patternProperties' allows no other names than those listed: put them under 'properties'"
    return None


def _points_to_a_part(ref: str) -> bool:
    """Whether this points to one of `parts`. The grammar compiler follows it anywhere, to what nobody has checked."""
    if not ref.startswith("#/"):  # the whole, an anchor, or elsewhere: those the compiler tells apart
        return True
    steps = map(unquote, ref.split("/")[1:])
    return all(step in _ALONE or (step in _IN_MAPS + _IN_LISTS and next(steps, None) is not None) for step in steps)


def _is_used_up(part: Schema) -> bool:
    """Whether the patterns of this object match no name beside the required ones and those of its properties."""
    names = {*part.get("properties", ()), *part.get("required", ())}
    others = {
        "type": "object",
        "properties": dict.fromkeys(names, False),
        "patternProperties": {pattern: {} for pattern in part["patternProperties"]},
        "additionalProperties": False,
    }
    matcher = LLMatcher(_bytes(), LLMatcher.grammar_from_json_schema(others, overrides=COMPILE), log_level=0)
    begun = _bytes().tokenize_str('{"')
    return not matcher.is_error() and matcher.try_consume_tokens(begun) < len(begun)


@cache
def _bytes() -> LLTokenizer:
    return LLTokenizer("byte")


def _integers(value: Any) -> Iterator[int]:
    """All integers in a JSON value."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _integers(inner)
    elif isinstance(value, int):
        yield value


def _is_rounded(number: int) -> bool:
    """Whether the grammar compiler, which keeps numbers as 64-bit floats, would let through another integer for it."""
    return abs(number) > sys.float_info.max or int(float(number)) != number


def _is_intersected(part: Schema) -> bool:
    """Whether closing this object, or one that it refers to, could leave nothing that fits."""
    if len(part.get("allOf", ())) > 1:
        return True
    joined = [key for key in ("$ref", "anyOf", "oneOf", "allOf") if key in part]
    return len(joined) > 1 or bool(joined and "properties" in part)


def _tidied(value: Any, *, closing: bool) -> Any:
    if not isinstance(value, Mapping):
        return value
    tidy: dict[str, Any] = {}
    for key, inner in value.items():
        if key in {"x-guidance", "uniqueItems", "propertyNames"}:  # of the last two only those that ask for nothing
            continue
        if key == "format" and inner in _ANY_TEXT:
            continue
        if key in _IN_MAPS and isinstance(inner, Mapping):
            tidy[key] = {name: _tidied(part, closing=closing) for name, part in inner.items()}
        elif key in _IN_LISTS and isinstance(inner, list | tuple):
            tidy[key] = [_tidied(part, closing=closing) for part in inner]
        else:
            tidy[key] = _tidied(inner, closing=closing) if key in _ALONE else inner
    if closing and "properties" in tidy and not {"additionalProperties", "patternProperties"} & tidy.keys():
        tidy["additionalProperties"] = False
    for inclusive, exclusive, inside in _BOUNDS:
        _bound(tidy, inclusive, exclusive, inside)
    return tidy


def _bound(part: dict[str, Any], inclusive: str, exclusive: str, inside: str) -> None:
    """Move one side's bounds inside to what the grammar compiler keeps: by two parts in 10**14 at most, 0 by 10**-16.

    An exclusive bound becomes an inclusive one, for two reasons. The compiler lets an excluded integer through where
    the other bound is in the same unit; and 1.00000000000000001, which is more than 1, is read as the double 1.0.
    """
    moved = []
    for key in (inclusive, exclusive):
        bound = part.get(key)
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not math.isfinite(bound):
            continue  # no number: the compiler refuses it
        if part.get("type") != "integer":
            moved.append(_beyond(part.pop(key), inside) if key == exclusive else _kept(part.pop(key), inside))
        elif not float(bound).is_integer():
            moved.append((math.ceil if inside is ROUND_CEILING else math.floor)(part.pop(key)))
    if moved:
        moved += [part[inclusive]] if inclusive in part else []
        part[inclusive] = max(moved) if inside is ROUND_CEILING else min(moved)


def _kept(bound: float, inside: str) -> float:
    """The nearest bound inside, itself included, that the grammar compiler reads as it is written."""
    if isinstance(bound, int):  # one that would be rounded is refused
        return bound
    number = Context(prec=_KEPT_DIGITS, rounding=inside).plus(Decimal(repr(bound)))
    return float(number) if abs(int(number.as_tuple().exponent)) <= _KEPT_POWER else _beyond(bound, inside)


def _beyond(bound: float, inside: str) -> float:
    """As `_kept`, itself excluded."""
    if bound == 0:
        return _NEXT_TO_ZERO if inside is ROUND_CEILING else -_NEXT_TO_ZERO
    context = Context(prec=_KEPT_DIGITS, rounding=inside)
    number = context.plus(Decimal(repr(bound)))
    return float(context.next_plus(number) if inside is ROUND_CEILING else context.next_minus(number))


def _problem(schema: Schema) -> str:
    try:
        grammar = LLMatcher.grammar_from_json_schema(dict(schema), overrides=COMPILE)
    except ValueError as error:
        return str(error)
    return LLMatcher.validate_grammar(grammar)


def _blame(part: Schema, root: Schema, path: str, problem: str) -> tuple[str, str]:
    """The innermost place that has the same problem by itself."""
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    for inner, found in parts(part, path):
        if inner == path:
            continue
        alone = _problem({**shared, **found})
        if alone and alone.splitlines()[-1] == problem.splitlines()[-1]:
            own = {key: value for key, value in found.items() if key not in shared}
            return _blame(own, root, inner, alone)
    return path, " ".join(problem.split())


def written(schema: Schema) -> str:
    """The schema as llguidance's grammars take it in."""
    return json.dumps({**schema, "x-guidance": COMPILE}, ensure_ascii=False)
