r"""Whether an answer is right: strict, by meaning, for boxed mathematics, options and words.

Strict means that the whole answer counts (no last number, no substring), that values are equal exactly (0.33 is not
1/3), and that order, brackets and units count where they mean something. By meaning means that notation does not:
`\dfrac12`, `1/2`, `0.5` and `x = \frac{1}{2}` are one answer, and so are `\{2, 1\}` and `1, 2`. A unit, a base, a
percent sign or a name may go unsaid; one that contradicts the gold answer's is wrong.

Answers that are spelled alike once cleaned, words, and plain numbers are judged here, at once. Only where two
expressions must be simplified (`\frac{\sqrt3}{3}` and `\frac{1}{\sqrt3}`) is math-verify asked, in other processes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from langchain_earlyexit.answers import CHOICE, AnswerForm, graded_form
from langchain_earlyexit.lab.compare import same, unknown
from langchain_earlyexit.lab.notation import boxed
from langchain_earlyexit.lab.shapes import readings
from langchain_earlyexit.lab.symbolic import Algebraists

LONGEST: Final = 1_000
"""Characters beyond which an answer is none: a runaway reply is not worth parsing."""

_ALGEBRAISTS: Final = Algebraists()  # no process starts before one is needed


def grade(answer: str | None, gold: str, form: AnswerForm | str = "boxed") -> bool:
    r"""Whether an answer is the gold one.

    Args:
        answer: an extracted answer, normalised or not, or a text whose last balanced `\boxed{}` is the answer; None
            for no answer, which is wrong.
        gold: the right answer as the data set has it.
        form: an answer form or its name. "boxed" and "text" are compared by meaning, "choice" by the letter.

    Raises:
        ValueError: an unknown form, or an empty gold answer, or one that is no letter where the form is "choice".
        ImportError: computer algebra is needed and math-verify is not installed.
    """
    return grade_all([(answer, gold)], form)[0]


def grade_all(pairs: Iterable[tuple[str | None, str]], form: AnswerForm | str = "boxed") -> list[bool]:
    """`grade` of each (answer, gold), in order; what needs computer algebra is asked of several processes at once."""
    name = form if isinstance(form, str) else form.name
    graded_form(name)
    verdicts: list[bool] = []
    open_pairs: dict[tuple[str, str], list[int]] = {}
    for at, (answer, gold) in enumerate(pairs):
        if not gold.strip():
            raise ValueError(f"question {at} has an empty gold answer (the answer given is {answer!r})")
        if name == "choice":
            verdicts.append(_same_letter(answer, gold))
            continue
        right, said = boxed(gold), _said(answer)
        verdict = _by_spelling(right, said) if said else False
        if verdict is None:
            open_pairs.setdefault((right, said), []).append(at)
        verdicts.append(verdict is True)
    for places, verdict in zip(open_pairs.values(), _ALGEBRAISTS.same_all(list(open_pairs)), strict=True):
        for at in places:
            verdicts[at] = verdict
    return verdicts


def _same_letter(answer: str | None, gold: str) -> bool:
    letter = CHOICE.normalise(boxed(gold))
    if not letter:
        raise ValueError(f"the gold answer of a choice must be a letter from A to J, got {gold!r}")
    return answer is not None and CHOICE.extract(answer) == letter


def _said(answer: str | None) -> str:
    """The answer itself; "" for none."""
    if answer is None or (len(answer) > LONGEST and r"\boxed" not in answer):
        return ""
    said = boxed(answer).strip()
    return said if len(said) <= LONGEST else ""


def _by_spelling(gold: str, answer: str) -> bool | None:
    """The verdict without computer algebra; None if it takes that."""
    if gold.strip() == answer.strip():
        return True
    verdicts = [same(one, other, unknown) for one in readings(gold) for other in readings(answer)]
    if True in verdicts:
        return True
    return None if None in verdicts else False


def main(arguments: Sequence[str] | None = None) -> int:
    """Print how often the grader is wrong on answers that are right, and on answers that are not; the exit status."""
    from langchain_earlyexit.lab.rewrites import measure

    parser = argparse.ArgumentParser(prog="python -m langchain_earlyexit.lab.grade", description=main.__doc__)
    parser.add_argument("--self-test", type=Path, required=True, metavar="GOLDS", help='JSON lines with an "answer"')
    parser.add_argument("--examples", type=int, default=10, help="print so many misgraded answers of each kind")
    given = parser.parse_args(arguments)
    lines = given.self_test.read_text(encoding="utf-8").split("\n")
    golds = [json.loads(line)["answer"] for line in lines if line.strip()]
    rates = measure(golds)
    print(rates)
    for title, pairs in (("rejected, though right", rates.rejected), ("accepted, though wrong", rates.accepted)):
        for answer, gold in pairs[: given.examples]:
            print(f"  {title}: {answer!r} for {gold!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
