"""Made-up tools and the questions that ask for them, by name or by what they do. Needs no torch."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_earlyexit.pocket.problems import ITEMS, NAMES, Split
from langchain_earlyexit.pocket.tool_text import Call
from langchain_earlyexit.pocket.tool_words import CITIES, parameter_name, schema_of, tool_name, value_of, words


def tool_of(name: str, description: str, properties: Mapping[str, Any], optional: Sequence[str] = ()) -> dict[str, Any]:
    """A tool as OpenAI writes it."""
    parameters = {
        "type": "object",
        "properties": dict(properties),
        "required": [parameter for parameter in properties if parameter not in optional],
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def names_of(tools: Sequence[dict[str, Any]]) -> list[str]:
    """The names of tools."""
    return [tool["function"]["name"] for tool in tools]


@dataclass(frozen=True)
class Topic:
    """A kind of tool: words for its name, what it takes, its descriptions, and questions that mean it."""

    verbs: str
    nouns: str
    parameters: tuple[tuple[str, str], ...]
    """Alternative names and the type of each parameter."""
    descriptions: tuple[str, ...]
    asks: tuple[str, ...]
    optional: tuple[str, tuple[str, ...]] | None = None


_INTEGER, _STRING = "integer", "string"
TOPICS = (
    Topic("get fetch find check show", "weather forecast temperature", (("location city place town", "city"),),
          ("Get the weather of a place.", "Get the weather at a location.", "Current weather for a city.",
           "Weather in a city."),
          ("What is the weather in {0}?", "How is the weather in {0}?", "What's the weather like in {0} today?",
           "Tell me the weather in {0}.", "weather in {0}", "Is it raining in {0}?"),
          ("unit", ("celsius", "kelvin"))),
    Topic("get fetch check", "time clock hour", (("city location zone", "city"),),
          ("Get the time in a city.", "Local time of a place."),
          ("What time is it in {0}?", "What is the time in {0}?", "Tell me the time in {0}.")),
    Topic("get count find", "population people", (("city place name", "city"),),
          ("Get the population of a city.", "Count the people of a place."),
          ("How many people live in {0}?", "What is the population of {0}?")),
    Topic("add create make new register", "customer client user account", (("name customer_name client full_name",
          _STRING),),
          ("Create a customer with the given name.", "Add a new customer.", "Create a customer."),
          ("Create a customer named {q0}.", "Please create a customer named {q0}.", "Add a new customer named {q0}.",
           "Create a customer called {q0}.", "Create a new customer named {q0} - a small company.",
           "Make {q0} a customer.")),
    Topic("get read check", "balance invoice account", (("id customer customer_id number", _INTEGER),),
          ("Get the balance of a customer.", "Balance for a customer number."),
          ("What is the balance for customer {0}?", "Get the balance of customer {0}.", "Balance for customer {0}?")),
    Topic("add sum plus", "numbers adder sum integers tool", (("a x first", _INTEGER), ("b y second", _INTEGER)),
          ("Add two numbers.", "Adds two integers.", "Tool that adds two integers.", "Sum of two integers."),
          ("What is {0} + {1}?", "What is {0} + {1}", "Add {0} and {1}.", "Use the tool to add {0} and {1}.",
           "What is {0} plus {1}? Use the tool.", "What is the sum of {0} and {1}?")),
    Topic("multiply times compute", "numbers product integers", (("a x first", _INTEGER), ("b y second", _INTEGER)),
          ("Multiply two numbers.", "Multiplies two integers.", "Product of two integers."),
          ("What is {0} * {1}?", "Multiply {0} by {1}.", "What is {0} times {1}? Use the tool.")),
    Topic("send write post", "message note mail", (("to name user", "person"), ("text message body", _STRING)),
          ("Send a message to a person.", "Write to someone."),
          ("Send {0} the message {q1}.", "Tell {0} {q1}.", "Write {q1} to {0}.")),
    Topic("set turn switch", "light lamp door", (("room place", "room"), ("on state", "boolean")),
          ("Turn a light on or off.", "Switch the light of a room."),
          ("Turn {o1} the light in the {0}.", "Switch the light in the {0} {o1}.", "Light {o1} in the {0}, please.")),
    Topic("order buy get", "item product thing", (("item product what", "item"), ("count quantity n", _INTEGER)),
          ("Order items.", "Buy some of a product."),
          ("Order {1} {0}.", "Please order {1} {0}.", "Buy {1} {0} for me.", "I want {1} {0}.")),
    Topic("search find look", "web notes files query", (("query text q", _STRING),),
          ("Search the notes.", "Find pages about a text."),
          ("Search for {q0}.", "Find pages about {q0}.", "Look up {q0}.")),
    Topic("translate convert", "text word language", (("text word", _STRING), ("language to", "language")),
          ("Translate a text.", "Say a text in another language."),
          ("Translate {q0} to {1}.", "How do you say {q0} in {1}?", "What is {q0} in {1}?")),
    Topic("set start make", "timer alarm clock", (("minutes time n", _INTEGER),),
          ("Set a timer in minutes.", "Start a timer."),
          ("Set a timer for {0} minutes.", "Start a timer of {0} minutes.", "Timer, {0} minutes.")),
    Topic("apply get compute", "magic secret function", (("input x value n", _INTEGER),),
          ("Applies a magic function to an input.", "Applies the magic to an input.", "Magic of a number."),
          ("What is the magic of {0}?", "Apply the magic to {0}.", "Apply the magic function to {0}.")),
    Topic("get read show", "date today day", (), ("Get the date of today.", "Today's date."),
          ("What is the date?", "What day is it today?", "Tell me today's date.")),
)  # fmt: skip
_LANGUAGES = ("French", "Spanish", "German", "Italian", "English")
_ROOMS = ("kitchen", "hall", "garden", "bedroom", "office")


def topic_value(kind: str, rng: random.Random) -> Any:
    """A random value of a kind that a topic names."""
    pools: dict[str, Sequence[str]] = {"item": ITEMS, "language": _LANGUAGES, "room": _ROOMS, "person": NAMES}
    if kind in pools:
        return rng.choice(pools[kind])
    if kind == "city":
        return rng.choice(CITIES) if rng.random() < 0.7 else words(rng)
    return value_of({"type": kind}, rng)


def quoted(value: Any, rng: random.Random) -> str:
    """A value as a user writes it in a question: strings in some quotes, true and false in words."""
    if isinstance(value, bool):
        return rng.choice(["true", "True"]) if value else rng.choice(["false", "False"])
    if isinstance(value, str):
        quotes = rng.choice(["''", "''", '""', '""', "“”", "‘’"])
        return f"{quotes[0]}{value}{quotes[1]}"
    return str(value)


@dataclass(frozen=True)
class Need:
    """A tool and the arguments wanted, with the question that asks for them."""

    tool: dict[str, Any]
    arguments: dict[str, Any]
    ask: str

    @property
    def call(self) -> Call:
        """The call that answers the question."""
        return {"name": self.tool["function"]["name"], "arguments": self.arguments}


def topic_tool(topic: Topic, split: Split, rng: random.Random, taken: Sequence[str]) -> dict[str, Any]:
    """A tool of the topic, with a name of the split."""
    name = tool_name(split, rng, topic.verbs.split(), topic.nouns.split(), taken)
    properties: dict[str, Any] = {}
    for names, kind in topic.parameters:
        free = [word for word in names.split() if word not in properties]
        properties[rng.choice(free)] = {"type": kind if kind in {"integer", "boolean"} else "string"}
    optional: list[str] = []
    if topic.optional and rng.random() < 0.35:
        properties[topic.optional[0]] = {"type": "string", "enum": list(topic.optional[1])}
        optional = [topic.optional[0]]
    return tool_of(name, rng.choice(topic.descriptions), properties, optional)


def ask_by_topic(topic: Topic, tool: dict[str, Any], rng: random.Random) -> Need:
    """A question for the tool that does not name it."""
    names = list(tool["function"]["parameters"]["properties"])
    values = [topic_value(kind, rng) for _, kind in topic.parameters]
    words_of: dict[str, str] = {}
    for i, value in enumerate(values):
        words_of[f"q{i}"] = quoted(value, rng)
        words_of[f"o{i}"] = "on" if value else "off"
    ask = rng.choice(topic.asks).format(*values, **words_of)
    arguments = dict(zip(names, values, strict=False))
    if len(names) > len(values) and topic.optional and rng.random() < 0.5:
        arguments[names[-1]] = rng.choice(topic.optional[1])
        ask += f" Use {arguments[names[-1]]}."
    return Need(tool, arguments, ask)


DESCRIPTIONS = (
    "Apply a magic function to an input.",
    "Calculate a magic function.",
    "Apply the secret step to an input.",
    "Run a check now.",
    "Compute the code.",
    "Do the step.",
    "",
)
_ASKS_BY_POSITION = (
    "What is the value of {t}({v})? Use the tool.",
    "What is the value of {t}({v})? Use the tool.",
    "What is the value of {t}({v})?",
    "What is {t}({v})?",
    "Call {t}({v}).",
    "Compute {t}({v}) with the tool.",
    "Give me {t}({v}).",
)
_ASKS_BY_NAME = (
    "Call {t} with {k}.",
    "Use the {t} tool with {k}.",
    "Use {t} with {k}.",
    "Please run {t} with {k}.",
    "Please use {t}, {k}.",
    "Run the tool {t} with {k}.",
    "I need {t} for {k}.",
)
_ASKS_WITHOUT = (
    "Call {t}.",
    "Use the {t} tool.",
    "Please run {t}.",
    "What is the value of {t}()? Use the tool.",
    "What is {t}()?",
    "Use the tool {t} now.",
    "What does {t} say?",
)


def any_tool(split: Split, rng: random.Random, taken: Sequence[str], low: int = 0) -> dict[str, Any]:
    """A tool about nothing in particular."""
    properties: dict[str, Any] = {}
    for _ in range(max(low, rng.choices([0, 1, 2, 3], [0.14, 0.46, 0.3, 0.1])[0])):
        properties[parameter_name(split, rng, list(properties))] = schema_of(rng)
    optional = list(properties)[-1:] if len(properties) > low and rng.random() < 0.2 else []
    return tool_of(tool_name(split, rng, taken=taken), rng.choice(DESCRIPTIONS), properties, optional)


def named(arguments: Mapping[str, Any], rng: random.Random) -> str:
    """Arguments as a question names them: `a = 5 and b = 7`."""
    form = rng.choice(["{n} = {v}", "{n}={v}", "{n} {v}", "{n} set to {v}", "{v} as {n}"])
    written = [form.format(n=name, v=quoted(value, rng)) for name, value in arguments.items()]
    return ", ".join(written[:-1]) + (rng.choice([" and ", ", "]) if len(written) > 1 else "") + written[-1]


def ask_by_name(tool: dict[str, Any], rng: random.Random) -> Need:
    """A question that names the tool."""
    function = tool["function"]
    parameters = function["parameters"]
    wanted = [n for n in parameters["properties"] if n in parameters["required"] or rng.random() < 0.5]
    arguments = {name: value_of(parameters["properties"][name], rng) for name in wanted}
    if not arguments:
        return Need(tool, arguments, rng.choice(_ASKS_WITHOUT).format(t=function["name"]))
    if rng.random() < 0.45:
        written = ", ".join(quoted(value, rng) for value in arguments.values())
        return Need(tool, arguments, rng.choice(_ASKS_BY_POSITION).format(t=function["name"], v=written))
    ask = rng.choice(_ASKS_BY_NAME).format(t=function["name"], k=named(arguments, rng))
    return Need(tool, arguments, ask)


def draw_need(split: Split, rng: random.Random, taken: Sequence[str] = ()) -> Need:
    """A random tool and a question for it."""
    if rng.random() < 0.45:
        return ask_by_name(any_tool(split, rng, taken), rng)
    topic = rng.choice(TOPICS)
    tool = topic_tool(topic, split, rng, taken)
    return ask_by_name(tool, rng) if rng.random() < 0.3 else ask_by_topic(topic, tool, rng)


def topic_of(tool: dict[str, Any]) -> Topic | None:
    """The topic whose description the tool has, if any."""
    description = tool["function"]["description"]
    return next((topic for topic in TOPICS if description in topic.descriptions), None)


def with_others(
    needed: Sequence[dict[str, Any]], split: Split, rng: random.Random, others: int
) -> tuple[dict[str, Any], ...]:
    """The needed tools among others of other topics, in random order."""
    tools = list(needed)
    topics = {id(topic_of(tool)) for tool in tools}
    while others:
        if rng.random() < 0.4:
            tools.append(any_tool(split, rng, names_of(tools)))
        else:
            topic = rng.choice(TOPICS)
            if id(topic) in topics:
                continue
            topics.add(id(topic))
            tools.append(topic_tool(topic, split, rng, names_of(tools)))
        others -= 1
    rng.shuffle(tools)
    return tuple(tools)
