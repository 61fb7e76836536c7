"""From the events of a running call to what LangChain hears: chunks, a whole message, custom events."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import asdict, dataclass, field
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, BaseRunManager, CallbackManagerForLLMRun
from langchain_core.callbacks.manager import ahandle_event, handle_event
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.tool import ToolCallChunk, tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from langchain_earlyexit.engines.program import Answer, Called, Checked, Done, Event, Stream, Thought
from langchain_earlyexit.promises import AUDIT_KEY, CALIBRATION_KEY, Promise, Verdict
from langchain_earlyexit.record import KEY, ExitRecord
from langchain_earlyexit.request import Request

_GATHERED = 64
"""Events that wait before the reader of a whole call is woken."""


@dataclass(slots=True)
class Call:
    """One running request.

    Attributes:
        request: what runs.
        stream: its events.
        id: the id of the message and of all its chunks.
        model: the name that metadata carry.
        engine: the engine's name.
        include_checks: whether the record holds the trace.
        promise: what holds for it, where it was asked with a confidence.
        record: how it ended, once it has.
    """

    request: Request
    stream: Stream
    id: str
    model: str
    engine: str
    include_checks: bool
    promise: Promise | None = None
    record: ExitRecord | None = None
    _thinking: list[str] = field(default_factory=list)
    _answer: list[str] = field(default_factory=list)
    _calls: list[ToolCallChunk] = field(default_factory=list)
    _last: dict[str, Any] | None = None
    _changed: bool | None = None

    def take(self, event: Event) -> None:
        """Add an event to the whole. Where an audit ends, it is counted: that may block."""
        self._add(event)
        if isinstance(event, Done):
            self._observe()

    async def atake(self, event: Event) -> None:
        """As `take`, for event loops."""
        self._add(event)
        if isinstance(event, Done) and self._changed is not None:
            await asyncio.to_thread(self._observe)

    def _observe(self) -> None:
        if self._changed is not None and self.promise is not None and self.promise.audit is not None:
            self.promise.audit.observe(self._changed, self.promise.call)

    def _add(self, event: Event) -> None:
        if isinstance(event, Thought):
            self._thinking.append(event.text)
        elif isinstance(event, Answer):
            self._answer.append(event.text)
        elif isinstance(event, Called):
            self._call(event)
        elif isinstance(event, Done):
            self._last = self._close(event)

    def chunk(self, event: Event) -> AIMessageChunk | None:
        """What a reader of the stream gets for an event that was taken."""
        if isinstance(event, Thought):
            return AIMessageChunk(content="", additional_kwargs={"reasoning_content": event.text}, id=self.id)
        if isinstance(event, Answer):
            return AIMessageChunk(content=event.text, id=self.id)
        if isinstance(event, Called):
            whole = self._calls[event.index]
            told = tool_call_chunk(
                name=event.name,
                args=event.arguments,
                id=None if event.name is None else whole["id"],
                # Its place among the blocks of the answer: v1 content merges what has the same.
                index=event.index + bool(self._thinking) + bool(self._answer),
            )
            return AIMessageChunk(content="", tool_call_chunks=[told], id=self.id)
        if isinstance(event, Done) and self._last is not None:
            return AIMessageChunk(content="", id=self.id, chunk_position="last", **self._last)
        return None

    def finished(self) -> dict[str, Any]:
        """What was said at the end.

        Raises:
            RuntimeError: the events ended before the call did. A part of an answer is none.
        """
        if self._last is None:
            raise RuntimeError("the call was stopped before it was done; was its model closed?")
        return self._last

    def result(self) -> ChatResult:
        """The whole call: what `invoke` returns is the sum of what `stream` yields.

        Raises:
            RuntimeError: the call was stopped before it was done.
        """
        last = dict(self.finished())
        if self._thinking:
            last["additional_kwargs"] = {"reasoning_content": "".join(self._thinking), **last["additional_kwargs"]}
        # Read as the sum of a stream's chunks is, so that both tell the same calls from broken ones.
        calls = AIMessageChunk(content="", tool_call_chunks=self._calls)
        message = AIMessage(
            content="".join(self._answer),
            id=self.id,
            tool_calls=calls.tool_calls,
            invalid_tool_calls=calls.invalid_tool_calls,
            **last,
        )
        return ChatResult(generations=[ChatGeneration(message=message)], llm_output={"model_name": self.model})

    def _call(self, event: Called) -> None:
        """Add a piece to its call; the first makes its id."""
        if event.index == len(self._calls):
            self._calls.append(tool_call_chunk(name="", args="", id=f"call_{uuid.uuid4().hex}", index=event.index))
        whole = self._calls[event.index]
        whole["name"] = (whole["name"] or "") + (event.name or "")
        whole["args"] = (whole["args"] or "") + event.arguments

    def _close(self, done: Done) -> dict[str, Any]:
        """What is said once, at the end. Repeated over chunks, floats and booleans would not merge."""
        self.record = ExitRecord.of(
            done,
            policy=repr(self.request.policy),
            budget=self.request.budget,
            engine=self.engine,
            include_checks=self.include_checks,
            shadow=self.request.shadow,
            confidence=None if self.promise is None else self.promise.confidence,
            guarantee=None if self.promise is None else self.promise.kept(done.reason),
        )
        promised: dict[str, Any] = {}
        if self.promise is not None and self.record.guarantee is not None:
            promised[CALIBRATION_KEY] = self.promise.calibration
        if self.promise is not None and self.promise.audit is not None:
            verdict = Verdict.of(done, self.request.form)
            self._changed = verdict.changed
            promised[AUDIT_KEY] = asdict(verdict)
        return {
            "usage_metadata": self.record.usage(done.prompt_tokens),
            "response_metadata": {
                "model_name": self.model,
                # Not `ls_provider`: where both are equal, LangChain's summarising takes `total_tokens` for the length
                # of the conversation, and ours holds trials and thoughts that are in none.
                "model_provider": "langchain-earlyexit",
                "finish_reason": done.finish_reason,
                "seed": done.seed,
                KEY: self.record.to_dict(),
                **promised,
            },
            "additional_kwargs": {KEY: self.record.to_dict()},
        }

    def custom(self, event: Event) -> tuple[str, dict[str, Any]] | None:
        """Name and data of the custom event for an event that was taken, if it has one."""
        if isinstance(event, Checked):
            decision = event.decision
            return "early_exit.check", {
                **event.check.to_dict(),
                "exit": decision.exit,
                "exits": event.exits,
                "reason": decision.reason,
                "score": decision.score,
            }
        if isinstance(event, Done) and self.record is not None:
            return "early_exit.exit", self.record.to_dict()
        return None


def gather(call: Call, manager: BaseRunManager | None) -> None:
    """Where nobody listens to single events, a thread need not be woken for each of them."""
    if manager is None or not manager.handlers:
        call.stream.gather(_GATHERED)


def hear(call: Call, event: Event, manager: CallbackManagerForLLMRun | None) -> None:
    """Add an event to a call that is read as a whole; handlers hear its custom event."""
    call.take(event)
    tell(manager, call.custom(event))


async def ahear(call: Call, event: Event, manager: AsyncCallbackManagerForLLMRun | None) -> None:
    """As `hear`, for event loops."""
    await call.atake(event)
    await atell(manager, call.custom(event))


def speak(call: Call, event: Event, manager: CallbackManagerForLLMRun | None) -> AIMessageChunk | None:
    """Add an event to a call that is streamed, and make of it what its reader gets; handlers hear that too."""
    hear(call, event, manager)
    message = call.chunk(event)
    if message is not None and manager is not None:
        manager.on_llm_new_token(message.text, chunk=ChatGenerationChunk(message=message))
    return message


async def aspeak(call: Call, event: Event, manager: AsyncCallbackManagerForLLMRun | None) -> AIMessageChunk | None:
    """As `speak`, for event loops."""
    await ahear(call, event, manager)
    message = call.chunk(event)
    if message is not None and manager is not None:
        await manager.on_llm_new_token(message.text, chunk=ChatGenerationChunk(message=message))
    return message


def tell(manager: CallbackManagerForLLMRun | None, custom: tuple[str, dict[str, Any]] | None) -> None:
    """Send a custom event under the model's own run, wherever core hands over a run manager.

    Core's public `dispatch_custom_event` names the parent run, and fails where there is none.
    """
    if manager is not None and custom is not None:
        handle_event(
            manager.handlers,
            "on_custom_event",
            "ignore_custom_event",
            *custom,
            run_id=manager.run_id,
            tags=manager.tags,
            metadata=manager.metadata,
        )


async def atell(manager: AsyncCallbackManagerForLLMRun | None, custom: tuple[str, dict[str, Any]] | None) -> None:
    """As `tell`, for async handlers."""
    if manager is not None and custom is not None:
        await ahandle_event(
            manager.handlers,
            "on_custom_event",
            "ignore_custom_event",
            *custom,
            run_id=manager.run_id,
            tags=manager.tags,
            metadata=manager.metadata,
        )
