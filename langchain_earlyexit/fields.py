"""The fields of `ChatEarlyExit`: what it is told, and what it tells LangChain of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from langchain_core.language_models import BaseChatModel, LangSmithParams, ModelProfile
from pydantic import AliasChoices, ConfigDict, Field, SecretStr, field_validator, model_validator

from langchain_earlyexit._version import __version__
from langchain_earlyexit.answers import AnswerForm
from langchain_earlyexit.asks import NAMES as ASKED
from langchain_earlyexit.asks import Asks
from langchain_earlyexit.loading import SOURCE_NAMES, Source
from langchain_earlyexit.pocket import CONTEXT_LENGTH as POCKET_CONTEXT
from langchain_earlyexit.policies import Never
from langchain_earlyexit.settings import BUDGET_NAMES, EFFORT_BUDGETS, NAMES, Settings, as_policy, as_stop, only_one


class Fields(BaseChatModel):
    """See `ChatEarlyExit`."""

    model_config = ConfigDict(
        arbitrary_types_allowed=True, populate_by_name=True, extra="forbid", protected_namespaces=()
    )

    model: str = Field(default="pocket", validation_alias=AliasChoices("model", "model_name"))
    """"pocket", a hub id, a local directory, or a directory holding one GGUF file."""
    engine: Any = "transformers"
    """"transformers" (here), "vllm" (a vLLM, SGLang or llama.cpp server at `base_url`), or an `Engine` of your own."""
    base_url: str | list[str] | None = None
    """Address of a server that runs `model`, or of several, with or without `/v1`. The tokenizer is `model`'s."""
    api_key: SecretStr | None = None
    """Of the server; without one, a Hugging Face token, for gated models."""
    device: str | None = None
    device_map: str | None = None
    dtype: str | None = None
    """Torch dtype by name; the checkpoint's own when None."""
    revision: str | None = None
    quantization_config: Any = None
    cache_bytes: int | None = Field(default=None, ge=1)
    """Most bytes that the keys and values of all calls may take together; half of the memory when None. Calls that do
    not fit wait in line, and one that cannot fit alone raises MemoryError. Of the local engine only."""
    reuse_prompts: bool = True
    """Keep the keys and values of prompts, in a quarter of that memory, for calls that begin alike. A call then shows
    by its speed whether another began so: turn it off where callers must not learn that of each other. Of the local
    engine only; a server has a setting of its own."""
    max_running: int | None = Field(default=None, ge=1)
    """Calls that run at once, 64 when None; more wait in line, first come first served. Equal models share one line."""
    trust_remote_code: bool = False
    probe: Any = None
    """Measures `p_safe` for LYNX: a `Probe`, a directory that holds one, or a hub id. Refused on another model. When
    None, the one that lies beside the weights, if any does, as soon as a policy reads it."""
    calibration: Any = None
    """What `confidence` is served from: a file that `earlyexit calibrate` wrote, a hub id, or a `Calibration`. Refused
    on another model. When None, the one that lies beside the weights, if any does."""
    max_retries: int = 2
    """How often loading from the hub, or a request to a server, is tried again after a network failure. A stream that
    breaks off goes on from the tokens that came, and is tried so often anew."""
    streaming: bool = False
    timeout: float | None = None
    """Seconds for one whole call, waiting in line included; past it TimeoutError is raised and the call is stopped."""

    exit_policy: Any = None
    """A policy, or its name ("never", "deer", "codestop", "lynx", "convergence", "eat", "thinkbrake", "giveup",
    "probethentrial"); None never exits."""
    confidence: float | None = None
    """1 - epsilon, where epsilon is the highest tolerated chance that leaving early changes the answer. Needs a
    `calibration`, whose next stricter level is served; takes the place of `exit_policy`."""
    thinking_budget: int | None = Field(default=None, validation_alias=AliasChoices(*BUDGET_NAMES))
    """Exact cap on thinking tokens; 0 no thinking, -1 or None no cap."""
    thinking_budget_message: str | None = None
    """Fed before the end tag when the budget ends the thinking; the family's published sentence when None."""
    reasoning_effort: str | None = None
    """A name for a budget: see `EFFORT_BUDGETS`. `thinking_budget` says it exactly; give one of the two. With
    `calibration` named, and neither policy nor confidence beside it, it is a confidence too, see `EFFORT_CONFIDENCES`:
    a calibration that only lies beside the weights makes none of it."""
    answer_form: Any = "auto"
    """"auto", "boxed", "choice", "text" or an `AnswerForm`: how an answer is induced, compared and scored."""
    answer_reserve: int | None = None
    """Tokens of `max_tokens` kept for the answer; by default 256, or a quarter of what is there if that is less.

    A trial answer that is a tool call (or JSON) takes 192 tokens (128) at most, or as many as are asked for here if
    that is more. One that is cut there has no answer and a confidence of 0, so longer calls do not end the thinking:
    where tools are called with long texts, ask for as many tokens as their calls take."""
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
    """Equal seeds give equal text, whatever else runs, in float32 on the local engine; in half precision and on servers
    company may tip a token. None draws one, which the response metadata tell."""
    stop: list[str] | None = Field(default=None, validation_alias=AliasChoices("stop", "stop_sequences"))
    """Strings that end the answer. In the thinking they mean nothing."""
    audit_rate: float = 0.0
    """Share of the calls with a confidence that think to the end, to see whether leaving would have changed the answer.
    When too many would, early exit is off until the model is calibrated again. See `promises`."""
    shadow: bool = False
    """Decide but never exit; the record tells where it would have."""
    include_checks: bool = False
    """Put the whole trace into the record."""
    include_history_reasoning: bool = False
    """Hand the reasoning of earlier turns to the chat template."""

    @model_validator(mode="before")
    @classmethod
    def _one_name_each(cls, data: Any) -> Any:
        if isinstance(data, dict):
            only_one(data, BUDGET_NAMES)
        return data

    @field_validator("exit_policy", mode="before")
    @classmethod
    def _policy(cls, value: Any) -> Any:
        return as_policy(value)

    @model_validator(mode="after")
    def _set_earlyexit_version(self) -> Self:
        self._add_version("langchain-earlyexit", __version__)
        return self

    @property
    def _llm_type(self) -> str:
        return "earlyexit"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Every setting that changes what is written: it is the cache key, and what traces show."""
        told = {name: getattr(self, name) for name in NAMES}
        told["exit_policy"] = repr(self.exit_policy or Never())
        if isinstance(self.answer_form, AnswerForm):
            told["answer_form"] = repr(self.answer_form)
        # Core writes a call's own `stop` under that name, and would hide this one from the cache key.
        told["stop_sequences"] = told.pop("stop")
        return {**told, **self._source().told}

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """The rest of the cache key. Classes and tools stand in it as what they ask for: two may have one name."""
        asked = {name: value for name, value in kwargs.items() if name in ASKED}
        rest = {name: value for name, value in kwargs.items() if name not in ASKED}
        # Two servers may have one name for two sets of weights. Not among what traces tell: an address may hold a key.
        where = {} if self.base_url is None else {"base_url": self.base_url}
        return super()._get_llm_string(stop, **rest, **where, **({"asks": repr(Asks.of(asked))} if asked else {}))

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
            tool_calling=True,
            tool_choice=True,
            tool_call_streaming=True,
            structured_output=True,
        )
        # Of other weights the context is known when they are loaded; a constructor reads no files.
        context = POCKET_CONTEXT if self.model == "pocket" else None
        if not isinstance(self.engine, str):
            context = self.engine.context_length
        if context is not None:
            profile["max_input_tokens"] = context
        return profile

    def _source(self) -> Source:
        return Source(**{name: getattr(self, name) for name in SOURCE_NAMES})

    def _settings(self) -> Settings:
        values = {name: getattr(self, name) for name in NAMES}
        return Settings(**{**values, "stop": as_stop(self.stop)})

    def _settings_of(self, stop: Sequence[str] | None, kwargs: Mapping[str, Any]) -> Settings:
        settings = self._settings().over(stop, kwargs, self.model, calibrated=self.calibration is not None)
        self._source().refuse_unserved(settings)
        return settings

    def call_settings(self, **kwargs: Any) -> Settings:
        """The settings of a call with these keywords: the constructor's, with the call's over them."""
        return self._settings_of(None, kwargs)
