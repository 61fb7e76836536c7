"""Random JSON schemas, bounded (every value is finite) or not, for tests of grammars."""

import random

WORDS = ["name", "größe", "count", "名前", "items", "flag", "a b", "x_1", 'quo"te', "emoji🎉"]


def schema(rng: random.Random, depth: int = 3, *, bounded: bool = True) -> dict:
    """A schema of any type, at most `depth` levels deep."""
    kinds = [string, integer, number, boolean, enum, constant, nullable]
    if depth > 0:
        kinds += [obj, obj, array, union]
    return rng.choice(kinds)(rng, depth, bounded)


def string(rng, depth, bounded):
    least = rng.randint(0, 3)
    found = {"type": "string"}
    if bounded:
        found |= {"minLength": least, "maxLength": least + rng.randint(0, 8)}
    if bounded and rng.random() < 0.3:
        return {
            "type": "string",
            "pattern": rng.choice(["^[a-z]{1,5}$", "^(ab|c)d?$", "^[0-9]{2}-[A-F]{3}$", "^ü{0,3}$"]),
        }
    if bounded and rng.random() < 0.2:
        return {"type": "string", "format": rng.choice(["date", "time", "uuid", "ipv4"])}
    return found


def integer(rng, depth, bounded):
    least = rng.randint(-1000, 1000)
    found = (
        {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 5000)}
        if bounded
        else {"type": "integer"}
    )
    if bounded and rng.random() < 0.2:
        found = {"type": "integer", "exclusiveMinimum": 0, "maximum": 100, "multipleOf": 5}
    return found


def number(rng, depth, bounded):
    if not bounded:
        return {"type": "number"}
    low, high = rng.choice(["minimum", "exclusiveMinimum"]), rng.choice(["maximum", "exclusiveMaximum"])
    least = rng.choice([rng.randint(-12, 12), rng.randint(-50, 50) / 4])
    apart = rng.randint((low, high) != ("minimum", "maximum"), 40) / 8  # between excluded bounds lies something
    return {"type": "number", low: least, high: least + apart}


def boolean(rng, depth, bounded):
    return {"type": "boolean"}


def enum(rng, depth, bounded):
    return {
        "enum": rng.sample(
            ["red", "grün", "青", 1, -2.5, True, None, 'with "quotes"', "new\nline", [1, 2]], rng.randint(1, 4)
        )
    }


def constant(rng, depth, bounded):
    return {"const": rng.choice(["fixed", 42, False, {"k": ["v"]}])}


def nullable(rng, depth, bounded):
    return {"anyOf": [string(rng, 0, bounded), {"type": "null"}]}


def union(rng, depth, bounded):
    return {"anyOf": [schema(rng, depth - 1, bounded=bounded) for _ in range(rng.randint(1, 3))]}


def array(rng, depth, bounded):
    found = {"type": "array", "items": schema(rng, depth - 1, bounded=bounded)}
    if bounded:
        least = rng.randint(0, 2)
        found |= {"minItems": least, "maxItems": least + rng.randint(0, 2)}
    return found


def obj(rng, depth, bounded):
    names = rng.sample(WORDS, rng.randint(0, 3))
    properties = {name: schema(rng, depth - 1, bounded=bounded) for name in names}
    found = {"type": "object", "properties": properties, "required": [name for name in names if rng.random() < 0.6]}
    if rng.random() < 0.5:
        found["additionalProperties"] = False
    return found
