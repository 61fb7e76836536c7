"""The forms in which chat templates take a conversation, each a function of its messages; and a probe of them.

A template may insist on taking turns, know no system role, or write either the text or the calls of a turn.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from langchain_earlyexit.messages import Message

Shape = Callable[[Sequence[Message]], list[Message]]


def merged(messages: Sequence[Message]) -> list[Message]:
    """Join neighbours of one role: for templates that insist on taking turns, or keep one system message."""
    result: list[Message] = []
    for message in messages:
        last = result[-1] if result else None
        if last is None or message["role"] == "tool" or last["role"] != message["role"]:
            result.append(dict(message))
            continue
        for key in ("content", "reasoning_content"):
            texts = [text for text in (last.get(key), message.get(key)) if text is not None]
            if texts:
                last[key] = "\n\n".join(filter(None, texts))
        if message.get("tool_calls"):
            last["tool_calls"] = [*last.get("tool_calls", ()), *message["tool_calls"]]
    return result


def one_system(messages: Sequence[Message]) -> list[Message]:
    """Let users say later system messages: for templates that read none but the first."""
    late = [{**m, "role": "user"} if i and m["role"] == "system" else m for i, m in enumerate(merged(messages))]
    return merged(late)


def no_system(messages: Sequence[Message]) -> list[Message]:
    """Let users say the system prompt: for templates that know no such role."""
    return merged([{**m, "role": "user"} if m["role"] == "system" else m for m in messages])


def with_json_arguments(messages: Sequence[Message]) -> list[Message]:
    """Write the arguments of tool calls as JSON text: for templates that add them to a string."""

    def written(call: Message) -> Message:
        function, arguments = call["function"], call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}

    return [
        {**m, "tool_calls": [written(call) for call in m["tool_calls"]]} if m.get("tool_calls") else m for m in messages
    ]


def calls_apart(messages: Sequence[Message], content: str | None = "") -> list[Message]:
    """Put calls into turns of their own, behind what was said with them: for templates that write one of the two."""
    result: list[Message] = []
    for message in messages:
        if not message.get("tool_calls"):
            result.append(message)
            continue
        calls = {**message, "content": content}
        if message["content"]:
            result.append({key: value for key, value in message.items() if key != "tool_calls"})
            calls.pop("reasoning_content", None)
        result.append(calls)
    return result


def calls_bare(messages: Sequence[Message]) -> list[Message]:
    """As `calls_apart`, with no content at all: for templates that take an empty text for a turn without calls."""
    return calls_apart(messages, None)


def with_system_line(messages: Sequence[Message], line: str) -> list[Message]:
    """Put a line in front of the system turn, which is made where there is none."""
    if not line:
        return list(messages)
    if messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{line}\n\n{messages[0]['content']}".rstrip()}
        return [first, *messages[1:]]
    return [{"role": "system", "content": line}, *messages]


CALLED: Final = "called_name"
"""The tool that a probe calls."""
GIVEN: Final = "given-value"
"""What it is given."""
SPOKEN: Final = "spoken-beside"
"""What may be said with the call."""
OFFERED: Final[Mapping[str, Any]] = {
    "type": "function",
    "function": {"name": "offered", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
"""A tool to stand beside a probe, where a template is another one with tools."""


def probe(content: str) -> list[Message]:
    """A conversation that shows what a template does with a call, and with the `content` beside it."""
    call_id = "probe0001"  # as long as some templates insist on
    call = {"id": call_id, "type": "function", "function": {"name": CALLED, "arguments": {"key": GIVEN}}}
    return [
        {"role": "system", "content": "set"},
        {"role": "user", "content": "asked"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "returned", "tool_call_id": call_id, "name": CALLED},
        {"role": "assistant", "content": "answered"},
        {"role": "user", "content": "asked again"},
    ]
