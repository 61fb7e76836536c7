"""Words for made-up tools: names (split by checksum), parameters, and values in several scripts. Needs no torch."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from langchain_earlyexit.pocket.problems import NAMES, Split, split_of

HELD_OUT = frozenset({"magic_function", "magic_function_no_args", "get_weather", "my_adder_tool", "create_customer"})
"""Tool names that are never drawn in any split: they are asked of the trained model elsewhere."""

VERBS = (
    "get", "fetch", "find", "check", "show", "read", "load", "look", "make", "create", "add", "start", "stop", "open",
    "close", "run", "apply", "compute", "set", "update", "send", "delete", "list", "count", "book", "order", "save",
    "search", "convert", "call",
)  # fmt: skip
NOUNS = (
    "weather", "forecast", "price", "value", "function", "magic", "customer", "order", "item", "user", "account",
    "ticket", "room", "table", "light", "door", "report", "file", "note", "city", "time", "date", "number", "score",
    "level", "stock", "balance", "invoice", "product", "song", "book", "message", "task", "event", "list", "name",
    "code", "data", "result", "secret", "adder", "input", "step", "rate", "limit", "timer", "total", "team",
    "company", "client", "project",
)  # fmt: skip
PARAMETERS = (
    "a", "b", "c", "x", "y", "n", "k", "input", "value", "number", "name", "text", "query", "id", "city", "location",
    "place", "count", "amount", "item", "user", "code", "level", "key", "label", "title", "size", "word", "start",
    "end", "customer_id", "user_id", "first_name", "customer_name", "item_name", "limit", "date", "note",
)  # fmt: skip
ENUMS = (
    ("celsius", "kelvin"),
    ("celsius", "fahrenheit"),
    ("small", "medium", "large"),
    ("red", "green", "blue"),
    ("low", "high"),
    ("asc", "desc"),
    ("km", "miles"),
    ("day", "week", "month"),
)
CITIES = (
    "Paris", "Rome", "London", "Berlin", "Madrid", "Tokyo", "Lima", "Oslo", "Cairo", "Delhi", "Boston", "Chicago",
    "Sydney", "Dublin", "Vienna", "Prague", "Warsaw", "Athens", "Lisbon", "Toronto", "San Francisco, CA", "New York",
    "Los Angeles", "Hong Kong", "Cape Town", "Mexico City", "Zürich", "São Paulo", "Málaga", "Kraków", "Austin, TX",
    "Buenos Aires", "Tel Aviv", "Rio de Janeiro", "Köln", "Reykjavík", "北京", "東京", "서울", "Москва",
)  # fmt: skip
_UNICODE = (
    "café", "naïve", "Zoë", "Müller", "Łukasz", "Ærø", "你好", "世界", "公司", "集团", "北京大学", "東京駅",
    "こんにちは", "カタカナ", "서울",
    "안녕", "Привет", "Анна", "Киев", "Ελλάδα", "Αθήνα", "שלום", "مرحبا", "नमस्ते", "สวัสดี", "🙂", "🚀", "☕", "🎉 ok",
    "½", "€ 5",
)  # fmt: skip
_SCRIPTS = (
    "áéíóúäöüßçñøåęłžš",
    "абвгдежзиклмнопрстуя",
    "αβγδεζηθικλμνοπρσω",
    "你好啊集团公司大小中国天地人山水火",
    "あいうえおかきくけこさしすせそ",
    "가나다라마바사아자하",
    "ابتثجحدرسشعفقكلم",
    "🙂🚀🎉☕🍎🐱🌍",
)
_TEXT_WORDS = (
    "red", "blue", "green", "old", "new", "big", "small", "fast", "slow", "hello", "world", "buy", "milk", "bread",
    "call", "home", "meeting", "lunch", "monday", "friday", "alpha", "beta", "gamma", "north", "south", "river",
    "garden", "music", "book", "water", "tea", "coffee", "train", "car", "dog", "cat", "sun", "rain",
)  # fmt: skip
_ONSETS = (
    "b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z", "br", "st", "tr", "ch",
    "pl",
)  # fmt: skip
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ou"]
_CODAS = ["", "", "", "n", "r", "s", "x", "l"]


def pseudo_word(rng: random.Random) -> str:
    """A word of two or three syllables that hardly any text has."""
    syllables = rng.choice([1, 2, 2, 3])
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)) + rng.choice(_CODAS)


def _of_split(split: Split, kind: str, make: Callable[[], str], taken: Sequence[str]) -> str:
    while True:
        word = make()
        if word not in taken and word not in HELD_OUT and split_of(f"{kind}:{word}") == split:
            return word


def _camel(*words: str) -> str:
    return words[0] + "".join(word.capitalize() for word in words[1:])


def tool_name(
    split: Split,
    rng: random.Random,
    verbs: Sequence[str] = VERBS,
    nouns: Sequence[str] = NOUNS,
    taken: Sequence[str] = (),
) -> str:
    """A name for a tool that belongs to the split and is not taken, mostly about the given verbs and nouns."""

    def make() -> str:
        verb, noun = rng.choice(verbs), rng.choice(nouns)
        roll = rng.random()
        if roll < 0.34:
            return f"{verb}_{noun}"
        if roll < 0.42:
            return _camel(verb, noun)
        if roll < 0.54:
            return rng.choice(
                [f"{noun}_tool", f"my_{noun}_tool", f"{verb}_{noun}_tool", f"{noun}_function", f"my_{noun}"]
            )
        if roll < 0.62:
            return rng.choice([f"{noun}_{verb}", f"{noun}_lookup", f"{verb}_{noun}_no_args", f"the_{verb}_{noun}"])
        if roll < 0.70:
            return f"{verb}_{noun}{rng.choice(['', '_'])}{rng.randint(1, 99)}"
        if roll < 0.76:
            return f"{verb}_{pseudo_word(rng)}"
        if roll < 0.82:
            return f"{pseudo_word(rng)}_{noun}"
        if roll < 0.86:
            return rng.choice("fgh") + rng.choice(["", str(rng.randint(1, 99))])
        return pseudo_word(rng) + rng.choice(["", "", "_" + pseudo_word(rng), str(rng.randint(1, 9))])

    return _of_split(split, "tool", make, taken)


def parameter_name(split: Split, rng: random.Random, taken: Sequence[str] = ()) -> str:
    """A name for a parameter: often a common one, which all splits share, else a made-up one of the split."""
    common = [name for name in PARAMETERS if name not in taken]
    if rng.random() < 0.7:
        return rng.choice(common)
    return _of_split(
        split,
        "parameter",
        lambda: rng.choice(["", "", "the_"]) + pseudo_word(rng) + rng.choice(["", "", "_id", "2"]),
        taken,
    )


def integer(rng: random.Random) -> int:
    """An integer of one to four digits, at times negative."""
    value = rng.randrange(10 ** rng.choice([1, 1, 2, 2, 3, 4]))
    return -value if rng.random() < 0.08 else value


def words(rng: random.Random) -> str:
    """A string value: a name, a place, common words, letters of no known word, or another script."""
    roll = rng.random()
    if roll < 0.22:
        return rng.choice(CITIES)
    if roll < 0.36:
        return rng.choice(NAMES)
    if roll < 0.44:
        return f"{rng.choice(NAMES)} {rng.choice(['Smith', 'Lee', 'Brown', 'O’Neil', pseudo_word(rng).capitalize()])}"
    if roll < 0.60:
        return " ".join(rng.choice(_TEXT_WORDS) for _ in range(rng.choice([1, 2, 2, 3])))
    if roll < 0.80:
        word = pseudo_word(rng)
        return rng.choice([word, word.capitalize(), f"{word}{rng.randint(1, 99)}", f"{word}@{pseudo_word(rng)}.com"])
    if roll < 0.90:
        return rng.choice(_UNICODE)
    letters = rng.choice(_SCRIPTS)
    return "".join(rng.choice(letters) for _ in range(rng.choice([2, 3, 4, 5])))


def value_of(schema: dict[str, Any], rng: random.Random) -> Any:
    """A random value of a parameter's JSON schema."""
    if "enum" in schema:
        return rng.choice(schema["enum"])
    kind = schema["type"]
    if kind == "integer":
        return integer(rng)
    if kind == "number":
        return round(rng.randrange(1, 1000) / rng.choice([2, 4, 10]) + 0.1, 1)
    if kind == "boolean":
        return rng.random() < 0.5
    return words(rng)


def schema_of(rng: random.Random) -> dict[str, Any]:
    """A random parameter's JSON schema."""
    kind = rng.choices(["integer", "string", "enum", "boolean", "number"], [0.42, 0.38, 0.08, 0.06, 0.06])[0]
    return {"type": "string", "enum": list(rng.choice(ENUMS))} if kind == "enum" else {"type": kind}
