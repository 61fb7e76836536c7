"""What of a streamed text may pass: tags out, stop strings honoured, outer whitespace off, nothing unsaid later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from langchain_earlyexit.codec import Codec


def _begun(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of `marks` without completing it."""
    longest = max((len(mark) for mark in marks), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        tail = text[-length:]
        if any(len(mark) > length and mark.startswith(tail) for mark in marks):
            return length
    return 0


class Trimmer:
    """Drops whitespace at both ends of a streamed text."""

    def __init__(self) -> None:
        self._begun = False
        self._space = ""

    def push(self, text: str) -> str:
        """What of the text so far can be said; trailing whitespace waits for something to follow it."""
        if not self._begun:
            text = text.lstrip()
        body = text.rstrip()
        if not body:
            self._space += text
            return ""
        said = self._space + body
        self._begun, self._space = True, text[len(body) :]
        return said


@dataclass(frozen=True, slots=True)
class TagFound:
    """The tag came with the last `tokens` tokens; `lead` and `rest` are what their text holds around it."""

    tokens: int
    lead: str
    rest: str


class TagFinder:
    """Finds a tag as text streams: by its id where it is one token, else by its text.

    Attributes:
        ids: the ids that are the tag by themselves; a text that spells the tag in plain letters does not hold it.
        held: how many of the last tokens may be the beginning of the tag.
    """

    def __init__(self, codec: Codec, tag: str | None) -> None:
        single = codec.single(tag)
        self.ids: frozenset[int] = frozenset() if single is None else frozenset({single})
        self._tag = tag if tag and single is None else None
        self._text = ""
        self._lengths: list[int] = []

    @property
    def held(self) -> int:
        return len(self._lengths)

    def push(self, token: int, piece: str) -> TagFound | None:
        """Take the next thinking token and the text it completes."""
        if token in self.ids:
            return TagFound(1, "", "")
        if self._tag is None:
            return None
        self._text += piece
        self._lengths.append(len(piece))
        at = self._text.find(self._tag)
        if at >= 0:
            return TagFound(len(self._lengths), self._text[:at], self._text[at + len(self._tag) :])
        keep = _begun(self._text, (self._tag,))
        while self._lengths and len(self._text) - self._lengths[0] >= keep:
            self._text = self._text[self._lengths.pop(0) :]
        return None


class Strainer:
    """The answer on its way out.

    Think tags are taken out, also those that come to be when another is taken out of them. The stop string that is
    complete first ends the answer before itself, but never before something can be read: at the very start it is
    passed over, because an answer is never empty. Text that was forced is not searched for stop strings. Whitespace at
    both ends is dropped. What passes does not depend on how the text was split.

    Attributes:
        spoken: whether the sampled text holds anything to read, said or held.
        stopped: whether a stop string has ended the answer.
    """

    def __init__(self, stop: Sequence[str], tags: Sequence[str], forced: str = "") -> None:
        self._stop = tuple(mark for mark in stop if mark)
        self._tags = tuple(mark.strip() for mark in tags if mark.strip())
        self._forced = forced
        self._held = ""
        self._trimmer = Trimmer()
        self._said = False
        self.stopped = False

    @property
    def spoken(self) -> bool:
        return self._said or bool(self._held.strip())

    def forced(self) -> str:
        """The forced text, as the answer's beginning."""
        return self._trimmer.push(self._forced)

    def push(self, text: str) -> str:
        """Take sampled text; return what can be said now."""
        if self.stopped:
            return ""
        held = self._held
        for letter in text:
            held = self._untagged(held, letter)
            cut = self._stops_at(held)
            if cut is not None:
                self.stopped, self._held = True, ""
                return self._trimmer.push(held[:cut])
        free = self._free(held)
        self._held = held[free:]
        self._said = self._said or bool(held[:free].strip())
        return self._trimmer.push(held[:free])

    def silent(self, text: str) -> bool:
        """Whether there is nothing to read yet, and still would be nothing with `text`."""
        if self._said:
            return False
        held = self._held
        for letter in text:
            held = self._untagged(held, letter)
        return not held.strip()

    def finish(self) -> str:
        """The answer is over: what was held as the possible beginning of a stop string or a tag."""
        held, self._held = self._held, ""
        return self._trimmer.push(held)

    def _untagged(self, held: str, letter: str) -> str:
        held += letter
        for tag in self._tags:
            if held.endswith(tag):
                return held[: -len(tag)]
        return held

    def _stops_at(self, held: str) -> int | None:
        """Where to cut for the stop strings that `held` ends with."""
        found = [len(held) - len(mark) for mark in self._stop if held.endswith(mark)]
        return min((at for at in found if self._said or held[:at].strip()), default=None)

    def _free(self, held: str) -> int:
        """How much of `held` no later text can change."""
        marks = self._stop + self._tags
        end, free = len(held), len(held) - _begun(held, marks)
        while inner := _begun(held[:end], self._tags):  # this may become a tag and go: what then meets is a mark too
            end -= inner
            free = min(free, end - _begun(held[:end], marks))
        return free
