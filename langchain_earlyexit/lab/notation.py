r"""LaTeX as models and data sets write it, brought to one spelling; and the exact value of plain arithmetic.

Nothing here compares answers: `clean` only takes away what carries no meaning (`\dfrac`, `\left`, `$`, spacing,
`\frac12` without braces), `exact` says what a number is worth as a fraction, and `split` cuts at separators that stand
outside all brackets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from math import factorial
from typing import Final

CURRENCY: Final = "¤"
"""What `clean` leaves of an escaped dollar sign (a plain one is a delimiter), or of another currency's."""
DEGREE: Final = "°"
ROW: Final = "\N{SYMBOL FOR NEWLINE}"
"""What `clean` leaves of the end of a matrix row."""

_UNICODE: Final = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "∗": "*", "π": r"\pi ",
    "√": r"\sqrt ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ",
    "±": r"\pm ", "∈": r"\in ", "²": "^2", "³": "^3", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "θ": r"\theta ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "，": ",", "（": "(", "）": ")", "\u00a0": " ",
    "\u202f": " ", "\u2009": " ", "€": CURRENCY, "£": CURRENCY,
}  # fmt: skip

_SPELLINGS: Final = tuple(
    (re.compile(pattern), word)
    for pattern, word in (
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?(?=\W|\d|$)", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits)(?![A-Za-z])", ""),
        (r"\{,\}", ","),
        (r"(?<=\d)(?:,\s*\\!|\\[!,])\s*(?=\d{3}(?!\d))", ""),  # thousands: 10,\!080 and 10\,080
        (r"\\[,!;:> ]|\\q?quad(?![A-Za-z])|~|\\(?:h|v)space\*?\{[^{}]*\}", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (r"\\(?:mbox|mathrm|textrm|textbf|textit|textsf|mathbf|mathit|mathsf|emph|textnormal)(?=\s*\{)", r"\\text"),
        (r"\\text\s*\{([A-Za-z])\}", r"\1"),
        (r"\\leq(?:slant|q)?(?![A-Za-z])|\\le(?![A-Za-z])|<=", r"\\leq "),
        (r"\\geq(?:slant|q)?(?![A-Za-z])|\\ge(?![A-Za-z])|>=", r"\\geq "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\ne(?![A-Za-z])|!=", r"\\neq "),
        (r"\\l?brace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\lbrack(?![A-Za-z])", "["),
        (r"\\rbrack(?![A-Za-z])", "]"),
        (r"\\[lr]?vert(?![A-Za-z])", "|"),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"\\(?:[lcd]?dots|dotsc)(?![A-Za-z])", r"\\ldots "),
        (r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degrees?(?![A-Za-z])", DEGREE),
        (r"\\%", "%"),
        (r"\\\$", CURRENCY),
        (r"\$|\\[()\[\]]", " "),
        (r"\\(?:times|ast)(?![A-Za-z])", r"\\cdot "),
        (r"\*\*", "^"),
        (r"\*", r"\\cdot "),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\\(?:infin|infinity)(?![A-Za-z])|(?<![A-Za-z\\])(?:infinity|inf)(?![A-Za-z])", r"\\infty "),
        (r"\+\s*\\infty", r"\\infty"),
        (r"\\(?:varnothing|empty)(?![A-Za-z])", r"\\emptyset "),
        (r"(?<![A-Za-z\\])(sqrt|sin|cos|tan|cot|sec|csc|log|ln)(?=\s*[({\\\d^]|\s+[a-z](?![a-z]))", r"\\\1 "),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        (r":=", "="),
    )
)

_TOKEN: Final = re.compile(r"\\begin\{[A-Za-z]+\*?\}|\\end\{[A-Za-z]+\*?\}|\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPENS: Final = frozenset({"(", "[", "{", r"\{"})
_CLOSES: Final = frozenset({")", "]", "}", r"\}"})


def clean(raw: str) -> str:
    """The answer in one spelling: no delimiters, layout, redundant braces or spaces that mean nothing.

    A space is kept between letters and digits, where it may divide ("18 dollars", "1 4/5").
    """
    text = "".join(_UNICODE.get(character, character) for character in raw)
    text = re.sub(r"\\\\(?:\s*\[[^\[\]]*(?:pt|em|ex|mm|cm)\])?", ROW, text)
    for pattern, word in _SPELLINGS:
        text = pattern.sub(word, text)
    text = _with_arguments_in_braces(" ".join(text.split()))
    text = re.sub(r"(?<=[^A-Za-z0-9,;]) (?=\S)|(?<=\S) (?=[^A-Za-z0-9])", "", text)
    text = re.sub(r"(?<=\d) (?=[A-Za-z](?![A-Za-z]))", "", text)
    text = re.sub(r"(?<=[\^_])\{(\w)\}", r"\1", text)
    return stripped(text)


def stripped(text: str) -> str:
    """Without surrounding space, closing punctuation or braces that hold all of it."""
    before = None
    while text != before:
        before = text
        text = text.strip().rstrip(" .,;:").lstrip(" ,;:=")
        if text.startswith("{") and closing(text, 0) == len(text) - 1:
            text = text[1:-1]
    return text


def tokens(text: str) -> Iterator[tuple[str, int, int]]:
    """Tokens of LaTeX with their start and the depth of brackets around them (a bracket's own depth is the outer one).

    Round and square brackets close one another, for half-open intervals.
    """
    depth = 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token in _CLOSES or token.startswith(r"\end{"):
            depth -= 1
        yield token, match.start(), depth
        if token in _OPENS or token.startswith(r"\begin{"):
            depth += 1


def closing(text: str, start: int) -> int | None:
    """Index of the bracket that closes the one at `start`; None where nothing does."""
    depth = 0
    for token, at, _ in tokens(text[start:]):
        depth += (token in _OPENS) - (token in _CLOSES)
        if depth == 0:
            return start + at
    return None


_DEEPEST: Final = 15


def is_expression(text: str) -> bool:
    """Whether cleaned text may be one: something is said, brackets close, and no number follows another.

    Brackets in more than 15 others are none: parsers of LaTeX hang on them.
    """
    depths = [depth for _, _, depth in tokens(text + " ")]
    closed = depths[-1] == 0 and min(depths) == 0 and max(depths) <= _DEEPEST
    return closed and bool(re.search(r"[A-Za-z0-9]", text)) and not re.search(r"(?<![_^])\d \d|\d\.\d*\.", text)


def split(text: str, *separators: str) -> tuple[list[str], list[str]]:
    """The parts between separators (tokens) that stand outside all brackets, and these separators."""
    parts, found, last = [], [], 0
    for token, at, depth in tokens(text):
        if depth == 0 and token in separators:
            parts.append(stripped(text[last:at]))
            found.append(token)
            last = at + len(token)
    return [*parts, stripped(text[last:])], found


_TAKES: Final = {r"\frac": 2, r"\binom": 2, r"\sqrt": 1}


def _with_arguments_in_braces(text: str) -> str:
    r"""`\frac12`, `\frac 59`, `\frac9{19}`, `\sqrt2`, `\sqrt(2)` with their arguments in braces."""
    out, at = [], 0
    while match := re.compile(r"\\(?:frac|binom|sqrt)(?![A-Za-z])").search(text, at):
        out.append(text[at : match.end()])
        at = match.end()
        if root := re.compile(r"\s*(\[[^\[\]]*\])").match(text, at):
            out.append(root.group(1))
            at = root.end()
        for _ in range(_TAKES[match.group()]):
            while at < len(text) and text[at] == " ":
                at += 1
            argument = _TOKEN.match(text, at)
            if argument is None:
                break
            end = argument.end()
            if argument.group() == "{" or (argument.group() == "(" and match.group() == r"\sqrt"):
                close = closing(text, at)
                if close is None:
                    break
                out.append("{" + _with_arguments_in_braces(text[at + 1 : close]) + "}")
                end = close + 1
            else:
                out.append("{" + argument.group() + "}")
            at = end
    return "".join([*out, text[at:]])


_LITERAL: Final = re.compile(
    r"(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.(?P<part>\d*)(?:\\overline\{(?P<over>\d+)\})?)?"
)
_MIXED: Final = re.compile(r"(?<![\d.)}])(\d+) (\d+)/(\d+)(?!\d)")
_POWER_BITS: Final = 20_000
_LARGEST_FACTORIAL: Final = 1_000


class _NotPlain(Exception):
    """The text is not arithmetic on plain numbers."""


def exact(text: str) -> Fraction | None:
    r"""What arithmetic on plain numbers is worth, exactly; None for anything with letters, roots or huge powers.

    Args:
        text: cleaned. Decimals, thousands separators, `0.\overline{3}`, `\frac`, mixed numbers (`1\frac{4}{5}`,
            `1 4/5`), `+ - \cdot /`, powers, factorials, brackets.
    """
    reader = _Arithmetic(_MIXED.sub(r"(\1+\2/\3)", text))
    try:
        value = reader.sum()
    except (_NotPlain, ZeroDivisionError):
        return None
    return value if reader.at == len(reader.text) else None


class _Arithmetic:
    """A recursive descent over the characters of one expression."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text.replace(r"\cdot", "*").replace(" ", "\0"), 0
        self.text = re.sub(r"\0?([^\w\0])\0?", r"\1", self.text)  # only a space between two digits or letters is left
        if self.text.count("(") + self.text.count("{") > 50:
            self.text = "?"  # so deep is nobody's answer

    def took(self, word: str) -> bool:
        if self.text.startswith(word, self.at):
            self.at += len(word)
            return True
        return False

    def need(self, word: str) -> None:
        if not self.took(word):
            raise _NotPlain

    def sum(self) -> Fraction:
        value = self.product()
        while True:
            if self.took("+"):
                value += self.product()
            elif self.took("-"):
                value -= self.product()
            else:
                return value

    def product(self) -> Fraction:
        if self.took("-"):
            return -self.product()
        if self.took("+"):
            return self.product()
        value = self.power()
        while True:
            if self.took("*"):
                value *= self.signed_power()
            elif self.took("/"):
                value /= self.signed_power()
            elif self.text.startswith("(", self.at):
                value *= self.power()
            else:
                return value

    def signed_power(self) -> Fraction:
        return -self.signed_power() if self.took("-") else self.power()

    def power(self) -> Fraction:
        base = self.atom()
        if self.took("!"):
            if base.denominator != 1 or not 0 <= base <= _LARGEST_FACTORIAL:
                raise _NotPlain
            base = Fraction(factorial(int(base)))
        if not self.took("^"):
            return base
        if self.took("{"):
            exponent = self.sum()
            self.need("}")
        else:
            exponent = Fraction(int(self.match(r"\d")))
        bits = max(abs(base.numerator).bit_length(), base.denominator.bit_length())
        if exponent.denominator != 1 or abs(exponent) * bits > _POWER_BITS:
            raise _NotPlain
        return base ** int(exponent)

    def match(self, pattern: str) -> str:
        found = re.compile(pattern).match(self.text, self.at)
        if not found:
            raise _NotPlain
        self.at = found.end()
        return found.group()

    def atom(self) -> Fraction:
        if self.took(r"\frac{"):
            top = self.sum()
            self.need("}{")
            bottom = self.sum()
            self.need("}")
            return top / bottom
        for opening, close in ("()", "{}"):
            if self.took(opening):
                value = self.sum()
                self.need(close)
                return value
        literal = _LITERAL.match(self.text, self.at)
        if literal is None or not any(literal.group("whole", "part", "over")):
            raise _NotPlain
        self.at = literal.end()
        value = _worth(literal)
        if literal.group("whole") and literal.group("part") is None and self.text.startswith(r"\frac{", self.at):
            fraction = self.atom()
            if not 0 < fraction < 1:
                raise _NotPlain  # neither a mixed number nor a product one would write
            value += fraction
        return value


def _worth(literal: re.Match[str]) -> Fraction:
    whole, part, over = literal.group("whole") or "0", literal.group("part") or "", literal.group("over")
    value = Fraction(int(whole.replace(",", "") + part), 10 ** len(part))
    if over:
        value += Fraction(int(over), (10 ** len(over) - 1) * 10 ** len(part))
    return value


_BOX: Final = re.compile(r"\\f?boxed(?![A-Za-z])\s*\{|\\fbox\s*\{")


def boxed(text: str) -> str:
    r"""What the last balanced `\boxed{}` holds; the text itself if it has none."""
    for opening in reversed(list(_BOX.finditer(text))):
        close = closing(text, opening.end() - 1)
        if close is not None:
            return boxed(text[opening.end() : close])
    return text
