"""Tool calls and JSON schemas as grammars over a model's tokens, by llguidance: whatever finishes under one is valid.

A grammar is plain text and compiled once for each tokenizer; a matcher follows one answer through it, and hands the
engine a mask of the ids that may come next. Nothing here runs a model.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from numpy.typing import NDArray

from langchain_earlyexit.inert import is_control, strings
from langchain_earlyexit.schemas import Schema, parts, written
from langchain_earlyexit.toolcalls import CallFormat

_KEPT = 64
"""Compiled grammars kept for each model."""

_MOST_CALLS = 16
"""Tool calls in one answer."""

_MOST_DIGITS = 17
"""Digits of a number that may as well end: as many as tell every double from its neighbours."""


class _Digits:
    """Counts the digits of the number that JSON, as it is written, has come to."""

    def __init__(self) -> None:
        self.count = 0
        self._string = self._escaped = False

    def push(self, text: bytes) -> None:
        """Take what comes next."""
        for letter in text:
            if self._string:
                self._string = self._escaped or letter != ord('"')
                self._escaped = not self._escaped and letter == ord("\\")
            elif letter != ord("."):
                self._string = letter == ord('"')
                self.count = self.count + 1 if letter in b"0123456789" else 0


class _Tokens:
    """A model's tokens: what they spell, and masks of them.

    Args:
        reader: the tokenizer, as llguidance reads it.
        controls: name of each control token.
        size: of a mask in bytes.
    """

    def __init__(self, reader: LLTokenizer, controls: Mapping[int, str], size: int) -> None:
        self.reader = reader
        self.controls = controls
        self._size = size
        self._without: dict[frozenset[int], NDArray[np.uint8]] = {}

    @cached_property
    def beginning_no_digit(self) -> NDArray[np.uint8]:
        """The mask of all ids but those whose text begins with a digit."""
        reader = self.reader
        return self._but(index for index in range(reader.vocab_size) if reader.decode_bytes([index])[:1].isdigit())

    def without_controls(self, but: frozenset[int]) -> NDArray[np.uint8]:
        """The mask of all ids but the control tokens, those in `but` let in."""
        mask = self._without.get(but)
        if mask is None:
            mask = self._without[but] = self._but(self.controls.keys() - but)
        return mask

    def _but(self, ids: Iterable[int]) -> NDArray[np.uint8]:
        bits = np.ones(8 * self._size, np.uint8)
        bits[[index for index in ids if index < self.reader.vocab_size]] = 0
        return np.packbits(bits, bitorder="little")


class Matcher:
    """One answer's way through a grammar. A number that may end has an end: a schema's bounds leave its digits open."""

    def __init__(self, matcher: LLMatcher, digits: _Digits, tokens: _Tokens, marks: frozenset[int]) -> None:
        self._matcher = matcher
        self._digits = digits
        self._tokens = tokens
        self._marks = marks

    @property
    def over(self) -> bool:
        """Whether nothing may follow but the end of the turn."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> bytes:
        """The mask of ids that may come next, as `Sample.allow` has it.

        Raises:
            RuntimeError: only a control token that the grammar does not name could, or as `push`.
        """
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        if mask.any() and not self._matcher.is_accepting():
            mask = self._without_aliens(mask)
        if self._digits.count >= _MOST_DIGITS:
            ended = mask & self._tokens.beginning_no_digit
            mask = ended if ended.any() else mask
        return mask.tobytes()

    def forced(self) -> tuple[int, ...]:
        """The ids that must come next, as the tokenizer writes the text that must; empty where that is open.

        The last of that text is left out where what may follow could join it in one token. So these are the ids that
        the tokenizer would give the whole answer, and what comes after them is drawn from the same place.
        """
        ids = tuple(self._matcher.compute_ff_tokens())
        controls, marks = self._tokens.controls, self._marks
        alien = next((at for at, index in enumerate(ids) if index in controls and index not in marks), None)
        return ids if alien is None or self._matcher.is_accepting() else ids[:alien]

    def _without_aliens(self, mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        # llguidance takes the name of a control token, where a pattern spells it, for the token.
        kept = mask & self._tokens.without_controls(self._marks)
        if not kept.any():
            name = self._tokens.controls[int(np.flatnonzero(np.unpackbits(mask, bitorder="little"))[0])]
            raise RuntimeError(
                f"a pattern of the schema leaves nothing to write but {name!r}, which is a control "
                "token of this model and cannot be written as text; allow other text in the pattern"
            )
        return kept

    def takes(self, token: int) -> bool:
        """Whether this id may come next."""
        return bool(self._matcher.validate_tokens([token]))

    def push(self, token: int) -> None:
        """Take the id that came.

        Raises:
            RuntimeError: it was not allowed, or the grammar is too large to follow.
        """
        self._matcher.consume_token(token)
        self._check()
        self._digits.push(self._tokens.reader.decode_bytes([token]))

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(f"the grammar of the answer cannot be followed: {self._matcher.get_error()}")


@dataclass(frozen=True)
class Grammar:
    """A grammar for one model.

    `text` is in llguidance's Lark; `before` is what an answer has said when it begins; `marks` are the control tokens
    that it names.
    """

    grammars: Grammars
    text: str
    before: str = ""
    marks: frozenset[int] = frozenset()

    def start(self, said: str = "") -> Matcher | None:
        """A matcher for an answer that begins with `said`; None if none may."""
        return self.grammars.start(self, said)


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
        self._tokens: _Tokens | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def schema(self, schema: Schema) -> Grammar:
        """JSON that is valid for a schema of `schemas.checked`.

        Raises:
            ValueError: a name or a constant in it spells a control token of the model.
        """
        return Grammar(self, f"start: {self._json(schema)}")

    def calls(
        self, form: CallFormat, tools: Sequence[Mapping[str, Any]], *, parallel: bool, otherwise: Schema | None = None
    ) -> Grammar:
        """Calls of `tools` (`name` and checked `parameters`), written in `form`.

        Without `otherwise` the text begins after the format's trigger, for that is what told that a call begins. With
        it the text is the whole answer: the trigger and calls, or JSON that is valid for `otherwise`.

        Raises:
            ValueError: as `schema`.
        """
        rules = []
        for index, tool in enumerate(tools):
            head = _text(form.named(tool["name"])) + " " + self._literal(form.middle)
            rules.append(f"call{index}: {head} {self._json(tool['parameters'])} {self._literal(form.tail)}")
        more = ""
        if parallel and form.between is not None:
            more = f"(BLANK? {self._literal(form.between.lstrip())} call){{0,{_MOST_CALLS - 1}}}"
        # A model that begins a call by itself may set another blank than the one we would, or none.
        lead = f"BLANK? {self._literal(form.lead.lstrip())}" if form.lead else ""
        lines = [
            f"calls: {lead} call {more}",
            "call: " + " | ".join(f"call{index}" for index in range(len(rules))),
            *rules,
            "BLANK: /[ \\n\\t]{1,4}/",
        ]
        if otherwise is None:
            lines.insert(0, "start: calls")
        else:
            lines[:0] = [f"start: {self._literal(form.trigger)} calls | other", f"other: {self._json(otherwise)}"]
        parts = (form.trigger, form.lead, form.middle, form.tail, form.between or "")
        marks = frozenset(part for text in parts for part in self._split(text) if isinstance(part, int))
        return Grammar(self, "\n".join(lines), form.trigger if otherwise is None else "", marks)

    def start(self, grammar: Grammar, said: str) -> Matcher | None:
        """See `Grammar.start`."""
        text = grammar.text
        with self._lock:
            tokens = self._read()
            known = self._compiled.get(text)
            if known is None:
                known = LLMatcher(tokens.reader, LLMatcher.grammar_from_lark(text), log_level=0)
                if known.is_error():
                    raise ValueError(f"the schema cannot be compiled to a grammar: {known.get_error()}")
                self._compiled[text] = known
                if len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(text)
            matcher = known.deep_copy()
        ids = self._ids(tokens.reader, said)
        if matcher.try_consume_tokens(ids) != len(ids):
            return None
        digits = _Digits()
        digits.push((grammar.before + said).encode())
        return Matcher(matcher, digits, tokens, grammar.marks)

    def _read(self) -> _Tokens:
        if self._tokens is None:
            if not self._eos:
                raise ValueError("this model's tokenizer has no end-of-turn token, so no grammar can tell it to stop")
            try:
                reader = from_tokenizer(self._tokenizer, eos_token=self._eos)
            except ValueError as error:
                raise ValueError(
                    "tool calls and response formats need a tokenizer whose tokens are bytes (byte-level BPE or byte "
                    f"fallback), and this model's is none: {error}. Ask without tools and response_format"
                ) from error
            controls = {index: name for name, index in self._added.items() if is_control(name)}
            size = len(LLMatcher(reader, LLMatcher.grammar_from_regex("a")).compute_bitmask())
            self._tokens = _Tokens(reader, controls, size)
        return self._tokens

    def _ids(self, reader: LLTokenizer, text: str) -> list[int]:
        """Ids that spell `text`, byte by byte; which ones is all the same to a grammar."""
        ids: list[int] = []
        for part in self._split(text):
            ids += [part] if isinstance(part, int) else reader.greedy_tokenize(part)
        return ids

    def _literal(self, text: str) -> str:
        """`text` of a format, its control tokens as such."""
        return " ".join(f"<[{part}]>" if isinstance(part, int) else _text(part) for part in self._split(text))

    def _json(self, schema: Schema) -> str:
        """The rule of a schema. What spells a control token cannot be written: llguidance would write the token."""
        for text in _words(schema):
            for found in self._controls.finditer(text):
                if is_control(found.group()):
                    raise ValueError(
                        f"the schema holds {text!r}, but {found.group()!r} is a control token of this model and cannot "
                        "be written as text under a grammar; name it otherwise in the schema and map it back"
                    )
        return f"%json {written(schema)}"

    def _split(self, text: str) -> list[int | str]:
        parts: list[int | str] = []
        at = 0
        for found in self._controls.finditer(text):
            parts += [text[at : found.start()], self._added[found.group()]]
            at = found.end()
        return [part for part in (*parts, text[at:]) if part != ""]


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _words(schema: Schema) -> Iterator[str]:
    """Names, constants and patterns of a JSON schema: the texts that an answer may have to spell."""
    for _, part in parts(schema):
        for key in ("properties", "patternProperties"):
            yield from part.get(key, ())
        yield from strings([part.get(key) for key in ("required", "const", "enum", "pattern")])
