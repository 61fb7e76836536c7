"""What a turn may or must answer with: tools, a choice among them, a response format. LangChain's keywords, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel

from langchain_earlyexit.schemas import checked, strictly

NAMES = ("tools", "tool_choice", "parallel_tool_calls", "response_format", "strict")
"""The keywords of a call that are read here."""

CHOICES = ("auto", "none", "any")

_ANY_OBJECT = {"type": "object"}

_PART = "#/$defs/"

_FORMATS = '{"type": "json_schema", "json_schema": {"name": …, "schema": {…}}} or {"type": "json_object"}'


@dataclass(frozen=True)
class Asks:
    """The tools of a turn and what is asked of it.

    Attributes:
        tools: OpenAI's function dicts.
        choice: one of `CHOICES`, or the name of the one tool that must be called.
        parallel: whether one answer may hold several calls.
        schema: the JSON schema, checked, of an answer that is no call; None where it is free.
        described: the schema as it was given, for the model to read; None where it says nothing.
    """

    tools: tuple[Mapping[str, Any], ...] = ()
    choice: str = "auto"
    parallel: bool = True
    schema: Mapping[str, Any] | None = None
    described: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> Asks:
        """Read the keywords of a call; those that are not among `NAMES` are passed over.

        Raises:
            ValueError: a choice of a tool that is not there, or a schema that cannot be enforced.
        """
        strict = keywords.get("strict")
        schema, described = as_schema(keywords.get("response_format"), strict=strict)
        tools = as_tools(keywords.get("tools") or (), strict=strict)
        choice = as_choice(keywords.get("tool_choice"), tools)
        return cls(
            tools=tools,
            choice=choice,
            parallel=keywords.get("parallel_tool_calls") is not False and choice in CHOICES,
            schema=schema,
            described=described,
        )

    @property
    def shown(self) -> tuple[Mapping[str, Any], ...]:
        """The tools that the model is told of: with tool_choice="none" it is not, for then it cannot call them."""
        return () if self.choice == "none" else self.tools

    @property
    def callables(self) -> tuple[dict[str, Any], ...]:
        """`name` and checked `parameters` of the tools that may be called."""
        named = [tool["function"] for tool in self.shown if self.choice in (*CHOICES, tool["function"]["name"])]
        return tuple({"name": tool["name"], "parameters": parameters_of(tool)} for tool in named)

    @property
    def forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.choice not in ("auto", "none")


FREE = Asks()
"""No tools, and any answer."""


def as_tools(tools: Sequence[Any], *, strict: bool | None = None) -> tuple[Mapping[str, Any], ...]:
    """Tools of any kind LangChain knows as OpenAI's function dicts, their schemas checked.

    Of several with the same name (the same thing given in two forms) a call fits one.

    Raises:
        ValueError: a tool that is no function, or a schema that cannot be enforced.
    """
    converted = tuple(as_tool(tool, strict=strict) for tool in tools)
    if any("function" not in tool for tool in converted):
        raise ValueError("a tool has no function that could be called here: server-side tools of providers do not run")
    for tool in converted:
        parameters_of(tool["function"])
    return converted


def as_tool(tool: Any, *, strict: bool | None = None) -> dict[str, Any]:
    """LangChain's `convert_to_openai_tool`, and whole where that cuts something down to {}.

    It does so to a model that refers to itself, and to a JSON schema that lists no properties. With `strict`, the
    argument's or the tool's own, every listed property must be given.

    Raises:
        ValueError: both say something else.
    """
    converted = _whole(tool)
    function = converted.get("function")
    if function is None:
        return converted
    said = function.get("strict")
    if strict is not None and said not in (None, strict):
        raise ValueError(f"the tool {function['name']!r} says strict={said}, but strict={strict} is asked of it")
    if strict is None and said is None:
        return converted
    function = {**function, "strict": said if strict is None else strict}
    if function["strict"] and isinstance(function.get("parameters"), Mapping):
        function["parameters"] = strictly(function["parameters"])
    return {**converted, "function": function}


def _whole(tool: Any) -> dict[str, Any]:
    """The tool as it is called, whether or not core keeps all of it."""
    converted = convert_to_openai_tool(tool)
    if isinstance(tool, Mapping) and "title" in tool and "parameters" not in converted.get("function", {}):
        whole = {key: value for key, value in tool.items() if key not in ("title", "description")}
        return {**converted, "function": {**converted["function"], "parameters": whole}}
    model = tool if isinstance(tool, type) else getattr(tool, "tool_call_schema", None)
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return converted
    schema = model.model_json_schema()
    parts = schema.get("$defs", {})
    if not any(name in _reached(part, parts) for name, part in parts.items()):
        return converted
    whole = {**parts[schema["$ref"].removeprefix(_PART)], "$defs": parts} if "$ref" in schema else schema
    return {**converted, "function": {**converted["function"], "parameters": whole}}


def _reached(schema: Any, parts: Mapping[str, Any], found: frozenset[str] = frozenset()) -> frozenset[str]:
    """Names of the parts of a JSON schema that `schema` refers to, directly or not."""
    inner = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    for value in inner:
        found = _reached(value, parts, found)
    name = str(schema.get("$ref", "")).removeprefix(_PART) if isinstance(schema, dict) else ""
    return _reached(parts[name], parts, found | {name}) if name in parts and name not in found else found


def parameters_of(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The checked schema of a function's arguments, which are always an object.

    Raises:
        ValueError: it describes something else, or cannot be enforced.
    """
    given = function.get("parameters") or {}
    kind = given.get("type", "object")
    if "object" not in kind:  # a type or a list of types
        raise ValueError(
            f"the tool {function['name']!r} takes a value of type {kind!r}, but the arguments of a call are always an "
            "object; put the value into a field of one"
        )
    schema = {"properties": {}, **given, "type": "object"}
    return _checked(json.dumps(schema), f"tool {function['name']!r}")


def as_choice(choice: Any, tools: Sequence[Mapping[str, Any]]) -> str:
    """`tool_choice` as "auto", "none", "any" or a tool's name.

    Raises:
        ValueError: it asks for a tool that is not there, or is no choice at all.
    """
    names = [tool["function"]["name"] for tool in tools]
    if isinstance(choice, Mapping):
        inner = choice.get("function") or choice
        name = inner.get("name") if isinstance(inner, Mapping) else None
        if choice.get("type") != "function" or not isinstance(name, str):
            raise ValueError(f'tool_choice must be {{"type": "function", "function": {{"name": …}}}}, not {choice}')
        return _known(name, names)
    if choice is None or choice is False or choice == "auto":
        return "auto"
    if choice == "none":
        return "none"
    if choice is True or choice in ("any", "required"):
        if not names:
            raise ValueError(f"tool_choice={choice!r} asks for a tool call, but no tools are given; pass tools")
        return "any"
    if not isinstance(choice, str):
        raise ValueError(f"tool_choice must be a string, a bool, a dict or None, not {choice!r}")
    return _known(choice, names)


def _known(name: str, names: Sequence[str]) -> str:
    if name not in names:
        known = ", ".join(names) or "none at all"
        raise ValueError(
            f"tool_choice asks for the tool {name!r}, but the tools given are: {known}. Name one of them, or say "
            '"auto", "any" or "none"'
        )
    return name


def as_schema(wanted: Any, *, strict: bool | None = None) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """`schema` and `described` of what a `response_format` asks for, see `Asks`.

    Raises:
        ValueError: no response format, or a schema that cannot be enforced.
    """
    if wanted is None:
        return None, None
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    if kind == "text":
        return None, None
    schema: Any = _ANY_OBJECT if kind == "json_object" else None
    name = ""
    if kind == "json_schema" and isinstance(wanted.get("json_schema"), Mapping):
        schema, name = wanted["json_schema"].get("schema"), str(wanted["json_schema"].get("name", ""))
        strict = wanted["json_schema"].get("strict", strict)
    elif isinstance(wanted, type):
        schema, name = json_schema(wanted), wanted.__name__
    if not isinstance(schema, Mapping):
        raise ValueError(f"response_format must be {_FORMATS}, not {wanted!r}")
    if strict:
        schema = strictly(schema)
    tidy = _checked(json.dumps(schema), f"the response format {name!r}")
    return tidy, None if schema == _ANY_OBJECT else schema


def json_schema(schema: Any) -> dict[str, Any]:
    """The JSON schema of anything LangChain knows as one."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return schema.model_json_schema()  # LangChain's own cuts what refers to itself down to {}
    function = as_tool(schema).get("function")
    if function is None:
        raise ValueError(
            f"a schema must be a pydantic model, a TypedDict or a JSON schema with a title, not {schema!r}"
        )
    told = {"title": function["name"], "description": function.get("description"), **function.get("parameters", {})}
    return {key: value for key, value in told.items() if value is not None}


@lru_cache(maxsize=256)
def _checked(schema: str, what: str) -> Mapping[str, Any]:
    """`schemas.checked`, once for equal schemas: every call of a bound model asks again."""
    return checked(json.loads(schema), what)
