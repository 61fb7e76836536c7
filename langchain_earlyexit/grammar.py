"""Tool calls and JSON schemas as grammars over a model's tokens, by llguidance: whatever finishes under one is valid.

A grammar is plain text and compiled once for each tokenizer; a matcher follows one answer through it, and hands the
engine a mask of the ids that may come next. Nothing here runs a model.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from langchain_earlyexit.schemas import Schema, written
from langchain_earlyexit.toolcalls import CallFormat

_KEPT = 64
"""Compiled grammars kept for each model."""

_MOST_CALLS = 16
"""Tool calls in one answer."""


class Matcher:
    """One answer's way through a grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def over(self) -> bool:
        """Whether nothing may follow but the end of the turn."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> bytes:
        """The mask of ids that may come next, as `Sample.allow` has it."""
        mask = bytes(self._matcher.compute_bitmask())
        self._check()
        return mask

    def push(self, token: int) -> None:
        """Take the id that came.

        Raises:
            RuntimeError: it was not allowed, or the grammar is too large to follow.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(f"the grammar of the answer cannot be followed: {self._matcher.get_error()}")


@dataclass(frozen=True)
class Grammar:
    """A grammar for one model. `text` is in llguidance's Lark, and tells two grammars apart."""

    grammars: Grammars
    text: str

    def start(self, said: str = "") -> Matcher | None:
        """A matcher for an answer that begins with `said`; None if none may."""
        return self.grammars.start(self.text, said)


class Grammars:
    """The grammars of one model. Cheap to make: its tokenizer is read when the first grammar is started.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        eos: ids that end a turn.
    """

    def __init__(self, tokenizer: Any, eos: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._eos = sorted(eos)
        self._added = {str(token): int(index) for index, token in tokenizer.added_tokens_decoder.items()}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._lock = threading.Lock()
        self._reader: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def schema(self, schema: Schema) -> Grammar:
        """JSON that is valid for a schema of `schemas.checked`."""
        return Grammar(self, f"start: {_json(schema)}")

    def calls(
        self, form: CallFormat, tools: Sequence[Mapping[str, Any]], *, parallel: bool, otherwise: Schema | None = None
    ) -> Grammar:
        """Calls of `tools` (`name` and checked `parameters`), written in `form`.

        Without `otherwise` the text begins after the format's trigger, for that is what told that a call begins. With
        it the text is the whole answer: the trigger and calls, or JSON that is valid for `otherwise`.
        """
        rules = []
        for index, tool in enumerate(tools):
            head = _text(form.named(tool["name"])) + " " + self._literal(form.middle)
            rules.append(f"call{index}: {head} {_json(tool['parameters'])} {self._literal(form.tail)}")
        more = ""
        if parallel and form.between is not None:
            more = f"({self._literal(form.between)} call){{0,{_MOST_CALLS - 1}}}"
        # A model that begins a call by itself may set another blank than the one we would.
        lead = f"BLANK? {self._literal(form.lead.lstrip())}" if form.lead else ""
        lines = [
            f"calls: {lead} call {more} {self._literal(form.end)}",
            "call: " + " | ".join(f"call{index}" for index in range(len(rules))),
            *rules,
            "BLANK: /[ \\n\\t]{1,4}/",
        ]
        if otherwise is None:
            lines.insert(0, "start: calls")
        else:
            lines[:0] = [f"start: {self._literal(form.trigger)} calls | other", f"other: {_json(otherwise)}"]
        return Grammar(self, "\n".join(lines))

    def start(self, text: str, said: str) -> Matcher | None:
        """See `Grammar.start`."""
        with self._lock:
            reader = self._read()
            known = self._compiled.get(text)
            if known is None:
                known = LLMatcher(reader, LLMatcher.grammar_from_lark(text), log_level=0)
                if known.is_error():
                    raise ValueError(f"the schema cannot be compiled to a grammar: {known.get_error()}")
                self._compiled[text] = known
                if len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(text)
            matcher = known.deep_copy()
        ids = self._ids(reader, said)
        return Matcher(matcher) if matcher.try_consume_tokens(ids) == len(ids) else None

    def _read(self) -> LLTokenizer:
        if self._reader is None:
            if not self._eos:
                raise ValueError("this model's tokenizer has no end-of-turn token, so no grammar can tell it to stop")
            try:
                self._reader = from_tokenizer(self._tokenizer, eos_token=self._eos)
            except ValueError as error:
                raise ValueError(
                    "tool calls and response formats need a tokenizer whose tokens are bytes (byte-level BPE or byte "
                    f"fallback), and this model's is none: {error}. Ask without tools and response_format"
                ) from error
        return self._reader

    def _ids(self, reader: LLTokenizer, text: str) -> list[int]:
        """Ids that spell `text`, byte by byte; which ones is all the same to a grammar."""
        ids: list[int] = []
        for part in self._split(text):
            ids += [part] if isinstance(part, int) else reader.greedy_tokenize(part)
        return ids

    def _literal(self, text: str) -> str:
        """`text` of a format, its control tokens as such."""
        return " ".join(f"<[{part}]>" if isinstance(part, int) else _text(part) for part in self._split(text))

    def _split(self, text: str) -> list[int | str]:
        parts: list[int | str] = []
        at = 0
        for found in self._controls.finditer(text):
            parts += [text[at : found.start()], self._added[found.group()]]
            at = found.end()
        return [part for part in (*parts, text[at:]) if part != ""]


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json(schema: Schema) -> str:
    return f"%json {written(schema)}"
