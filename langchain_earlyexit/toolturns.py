"""How tools, calls and results are shown to a model: by its chat template where that knows how, else by us.

A template that does not read `tools` gets them described in the system turn; one that does not read `tool_calls` gets
earlier calls as text of the assistant's turns, and results as turns of the user.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_earlyexit.toolcalls import HERMES, CallFormat, find_format, name_unspoken

Message = dict[str, Any]

_CODE = re.compile(r"\{[{%](.*?)[%}]\}", re.DOTALL)
"""A chat template's code, as against its text."""

_SCHEMA_LINE = "Answer with JSON that is valid for this JSON schema, and nothing else:"

_LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class ToolTurns:
    """What a chat template does about tools.

    Attributes:
        format: how the model writes calls.
        shows_tools: whether the template describes tools.
        shows_calls: whether it writes earlier calls and results.
        unspoken: name of the format that the template has calls in and that is not written here, None where there is
            none.
    """

    format: CallFormat = HERMES
    shows_tools: bool = False
    shows_calls: bool = False
    unspoken: str | None = None

    @classmethod
    def of(cls, template: str | None) -> ToolTurns:
        """Read it from the template's text. One whose format is unknown counts as one that knows nothing of tools."""
        if template is None:
            return cls()
        words = set(re.findall(r"\w+", " ".join(_CODE.findall(template))))
        found = find_format(template)
        if found is None:
            return cls(unspoken=name_unspoken(template) if "tools" in words else None)
        return cls(found, "tools" in words, "tool_calls" in words)

    def shape(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], schema: Mapping[str, Any] | None = None
    ) -> tuple[list[Message], Sequence[Mapping[str, Any]]]:
        """Messages, and the tools that are left for the template to describe. A `schema` of the answer is told too.

        A model that was taught calls in a format that is not written here is asked for them in another, with a warning:
        what it is made to call is valid, but whether it calls, and well, is not what it was taught.
        """
        if tools and self.unspoken is not None:
            warnings.warn(
                f"this model's chat template has tool calls in a format that is not spoken here ({self.unspoken}): the "
                f"tools are described in the system turn instead, and calls are read as {self.format.name} writes "
                "them. Set tool_choice where a call must be made, or use response_format",
                stacklevel=2,
            )
        shaped = list(messages)
        if not self.shows_calls:
            shaped = self.told(shaped)
        elif self.format.id_length is not None:
            shaped = [_with_short_ids(message, self.format.id_length) for message in shaped]
        if schema is not None:
            shaped = _with_system(shaped, f"{_SCHEMA_LINE}\n{json.dumps(schema, ensure_ascii=False)}")
        if self.shows_tools or not tools:
            return shaped, tools
        return _with_system(shaped, self.described(tools)), ()

    def described(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """Tools as a text for the system turn."""
        lines = [json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools]
        example = self.format.text([{"name": "NAME", "arguments": '{"PARAMETER": VALUE}'}])
        return "\n".join(
            ("# Tools", "You can call these functions:", *lines, "To call one, answer with nothing but this:", example)
        )

    def told(self, messages: Sequence[Message]) -> list[Message]:
        """Calls as text of the assistant, results as turns of the user, neighbours in one turn."""
        shaped: list[Message] = []
        results = False
        for message in messages:
            if message["role"] == "tool":
                result = f"<tool_response>\n{message['content']}\n</tool_response>"
                if results:
                    shaped[-1] = {**shaped[-1], "content": f"{shaped[-1]['content']}\n{result}"}
                else:
                    shaped.append({"role": "user", "content": result})
                results = True
                continue
            results = False
            calls = [call["function"] for call in message.get("tool_calls", ())]
            if calls:
                text = self.format.text(calls)
                content = f"{message['content']}\n{text}".lstrip("\n")
                told = {key: value for key, value in message.items() if key != "tool_calls"}
                shaped.append({**told, "content": content})
            else:
                shaped.append(message)
        return shaped


def _with_system(messages: list[Message], text: str) -> list[Message]:
    """The messages with `text` at the end of their first system turn."""
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}".lstrip()}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _with_short_ids(message: Message, length: int) -> Message:
    """The message with ids of calls that a template insists on: so many letters and digits, equal for equal ids."""

    def short(call_id: Any) -> str:
        number = int.from_bytes(hashlib.sha256(str(call_id).encode()).digest(), "big")
        return "".join(_LETTERS[number // len(_LETTERS) ** place % len(_LETTERS)] for place in range(length))

    shaped = dict(message)
    if "tool_call_id" in message:
        shaped["tool_call_id"] = short(message["tool_call_id"])
    if "tool_calls" in message:
        shaped["tool_calls"] = [{**call, "id": short(call.get("id"))} for call in message["tool_calls"]]
    return shaped
