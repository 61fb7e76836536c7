"""Follows an answer as it is written: what of it is free text, what decodes under a grammar, what is a tool call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from langchain_earlyexit.codec import Codec
from langchain_earlyexit.strain import TagFinder
from langchain_earlyexit.toolcalls import CallFormat, CallPiece, CallReader


class Matcher(Protocol):
    """One answer's way through a grammar."""

    @property
    def over(self) -> bool:
        """Whether nothing may follow but the end of the turn."""

    def allowed(self) -> bytes:
        """The mask of ids that may come next, as `Sample.allow` has it."""

    def forced(self) -> tuple[int, ...]:
        """The ids that must come next, empty where that is open."""

    def takes(self, token: int) -> bool:
        """Whether this id may come next."""

    def push(self, token: int) -> None:
        """Take the id that came."""


class Grammar(Protocol):
    """A grammar for one model's tokens."""

    def start(self, said: str = "") -> Matcher | None:
        """A matcher for text that begins with `said`; None if none may."""


@dataclass(frozen=True)
class Bounds:
    """What an answer must be, or what a part of it must be.

    Attributes:
        grammar: of the whole answer; or, where it is not `at_once`, of what follows the trigger of a call.
        calls: how tool calls are written, None where there can be none.
        at_once: the grammar rules from the first token on. Else the answer is free until a call begins.
        said: the part of a first call that is fed rather than sampled, from the trigger's end on; None where the answer
            need not be a call.
        names: of the tools that may be called.
    """

    grammar: Grammar
    calls: CallFormat | None = None
    at_once: bool = True
    said: str | None = None
    names: tuple[str, ...] = ()


class Guide:
    """Takes an answer's tokens one by one and says what may come next.

    Where a call is complete, the model is free: it goes on to another, or says anything else. That ends the turn and is
    passed over, so no call is made that the model did not begin.

    Attributes:
        reader: reads the calls, once the first has begun.
    """

    def __init__(self, bounds: Bounds | None, codec: Codec) -> None:
        self._bounds = bounds
        self._codec = codec
        self._matcher: Matcher | None = None
        self._finder: TagFinder | None = None
        self._openings: tuple[str, ...] = ()  # one of which an answer that is a call begins with
        self._waiting: list[str] = []  # free text of the last tokens, which may be the beginning of a call
        self._ended = False
        self.reader: CallReader | None = None
        if bounds is None:
            return
        if bounds.at_once:
            self._matcher = bounds.grammar.start(bounds.said or "")
            if self._matcher is None:
                raise ValueError(f"the answer's grammar does not allow its own beginning {bounds.said!r}")
        if bounds.calls is not None:
            if bounds.said is not None:
                self.reader = CallReader(bounds.calls)
                self.reader.push(bounds.said)
            elif bounds.calls.at_start:
                self._openings = tuple(map(bounds.calls.beginning, bounds.names))
            else:
                self._finder = TagFinder(codec, bounds.calls.trigger)

    @property
    def bound(self) -> bool:
        """Whether a grammar rules now."""
        return self._matcher is not None

    @property
    def over(self) -> bool:
        """Whether the answer is complete: only the end of the turn could follow."""
        return self._ended or (self._matcher is not None and self._matcher.over)

    @property
    def _between(self) -> bool:
        return self.reader is not None and self.reader.between

    def allowed(self) -> bytes | None:
        """The mask of ids that may come next, None for any."""
        return None if self._matcher is None or self._between else self._matcher.allowed()

    def forced(self) -> tuple[int, ...]:
        """The ids that must come next, in the end that of the turn; empty where that is open."""
        return () if self._matcher is None or self._between else self._matcher.forced()

    def push(self, token: int, piece: str) -> tuple[str, list[CallPiece]]:
        """Take a token and the text it completes: the free text (or JSON) that can be said now, and pieces of calls.

        Raises:
            RuntimeError: a token that the mask did not allow.
        """
        if self._matcher is not None:
            if self._between and not self._matcher.takes(token):
                self._ended = True
                return "", []
            self._matcher.push(token)
        if self.reader is not None:
            return "", self.reader.push(piece)
        shown = "" if token in self._codec.special else piece
        if self._openings:
            return self._open(shown)
        if self._finder is None:
            return shown, []
        found = self._finder.push(token, piece)
        if found is None:
            self._waiting.append(shown)
            free = len(self._waiting) - self._finder.held
            text = "".join(self._waiting[:free])
            del self._waiting[:free]
            return text, []
        self._waiting.append(shown)
        return self._begin(found.lead, found.rest)

    def _open(self, shown: str) -> tuple[str, list[CallPiece]]:
        """Hold an answer's beginning until it is that of a call of one of the tools, or can no longer be."""
        self._waiting.append(shown)
        text = "".join(self._waiting).lstrip()
        if text.startswith(self._openings):
            self._openings = ()
            return self._begin("", text.removeprefix(self._calls.trigger))
        if any(opening.startswith(text) for opening in self._openings):
            return "", []
        self._openings = ()
        return self._let_go(), []

    def _let_go(self) -> str:
        text = "".join(self._waiting)
        self._waiting = []
        return text

    def _begin(self, lead: str, rest: str) -> tuple[str, list[CallPiece]]:
        """A trigger is complete, with `rest` after it: from here on it is a call, if one may stand here."""
        bounds = self._bounds
        assert bounds is not None  # noqa: S101 - calls are looked for
        matcher = bounds.grammar.start(rest) if self._matcher is None else self._matcher
        self._finder = None
        if matcher is None:  # what looks like a call and cannot be one stays the text it is
            return self._let_go(), []
        self._waiting, self._matcher = [], matcher
        self.reader = CallReader(self._calls)
        return lead, self.reader.push(rest)

    @property
    def _calls(self) -> CallFormat:
        assert self._bounds is not None  # noqa: S101 - calls are looked for
        assert self._bounds.calls is not None  # noqa: S101
        return self._bounds.calls

    def read(self, text: str) -> tuple[str, list[CallPiece]]:
        """A whole answer that was already decoded under these bounds: its free text, and its calls."""
        if self.reader is not None:
            return "", self.reader.push(text)
        if self._openings:
            begun = text.lstrip().startswith(self._openings)
        else:
            begun = self._finder is not None and self._calls.trigger in text
        if not begun:
            return text, []
        before, _, after = text.partition(self._calls.trigger)
        self.reader = CallReader(self._calls)
        return before, self.reader.push(after)

    def finish(self) -> tuple[str, list[CallPiece]]:
        """The answer is over: the text that waited, and the end of a call that was broken off."""
        return self._let_go(), [] if self.reader is None else self.reader.finish()
