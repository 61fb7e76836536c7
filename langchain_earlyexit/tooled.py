"""`bind_tools` and `with_structured_output` of the chat model: what can be refused is refused here, before any call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable

from langchain_earlyexit.asks import as_choice, as_schema, as_tools
from langchain_earlyexit.structured import Method, bound_for


class Tooled:
    """Mixin in front of a chat model whose calls take the keywords of `asks.Asks`."""

    def bind_tools(
        self,
        tools: Sequence[Any],
        *,
        tool_choice: str | bool | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The model with tools to call: it thinks, then answers or calls; a call's arguments fit the tool's schema.

        Args:
            tools: functions, pydantic models, TypedDicts, LangChain tools, JSON schemas or OpenAI's function dicts.
            tool_choice: "auto" (or None, False): the model decides; "any" ("required", True): it must call; "none": it
                must not, and does not see the tools; a tool's name, or `{"type": "function", "function": {"name": …}}`:
                it must call that one, once.
            parallel_tool_calls: False for one call at most.
            strict: as in OpenAI's schemas, all arguments are required. Schemas are enforced either way.
            **kwargs: keywords for every call, such as `thinking_budget`.

        Raises:
            ValueError: an unknown tool is chosen, or a schema has a keyword that cannot be enforced.
        """
        given = as_tools(tools, strict=strict)
        asked: dict[str, Any] = {"tools": list(given)} if given else {}
        if tool_choice is not None:
            as_choice(tool_choice, given)
            asked["tool_choice"] = tool_choice
        if parallel_tool_calls is not None:
            asked["parallel_tool_calls"] = parallel_tool_calls
        as_schema(kwargs.get("response_format"))
        return cast("BaseChatModel", self).bind(**asked, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Method = "function_calling",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """The model with answers that are values of `schema`: it thinks freely, then writes JSON under a grammar.

        Args:
            schema: a pydantic model (then the value is one), a TypedDict or a JSON schema (then it is a dict).
            method: "function_calling": the value is the arguments of a forced tool call; "json_schema": the answer's
                text is the JSON, and the schema is shown in the system turn; "json_mode": any JSON object, which is
                then validated; say in the prompt what is wanted.
            include_raw: answer with a dict of `raw` (the message), `parsed` and `parsing_error`.
            strict: as in `bind_tools`. Schemas are enforced either way.
            **kwargs: keywords for every call.

        Raises:
            ValueError: an unknown method, or a schema with a keyword that cannot be enforced.
        """
        return bound_for(self, schema, method=method, include_raw=include_raw, strict=strict, keywords=kwargs)
