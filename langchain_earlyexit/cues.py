"""Where a chain of thought may be checked: cue words, paragraphs, sentences or every N tokens, found as it streams.

`CueSpec` says what counts as a cue for a model; `CueMatcher` is fed the thinking tokens one by one and reports each
cue as a `Hit` whose `position` says how many thinking tokens stay if the thinking ends there.

The rules for cue words, which the published codes get wrong by searching substrings of decoded text: case does not
matter; a cue stands between word boundaries ("awaiting" is no "wait"), so it fires when the next character has come;
the whole cue is dropped, from the token that holds its first letter on, however it is split into tokens; nothing
fires after the end of thinking. The earliest start wins, then the longest cue, and what one cue took, no other can.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from typing import Final

FALLBACKS: Final = ("paragraph", "interval")


@dataclass(frozen=True, slots=True)
class CueSpec:
    """What counts as a cue for one model. Plain data: `CueSpec(**json.loads(json.dumps(asdict(spec))))` equals it.

    Args:
        words: reflection words, any case. A space in one matches exactly one space. An edge that is not an ASCII
            letter, digit or underscore needs no word boundary (Chinese has no spaces): such a cue fires at once.
        token_ids: single tokens that are a reflection cue by themselves, text or no text.
        fallback: "paragraph" or "interval", the main decision point of a model without words or token ids.
        interval: tokens between interval checks.
        min_gap: least number of thinking tokens between two checks.

    Raises:
        ValueError: a word that is empty or has outer whitespace, an unknown fallback, or a number out of range.
    """

    words: tuple[str, ...] = ()
    fallback: str = "paragraph"
    interval: int = 64
    min_gap: int = 0
    token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.words, str):
            raise ValueError(f"words must be a sequence of strings, got the string {self.words!r}")
        object.__setattr__(self, "words", tuple(self.words))
        object.__setattr__(self, "token_ids", tuple(self.token_ids))
        for word in self.words:
            if not word or word != word.strip():
                raise ValueError(f"a cue word must be text without outer whitespace, got {word!r}")
        if self.fallback not in FALLBACKS:
            raise ValueError(f"fallback must be one of {', '.join(FALLBACKS)}; got {self.fallback!r}")
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1 token, got {self.interval}")
        if self.min_gap < 0:
            raise ValueError(f"min_gap must not be negative, got {self.min_gap}")

    @property
    def primary(self) -> frozenset[str]:
        """The model's main decision points: reflection if it has cues of its own, else the fallback."""
        return frozenset({"reflection" if self.words or self.token_ids else self.fallback})

    @property
    def offered(self) -> frozenset[str]:
        """Every kind of check that can be found for this model."""
        return self.primary | {"paragraph", "sentence", "interval"}


@dataclass(frozen=True, slots=True)
class Hit:
    """A cue: `position` thinking tokens are kept if the thinking ends here; `cue` as the spec spells it; its kind.

    `end` counts the thinking tokens through the cue's last one, for what is read there; it takes no part in equality.
    """

    position: int
    cue: str
    kind: str
    end: int = field(default=0, compare=False)


class CueMatcher:
    r"""Finds the cues of one chain of thought as its tokens come.

    Kinds, and what is kept when the thinking ends at a hit (tokens are kept or dropped whole):

    - reflection: everything before the token that holds the cue's first letter.
    - paragraph: through the token that completes "\n\n"; once per run of newlines.
    - sentence: through the token that holds the last of `.!?` and the quotes or brackets closing after it; it fires
      when whitespace follows, so "3.5" is no end of a sentence.
    - interval: exactly N, 2N, … tokens.

    Hits come in order of position. When one token brings several, the first is returned and the others by the next
    calls. Not reported: position 0, fewer than `min_gap` tokens after the last hit, and the same kind twice at the
    same position.

    Args:
        spec: what counts as a cue.
        kinds: which kinds to report; empty for none.

    Raises:
        ValueError: kinds that `spec` does not offer.
    """

    def __init__(self, spec: CueSpec, kinds: frozenset[str]) -> None:
        if not kinds <= spec.offered:
            raise ValueError(f"cannot find {sorted(kinds - spec.offered)}; offered are {sorted(spec.offered)}")
        self._kinds = kinds
        self._interval = spec.interval if "interval" in kinds else 0
        self._min_gap = spec.min_gap
        self._pushed = 0
        self._found: deque[Hit] = deque()  # in order of position, not yet returned
        self._last: dict[str, int] = {}  # position of the last hit returned, by kind
        reflects = "reflection" in kinds
        self._words = _WordScanner(spec.words) if reflects and spec.words else None
        self._token_ids = frozenset(spec.token_ids if reflects else ())
        self._newlines = 0  # length, up to 2, of the run of newlines the text ends with
        self._closing = ""  # the mark of .!? that the text ends with, quotes and brackets after it aside
        self._sentence_end = 0  # tokens through the last of that punctuation, 0 if the text ends otherwise

    @property
    def held(self) -> int:
        """How many of the last tokens must not be streamed yet: a later hit may drop them."""
        return self._pushed - min(self._settled(), self._found[0].position if self._found else self._pushed)

    def push(self, token_id: int, piece: str) -> Hit | None:
        """Take the next thinking token; return the next cue, if one is certain.

        Args:
            token_id: its id.
            piece: the text this token completes; "" while a character of several tokens is incomplete.
        """
        self._pushed += 1
        if token_id in self._token_ids:
            if self._words:
                self._words.interrupt(self._pushed - 1, self._found)
            self._found.append(Hit(self._pushed - 1, piece, "reflection", self._pushed))
        elif self._words:
            self._words.push(piece, self._pushed - 1, self._found)
        if "paragraph" in self._kinds:
            self._push_paragraph(piece)
        if "sentence" in self._kinds:
            self._push_sentence(piece)
        if self._interval and self._pushed % self._interval == 0:
            self._found.append(Hit(self._pushed, f"{self._interval} tokens", "interval", self._pushed))
        return self._next() if self._found else None

    def _settled(self) -> int:
        # No hit yet to be found can have a position below this.
        start = self._words.start if self._words else None
        return min(self._pushed if start is None else start, self._sentence_end or self._pushed)

    def _next(self) -> Hit | None:
        if len(self._found) > 1:  # sort is stable: at one position, the order above
            self._found = deque(sorted(self._found, key=lambda hit: hit.position))
        # A later hit waits while an earlier one may still come up: positions never go down.
        while self._found and self._found[0].position <= self._settled():
            hit = self._found.popleft()
            too_close = bool(self._last) and hit.position - max(self._last.values()) < self._min_gap
            if hit.position >= 1 and not too_close and self._last.get(hit.kind) != hit.position:
                self._last[hit.kind] = hit.position
                return hit
        return None

    def _push_paragraph(self, piece: str) -> None:
        if "\n" in piece:
            text = "\n" * self._newlines + piece
            if any(m.end() > self._newlines for m in _PARAGRAPH.finditer(text)):
                self._found.append(Hit(self._pushed, "\n\n", "paragraph", self._pushed))
            self._newlines = min(2, len(text) - len(text.rstrip("\n")))
        elif piece:
            self._newlines = 0

    def _push_sentence(self, piece: str) -> None:
        if not piece:
            return
        text = self._closing + piece
        for m in _SENTENCE.finditer(text):
            earlier = m.end() <= len(self._closing)  # the punctuation came before; this piece brings the whitespace
            end = self._sentence_end if earlier else self._pushed
            self._found.append(Hit(end, m.group()[0], "sentence", end))
        still_open = _SENTENCE_OPEN.search(text)
        # one character stands for the whole of it: quotes may follow for as long as they like
        self._closing = still_open.group()[0] if still_open else ""
        self._sentence_end = self._pushed if still_open else 0


_PARAGRAPH: Final = re.compile(r"(?<!\n)\n\n")
_CLOSED: Final = r"""[.!?]["'”’»)\]}*]*"""
_SENTENCE: Final = re.compile(_CLOSED + r"(?=\s)")
_SENTENCE_OPEN: Final = re.compile(_CLOSED + r"\Z")


class _WordScanner:
    """Finds cue words in streamed text, keeping only the text a cue may still begin in."""

    def __init__(self, words: tuple[str, ...]) -> None:
        # Longest first: at one start, a longer cue that is there, or may yet come, goes before a shorter one.
        self._spelled = sorted(dict.fromkeys(words), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(_whole_or_begun, self._spelled)), re.IGNORECASE)
        # A letter of several tokens begins in the first of them, which brings no text.
        self._letters_span_tokens = any(not word[0].isascii() for word in words)
        self._text = ""  # the character before the search, and what may be a cue
        self._tokens: list[int] = []  # per character: tokens before the one it begins in
        self._ends: list[int] = []  # per character: tokens through the one that completes it
        self._from = 0  # where in _text to search
        self._silent: int | None = None  # tokens before the run of tokens without text, if we are in one
        self.start: int | None = None  # tokens before the possible cue that is held, if one is

    def push(self, piece: str, before: int, found: deque[Hit]) -> None:
        """Take the text of a token that `before` tokens precede; append the cues it completes to `found`."""
        if not piece:
            if self._letters_span_tokens and self._silent is None:
                self._silent = before
                self.start = before if self.start is None else self.start
            return
        self._text += piece
        self._tokens += [before] * len(piece)
        self._ends += [before + 1] * len(piece)
        if self._silent is not None:
            if not piece[0].isascii():
                self._tokens[-len(piece)] = self._silent
            self._silent = None
        self._search(found)

    def interrupt(self, before: int, found: deque[Hit]) -> None:
        """Take a token that is a cue by itself: a cue waiting for its right edge has it, and no other goes on."""
        self.push("\0", before, found)

    def _search(self, found: deque[Hit]) -> None:
        at, begun = self._from, None
        while match := self._pattern.search(self._text, at):
            if match.lastindex is None:  # begun, and the text ends
                begun = match.start()
                break
            start, at = self._tokens[match.start()], match.end()
            found.append(Hit(start, self._spelled[match.lastindex - 1], "reflection", self._ends[at - 1]))
        self.start = None if begun is None else self._tokens[begun]
        # Keep one character before: it decides on a word boundary. What was taken by a cue stays taken.
        keep = max(0, (len(self._text) if begun is None else begun) - 1)
        self._from = 0 if keep == 0 and begun == 0 else 1
        self._text = self._text[keep:]
        del self._tokens[:keep]
        del self._ends[:keep]


def _whole_or_begun(word: str) -> str:
    """A pattern for the whole word (in a group), or else for a beginning of it that the text ends with."""
    left = r"(?<!\w)" if _needs_boundary(word[0]) else ""
    right = r"(?=\W)" if _needs_boundary(word[-1]) else ""
    # "but" may begin as b(?:u(?:t)?)?; a whole word is only begun if its right edge must still come
    begun = ""
    for letter in reversed(word if right else word[:-1]):
        begun = re.escape(letter) + (f"(?:{begun})?" if begun else "")
    whole = f"{left}({re.escape(word)}){right}"
    return f"{whole}|{left}{begun}\\Z" if begun else whole


def _needs_boundary(edge: str) -> bool:
    return edge.isascii() and (edge.isalnum() or edge == "_")
