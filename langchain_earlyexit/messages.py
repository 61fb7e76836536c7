"""LangChain messages in, the dicts that chat templates read out."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

Message = dict[str, Any]

_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
}
_DOCUMENT_BLOCKS = {"document", "search_result", "text-plain", "file"}
_REASONING_BLOCKS = {"reasoning", "thinking", "reasoning_content"}
_CALL_BLOCKS = {"tool_call", "tool_use", "function_call", "invalid_tool_call"}
_MEDIA_BLOCKS = {"image", "image_url", "input_image", "audio", "input_audio", "video", "input_file", "media"}
_SAYS_ERROR = re.compile(r"\s*error\s*(:|$)", re.IGNORECASE)


@dataclass
class _Parts:
    """What the content of one message holds."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[Message, ...] = ()
    results: tuple[Message, ...] = ()


def _call(name: object, arguments: object, call_id: object) -> Message:
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:  # a call the model got wrong stays as it wrote it
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    call = {"type": "function", "function": {"name": str(name or ""), "arguments": arguments}}
    return call if call_id is None else {"id": str(call_id), **call}


def _reasoning_of(block: Mapping[str, Any]) -> str:
    for key in ("reasoning", "thinking", "text", "reasoning_content"):
        value = block.get(key)
        if isinstance(value, Mapping):  # Bedrock: {"reasoning_content": {"text": …}}
            return _reasoning_of(value)
        if isinstance(value, str):
            return value
    # OpenAI's items: a summary or, from open weights, the reasoning itself.
    return "".join(str(part.get("text", "")) for part in block.get("summary") or block.get("content") or ())


def _text_of(block: Mapping[str, Any], kind: str) -> str | None:
    """The text of a block; None where it is something else."""
    if kind == "refusal":
        return str(block.get("refusal") or block.get("text") or "")
    if kind in _DOCUMENT_BLOCKS:
        return _document(block)
    if kind == "json":
        held = block["json"] if "json" in block else {key: value for key, value in block.items() if key != "type"}
        return json.dumps(held, ensure_ascii=False)
    return block["text"] if isinstance(block.get("text"), str) and kind not in _MEDIA_BLOCKS else None


def _document(block: Mapping[str, Any]) -> str | None:
    """A document or search result, headed by what is told of it; None where it is no text (a PDF, an upload)."""
    source = block.get("source")
    held = source if isinstance(source, Mapping) else block
    if held is not block and held.get("type") == "text":  # Anthropic: {"source": {"type": "text", "data": …}}
        text = held.get("data")
    elif isinstance(block.get("text"), str):
        text = block["text"]
    else:
        inner = held.get("content")
        text = None if inner is None else _parts(inner, "document").text
    if not isinstance(text, str):
        return None
    heads = (block.get("title"), source if isinstance(source, str) else None, block.get("context"))
    return "\n".join([*(str(head) for head in heads if head), text])


def _marked(text: str) -> str:
    """What a failed tool said, as an error."""
    return text if _SAYS_ERROR.match(text) else f"Error: {text}"


def _parts(content: str | Iterable[Any], speaker: str) -> _Parts:
    """Sort the blocks of a message's content; refuse, by name, what a text-only model cannot be shown."""
    if isinstance(content, str):
        return _Parts(text=content)
    parts, behind_document = _Parts(), False
    for raw in content:
        block: Mapping[str, Any] = {"type": "text", "text": raw} if isinstance(raw, str) else raw
        block = block["value"] if block.get("type") == "non_standard" else block
        kind = str(block.get("type", ""))
        if kind in _REASONING_BLOCKS:
            parts.reasoning += _reasoning_of(block)
        elif kind in _CALL_BLOCKS and speaker == "assistant":
            arguments = block.get("args", block.get("input", block.get("arguments", {})))
            parts.calls += (_call(block.get("name"), arguments, block.get("call_id", block.get("id"))),)
        elif kind == "tool_result":
            said = _parts(block.get("content") or "", "tool").text
            failed = block.get("is_error") or block.get("status") == "error"
            result = {"role": "tool", "content": _marked(said) if failed else said}
            parts.results += ({**result, "tool_call_id": str(block.get("tool_use_id"))},)
        elif (text := _text_of(block, kind)) is not None:
            is_document = kind in _DOCUMENT_BLOCKS
            # Blocks of a tool's result are results side by side; others' may be pieces of one sentence.
            between = "\n\n" if is_document or behind_document else "\n" if speaker == "tool" else ""
            parts.text += (between if parts.text else "") + text
            behind_document = is_document
        elif speaker != "assistant" or kind in _MEDIA_BLOCKS | _DOCUMENT_BLOCKS:
            raise ValueError(
                f"The {speaker} message holds a content block of type {kind!r}, but this model reads text only. "
                "Remove the block or replace it by its text."
            )
        # What is left are a foreign provider's own notes in its answer (signatures, server-side searches).
    return parts


def _assistant(message: BaseMessage, parts: _Parts, *, include_reasoning: bool) -> Message:
    calls: list[Message] = []
    if isinstance(message, AIMessage):
        calls += [_call(call["name"], call["args"], call["id"]) for call in message.tool_calls]
        calls += [_call(call["name"], call["args"] or "", call["id"]) for call in message.invalid_tool_calls]
    known = {call.get("id") for call in calls}
    # Blocks repeat what `tool_calls` says; a history made by hand may hold calls in its blocks alone.
    calls += [call for call in parts.calls if not known or call.get("id", None) not in {None, *known}]
    older = message.additional_kwargs.get("function_call")  # before OpenAI had tool calls
    if older and not calls:
        calls = [_call(older.get("name"), older.get("arguments") or {}, None)]
    refusal = str(message.additional_kwargs.get("refusal") or "")  # blocks may repeat it
    said = parts.text if refusal in parts.text else f"{parts.text}\n\n{refusal}".lstrip("\n")
    result: Message = {"role": "assistant", "content": said}
    beside = {key: message.additional_kwargs.get(key) for key in ("reasoning_content", "reasoning")}
    reasoning = _reasoning_of(beside) or parts.reasoning
    if include_reasoning and reasoning:
        result["reasoning_content"] = str(reasoning)
    if calls:
        result["tool_calls"] = calls
    return result


def role_of(message: BaseMessage) -> str:
    """The role that chat templates know a message by, whatever its class calls it.

    Raises:
        ValueError: a role no template knows.
    """
    if isinstance(message, HumanMessage):
        return "user"
    if isinstance(message, SystemMessage):
        return "system"
    if isinstance(message, ToolMessage | FunctionMessage):
        return "tool"
    if isinstance(message, AIMessage):
        return "assistant"
    name = message.role if isinstance(message, ChatMessage) else message.type
    if name.lower() not in _ROLES:
        raise ValueError(
            f"A message has the role {name!r}, which chat templates do not know; known are {', '.join(sorted(_ROLES))}."
        )
    return _ROLES[name.lower()]


def to_template(messages: Sequence[BaseMessage], *, include_reasoning: bool) -> list[Message]:
    """Turn LangChain messages into the dicts that chat templates read.

    Content becomes one string: text, refusals, and documents and search results that are text. Tool calls take
    OpenAI's shape, with the arguments as a dict, wherever the history keeps them (attribute, v1 block, Anthropic's
    `tool_use`, OpenAI's former `function_call`). A tool's error status, which no template knows, is said in the text.

    Two things are left out: earlier reasoning, unless it is asked for, and what a foreign provider noted in its answer
    of its own doings (signatures, server-side searches).

    Raises:
        ValueError: no messages; a role no template knows; a block that is not text.

    """
    if not messages:
        raise ValueError("There are no messages to answer: pass at least one, such as HumanMessage('…').")
    result: list[Message] = []
    names: dict[str, str] = {}
    for message in messages:
        role = role_of(message)
        parts = _parts(message.content, role)
        turn: Message = {"role": role, "content": parts.text}
        if role == "assistant":
            turn = _assistant(message, parts, include_reasoning=include_reasoning)
            names |= {str(call.get("id")): call["function"]["name"] for call in turn.get("tool_calls", ())}
        elif role == "tool":
            call_id = getattr(message, "tool_call_id", None)
            name = message.name or names.get(str(call_id), "")
            turn |= {key: value for key, value in (("tool_call_id", call_id), ("name", name)) if value}
            if getattr(message, "status", "") == "error":
                turn["content"] = _marked(parts.text)
        results = [_named(found, names) for found in parts.results]
        if role == "assistant":
            result += [turn, *results]
        else:  # a turn of nothing but results is theirs
            result += [*results, turn] if parts.text or not results else results
    return result


def _named(result: Message, names: Mapping[str, str]) -> Message:
    called = names.get(result["tool_call_id"])
    return {**result, "name": called} if called else result
