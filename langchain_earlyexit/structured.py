"""`with_structured_output`: from an answer, or a tool call, to the value that a schema describes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from operator import itemgetter
from typing import Any, Literal, cast

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.output_parsers import BaseCumulativeTransformOutputParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable, RunnableLambda, RunnableMap, RunnablePassthrough
from langchain_core.utils.json import parse_partial_json
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import ValidationError
from pydantic.v1 import BaseModel as BaseModelV1
from pydantic.v1 import ValidationError as ValidationErrorV1

from langchain_earlyexit.asks import as_tool, json_schema

Method = Literal["function_calling", "json_schema", "json_mode"]
METHODS: tuple[Method, ...] = ("function_calling", "json_schema", "json_mode")


class StructuredAnswer(BaseCumulativeTransformOutputParser[Any]):
    """The value that a message holds. A message that was cut off holds none: nothing is guessed from half of it.

    While it streams, dicts grow; a pydantic model is made of the whole message only, for half a number is valid too.
    The last value is that of the whole message: where that holds none, the stream ends in the error.
    """

    model: Any = None
    """Pydantic model that the value becomes; a dict when None."""
    tool: str | None = None
    """The tool whose arguments are the value; the message's text is, when None."""

    def parse(self, text: str) -> Any:
        """The value of an answer's text."""
        return self._made(json.loads(text), text)

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """The value of a message.

        Raises:
            OutputParserException: it holds none, or one that the model's own validators refuse.
        """
        message = cast("ChatGeneration", result[0]).message
        # Core calls every message of a stream partial, the last one too, and those that come in one piece.
        if partial and isinstance(message, AIMessageChunk) and message.chunk_position != "last":
            return self._half(message)
        try:
            value = self._arguments(message) if self.tool else _whole(message)
        except ValueError as error:
            raise OutputParserException(_why(message, error)) from error
        return self._made(value, message.text)

    def _arguments(self, message: BaseMessage) -> Any:
        # Of a message that comes in one piece, a stream's parser is given a copy that is no AIMessage.
        for call in getattr(message, "tool_calls", ()):
            if call["name"] == self.tool:
                return call["args"]
        raise ValueError(f"there is no call of {self.tool!r} in it")

    def _half(self, message: BaseMessage) -> Any:
        """What can be shown of a value that is not whole, None if nothing."""
        if self.model is not None:
            return None
        try:
            return self._arguments(message) if self.tool else parse_partial_json(message.text)
        except ValueError:
            return None

    def _made(self, value: Any, text: str) -> Any:
        if self.model is None:
            return value
        try:
            if issubclass(self.model, BaseModelV1):
                return self.model.parse_obj(value)
            return self.model.model_validate(value)
        except (ValidationError, ValidationErrorV1) as error:
            raise OutputParserException(
                f"{self.model.__name__}'s own validators refuse the answer's value: {error}", llm_output=text
            ) from error


def _whole(message: BaseMessage) -> Any:
    """The JSON of a message's text. Of a number alone, what was cut off would not be missed."""
    value = json.loads(message.text)
    if type(value) in (int, float) and _is_cut(message):
        raise ValueError(f"the number {value} may go on")
    return value


def _is_cut(message: BaseMessage) -> bool:
    return bool(message.response_metadata.get("finish_reason") == "length")


def _why(message: BaseMessage, error: Exception) -> str:
    if _is_cut(message):
        return "the answer was cut off before its JSON was complete; raise max_tokens, or bound the schema's strings"
    return f"the answer holds no value of the schema: {error}"


def bound_for(
    llm: Any, schema: Any, *, method: str, include_raw: bool, strict: bool | None, keywords: Mapping[str, Any]
) -> Runnable[Any, Any]:
    """See `ChatEarlyExit.with_structured_output`."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r} of structured output; known are {', '.join(METHODS)}")
    if method == "json_mode" and strict:
        raise ValueError("strict=True is about a schema, and json_mode keeps to none; take method='json_schema'")
    told = {"ls_structured_output_format": {"kwargs": {"method": method, "strict": strict}, "schema": schema}}
    model = schema if isinstance(schema, type) and is_basemodel_subclass(schema) else None
    if schema is None and method != "json_mode":
        raise ValueError(f"method {method!r} needs a schema; only json_mode goes without")
    kind = "object" if schema is None else json_schema(schema).get("type", "object")
    if "object" not in kind and method != "json_schema":  # a type or a list of types
        raise ValueError(
            f"method {method!r} writes a JSON object, but the schema's values are of type {kind!r}; take "
            "method='json_schema', or put the value into a field of an object"
        )
    if method == "function_calling":
        tool = as_tool(schema, strict=strict)
        name = tool["function"]["name"]
        bound = llm.bind_tools([tool], tool_choice=name, parallel_tool_calls=False, **told, **keywords)
        parser = StructuredAnswer(model=model, tool=name)
    else:
        response_format: dict[str, Any] = {"type": "json_object"}
        if method == "json_schema":
            name = schema.get("title", "answer") if isinstance(schema, Mapping) else schema.__name__
            inner = {"name": name, "schema": json_schema(schema), **({"strict": True} if strict else {})}
            response_format = {"type": "json_schema", "json_schema": inner}
        if schema is None:
            told = {}
        bound = llm.bind_tools([], response_format=response_format, **told, **keywords)
        parser = StructuredAnswer(model=model)
    if not include_raw:
        return cast("Runnable[Any, Any]", bound | parser)
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    # Invoked while streaming, too: a fallback takes over from what fails at once, not from a stream that has begun.
    whole = RunnableLambda(parsed.invoke, parsed.ainvoke)
    return RunnableMap(raw=bound) | whole.with_fallbacks([failed], exception_key="parsing_error")
