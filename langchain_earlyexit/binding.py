"""An engine and what follows from its tokenizer and names; and from a conversation to the request an engine can run."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from langchain_core.messages import BaseMessage

from langchain_earlyexit.answers import BOXED, FORMS, TEXT, AnswerForm, detect_form
from langchain_earlyexit.asks import FREE, Asks
from langchain_earlyexit.codec import Codec
from langchain_earlyexit.cues import CueSpec
from langchain_earlyexit.engines.program import Engine
from langchain_earlyexit.families import Family, ThinkTags, find_family, thinking_tags
from langchain_earlyexit.fingerprint import digest
from langchain_earlyexit.grammar import Grammars
from langchain_earlyexit.guarantee import call_fingerprint
from langchain_earlyexit.guide import Bounds
from langchain_earlyexit.jsonforms import JSON, ToolCall
from langchain_earlyexit.messages import role_of, to_template
from langchain_earlyexit.policies import Never, Policy
from langchain_earlyexit.probe import Probe
from langchain_earlyexit.prompts import Prompt, PromptTooLong, render
from langchain_earlyexit.request import Request
from langchain_earlyexit.sampling import Sampling
from langchain_earlyexit.settings import Settings
from langchain_earlyexit.signals import refuse_lacking
from langchain_earlyexit.toolturns import ToolTurns

_ANSWER_RESERVE = 256
_CUE_GAP = 8
"""Tokens between two checks at least: "Wait, let me check" is one doubt, and is looked into once."""


@dataclass(frozen=True)
class Binding:
    """What is known of a loaded model."""

    engine: Engine
    codec: Codec
    family: Family
    tags: ThinkTags | None
    cues: CueSpec
    grammars: Grammars
    turns: ToolTurns
    probe: Probe | None = None

    @classmethod
    def of(cls, engine: Engine, probe: Probe | None = None) -> Binding:
        """Read tokenizer, template and generation config of `engine`.

        Raises:
            ValueError: a probe that was trained on something else than this engine runs.
        """
        tokenizer = engine.tokenizer
        family = find_family(*engine.family_hints)
        template = getattr(tokenizer, "chat_template", None)
        with_tools = None
        if isinstance(template, dict):
            with_tools, template = template.get("tool_use"), template.get("default")
        eos = engine.generation_defaults.get("eos_token_id", ())
        codec = Codec(tokenizer, tuple(eos) if isinstance(eos, list | tuple) else (eos,))
        bound = cls(
            engine=engine,
            codec=codec,
            family=family,
            tags=thinking_tags(template, tokenizer.get_added_vocab(), family),
            cues=CueSpec(words=family.cues, min_gap=_CUE_GAP),
            grammars=Grammars(tokenizer, codec.eos),
            turns=ToolTurns.of(template if with_tools is None else with_tools),
        )
        return bound if probe is None else bound.with_probe(probe)

    def with_probe(self, probe: Probe) -> Binding:
        """The same model, read by `probe`.

        Raises:
            ValueError: a probe that was trained on something else than this engine runs, or that is not the one its
                server has.
        """
        actual = self.fingerprint
        if self.sentry is not None:
            if probe.digest != self.sentry:
                raise ValueError(
                    f"{probe!r} is not the probe that the server has, whose digest is {self.sentry!r}: start the "
                    "server with this one, or leave probe out here"
                )
            # Which weights these are the server knows, and its plugin has refused a probe that was made for others.
            actual = actual | {name: probe.binds[name] for name in ("weights", "dtype") if name in probe.binds}
        probe.refuse_mismatch(actual)
        return replace(self, probe=probe)

    @property
    def sentry(self) -> str | None:
        """Of an engine with a sentry of its own, the digest of its probe; see `request.Request.sentry`."""
        found: str | None = getattr(self.engine, "sentry", None)
        return found

    @property
    def probe_digest(self) -> str | None:
        """Of the probe that measures `p_safe`, here or in the server."""
        return (self.sentry or None) if self.probe is None else self.probe.digest

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What an artifact made on this model is bound to: weights, dtype, tokenizer, chat template and cues."""
        tokenizer = self.engine.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            vocabulary = tokenizer.get_vocab()
        else:  # how it last truncated and padded is state, of no account here
            vocabulary = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
        identity: Mapping[str, str] = getattr(self.engine, "identity", {})
        return {
            "weights": identity.get("weights", self.engine.name),
            "dtype": identity.get("dtype", "unknown"),
            "tokenizer": digest(vocabulary),
            "template": digest(getattr(tokenizer, "chat_template", None)),
            "cues": json.dumps(asdict(self.cues)),
        }

    def call_fingerprint(
        self, messages: Sequence[BaseMessage], settings: Settings, request: Request, asks: Asks = FREE
    ) -> dict[str, str]:
        """`fingerprint`, and what a promise about calls like this one depends on beside it and the policy.

        Args:
            messages: whose system prompts count.
            settings: of the call.
            request: what they make.
            asks: tools and schema of the call.
        """
        # A system prompt may be called by other names; what else was said does not count.
        systems = [message for message in messages if role_of(message) == "system"]
        turns = to_template(systems, include_reasoning=False) if systems else []
        caps: dict[str, Any] = {
            "thinking": request.budget,
            "total": settings.max_tokens,
            "reserve": settings.answer_reserve,
            "context": self.engine.context_length,
        }
        if request.budget and settings.thinking_budget_message not in (None, self.family.budget_message):
            caps["message"] = digest(settings.thinking_budget_message)  # what stands before an answer at the cap
        return {
            **self.fingerprint,
            **call_fingerprint(
                engine=self.engine.name,
                system_prompt="\n".join(str(turn["content"]) for turn in turns),
                tools=asks.shown,
                choice=asks.choice,
                parallel=asks.parallel,
                schema=asks.schema if asks.described is None else asks.described,
                answer_form={
                    "name": request.form.name,
                    **asdict(request.form),
                    "reuse": request.reuse,
                    "stop": list(request.stop),
                },
                sampling=asdict(request.sampling),
                caps=caps,
                probe=self.probe_digest,
            ),
        }

    def prompt(
        self,
        messages: Sequence[BaseMessage],
        settings: Settings,
        tools: Sequence[Mapping[str, Any]] = (),
        schema: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """The conversation, and the tools as OpenAI's function descriptions, as the model is shown them.

        Raises:
            ValueError: no messages, or content that is not text.
        """
        return render(
            self.engine.tokenizer,
            messages,
            tags=self.tags,
            family=self.family,
            thinking=settings.budget != 0,
            include_reasoning=settings.include_history_reasoning,
            tools=tools,
            turns=self.turns,
            schema=schema,
        )

    def request(self, messages: Sequence[BaseMessage], settings: Settings, asks: Asks = FREE) -> Request:
        """The request for one call.

        Raises:
            ValueError: no messages, content that is not text, a prompt or cap that leaves no room to answer, or
                something that this engine cannot do.
        """
        policy, sampling = settings.exit_policy or Never(), settings.sampling(self._sampling_defaults())
        self._refuse_lacking(policy, settings, sampling, asks)
        watches: Callable[[Sampling], bool] | None = getattr(self.engine, "watches", None)
        prompt = self.prompt(messages, settings, asks.shown, asks.described)
        message = settings.thinking_budget_message
        limit = _limit(settings.max_tokens, self.engine.context_length, len(prompt.ids))
        return Request(
            prompt=prompt.ids,
            codec=self.codec,
            thinking=prompt.thinking == "open",
            tags=None if self.tags is None else (self.tags.start, self.tags.end),
            policy=policy,
            cues=self.cues,
            form=self._json_form(asks, settings.answer_reserve) or self._form(settings.answer_form, messages),
            bounds=self._bounds(asks),
            message=self.family.budget_message if message is None else message,
            budget=settings.budget,
            limit=limit,
            reserve=_reserve(settings.answer_reserve, limit),
            sampling=sampling,
            seed=secrets.randbits(48) if settings.seed is None else settings.seed,
            stop=settings.stop,
            look=settings.look,
            shadow=settings.shadow,
            reuse=settings.reuse_trial_answer,
            probe=self.probe,
            aside=watches is not None and not watches(sampling),
            sentry=self.sentry,
        )

    def _refuse_lacking(self, policy: Policy, settings: Settings, sampling: Sampling, asks: Asks) -> None:
        refuse_lacking(policy, self.engine)
        lacks: Mapping[str, str] = getattr(self.engine, "lacks", {})
        if "seed" in lacks and settings.seed is not None and sampling.temperature:
            raise ValueError(f"seed={settings.seed} would be ignored: {lacks['seed']}")
        if "grammar" in lacks and (asks.callables or asks.schema is not None):
            raise ValueError(lacks["grammar"])

    def _sampling_defaults(self) -> Mapping[str, Any]:
        """The checkpoint's generation config over the family's published advice; greedy where neither says anything."""
        config = self.engine.generation_defaults
        if not config.get("do_sample"):
            return self.family.sampling
        # What a checkpoint that samples leaves unsaid is transformers' default of 1.0, not greedy.
        return {"temperature": 1.0, **self.family.sampling, **config}

    def _json_form(self, asks: Asks, reserve: int | None) -> AnswerForm | None:
        """The form of a turn that may call or must be JSON, whatever form other turns have; else None.

        A trial is worth the tokens that are kept for the answer: where those were asked for, it may take as many.
        """
        otherwise = TEXT if asks.schema is None else replace(JSON, trial_cap=max(JSON.trial_cap, reserve or 0))
        if not asks.callables:
            return None if asks.schema is None else otherwise
        form = ToolCall.forced(self.turns.format) if asks.forced else ToolCall(format=self.turns.format)
        return replace(form, trial_cap=max(form.trial_cap, reserve or 0), otherwise=TEXT if asks.forced else otherwise)

    def _bounds(self, asks: Asks) -> Bounds | None:
        tools, schema, form = asks.callables, asks.schema, self.turns.format
        if not tools:
            return None if schema is None else Bounds(self.grammars.schema(schema))
        if asks.forced:
            return Bounds(self.grammars.calls(form, tools, parallel=asks.parallel), form, said=form.lead)
        in_letters = self.codec.single(form.trigger) is None
        if schema is not None and in_letters and self.grammars.schema(schema).start(form.trigger[:1]) is not None:
            raise ValueError(
                f"this model begins its calls ({form.name}) as the response format may begin, with "
                f"{form.trigger[:1]!r}, and a grammar cannot tell them apart; give tools and response_format in calls "
                "of their own, or give the response format as one more tool"
            )
        grammar = self.grammars.calls(form, tools, parallel=asks.parallel, otherwise=schema)
        names = tuple(tool["name"] for tool in tools)
        return Bounds(grammar, form, at_once=schema is not None, names=names)

    def _form(self, wanted: str | AnswerForm, messages: Sequence[BaseMessage]) -> AnswerForm:
        if isinstance(wanted, AnswerForm):
            return wanted
        asked = "\n".join(message.text for message in messages if message.type in {"system", "human"})
        form = detect_form(asked, self.family.habit) if wanted == "auto" else FORMS[wanted]
        if form is BOXED:
            return replace(form, inducer=self.family.boxed_inducer)
        if form is TEXT:
            return replace(form, inducer="\n\n")  # a blank line, as models leave one after their end tag
        return form


def _limit(max_tokens: int | None, context: int | None, prompt: int) -> int | None:
    if context is None:
        return max_tokens
    left = context - prompt
    if left < 1:
        raise PromptTooLong(
            f"the prompt has {prompt} tokens, but this model's context holds {context}; shorten the conversation"
        )
    return left if max_tokens is None else min(max_tokens, left)


def _reserve(asked: int | None, limit: int | None) -> int:
    if asked is not None:
        return asked
    return _ANSWER_RESERVE if limit is None else max(1, min(_ANSWER_RESERVE, limit // 4))
