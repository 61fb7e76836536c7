"""An engine and what follows from its tokenizer and names; and from a conversation to the request an engine can run."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from langchain_core.messages import BaseMessage

from langchain_earlyexit.answers import BOXED, FORMS, TEXT, AnswerForm, detect_form
from langchain_earlyexit.codec import Codec
from langchain_earlyexit.controller import Request
from langchain_earlyexit.cues import CueSpec
from langchain_earlyexit.engines.program import Engine
from langchain_earlyexit.families import Family, ThinkTags, find_family, thinking_tags
from langchain_earlyexit.messages import render
from langchain_earlyexit.policies import Never
from langchain_earlyexit.settings import Settings

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

    @classmethod
    def of(cls, engine: Engine) -> Binding:
        """Read tokenizer, template and generation config of `engine`."""
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

    def request(self, messages: Sequence[BaseMessage], settings: Settings) -> Request:
        """The request for one call.

        Raises:
            ValueError: no messages, content that is not text, or a prompt or cap that leaves no room to answer.
        """
        prompt = render(
            self.engine.tokenizer,
            messages,
            tags=self.tags,
            family=self.family,
            thinking=settings.budget != 0,
            include_reasoning=settings.include_history_reasoning,
        )
        message = settings.thinking_budget_message
        limit = _limit(settings.max_tokens, self.engine.context_length, len(prompt.ids))
        return Request(
            prompt=prompt.ids,
            codec=self.codec,
            thinking=prompt.thinking == "open",
            tags=None if self.tags is None else (self.tags.start, self.tags.end),
            policy=settings.exit_policy or Never(),
            cues=self.cues,
            form=self._form(settings.answer_form, messages),
            message=self.family.budget_message if message is None else message,
            budget=settings.budget,
            limit=limit,
            reserve=_reserve(settings.answer_reserve, limit),
            sampling=settings.sampling(self._sampling_defaults()),
            seed=secrets.randbits(48) if settings.seed is None else settings.seed,
            stop=settings.stop,
            look=settings.look,
            shadow=settings.shadow,
            reuse=settings.reuse_trial_answer,
        )

    def _sampling_defaults(self) -> Mapping[str, Any]:
        """The checkpoint's generation config over the family's published advice; greedy where neither says anything."""
        config = self.engine.generation_defaults
        if not config.get("do_sample"):
            return self.family.sampling
        # What a checkpoint that samples leaves unsaid is transformers' default of 1.0, not greedy.
        return {"temperature": 1.0, **self.family.sampling, **config}

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
        raise ValueError(
            f"the prompt has {prompt} tokens, but this model's context holds {context}; shorten the conversation"
        )
    return left if max_tokens is None else min(max_tokens, left)


def _reserve(asked: int | None, limit: int | None) -> int:
    if asked is not None:
        return asked
    return _ANSWER_RESERVE if limit is None else max(1, min(_ANSWER_RESERVE, limit // 4))
