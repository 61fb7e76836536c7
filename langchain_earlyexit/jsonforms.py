"""Answer forms of turns that end in JSON: a response format, and a tool call.

A grammar tells where such an answer ends, so a trial goes on until it is over, or too long to be one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from langchain_earlyexit.answers import TEXT, AnswerForm, TrialAnswer
from langchain_earlyexit.toolcalls import (
    HERMES,
    CallFormat,
    CallPiece,
    CallReader,
    calls_of,
    canonical,
    canonical_calls,
    read_calls,
)

_GAP: Final = "\n\n"
"""A blank line, as models leave one after their end tag."""


@dataclass(frozen=True)
class Json(AnswerForm):
    """JSON under a schema; normalised to keys in order and no spaces."""

    name: ClassVar[str] = "schema"
    _closed_by_end: ClassVar[bool] = True
    inducer: str = _GAP
    trial_cap: int = 128

    def span_end(self, text: str) -> int | None:
        """None: the grammar tells the end."""
        return None

    def normalise(self, span: str) -> str:
        """Canonical JSON, "" for what is none."""
        try:
            return canonical(json.loads(span))
        except ValueError:
            return ""

    def extract(self, content: str) -> str | None:
        """The whole text."""
        return self.normalise(content) or None


JSON: Final = Json()


@dataclass(frozen=True)
class ToolCall(AnswerForm):
    """The tool calls of a turn, each a name and arguments; normalised to canonical JSON, several to a list.

    A turn that must call (`begun`) is induced with the beginning of a call. One that may has a free trial: if it begins
    with a call, that is the answer; else the answer is what the other form makes of it. The confidence is the mean over
    tokens that hold a character of a name or of arguments: what the format fixes says nothing of how sure the model is.

    Args:
        inducer: fed after the end of thinking; through the format's opening where the call is `begun`.
        trial_cap: most tokens a trial samples.
        format: how calls are written.
        begun: whether the inducer begins the call.
        otherwise: the form of a turn that does not call.
    """

    name: ClassVar[str] = "tool_call"
    inducer: str = _GAP
    trial_cap: int = 192
    format: CallFormat = HERMES
    begun: bool = False
    otherwise: AnswerForm = TEXT

    @classmethod
    def forced(cls, form: CallFormat) -> ToolCall:
        """The form of a turn that must call."""
        return cls(inducer=_GAP + form.opening, format=form, begun=True)

    def span_end(self, text: str) -> int | None:
        """Index just past the last whole arguments; None while there are none."""
        start = self._start(text)
        if start is None:
            return self.otherwise.span_end(text)
        reader, _, offset = self._read(text, start)
        return offset + reader.spans[-1][1] if reader.whole else None

    def normalise(self, span: str) -> str:
        """See the class."""
        calls = _canonical(span) or read_calls(self.format, self.format.opening + span if self.begun else span)
        if calls:
            return canonical_calls(calls)
        return "" if self.begun else self.otherwise.normalise(span)

    def extract(self, content: str) -> str | None:
        """The calls that the text ends in, else what the other form finds."""
        at = 0 if self.format.at_start else max(0, content.find(self.format.trigger))
        calls = read_calls(self.format, content[at:])
        if calls:
            return canonical_calls(calls)
        return None if self.begun else self.otherwise.extract(content)

    def trial(self, pieces: Sequence[str], logprobs: Sequence[float], ended: bool) -> TrialAnswer | None:
        """See `AnswerForm.trial`."""
        if len(pieces) != len(logprobs):
            raise ValueError(f"{len(pieces)} pieces, but {len(logprobs)} logprobs")
        text = "".join(pieces)
        goes_on = not ended and len(pieces) < self.trial_cap
        start = self._start(text)
        if start is None:
            if goes_on and self.format.trigger.startswith(text.lstrip()):
                return None
            return self.otherwise.trial(pieces, logprobs, ended)
        if goes_on:
            return None
        reader, found, offset = self._read(text, start)
        calls = calls_of(found) if reader.whole and not reader.finish() else None
        scored, at = [], 0
        for piece, logprob in zip(pieces, logprobs, strict=True):
            end = at + len(piece)
            if any(at < offset + last and end > offset + first for first, last in reader.spans):
                scored.append(logprob)
            at = end
        return TrialAnswer(
            answer=canonical_calls(calls) if calls else None,
            text=text,
            confidence=self.score(scored) if calls else 0.0,
            complete=bool(calls),
            span_tokens=len(scored),
        )

    def _start(self, text: str) -> int | None:
        """Where in `text` what follows the trigger begins; None if no call has begun."""
        if self.begun:
            return 0
        blank = len(text) - len(text.lstrip())
        called = text.startswith(self.format.trigger, blank) and self.format.may_call(text[blank:])
        return blank + len(self.format.trigger) if called else None

    def _read(self, text: str, start: int) -> tuple[CallReader, list[CallPiece], int]:
        """A reader that has read `text`, what it found, and where in `text` its positions are counted from."""
        reader = CallReader(self.format)
        said = self.format.lead if self.begun else ""
        return reader, reader.push(said + text[start:]), start - len(said)


def _canonical(span: str) -> tuple[dict[str, Any], ...] | None:
    """The calls of a span that is normalised already."""
    try:
        value = json.loads(span)
    except ValueError:
        return None
    calls = value if isinstance(value, list) else [value]
    whole = calls and all(isinstance(call, dict) and call.keys() == {"name", "arguments"} for call in calls)
    return tuple(calls) if whole else None
