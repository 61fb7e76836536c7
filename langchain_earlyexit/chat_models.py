"""`ChatEarlyExit`: a local reasoning model as a LangChain chat model that stops thinking when it has done its work."""

from __future__ import annotations

import asyncio
import secrets
import threading
import uuid
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.callbacks.manager import ahandle_event, handle_event
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list
from pydantic import AliasChoices, ConfigDict, Field, PrivateAttr, SecretStr, field_validator, model_validator

from langchain_earlyexit._version import __version__
from langchain_earlyexit.answers import BOXED, FORMS, TEXT, AnswerForm, detect_form
from langchain_earlyexit.codec import Codec
from langchain_earlyexit.controller import Request, program
from langchain_earlyexit.cues import CueSpec
from langchain_earlyexit.engines.program import Answer, Checked, Done, Engine, Event, Stream, Thought
from langchain_earlyexit.engines.shared import acquire, release
from langchain_earlyexit.families import Family, ThinkTags, find_family, thinking_tags
from langchain_earlyexit.messages import render
from langchain_earlyexit.pocket import weights_dir
from langchain_earlyexit.policies import CoDEStop, FirstOf, Never, Policy, policy_from_name
from langchain_earlyexit.record import KEY, ExitRecord
from langchain_earlyexit.sampling import Sampling

EFFORT_BUDGETS: Mapping[str, int] = {
    "none": 0,
    "minimal": 256,
    "low": 1024,
    "medium": 4096,
    "high": 12288,
    "xhigh": 24576,
    "max": -1,
}
"""`reasoning_effort` as a cap on thinking tokens (-1: no cap)."""

_ANSWER_RESERVE = 256
_CUE_GAP = 8
"""Tokens between two checks at least: "Wait, let me check" is one doubt, and is looked into once."""

_BATCH_WIDTH = 64
"""Calls of one `batch` in flight: as many as the local engine runs at once."""

_LOOKS = ("parallel", "wait")
_FROM_CORE = frozenset({"stream", "ls_structured_output_format", "structured_output_format"})
_NOT_YET = frozenset({"tools", "tool_choice", "parallel_tool_calls", "response_format", "strict"})
_BUDGET_NAMES = ("thinking_budget", "thinking_token_budget", "reasoning_budget")


@dataclass(frozen=True)
class _Knobs:
    """The settings a call may change, resolved: constructor first, call over it."""

    exit_policy: Any = None
    confidence: float | None = None
    thinking_budget: int | None = None
    thinking_budget_message: str | None = None
    reasoning_effort: str | None = None
    answer_form: Any = "auto"
    answer_reserve: int | None = None
    max_tokens: int | None = None
    reuse_trial_answer: bool = False
    look: str = "parallel"
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    shadow: bool = False
    include_checks: bool = False
    include_history_reasoning: bool = False


_KNOBS = tuple(f.name for f in fields(_Knobs))


@dataclass(frozen=True)
class _Bound:
    """An engine, and what follows from its tokenizer and names."""

    engine: Engine
    codec: Codec
    family: Family
    tags: ThinkTags | None
    cues: CueSpec

    @classmethod
    def of(cls, engine: Engine) -> _Bound:
        tokenizer = engine.tokenizer
        family = find_family(*engine.family_hints)
        template = getattr(tokenizer, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        eos = engine.generation_defaults.get("eos_token_id", ())
        return cls(
            engine=engine,
            codec=Codec(tokenizer, tuple(eos) if isinstance(eos, list | tuple) else (eos,)),
            family=family,
            tags=thinking_tags(template, tokenizer.get_added_vocab(), family),
            cues=CueSpec(words=family.cues, min_gap=_CUE_GAP),
        )


@dataclass(slots=True)
class _Call:
    """One running request and what its chunks say of it."""

    request: Request
    stream: Stream
    id: str
    model: str
    policy: str
    budget: int | None
    engine: str
    knobs: _Knobs
    record: ExitRecord | None = field(default=None)

    def chunk(self, event: Event) -> AIMessageChunk | None:
        """What a reader of the stream gets for `event`."""
        if isinstance(event, Thought):
            return AIMessageChunk(content="", additional_kwargs={"reasoning_content": event.text}, id=self.id)
        if isinstance(event, Answer):
            return AIMessageChunk(content=event.text, id=self.id)
        if isinstance(event, Done):
            last = self.close(event)
            return AIMessageChunk(content="", id=self.id, chunk_position="last", **last)
        return None

    def close(self, done: Done) -> dict[str, Any]:
        """What is said once, at the end. Repeated over chunks, floats and booleans would not merge."""
        self.record = ExitRecord.of(
            done,
            policy=self.policy,
            budget=self.budget,
            engine=self.engine,
            include_checks=self.knobs.include_checks,
            shadow=self.knobs.shadow,
        )
        return {
            "usage_metadata": self.record.usage(done.prompt_tokens),
            "response_metadata": {
                "model_name": self.model,
                "model_provider": "earlyexit",
                "finish_reason": done.finish_reason,
                "seed": done.seed,
                KEY: self.record.to_dict(),
            },
            "additional_kwargs": {KEY: self.record.to_dict()},
        }


class ChatEarlyExit(BaseChatModel):
    """A local reasoning model that stops thinking when more thinking no longer changes the answer.

    The answer is `content`, the thinking is `additional_kwargs["reasoning_content"]`, and the exit record, with the
    reason why thinking ended and what it cost, is `response_metadata["early_exit"]`.

    Example:
        >>> from langchain_earlyexit import ChatEarlyExit, DEER
        >>> llm = ChatEarlyExit(model="pocket", exit_policy=DEER(threshold=0.95), thinking_budget=512)
        >>> llm.invoke("What is 37 + 48 * 2 - 15?").content  # doctest: +SKIP

    Weights are loaded at the first call, off the event loop, once per process for equal settings. `close()`, or use
    as a context manager, frees them when the last model that uses them is closed.

    Every field below `timeout` can also be given per call (`llm.invoke(..., thinking_budget=64)`), where it wins.
    """

    model_config = ConfigDict(
        arbitrary_types_allowed=True, populate_by_name=True, extra="forbid", protected_namespaces=()
    )

    model: str = Field(default="pocket", validation_alias=AliasChoices("model", "model_name"))
    """"pocket", a hub id, a local directory, or a directory holding one GGUF file."""
    engine: Any = "transformers"
    """"transformers", or an `Engine` of your own."""
    base_url: str | list[str] | None = None
    """Address of a remote engine. No remote engine ships in this version."""
    api_key: SecretStr | None = None
    """Hugging Face token, for gated models."""
    device: str | None = None
    device_map: str | None = None
    dtype: str | None = None
    """Torch dtype by name; the checkpoint's own when None."""
    revision: str | None = None
    quantization_config: Any = None
    trust_remote_code: bool = False
    max_retries: int = 2
    """How often loading from the hub is tried again after a network failure."""
    streaming: bool = False
    timeout: float | None = None
    """Seconds for one whole call, waiting in line included; past it TimeoutError is raised and the call is stopped."""

    exit_policy: Any = None
    """A policy, or its name ("never", "deer", "codestop"); None never exits."""
    confidence: float | None = None
    """1 - epsilon: the share of questions whose answer an early exit must not change. Needs a calibration."""
    thinking_budget: int | None = Field(default=None, validation_alias=AliasChoices(*_BUDGET_NAMES))
    """Exact cap on thinking tokens; 0 no thinking, -1 or None no cap."""
    thinking_budget_message: str | None = None
    """Fed before the end tag when the budget ends the thinking; the family's published sentence when None."""
    reasoning_effort: str | None = None
    """A name for a budget: see `EFFORT_BUDGETS`. `thinking_budget` says it exactly; give one of the two."""
    answer_form: Any = "auto"
    """"auto", "boxed", "choice", "text" or an `AnswerForm`: how an answer is induced, compared and scored."""
    answer_reserve: int | None = None
    """Tokens of `max_tokens` kept for the answer; by default 256, or a quarter of what is there if that is less."""
    max_tokens: int | None = None
    """Cap on thinking + forced + answer tokens."""
    reuse_trial_answer: bool = False
    """Take a complete trial answer as the answer, instead of sampling one after the exit."""
    look: str = "parallel"
    """"parallel": the model thinks on while a trial answer is decoded beside it. "wait": it waits."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    """Equal seeds give equal text, whatever else runs. None draws one, which the response metadata tell."""
    stop: list[str] | None = Field(default=None, validation_alias=AliasChoices("stop", "stop_sequences"))
    """Strings that end the answer. In the thinking they mean nothing."""
    shadow: bool = False
    """Decide but never exit; the record tells where it would have."""
    include_checks: bool = False
    """Put the whole trace into the record."""
    include_history_reasoning: bool = False
    """Hand the reasoning of earlier turns to the chat template."""

    _bound: _Bound | None = PrivateAttr(default=None)
    _calls: dict[str, Stream] = PrivateAttr(default_factory=dict)
    _lock: Any = PrivateAttr(default_factory=threading.Lock)

    # --- construction -----------------------------------------------------------------------------------------------

    @model_validator(mode="before")
    @classmethod
    def _one_name_each(cls, data: Any) -> Any:
        if isinstance(data, dict):
            _only_one(data, _BUDGET_NAMES)
        return data

    @field_validator("exit_policy", mode="before")
    @classmethod
    def _policy(cls, value: Any) -> Any:
        return _as_policy(value)

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if isinstance(self.engine, str):
            if self.engine != "transformers":
                raise ValueError(f"unknown engine {self.engine!r}; known are 'transformers', or an Engine of your own")
            if self.base_url is not None:
                raise ValueError(
                    "base_url is the address of a remote engine, but engine is 'transformers', which is local"
                )
        elif not isinstance(self.engine, Engine):
            raise ValueError(f"engine must be 'transformers' or an Engine, not {type(self.engine).__name__}")
        _check(self._knobs())
        return self

    @model_validator(mode="after")
    def _set_earlyexit_version(self) -> Self:
        self._add_version("langchain-earlyexit", __version__)
        return self

    # --- what LangChain asks ----------------------------------------------------------------------------------------

    @property
    def _llm_type(self) -> str:
        return "earlyexit"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Every setting that changes what is written: it is the cache key, and what traces show."""
        told = {name: getattr(self, name) for name in _KNOBS}
        told["exit_policy"] = repr(self.exit_policy or Never())
        if isinstance(self.answer_form, AnswerForm):
            told["answer_form"] = repr(self.answer_form)
        # Core writes a call's own `stop` under that name, and would hide this one from the cache key.
        told["stop_sequences"] = told.pop("stop")
        told["model"] = self.model
        told["engine"] = self.engine if isinstance(self.engine, str) else self.engine.name
        for name in ("dtype", "device", "device_map", "revision"):
            told[name] = getattr(self, name)
        if self.quantization_config is not None:
            told["quantization_config"] = str(self.quantization_config)
        return told

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "earlyexit"
        params["ls_model_name"] = kwargs.get("model", self.model)
        temperature = kwargs.get("temperature", self.temperature)
        if temperature is not None:
            params["ls_temperature"] = temperature
        max_tokens = kwargs.get("max_tokens", self.max_tokens)
        if max_tokens is not None:
            params["ls_max_tokens"] = max_tokens
        if stop or self.stop:
            params["ls_stop"] = list(stop or self.stop or ())
        return params

    def _resolve_model_profile(self) -> ModelProfile | None:
        profile = ModelProfile(
            text_inputs=True,
            text_outputs=True,
            image_inputs=False,
            audio_inputs=False,
            video_inputs=False,
            reasoning_output=True,
            reasoning_effort_levels=list(EFFORT_BUDGETS),
            tool_calling=False,
            structured_output=False,
        )
        context = None if self._bound is None else self._bound.engine.context_length
        if context is None and not isinstance(self.engine, str):
            context = self.engine.context_length
        if context is not None:
            profile["max_input_tokens"] = context
        return profile

    def get_token_ids(self, text: str) -> list[int]:
        """Ids of `text` under this model's tokenizer (it is loaded if need be)."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return list(self._bind().codec.encode(text))

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
        wide = [{"max_concurrency": _BATCH_WIDTH, **one} for one in get_config_list(config, len(inputs))]
        return super().batch(inputs, cast("list[RunnableConfig]", wide), return_exceptions=return_exceptions, **kwargs)

    # --- the engine -------------------------------------------------------------------------------------------------

    def _bind(self) -> _Bound:
        """The engine, loaded at the first call. Blocking: from async code it runs in a thread."""
        with self._lock:
            if self._bound is None:
                self._bound = _Bound.of(self._load() if isinstance(self.engine, str) else self.engine)
            return self._bound

    def _load(self) -> Engine:
        return acquire(
            model=str(weights_dir()) if self.model == "pocket" else self.model,
            device=self.device,
            device_map=self.device_map,
            dtype=self.dtype,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            quantization_config=self.quantization_config,
            token=None if self.api_key is None else self.api_key.get_secret_value(),
            max_retries=self.max_retries,
        )

    def close(self) -> None:
        """Stop this model's calls. Weights go when no other model in the process uses them. A later call loads anew."""
        with self._lock:
            bound, self._bound = self._bound, None
            calls = list(self._calls.values())
        for call in calls:
            call.cancel()
        if bound is not None and isinstance(self.engine, str):
            release(bound.engine)

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

    def _knobs(self) -> _Knobs:
        values = {name: getattr(self, name) for name in _KNOBS}
        return _Knobs(**{**values, "stop": tuple(self.stop or ())})

    def _resolve(self, stop: Sequence[str] | None, kwargs: Mapping[str, Any]) -> _Knobs:
        given = {name: value for name, value in kwargs.items() if name not in _FROM_CORE}
        if (missing := sorted(set(given) & _NOT_YET)) and any(given[name] for name in missing):
            raise NotImplementedError(f"{', '.join(missing)}: tools and structured output are not part of this version")
        for name in _NOT_YET:
            given.pop(name, None)
        _only_one(given, _BUDGET_NAMES)
        for name in _BUDGET_NAMES[1:]:
            if name in given:
                given["thinking_budget"] = given.pop(name)
        if given.pop("model", self.model) != self.model:
            raise ValueError(f"model={kwargs['model']!r} cannot be swapped in per call; this one is {self.model!r}")
        unknown = sorted(set(given) - set(_KNOBS))
        if unknown:
            raise TypeError(
                f"unknown keyword(s) for ChatEarlyExit: {', '.join(unknown)}; known are {', '.join(_KNOBS)}"
            )
        if stop is not None:
            given["stop"] = stop
        if "stop" in given:
            wanted = given["stop"]
            given["stop"] = (wanted,) if isinstance(wanted, str) else tuple(wanted or ())
        if "exit_policy" in given:
            given["exit_policy"] = _as_policy(given["exit_policy"])
        # A name for a budget and a budget: the nearer one counts. Both at once is for _check to refuse.
        if "thinking_budget" in given and "reasoning_effort" not in given:
            given["reasoning_effort"] = None
        if "reasoning_effort" in given and "thinking_budget" not in given:
            given["thinking_budget"] = None
        knobs = replace(self._knobs(), **given)
        _check(knobs)
        return knobs

    def _start(self, messages: list[BaseMessage], stop: Sequence[str] | None, kwargs: Mapping[str, Any]) -> _Call:
        """Load, render, and hand the engine its program."""
        knobs = self._resolve(stop, kwargs)
        bound = self._bind()
        budget = knobs.thinking_budget
        if knobs.reasoning_effort is not None:
            budget = EFFORT_BUDGETS[knobs.reasoning_effort]
        budget = None if budget == -1 else budget
        prompt = render(
            bound.engine.tokenizer,
            messages,
            tags=bound.tags,
            family=bound.family,
            thinking=budget != 0,
            include_reasoning=knobs.include_history_reasoning,
        )
        policy = knobs.exit_policy or Never()
        _warn_uncalibrated(policy)
        limit = _limit(knobs.max_tokens, bound.engine.context_length, len(prompt.ids))
        request = Request(
            prompt=prompt.ids,
            codec=bound.codec,
            thinking=prompt.thinking == "open",
            tags=None if bound.tags is None else (bound.tags.start, bound.tags.end),
            policy=policy,
            cues=bound.cues,
            form=_form(knobs.answer_form, bound.family, messages),
            message=bound.family.budget_message
            if knobs.thinking_budget_message is None
            else knobs.thinking_budget_message,
            budget=budget,
            limit=limit,
            reserve=_reserve(knobs.answer_reserve, limit),
            sampling=_sampling(knobs, bound),
            seed=secrets.randbits(48) if knobs.seed is None else knobs.seed,
            stop=knobs.stop,
            look=knobs.look,
            shadow=knobs.shadow,
            reuse=knobs.reuse_trial_answer,
        )
        stream = bound.engine.submit(program(request), timeout=self.timeout)
        call = _Call(
            request, stream, f"earlyexit-{uuid.uuid4()}", self.model, repr(policy), budget, bound.engine.name, knobs
        )
        with self._lock:
            self._calls[call.id] = stream
        return call

    def _end(self, call: _Call) -> None:
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
        call = self._start(messages, stop, kwargs)
        try:
            for event in call.stream:
                message = call.chunk(event)
                _tell(run_manager, call, event)
                if message is None:
                    continue
                chunk = ChatGenerationChunk(message=message)
                if run_manager is not None:
                    run_manager.on_llm_new_token(message.text, chunk=chunk)
                yield chunk
        finally:
            self._end(call)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        call = await self._astart(messages, stop, kwargs)
        try:
            async for event in call.stream:
                message = call.chunk(event)
                await _atell(run_manager, call, event)
                if message is None:
                    continue
                chunk = ChatGenerationChunk(message=message)
                if run_manager is not None:
                    await run_manager.on_llm_new_token(message.text, chunk=chunk)
                yield chunk
        finally:
            self._end(call)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self._start(messages, stop, kwargs)
        whole = _Whole(call)
        try:
            for event in call.stream:
                whole.take(event)
                _tell(run_manager, call, event)
        finally:
            self._end(call)
        return whole.result()

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = await self._astart(messages, stop, kwargs)
        whole = _Whole(call)
        try:
            async for event in call.stream:
                whole.take(event)
                await _atell(run_manager, call, event)
        finally:
            self._end(call)
        return whole.result()

    async def _astart(
        self, messages: list[BaseMessage], stop: Sequence[str] | None, kwargs: Mapping[str, Any]
    ) -> _Call:
        """`_start` in a thread: it may load weights, and tokenizes. A cancelled caller leaves nothing running."""
        starting = asyncio.ensure_future(asyncio.to_thread(self._start, messages, stop, kwargs))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(self._forget)
            raise

    def _forget(self, starting: asyncio.Future[_Call]) -> None:
        if not starting.cancelled() and starting.exception() is None:
            self._end(starting.result())


class _Whole:
    """A call's events summed up: what `invoke` returns is the sum of what `stream` yields."""

    def __init__(self, call: _Call) -> None:
        self._call = call
        self._thinking: list[str] = []
        self._answer: list[str] = []
        self._last: dict[str, Any] | None = None

    def take(self, event: Event) -> None:
        if isinstance(event, Thought):
            self._thinking.append(event.text)
        elif isinstance(event, Answer):
            self._answer.append(event.text)
        elif isinstance(event, Done):
            self._last = self._call.close(event)

    def result(self) -> ChatResult:
        if self._last is None:
            raise RuntimeError("the call was stopped before it was done")
        last = dict(self._last)
        if self._thinking:
            last["additional_kwargs"] = {
                "reasoning_content": "".join(self._thinking),
                **last["additional_kwargs"],
            }
        message = AIMessage(content="".join(self._answer), id=self._call.id, **last)
        return ChatResult(generations=[ChatGeneration(message=message)], llm_output={"model_name": self._call.model})


# --- reading settings ---------------------------------------------------------------------------------------------


def _only_one(given: Mapping[str, Any], names: Sequence[str]) -> None:
    both = [name for name in names if name in given]
    if len(both) > 1:
        raise ValueError(f"{' and '.join(both)} are names for the same setting; give one")


def _as_policy(value: Any) -> Policy | None:
    if value is None:
        return None
    if isinstance(value, str):
        return policy_from_name(value)
    if isinstance(value, type) or not isinstance(value, Policy):
        raise ValueError(
            f"exit_policy must be a policy such as DEER(threshold=0.95), or the name of one; got {value!r}"
        )
    return value


def _check(knobs: _Knobs) -> None:
    """Refuse what cannot be meant, before anything is loaded."""
    if knobs.confidence is not None:
        raise ValueError(
            f"confidence={knobs.confidence} needs a calibration of this model and policy, and none is loaded. Set "
            "exit_policy with a threshold of its own, for example DEER(threshold=0.95), which promises nothing"
        )
    if knobs.thinking_budget is not None and knobs.thinking_budget < -1:
        raise ValueError(f"thinking_budget must be -1 (no cap), 0 (no thinking) or a cap, not {knobs.thinking_budget}")
    if knobs.reasoning_effort is not None:
        if knobs.reasoning_effort not in EFFORT_BUDGETS:
            raise ValueError(
                f"unknown reasoning_effort {knobs.reasoning_effort!r}; known are {', '.join(EFFORT_BUDGETS)}"
            )
        if knobs.thinking_budget is not None:
            raise ValueError(
                f"reasoning_effort={knobs.reasoning_effort!r} and thinking_budget={knobs.thinking_budget} both cap the "
                "thinking; give one"
            )
    if knobs.look not in _LOOKS:
        raise ValueError(f"look must be one of {', '.join(_LOOKS)}; got {knobs.look!r}")
    if knobs.max_tokens is not None and knobs.max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {knobs.max_tokens}")
    if knobs.answer_reserve is not None and knobs.answer_reserve < 1:
        raise ValueError(f"answer_reserve must be at least 1, not {knobs.answer_reserve}: an answer is never empty")
    if knobs.answer_reserve is not None and knobs.max_tokens is not None and knobs.answer_reserve > knobs.max_tokens:
        raise ValueError(f"answer_reserve={knobs.answer_reserve} is more than max_tokens={knobs.max_tokens}")
    if not isinstance(knobs.answer_form, AnswerForm) and knobs.answer_form not in ("auto", *FORMS):
        raise ValueError(f"unknown answer_form {knobs.answer_form!r}; known are auto, {', '.join(FORMS)}")
    if any(not mark for mark in knobs.stop):
        raise ValueError("a stop string must not be empty")
    _sampling_of(knobs)


def _sampling_of(knobs: _Knobs, defaults: Mapping[str, Any] | None = None) -> Sampling:
    names = ("temperature", "top_p", "top_k", "min_p")
    chosen = {name: value for name, value in (defaults or {}).items() if name in names and value is not None}
    chosen.update({name: value for name in names if (value := getattr(knobs, name)) is not None})
    if "top_k" in chosen:
        chosen["top_k"] = int(chosen["top_k"])
    return Sampling(**chosen)


def _sampling(knobs: _Knobs, bound: _Bound) -> Sampling:
    """The user's settings over the checkpoint's generation config over the family's advice."""
    config = bound.engine.generation_defaults
    defaults = dict(bound.family.sampling)
    if config.get("do_sample"):
        # What a sampling checkpoint leaves unsaid is transformers' default of 1.0, not greedy.
        defaults = {"temperature": 1.0, **defaults, **config}
    return _sampling_of(knobs, defaults)


def _limit(max_tokens: int | None, context: int | None, prompt: int) -> int | None:
    if context is None:
        return max_tokens
    left = context - prompt
    if left < 1:
        raise ValueError(
            f"the prompt has {prompt} tokens, but this model's context holds {context}; shorten the conversation"
        )
    return left if max_tokens is None else min(max_tokens, left)


def _reserve(asked: int | None, limit: int | None) -> int:
    if asked is not None:
        return asked
    return _ANSWER_RESERVE if limit is None else max(1, min(_ANSWER_RESERVE, limit // 4))


def _form(wanted: Any, family: Family, messages: Sequence[BaseMessage]) -> AnswerForm:
    if isinstance(wanted, AnswerForm):
        return wanted
    asked = "\n".join(message.text for message in messages if message.type in {"system", "human"})
    form = detect_form(asked, family.habit) if wanted == "auto" else FORMS[wanted]
    if form is BOXED:
        return replace(form, inducer=family.boxed_inducer)
    if form is TEXT:
        return replace(form, inducer="\n\n")  # a blank line, as models leave one after their end tag
    return form


_warned = threading.Event()


def _warn_uncalibrated(policy: Policy) -> None:
    members = policy.policies if isinstance(policy, FirstOf) else (policy,)
    if not _warned.is_set() and any(isinstance(member, CoDEStop) for member in members):
        _warned.set()
        warnings.warn(
            "CoDEStop's tau is used uncalibrated: in its paper it ranges from 0.9 to 90 over models and tasks "
            "(arXiv 2604.04930, Table 7), and no value carries over",
            stacklevel=2,
        )


# --- custom events ------------------------------------------------------------------------------------------------


def _custom(call: _Call, event: Event) -> tuple[str, dict[str, Any]] | None:
    if isinstance(event, Checked):
        decision = event.decision
        return "early_exit.check", {
            **event.check.to_dict(),
            "exit": decision.exit,
            "exits": event.exits,
            "reason": decision.reason,
            "score": decision.score,
        }
    if isinstance(event, Done) and call.record is not None:
        return "early_exit.exit", call.record.to_dict()
    return None


def _tell(manager: CallbackManagerForLLMRun | None, call: _Call, event: Event) -> None:
    """Custom events under the model's own run, wherever core hands over a run manager."""
    if manager is None or (custom := _custom(call, event)) is None:
        return
    handle_event(
        manager.handlers,
        "on_custom_event",
        "ignore_custom_event",
        *custom,
        run_id=manager.run_id,
        tags=manager.tags,
        metadata=manager.metadata,
    )


async def _atell(manager: AsyncCallbackManagerForLLMRun | None, call: _Call, event: Event) -> None:
    if manager is None or (custom := _custom(call, event)) is None:
        return
    await ahandle_event(
        manager.handlers,
        "on_custom_event",
        "ignore_custom_event",
        *custom,
        run_id=manager.run_id,
        tags=manager.tags,
        metadata=manager.metadata,
    )
