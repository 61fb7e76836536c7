r"""How often the grader is wrong: true answers in other notation that it rejects, wrong answers that it accepts.

Every rewrite leaves the answer what it is (`\frac{1}{2}` as `0.5`, a set in another order, `x = ` before it), every
alteration makes it another answer by one number or one sign. Both work on the text alone and share no code with the
grader, which would else be judged by itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isqrt
from typing import Final

Change = Callable[[str], Iterator[str]]

_PLAIN_FRACTION: Final = re.compile(r"(-?)\\d?frac\{?(\d+)\}? ?\{?(\d+)\}?")
_FRACTION: Final = re.compile(r"\\d?frac\{((?:[^{}]|\{[^{}]*\})*)\}\{((?:[^{}]|\{[^{}]*\})*)\}")
_BRACKETS: Final = re.compile(r"(?<!\\left)(?<!\\right)(\\\{|\\\}|[()\[\]])")
_LISTED: Final = re.compile(r"(-?\d+)(, ?-?\d+)+")
_ROOT: Final = re.compile(r"(-?)(\d*) ?\\sqrt\{?(\d+)\}?")
_SUM: Final = re.compile(r"(-?[^-+=,(){}\[\]<>_/ ]+) ?([-+]) ?([^-+=,(){}\[\]<>_/ ]+)")


def _fraction_commands(gold: str) -> Iterator[str]:
    if "frac" in gold:
        plain = re.sub(r"\\[dt]frac", r"\\frac", gold)
        yield from (plain, plain.replace(r"\frac", r"\dfrac"), plain.replace(r"\frac", r"\tfrac"))
    if _FRACTION.search(gold):
        yield _FRACTION.sub(lambda m: rf"\frac {{{m[1]}}} {{{m[2]}}}", gold)
        yield _FRACTION.sub(lambda m: rf"({m[1]})/({m[2]})" if m.start() == 0 else m[0], gold)
    if (found := _PLAIN_FRACTION.fullmatch(gold)) and len(found[2]) == len(found[3]) == 1:
        yield rf"{found[1]}\frac{found[2]}{found[3]}"
        yield rf"{found[1]}\frac {found[2]} {found[3]}"


def _other_numerals(gold: str) -> Iterator[str]:
    """A number as a fraction, a terminating decimal, a mixed number, or with zeros behind the point."""
    found = _PLAIN_FRACTION.fullmatch(gold)
    if found and int(found[3]):
        value = Fraction(int(found[1] + found[2]), int(found[3]))
        yield f"{value.numerator}/{value.denominator}"
        yield rf"\frac{{{2 * value.numerator}}}{{{2 * value.denominator}}}"
        if value.numerator < 0:
            yield rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
        if (decimal := _decimal(value)) is not None:
            yield decimal
        if value > 1 and value.denominator > 1:
            whole, rest = divmod(value.numerator, value.denominator)
            yield rf"{whole}\frac{{{rest}}}{{{value.denominator}}}"
            yield f"{whole} {rest}/{value.denominator}"
    elif re.fullmatch(r"-?\d*\.\d+", gold):
        value = Fraction(gold)
        yield rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
        yield f"{gold}0"
        yield f"0{gold}" if gold.startswith(".") else gold.replace("0.", ".", 1)
    elif re.fullmatch(r"-?\d+", gold):
        yield f"{gold}.0"
        yield f"{gold}.00"


def _decimal(value: Fraction) -> str | None:
    for digits in range(1, 9):
        if value.denominator <= 10**digits and (scaled := value * 10**digits).denominator == 1:
            sign, number = "-" if scaled < 0 else "", str(abs(int(scaled))).rjust(digits + 1, "0")
            return f"{sign}{number[:-digits]}.{number[-digits:]}"
    return None


def _spacing(gold: str) -> Iterator[str]:
    if r"\text" not in gold and r"\mbox" not in gold:
        yield re.sub(r"(?<![A-Za-z\\]) +(?![A-Za-z])", "", gold)
        yield re.sub(r"(?<=[\w})\]])([-+=])(?=[\w\\(])", r" \1 ", gold)
        yield gold.replace(",", r",\,") if r",\!" not in gold and not re.search(r"\d,\d{3}", gold) else gold
    yield f"  {gold} "


def _delimiters(gold: str) -> Iterator[str]:
    yield from (
        f"${gold}$",
        rf"\({gold}\)",
        rf"\[{gold}\]",
        rf"\boxed{{{gold}}}",
        rf"The answer is $\boxed{{{gold}}}$.",
    )
    yield from (f"{gold}.", f"${gold}$.", rf"\displaystyle {gold}", f"{{{gold}}}")


def _wrappers(gold: str) -> Iterator[str]:
    if found := re.fullmatch(r"\\text\{(.*)\}", gold):
        yield from (found[1], rf"\mathrm{{{found[1]}}}", rf"\textbf{{{found[1]}}}", rf"\mbox{{{found[1]}}}")
        yield found[1].strip("()")
        yield found[1].lower() if len(found[1]) > 3 else found[1]
    elif re.fullmatch(r"-?[\d.]+", gold):
        yield from (rf"\text{{{gold}}}", rf"\mathbf{{{gold}}}")


def _left_right(gold: str) -> Iterator[str]:
    yield gold.replace(r"\left", "").replace(r"\right", "")
    if r"\left" not in gold and re.search(r"^[(\[]|\\\{", gold):
        sided = {
            "(": r"\left(",
            "[": r"\left[",
            r"\{": r"\left\{",
            ")": r"\right)",
            "]": r"\right]",
            r"\}": r"\right\}",
        }
        yield _BRACKETS.sub(lambda m: sided[m[0]], gold)


def _orders(gold: str) -> Iterator[str]:
    """A list of numbers, a union or a set in another order; plus-minus written out."""
    if _LISTED.fullmatch(gold) and not re.search(r"\d,\d{3}", gold):
        items = re.split(r", ?", gold)
        yield from (
            ", ".join(reversed(items)),
            rf"\{{{','.join(items)}\}}",
            rf"{', '.join(items[:-1])} \text{{ and }} {items[-1]}",
        )
        yield f"x = {', '.join(items)}"
        yield ", ".join(f"x = {item}" for item in items)
        yield " or ".join(items[::-1])
    if r"\cup" in gold:
        yield r"\cup".join(reversed(gold.split(r"\cup")))
    if gold.startswith(r"\{") and gold.endswith(r"\}"):
        yield rf"\{{{','.join(reversed(gold[2:-2].split(',')))}\}}"
        yield gold[2:-2]
    if r"\pm" in gold and not gold.startswith(r"\{"):
        yield gold.replace(r"\pm", "+") + ", " + gold.replace(r"\pm", "-")


def _units(gold: str) -> Iterator[str]:
    bare = re.sub(r" ?\\(?:text|mbox)\{ ?(?:degrees|cents|inches|cm)\}(?:\^2)?$|\^\\circ$", "", gold)
    if gold.endswith(r"^\circ"):
        yield from (
            f"{bare}^{{\\circ}}",
            f"{bare}°",
            rf"{bare} \text{{ degrees}}",
            rf"{bare}\degree",
            f"{bare} degrees",
        )
    if bare != gold:
        yield bare
    if gold.startswith(r"\$"):
        yield from (gold[2:], rf"{gold[2:]} \text{{ dollars}}", f"${gold}$")
    elif re.fullmatch(r"\d+", gold):
        yield from (rf"{gold} \text{{ units}}", rf"{gold}\text{{ cm}}", rf"{gold} \mbox{{ apples}}", f"{gold} ways")
    for short, long in ((r"\mbox{ cm}^2", r"\text{ square centimeters}"), (r"\mbox{ inches}^2", r"\text{ in}^2")):
        if short in gold:
            yield gold.replace(short, long)


def _thousands(gold: str) -> Iterator[str]:
    plain = re.sub(r"(?<=\d),(?:\\! ?)?(?=\d{3}(?!\d))", "", gold)
    if (found := re.fullmatch(r"((?:\\\$)?)(\d{4,})", plain)) and plain == gold.replace(",", "").replace(
        r"\!", ""
    ).replace(" ", ""):
        grouped = f"{int(found[2]):,}"
        yield found[1] + found[2]
        yield from (found[1] + grouped.replace(",", comma) for comma in (",", "{,}", r",\!", r"\,"))


def _names(gold: str) -> Iterator[str]:
    if found := re.fullmatch(r"([xy]) ?= ?(.+)", gold):
        yield from (found[2], f"{found[1]}={found[2]}")
    elif r"\in" in gold and r"\infty" not in gold:
        yield gold.split(r"\in")[1].strip()
    elif (
        r"\text" not in gold
        and not re.search(r"[=<>]|\\[gl]eq", gold)
        and r"\mbox" not in gold
        and not re.search(r"[A-Z]", gold)
    ):
        name = "S" if re.match(r"[(\[]|\\[{l]", gold) else "f(x)" if "x" in gold else "z"
        yield f"{name} = {gold}"


def _intervals(gold: str) -> Iterator[str]:
    if found := re.fullmatch(r"([(\[])([^,()]+), ?\\infty\)", gold):
        yield f"x {'>' if found[1] == '(' else '>='} {found[2]}"
        yield found[2] + (" < x" if found[1] == "(" else r" \le x")
    if found := re.fullmatch(r"\(-\\infty, ?([^,()]+)([)\]])", gold):
        yield ("x < " if found[2] == ")" else r"x \leqslant ") + found[1]
    if found := re.fullmatch(r"\\left\((.+),(.+)\\right\]", gold):
        yield rf"{found[1]} < x \le {found[2]}"


def _algebra(gold: str) -> Iterator[str]:
    """A sum the other way round, a root with its factor inside or below, a product spelled out."""
    if (found := _SUM.fullmatch(gold)) and r"\pm" not in gold:
        yield f"{'-' if found[2] == '-' else ''}{found[3]} {'' if found[1].startswith('-') else '+'} {found[1]}"
    if (found := _ROOT.fullmatch(gold)) and found[2]:
        inside = int(found[2]) ** 2 * int(found[3])
        yield rf"{found[1]}\sqrt{{{inside}}}"
        yield rf"{found[1]}{found[2]} \cdot \sqrt{{{found[3]}}}"
    if (found := _ROOT.fullmatch(gold)) and isqrt(int(found[3])) ** 2 != int(found[3]):
        yield rf"{found[1]}{int(found[2] or 1) * int(found[3])}/\sqrt{{{found[3]}}}"
    if found := re.fullmatch(r"(\d+) ?\\pi", gold):
        yield from (rf"{found[1]} \cdot \pi", rf"\pi \cdot {found[1]}", f"{found[1]}π")
    if found := _FRACTION.fullmatch(gold):
        yield rf"\frac{{2({found[1]})}}{{2({found[2]})}}"
        yield rf"\frac{{1}}{{{found[2]}}} \cdot ({found[1]})"


def _letters(gold: str) -> Iterator[str]:
    if "pmatrix" in gold:
        yield gold.replace("pmatrix", "bmatrix")
        yield gold.replace(r" \\ ", "\\\\")
    if re.search(r"\\pi|\\infty|-", gold) and r"\text" not in gold:
        yield re.sub(r"\\pi(?![A-Za-z])", "π", gold.replace("-", "−").replace(r"\infty", "∞"))


REWRITES: Final[dict[str, Change]] = {
    "fraction commands": _fraction_commands, "numerals": _other_numerals, "spacing": _spacing,
    "delimiters": _delimiters, "wrappers": _wrappers, "left and right": _left_right, "order": _orders, "units": _units,
    "thousands": _thousands, "names": _names, "intervals": _intervals, "algebra": _algebra, "letters": _letters,
}  # fmt: skip

_NUMERAL: Final = re.compile(r"\d+(?:\.\d+)?|(?<!\d)\.\d+")


def _one_number_changed(gold: str) -> Iterator[str]:
    """Each number in turn, one more and ten times as large (a zero: 7). Trailing zeros keep the digits apart."""
    for found in _NUMERAL.finditer(gold):
        digits = found.group()
        last = digits[:-1] + str((int(digits[-1]) + 1) % 10)
        for other in (last, "7" if not digits.strip("0.") else f"{digits}0" if "." not in digits else f"1{digits}"):
            yield gold[: found.start()] + other + gold[found.end() :]


def _sign_changed(gold: str) -> Iterator[str]:
    if re.fullmatch(r"-?\d+|-?\\d?frac\{\d+\}\{\d+\}|-?\d*\\sqrt\{?\d+\}?", gold) and gold != "0":
        yield gold[1:] if gold.startswith("-") else f"-{gold}"
    for at in (m.start() for m in re.finditer(r"(?<=[\w}] )[-+](?= [\w\\])", gold)):
        yield gold[:at] + ("+" if gold[at] == "-" else "-") + gold[at + 1 :]


ALTERATIONS: Final[dict[str, Change]] = {"one number changed": _one_number_changed, "one sign changed": _sign_changed}


@dataclass(frozen=True)
class Rates:
    """Verdicts on rewritten and altered gold answers: counts by kind, and the (answer, gold) pairs judged wrongly."""

    right: dict[str, int]
    wrong: dict[str, int]
    rejected: tuple[tuple[str, str], ...]
    accepted: tuple[tuple[str, str], ...]
    kinds: dict[str, int]

    @property
    def false_rejects(self) -> float:
        """Share of right answers that were rejected."""
        return len(self.rejected) / max(1, sum(self.right.values()))

    @property
    def false_accepts(self) -> float:
        """Share of wrong answers that were accepted."""
        return len(self.accepted) / max(1, sum(self.wrong.values()))

    def __str__(self) -> str:
        lines = [f"right answers in other notation, rejected: {self.false_rejects:7.2%}"]
        lines += [f"  {kind:20} {self.kinds.get(kind, 0):5} of {count:5}" for kind, count in self.right.items()]
        lines += [f"wrong answers, accepted:                    {self.false_accepts:7.2%}"]
        lines += [f"  {kind:20} {self.kinds.get(kind, 0):5} of {count:5}" for kind, count in self.wrong.items()]
        return "\n".join(lines)


def changed(golds: Sequence[str], changes: dict[str, Change]) -> list[tuple[str, str, str]]:
    """(kind, other text, gold) of every change of every gold answer, each text once."""
    cases: dict[tuple[str, str], str] = {}
    for gold in golds:
        for kind, change in changes.items():
            for other in change(gold):
                if other != gold:
                    cases.setdefault((other, gold), kind)
    return [(kind, other, gold) for (other, gold), kind in cases.items()]


def measure(golds: Sequence[str]) -> Rates:
    """Grade every rewrite and every alteration of these gold answers, in boxed form."""
    from langchain_earlyexit.lab.grade import grade_all

    judged = []
    for changes, truth in ((REWRITES, True), (ALTERATIONS, False)):
        cases = changed(golds, changes)
        verdicts = grade_all([(other, gold) for _, other, gold in cases])
        missed = [case for case, verdict in zip(cases, verdicts, strict=True) if verdict != truth]
        judged.append((Counter(kind for kind, _, _ in cases), missed))
    (right, rejected), (wrong, accepted) = judged
    return Rates(
        right=dict(right),
        wrong=dict(wrong),
        rejected=tuple((other, gold) for _, other, gold in rejected),
        accepted=tuple((other, gold) for _, other, gold in accepted),
        kinds=dict(Counter(kind for kind, _, _ in rejected + accepted)),
    )
