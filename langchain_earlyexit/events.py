"""Native content-block events of one call: what core's `stream_events(version="v3")` and LangGraph's v3 streams show.

Core can make such events from chunks, but then every block stays open until the message ends. Made here, from the
engine's own events, the reasoning block finishes at the moment of the exit, before a token of the answer is sampled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, cast

from langchain_earlyexit.engines.program import Closed, Event
from langchain_earlyexit.replies import Call

if TYPE_CHECKING:
    from langchain_core.messages import AIMessageChunk
    from langchain_core.messages.tool import ToolCallChunk
    from langchain_protocol.protocol import MessagesData

_TEXT = {"text": "text", "reasoning": "reasoning", "tool_call_chunk": "args"}
"""The member of a block that grows, by the block's type."""

_DELTA = {"text": "text-delta", "reasoning": "reasoning-delta", "tool_call_chunk": "tool-call-delta"}


@dataclass(slots=True)
class _Block:
    """An open block: its place, its type, which tool call it is (None for text), and what it holds so far."""

    place: int
    kind: str
    call: Any
    start: dict[str, Any]
    pieces: list[str] = field(default_factory=list)


class Blocks:
    """Turns the events of a running call into the protocol's events; one block is open at a time.

    It reads the same chunks that `stream` yields, so both are equal by construction: text, reasoning, tool calls,
    usage and record. What chunks cannot say is the moment of the exit, which the engine tells (`Closed`).
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._open: _Block | None = None
        self._begun = 0
        self._thinking: list[str] = []

    def start(self) -> MessagesData:
        """The first event. Its id is the one that `ChatEarlyExit.answer_now` takes."""
        return {
            "event": "message-start",
            "role": "ai",
            "id": self._call.id,
            "metadata": {"provider": "earlyexit", "model": self._call.model},
        }

    def take(self, event: Event, chunk: AIMessageChunk | None) -> Iterator[MessagesData]:
        """Protocol events for an engine's event and the chunk that was made of it."""
        if isinstance(event, Closed) and self._open is not None and self._open.kind == "reasoning":
            yield from self._finish({"extras": {"exit": asdict(event)}})
        if chunk is None:
            return
        thought = chunk.additional_kwargs.get("reasoning_content")
        if thought:
            self._thinking.append(thought)
            yield from self._grow("reasoning", thought)
        if chunk.text:
            yield from self._grow("text", chunk.text)
        for call in chunk.tool_call_chunks:
            yield from self._grow("tool_call_chunk", call["args"] or "", call)
        if chunk.chunk_position == "last":
            yield from self._finish()
            yield self._end(chunk)

    def _grow(self, kind: str, text: str, call: ToolCallChunk | None = None) -> Iterator[MessagesData]:
        """Add to the open block, or finish it and open one of this kind."""
        which = None if call is None else call["index"]
        if self._open is None or (self._open.kind, self._open.call) != (kind, which):
            yield from self._finish()
            start: dict[str, Any] = {"type": kind, _TEXT[kind]: ""}
            if call is not None:
                start |= {"id": call["id"], "name": call["name"], "index": which}
            self._open = _Block(self._begun, kind, which, start)
            self._begun += 1
            yield cast(
                "MessagesData", {"event": "content-block-start", "index": self._open.place, "content": dict(start)}
            )
        if text:
            self._open.pieces.append(text)
            delta = {"type": _DELTA[kind], _TEXT[kind]: text}
            yield cast("MessagesData", {"event": "content-block-delta", "index": self._open.place, "delta": delta})

    def _finish(self, more: dict[str, Any] | None = None) -> Iterator[MessagesData]:
        block, self._open = self._open, None
        if block is None:
            return
        text = "".join(block.pieces)
        whole = {**block.start, _TEXT[block.kind]: text} if block.kind != "tool_call_chunk" else _tool_call(block, text)
        yield cast(
            "MessagesData",
            {"event": "content-block-finish", "index": block.place, "content": {**whole, **(more or {})}},
        )

    def _end(self, last: AIMessageChunk) -> MessagesData:
        """The last event. `metadata` and `additional_kwargs` are core's extension of the protocol."""
        kwargs = dict(last.additional_kwargs)
        if self._thinking:
            kwargs["reasoning_content"] = "".join(self._thinking)
        return cast(
            "MessagesData",
            {
                "event": "message-finish",
                "usage": last.usage_metadata,
                "metadata": dict(last.response_metadata),
                "additional_kwargs": kwargs,
            },
        )


def _tool_call(block: _Block, arguments: str) -> dict[str, Any]:
    """A finished call; one whose arguments are not a whole JSON object is told as invalid, with its text."""
    named = {"id": block.start["id"], "name": block.start["name"]}
    try:
        parsed = json.loads(arguments or "{}")
    except ValueError:
        parsed = None
    if isinstance(parsed, dict):
        return {"type": "tool_call", **named, "args": parsed}
    # Core says no more of a broken call that it reads from chunks.
    return {"type": "invalid_tool_call", **named, "args": arguments, "error": None}
