r"""How an answer is induced, where it stops, how sure it is, and when two answers are the same.

A form's `inducer` is fed after the end of thinking; what the model then samples is the answer span (up to the
balanced brace of `\boxed{`, the option letter, or the first sentence). A trial answer, scored over the span's
tokens alone, tells how sure the model is of it. Forms are frozen dataclasses; a family that advises other words
has `dataclasses.replace(BOXED, inducer=...)`.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final


@dataclass(frozen=True, slots=True)
class TrialAnswer:
    """A finished trial.

    Args:
        answer: normalised; None if there is none, or a boxed or choice answer is incomplete.
        text: what was sampled, through what closes the span (the brace, the parenthesis): to follow the inducer when
            the trial is reused as the answer.
        confidence: geometric mean probability of the span's tokens; 0.0 for an incomplete boxed or choice answer.
        complete: the span was closed, or a free text ended, and it holds an answer.
        span_tokens: how many tokens the confidence is the mean of.
    """

    answer: str | None
    text: str
    confidence: float
    complete: bool
    span_tokens: int


@dataclass(frozen=True)
class AnswerForm(ABC):
    """One way to answer.

    Args:
        inducer: visible text that is fed after the end-of-thinking string when an answer is forced.
        trial_cap: most tokens a trial samples.
    """

    name: ClassVar[str]
    _closed_by_end: ClassVar[bool] = False  # the end of the turn completes an open span
    _scored_open: ClassVar[bool] = False  # an incomplete span has an answer and a confidence
    inducer: str
    trial_cap: int

    def __post_init__(self) -> None:
        if self.trial_cap < 1:
            raise ValueError(f"trial_cap must be at least 1 token, got {self.trial_cap}")

    @abstractmethod
    def span_end(self, text: str) -> int | None:
        """Index just past the answer in `text`, sampled after the inducer; None while it may go on."""

    @abstractmethod
    def normalise(self, span: str) -> str:
        """The span as it is compared: idempotent, "" for a span that holds no answer."""

    @abstractmethod
    def extract(self, content: str) -> str | None:
        """The normalised answer of a full answer text (inducer included), None if it has none."""

    def same(self, a: str | None, b: str | None) -> bool:
        """Whether two answers, normalised or not, are one. No answer is the same as none."""
        return a is not None and b is not None and self.normalise(a) == self.normalise(b)

    @staticmethod
    def score(logprobs: Sequence[float]) -> float:
        """Geometric mean probability, in [0, 1], of tokens with these log probabilities (nats).

        0.0 for no tokens, and where any log probability is NaN or infinite: no answer is no confidence (DEER's v3,
        arXiv 2504.15895; the first codes divide by n - 1 or n - 2).
        """
        if not logprobs or not all(map(math.isfinite, logprobs)):
            return 0.0
        return math.exp(min(0.0, sum(logprobs) / len(logprobs)))  # rounding may lift a log above 0

    def trial(self, pieces: Sequence[str], logprobs: Sequence[float], ended: bool) -> TrialAnswer | None:
        """Judge a trial so far.

        Only tokens that hold a character of the answer are scored: one that holds its end and the brace counts, one
        that only closes, leads in with whitespace or follows does not (the published codes differ in this).

        Args:
            pieces: text of the tokens sampled after the inducer; "" where a character is incomplete.
            logprobs: their log probabilities (nats), of equal length.
            ended: whether the model ended its turn, or its tokens ran out.

        Returns:
            None while more tokens are needed: the span is open, the turn not ended, `trial_cap` not reached.

        Raises:
            ValueError: pieces and logprobs differ in length.
        """
        if len(pieces) != len(logprobs):
            raise ValueError(f"{len(pieces)} pieces, but {len(logprobs)} logprobs")
        text = "".join(pieces)
        end = self.span_end(text)
        if end is None and not ended and len(pieces) < self.trial_cap:
            return None
        span = text[: len(text) if end is None else end]
        first, stop = len(span) - len(span.lstrip()), len(span.rstrip())
        scored, at = [], 0
        for piece, logprob in zip(pieces, logprobs, strict=True):
            # a token without text holds the first bytes of the character that comes next
            if at < stop and (at + len(piece) > first or (not piece and at == first)):
                scored.append(logprob)
            at += len(piece)
        answer = self.normalise(span) or None
        complete = answer is not None and (end is not None or (ended and self._closed_by_end))
        counts = complete or self._scored_open
        return TrialAnswer(
            answer=answer if counts else None,
            text=text if end is None else text[: self._closed_at(text, end)],
            confidence=self.score(scored) if counts else 0.0,
            complete=complete,
            span_tokens=len(scored),
        )

    def _closed_at(self, text: str, end: int) -> int:
        """Index just past what closes a span that ends at `end`."""
        return end


_BRACES: Final = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is taken with its backslash
_BOXES: Final = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


@dataclass(frozen=True)
class Boxed(AnswerForm):
    r"""A `\boxed{…}` answer; the inducer ends inside the open box.

    Normalised without knowing mathematics, so that different answers stay different: outer `$`, `\(`, `\text{}`,
    `\mathrm{}`, `\boxed{}`, whitespace, `\left`, `\right` and a trailing full stop go; `\dfrac` is `\frac`; a plain
    number loses thousands separators, `+`, leading and trailing zeros (`1,234.50` is `1234.5`). Units, degrees,
    percent signs and equal values in other notation (1/2 and 0.5) are left alone.
    """

    name: ClassVar[str] = "boxed"
    inducer: str = "\n\nThe answer is \\boxed{"
    trial_cap: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inducer.endswith("{"):
            raise ValueError(f"a boxed inducer must end with its open brace, got {self.inducer!r}")

    def span_end(self, text: str) -> int | None:
        """Index of the brace that balances the inducer's."""
        depth = 1
        for m in _BRACES.finditer(text):
            depth += {"{": 1, "}": -1}.get(m.group(), 0)
            if depth == 0:
                return m.start()
        return None

    def normalise(self, span: str) -> str:
        """See the class."""
        return _normalised_maths(span)

    def extract(self, content: str) -> str | None:
        r"""The content of the last `\boxed{…}` that is balanced; an empty or open box is none."""
        opened: list[int | None] = []  # per open brace: start of the box's content, None for a plain brace
        spans: list[tuple[int, int]] = []
        for m in _BOXES.finditer(content):
            if m.group() == "}":
                if opened and (start := opened.pop()) is not None:
                    spans.append((start, m.start()))
            elif m.group() == "{" or m.group().startswith("\\boxed"):
                opened.append(None if m.group() == "{" else m.end())
        if not spans:
            return None
        start, end = max(spans)
        return self.normalise(content[start:end]) or None

    def _closed_at(self, text: str, end: int) -> int:
        return end + 1


# Options are A to J; the article "a" and the pronoun "I" are the words a letter is mistaken for.
_OPTION_SPAN: Final = re.compile(r"\s*[*(]*([A-Ja-j])(?=[).,:;\]}*\n])")
_OPTION_ALONE: Final = re.compile(r"[\s*($]*(?:\\(?:text|mathrm|textbf)\{)?\(?([A-Ja-j])[\s*).,:;}\]$]*")
_OPTION_SAID: Final = re.compile(
    r"\\boxed\s*\{[\s(]*(?:\\(?:text|mathrm|textbf)\s*\{)?[\s(]*([A-Ja-j])[\s).]*\}"
    r"|(?i:answer)(?i:\s+is)?[\s:*]*(?i:option\s+)?\(([A-Ja-j])\)"
    r"|(?i:answer)(?i:\s*:|\s+is)[\s:*]*(?i:option\s+)?([A-HJ])\b(?!['’])",
)
_OPTION_IN_BRACKETS: Final = re.compile(r"(?<!\w)\(([A-J])\)")


@dataclass(frozen=True)
class Choice(AnswerForm):
    """An option letter, A to J; normalised to the upper-case letter."""

    name: ClassVar[str] = "choice"
    _closed_by_end: ClassVar[bool] = True  # a lone letter is an answer; anything else normalises to none
    inducer: str = "\n\nThe answer is ("
    trial_cap: int = 8

    def span_end(self, text: str) -> int | None:
        """Index after the letter, once a bracket or punctuation shows that it is no word's first letter."""
        m = _OPTION_SPAN.match(text)
        return m.end() if m else None

    def normalise(self, span: str) -> str:
        """The letter, if the span is one, brackets and emphasis aside; otherwise ""."""
        m = _OPTION_ALONE.fullmatch(span)
        return m.group(1).upper() if m else ""

    def extract(self, content: str) -> str | None:
        r"""The letter last called the answer or boxed; else the last "(X)"; else a text that is a letter."""
        if said := list(_OPTION_SAID.finditer(content)):
            return next(letter for letter in said[-1].groups() if letter).upper()
        if brackets := _OPTION_IN_BRACKETS.findall(content):
            return str(brackets[-1])
        return self.normalise(content) or None

    def _closed_at(self, text: str, end: int) -> int:
        return end + 1 if text[end : end + 1] == ")" else end


_SENTENCE_OR_LINE: Final = re.compile(r"""\S[^\n]*?(?:[.!?]["'”’»)\]}*]*(?=\s)|(?=\n))""")


@dataclass(frozen=True)
class Text(AnswerForm):
    """A free answer. Nothing is induced; a trial looks at its first sentence or line.

    Normalised to lower case with single spaces and no trailing full stop; a plain number as in `Boxed`.
    """

    name: ClassVar[str] = "text"
    _closed_by_end: ClassVar[bool] = True
    _scored_open: ClassVar[bool] = True
    inducer: str = ""
    trial_cap: int = 16

    def span_end(self, text: str) -> int | None:
        """Index after the first sentence (whitespace must follow) or line that holds text."""
        m = _SENTENCE_OR_LINE.search(text)
        return m.end() if m else None

    def normalise(self, span: str) -> str:
        """See the class."""
        plain = " ".join(span.casefold().split()).rstrip(". ")
        return _plain_number(plain) or plain

    def extract(self, content: str) -> str | None:
        """The whole text."""
        return self.normalise(content) or None


BOXED: Final = Boxed()
CHOICE: Final = Choice()
TEXT: Final = Text()
FORMS: Final[dict[str, AnswerForm]] = {form.name: form for form in (BOXED, CHOICE, TEXT)}


def graded_form(name: str) -> AnswerForm:
    """The form of this name, for what compares answers.

    Raises:
        ValueError: answers of this form are not compared; calls of tools and answers under a schema have such forms.
    """
    if name not in FORMS:
        raise ValueError(
            f"answers of form {name!r} cannot be compared, so nothing can be promised, learned or told of them; "
            f"compared are {', '.join(FORMS)}. Collect turns without tools and response_format"
        )
    return FORMS[name]


_OPTION_LINE: Final = re.compile(r"^[ \t>*-]*\(?([A-J])[).:]\**[ \t]+\S", re.MULTILINE)
_ASKS_FOR_LETTER: Final = re.compile(
    r"\b(?:answer|reply|respond)\b[^.\n]{0,20}\b(?:with|by|using)\b[^.\n]{0,30}\bletter\b(?! (?:to|from|of (?!the\b)))"
    r"|\bletter (?:of|for) (?:the|your)\b[^.\n]{0,20}\b(?:option|choice|answer)\b"
    r"|\b(?:option|choice|answer|correct) letter\b",
    re.IGNORECASE,
)


def detect_form(conversation_text: str, habit: str) -> AnswerForm:
    r"""The form a conversation asks for, else the one the model's family falls into.

    Args:
        conversation_text: what the system and the user said.
        habit: name of the family's usual form, a key of `FORMS`.

    Returns:
        `BOXED` if the text asks for `\boxed`, also of a letter; `CHOICE` if it asks for a letter, or asks something
        ("?") over lines that list options from A on; otherwise `BOXED` for a family that boxes, else `TEXT`.

    Raises:
        ValueError: an unknown habit.
    """
    if habit not in FORMS:
        raise ValueError(f"unknown answer habit {habit!r}; known are {', '.join(FORMS)}")
    if "\\boxed" in conversation_text:
        return BOXED
    letters = _OPTION_LINE.findall(conversation_text)
    lists_options = "A" in letters and "B" in letters[letters.index("A") + 1 :] and "?" in conversation_text
    if lists_options or _ASKS_FOR_LETTER.search(conversation_text):
        return CHOICE
    return BOXED if habit == "boxed" else TEXT


_NUMBER: Final = re.compile(r"([+-]?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(?:\.([0-9]*))?")
_WRAPPERS: Final = ("\\text", "\\mathrm", "\\textbf", "\\mathbf", "\\boxed")


def _plain_number(text: str) -> str | None:
    """A plain decimal number without ornament, by text alone (no float: digits may be many), else None."""
    m = _NUMBER.fullmatch(text)
    if not m:
        return None
    whole, fraction = m.group(2).replace(",", "").lstrip("0") or "0", (m.group(3) or "").rstrip("0")
    digits = f"{whole}.{fraction}" if fraction else whole
    return f"-{digits}" if m.group(1) == "-" and digits != "0" else digits


def _normalised_maths(span: str) -> str:
    before, text = None, span
    while text != before:  # a wrapper may hide a wrapper; every round but the last takes something away
        before, text = text, _unwrapped(text)
    return text


def _unwrapped(text: str) -> str:
    text = text.replace("−", "-").replace("{,}", ",").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", text)
    # LaTeX's thousands separators: 10\,080 and 10,\!080
    text = re.sub(r"(?<=[0-9])(?:\\[,!](?=[0-9])|,\\! ?(?=[0-9]{3}(?![0-9])))", "", text)
    text = re.sub(r"(?<!\\)\\[,!;: ]|\\q?quad(?![A-Za-z])|~", " ", text)  # but not the end of a row, `\\ `
    text = " ".join(text.split())
    text = text.rstrip(". ")
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening + closing):
            inner = text[len(opening) : len(text) - len(closing)]
            if opening not in inner:
                return inner
    for wrapper in _WRAPPERS:
        if text.startswith(wrapper + "{") and BOXED.span_end(text[len(wrapper) + 1 :]) == len(text) - len(wrapper) - 2:
            return text[len(wrapper) + 1 : -1]
    if (number := _plain_number(text)) is not None:
        return number
    # Spaces mean nothing beside a symbol. After a comma one stays: "1, 234" is a list, "1,234" is a number.
    text = re.sub(r"(?<=[^\w\s]) (?=\S)|(?<=\S) (?=[^\w\s])", "", text)
    return re.sub(r",(?=\S)", ", ", text)
