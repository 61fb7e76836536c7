"""`ChatEarlyExit`: a local reasoning model as a LangChain chat model that stops thinking when it has done its work."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun, Callbacks
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ContextThreadPoolExecutor, get_config_list
from langchain_core.runnables.utils import AnyConfigurableField
from pydantic import PrivateAttr, model_validator

from langchain_earlyexit.asks import Asks, as_tool
from langchain_earlyexit.binding import Binding
from langchain_earlyexit.configurable import ConfiguredFields
from langchain_earlyexit.controller import program
from langchain_earlyexit.copies import Copied
from langchain_earlyexit.engines.program import Stream
from langchain_earlyexit.events import Blocks
from langchain_earlyexit.fields import Fields
from langchain_earlyexit.guarantee import Calibration
from langchain_earlyexit.inert import plain_ids
from langchain_earlyexit.lanes import audited
from langchain_earlyexit.loading import Loaded, Shelf
from langchain_earlyexit.messages import to_template
from langchain_earlyexit.policies import Policy
from langchain_earlyexit.prompts import RefusedByTemplate
from langchain_earlyexit.replies import Call, ahear, aspeak, gather, hear, speak
from langchain_earlyexit.settings import NAMES, Settings, effort_confidence, warn_uncalibrated
from langchain_earlyexit.signals import refuse_lacking
from langchain_earlyexit.tooled import Tooled

if TYPE_CHECKING:
    from langchain_protocol.protocol import MessagesData

_BATCH_WIDTH = 64
"""Calls of one `batch` in flight where `max_running` does not say: as many as an engine runs at once."""

_AROUND_A_TURN = 8
"""Tokens that stand for what a chat template puts around a turn, a call or a tool, where it cannot be asked."""


class ChatEarlyExit(Tooled, Copied, Fields):
    """A local reasoning model that stops thinking when more thinking no longer changes the answer.

    The answer is `content`, the thinking is `additional_kwargs["reasoning_content"]`, and the exit record, with the
    reason why thinking ended and what it cost, is `response_metadata["early_exit"]`.

    Example:
        >>> from langchain_earlyexit import ChatEarlyExit, DEER
        >>> llm = ChatEarlyExit(model="pocket", exit_policy=DEER(threshold=0.95), thinking_budget=512)
        >>> llm.invoke("What is 37 + 48 * 2 - 15?").content  # doctest: +SKIP

    Weights are loaded at the first call, off the event loop, once per process for equal settings. `close()`, or use
    as a context manager, frees them when no other model holds them. A model that is gone holds none: if it was not
    closed, its weights wait for an equal one, until others are loaded.

    The fields are those of `Fields`. Each below `timeout` can also be given per call
    (`llm.invoke(..., thinking_budget=64)`), where it wins.
    """

    _shelf: Shelf = PrivateAttr(default_factory=Shelf)
    _calls: dict[str, Stream] = PrivateAttr(default_factory=dict)
    _lock: Any = PrivateAttr(default_factory=threading.Lock)

    # --- construction -----------------------------------------------------------------------------------------------

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        source, settings = self._source(), self._settings()
        source.refuse_unserved(settings)
        policy = settings.exit_policy
        if policy is not None:
            source.refuse_unprobed(policy)
            if policy.needs - {"trial_confidence"}:  # of a server, this must be asked
                self._refuse_lacking(policy)
        return self

    def _refuse_lacking(self, policy: Policy) -> None:
        """Ask the engine whether it tells what `policy` needs. A server that is not there yet is asked at a call."""
        if self.engine == "transformers":
            return
        if isinstance(self.engine, str):
            with contextlib.suppress(ConnectionError):
                engine = self._bind().engine
                try:
                    refuse_lacking(policy, engine)
                except ValueError:
                    self.close()
                    raise
        else:
            refuse_lacking(policy, self.engine)

    # --- what LangChain asks ----------------------------------------------------------------------------------------

    def get_token_ids(self, text: str) -> list[int]:
        """Ids of `text` under this model's tokenizer (it is loaded if need be). As in a prompt, none controls."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return plain_ids(self._bind().engine.tokenizer, text)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Length of the prompt that these messages make, tools and the chat template's own tokens included.

        It is the `input_tokens` that a call with them reports. Of parts of a conversation that the chat template takes
        for none (LangChain's trimming counts such), it is a little more than the tokens of their texts and calls.

        Args:
            messages: a conversation; an empty one has no tokens.
            tools: what `bind_tools` takes.
        """
        if not messages:
            return 0
        described = [as_tool(tool) for tool in tools or ()]
        try:
            return len(self._bind().prompt(messages, self._settings(), described).ids)
        except RefusedByTemplate:
            turns = to_template(messages, include_reasoning=False)
            calls = [call for turn in turns for call in turn.get("tool_calls", ())]
            texts = [*(str(turn["content"] or "") for turn in turns), *map(json.dumps, (*calls, *described))]
            return sum(len(self.get_token_ids(text)) + _AROUND_A_TURN for text in texts)

    @property
    def _width(self) -> int:
        return self.max_running or _BATCH_WIDTH

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """As every runnable's, but many questions wait for the model at once, not a handful: they share its passes.

        `config["max_concurrency"]` sets how many, as usual.
        """
        wide = [{"max_concurrency": self._width, **one} for one in get_config_list(config, len(inputs))]
        return super().batch(inputs, cast("list[RunnableConfig]", wide), return_exceptions=return_exceptions, **kwargs)

    def generate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Callbacks = None,
        **kwargs: Any,
    ) -> LLMResult:
        """As every chat model's, but many questions share the model's passes instead of waiting for each other."""
        ask = super().generate
        if len(messages) < 2:
            return ask(messages, stop, callbacks, **kwargs)
        ids = [kwargs.pop("run_id", None), *[None] * (len(messages) - 1)]  # one id is the first run's, as in core
        with ContextThreadPoolExecutor(min(len(messages), self._width)) as threads:
            asked = [
                threads.submit(ask, [one], stop, callbacks, run_id=id_, **kwargs)
                for one, id_ in zip(messages, ids, strict=True)
            ]
            try:
                results = [future.result() for future in asked]
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        return LLMResult(
            generations=[result.generations[0] for result in results],
            llm_output=self._combine_llm_outputs([result.llm_output for result in results]),
            run=[info for result in results for info in result.run or ()] or None,
        )

    def configurable_fields(self, **kwargs: AnyConfigurableField) -> ConfiguredFields:
        """As every runnable's, and `bind_tools` and `with_structured_output` of what comes keep it configurable.

        Raises:
            ValueError: a field that this model has not.
        """
        super().configurable_fields(**kwargs)  # checks the names
        return ConfiguredFields(default=self, fields=kwargs)

    def configured(self, **changed: Any) -> Self:
        """The model with other fields, for a run: it shares what is loaded, and its calls are among this one's.

        Settings that a call may give count as they do in a call: a budget takes the place of an effort, say.

        Raises:
            TypeError: an unknown setting.
            ValueError: a value, or two together, that cannot be meant.
        """
        asked = {name: value for name, value in changed.items() if name in NAMES}
        built = {name: value for name, value in changed.items() if name not in NAMES}
        like = self
        if built:
            kept = set(type(self).model_fields) - ({"profile"} if {"model", "engine"} & set(built) else set())
            kept -= {"streaming"} - self.model_fields_set  # said aloud, its False would turn streaming off for core
            like = type(self)(**{**{name: getattr(self, name) for name in kept}, **built})
        settings = like.call_settings(**asked)
        said = {name: getattr(settings, name) for name in NAMES} | {"stop": list(settings.stop) or None}
        return self.sharing(like.model_copy(update=said))

    # --- the engine -------------------------------------------------------------------------------------------------

    @property
    def _loaded(self) -> Loaded:
        return self._shelf.of(self._source())

    def _bind(self, settings: Settings | None = None) -> Binding:
        """The engine, loaded at the first call, for one with `settings`. From async code this runs in a thread."""
        bound = self._loaded.bind(self._source(), settings)
        context = bound.engine.context_length
        if context is not None and self.profile is not None and "max_input_tokens" not in self.profile:
            self.profile = {"max_input_tokens": context, **self.profile}
        return bound

    def load(self) -> Binding:
        """Load weights and probe now, not at the first call, and tell what is known of the model. Blocking.

        What it tells holds for as long as this chat model is neither closed nor gone.
        """
        return self._bind()

    def load_calibration(self) -> Calibration | None:
        """What serves calls with a confidence: the calibration that was named, or lies beside the weights; else None.

        No weights are loaded. Blocking, the first time.
        """
        return self._loaded.calibration(self._source())

    def serves(self, confidence: float) -> bool:
        """Whether the calibration has a level that is at least as strict. Blocking, the first time.

        Raises:
            ValueError: there is no calibration.
        """
        found = self.load_calibration()
        if found is None:
            self.call_settings(confidence=confidence)  # says how to get one
        return found is not None and found.serves(confidence)

    def capped(self, cap: int, **kwargs: Any) -> dict[str, Any]:
        """Keywords that hold a call with these to at most `cap` thinking tokens, and leave all else as it is.

        An effort is a cap too, and where it is also a confidence, that stays. Blocking, the first time.
        """
        settings = self.call_settings(**kwargs)
        if settings.budget is not None and settings.budget <= cap:
            return {}
        told: dict[str, Any] = {"thinking_budget": cap, "reasoning_effort": None}
        alone = settings.reasoning_effort is not None and settings.exit_policy is None and settings.confidence is None
        if self.calibration is not None and alone:  # it decides, and nothing of the constructor's may come back
            level = effort_confidence(settings)
            served = level is not None and self.serves(level)
            told |= {"confidence": level} if served else {"exit_policy": "never"}
        return told

    def close(self) -> None:
        """Stop this model's calls. Weights go when no other model in the process uses them. A later call loads anew."""
        with self._shelf.closing():
            with self._lock:
                calls = list(self._calls.values())
            for call in calls:
                call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def answer_now(self, message_id: str | None = None) -> int:
        """Tell running calls to close their thinking and answer; the record's reason is then `answer_now`.

        Args:
            message_id: the `id` that a call's chunks carry; None means every running call of this model.

        Returns:
            How many calls were told.
        """
        with self._lock:
            told = [call for name, call in self._calls.items() if message_id in (None, name)]
        for call in told:
            call.answer_now()
        return len(told)

    # --- one call ---------------------------------------------------------------------------------------------------

    def _start(self, messages: list[BaseMessage], stop: Sequence[str] | None, kwargs: Mapping[str, Any]) -> Call:
        """Load, render, and hand the engine its program."""
        settings = self._settings_of(stop, kwargs)
        asks = Asks.of(kwargs)
        bound, promises = self._bind(settings), self._loaded.promises
        warn_uncalibrated(settings.exit_policy)
        if promises is None:
            request, promise = bound.request(messages, settings, asks), None
        else:
            request, promise = promises.request(bound, messages, settings, asks)
        to_the_end = promise is not None and promise.audit is not None
        stream = bound.engine.submit((audited if to_the_end else program)(request), timeout=self.timeout)
        name = f"earlyexit-{uuid.uuid4()}"
        with self._lock:
            self._calls[name] = stream
        return Call(request, stream, name, self.model, bound.engine.name, settings.include_checks, promise)

    @contextlib.contextmanager
    def _running(self, call: Call) -> Iterator[Call]:
        """The call while somebody listens to it."""
        try:
            yield call
        finally:
            self._end(call)

    def _end(self, call: Call) -> None:
        call.stream.cancel()
        with self._lock:
            self._calls.pop(call.id, None)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with self._running(self._start(messages, stop, kwargs)) as call:
            for event in call.stream:
                message = speak(call, event, run_manager)
                if message is not None:
                    yield ChatGenerationChunk(message=message)
            call.finished()

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        with self._running(await self._astart(messages, stop, kwargs)) as call:
            async for event in call.stream:
                message = await aspeak(call, event, run_manager)
                if message is not None:
                    yield ChatGenerationChunk(message=message)
            call.finished()

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with self._running(self._start(messages, stop, kwargs)) as call:
            gather(call, run_manager)
            for event in call.stream:
                hear(call, event, run_manager)
        return call.result()

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with self._running(await self._astart(messages, stop, kwargs)) as call:
            gather(call, run_manager)
            async for event in call.stream:
                await ahear(call, event, run_manager)
        return call.result()

    def _stream_chat_model_events(
        self,
        messages: list[BaseMessage],
        *,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[MessagesData]:
        """Core's hook for `stream_events(version="v3")`: the events of `Blocks`, and what `_stream` tells handlers."""
        with self._running(self._start(messages, stop, kwargs)) as call:
            blocks = Blocks(call)
            yield blocks.start()
            for event in call.stream:
                yield from blocks.take(event, speak(call, event, run_manager))
            call.finished()

    async def _astream_chat_model_events(
        self,
        messages: list[BaseMessage],
        *,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[MessagesData]:
        """As `_stream_chat_model_events`, for async callers."""
        with self._running(await self._astart(messages, stop, kwargs)) as call:
            blocks = Blocks(call)
            yield blocks.start()
            async for event in call.stream:
                for told in blocks.take(event, await aspeak(call, event, run_manager)):
                    yield told
            call.finished()

    async def _astart(self, messages: list[BaseMessage], stop: Sequence[str] | None, kwargs: Mapping[str, Any]) -> Call:
        """`_start` in a thread: it may load weights, and tokenizes. A cancelled caller leaves nothing running."""
        started, left = list[Call](), threading.Event()

        def start() -> Call:
            call = self._start(messages, stop, kwargs)
            started.append(call)  # then a look whether it is wanted, as the other side sets `left` and then looks here
            if left.is_set():
                self._end(call)
            return call

        try:
            return await asyncio.to_thread(start)
        except asyncio.CancelledError:
            # The thread goes on, and nobody may be there to be told when it is done: the loop may be closed by then.
            left.set()
            for call in started:
                self._end(call)
            raise
