"""Questions with known answers: from the bundled model's problem maker, from JSON lines, from data sets on the hub.

A question is what the model is asked, word for word. Data sets on the hub are asked as the papers on early exit do:
the problem, then the request to reason and to box the answer (arXiv 2504.15895, 2512.05325), or the options, a line
each, and the request for a letter.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from langchain_earlyexit.pocket.problems import sample

BOXED_REQUEST: Final = "Please reason step by step, and put your final answer within \\boxed{}."
CHOICE_REQUEST: Final = "Please reason step by step, and answer with the letter of the right option."

_LETTERS: Final = "ABCDEFGHIJ"


@dataclass(frozen=True, slots=True)
class Question:
    """A question and, where it is known, its right answer.

    Args:
        id: the same from run to run, and different for every question of a data set.
        question: what the model is asked, options and request included.
        answer: the right answer as the data set has it; the letter where there are options; None if nobody knows it.
        form: how it is answered and graded: "boxed", "choice" or "text".
        source: the data set or file it comes from.
        options: what the letters stand for, from A on; empty for an open question.
    """

    id: str
    question: str
    answer: str | None
    form: str
    source: str
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.question.strip() or (self.answer is not None and not self.answer.strip()):
            raise ValueError(f"question {self.id!r} of {self.source} has an empty question or an empty answer")
        if self.answer is None:
            return
        letters = _LETTERS[: len(self.options)] if self.options else _LETTERS
        if self.form == "choice" and (len(self.answer) != 1 or self.answer not in letters):
            raise ValueError(
                f"question {self.id!r} of {self.source} has the answer {self.answer!r}, "
                f"which is none of its options {', '.join(letters)}"
            )


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of a data set, brought to one form; options not yet shuffled."""

    problem: str
    answer: str
    options: tuple[str, ...] = ()
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Hub:
    """Where a data set lives on the hub and how its rows are read. `shuffled`: its right option stands first."""

    path: str
    config: str | None
    split: str
    read: Callable[[Mapping[str, Any]], _Row]
    shuffled: bool = False

    def questions(
        self, name: str, rows: Iterable[Mapping[str, Any]], split: str, *, seed: int = 0, request: str | None = None
    ) -> list[Question]:
        """All questions of these rows. Options are shuffled by the seed and the question's id alone.

        Raises:
            ValueError: a row lacks a column.
        """
        found = []
        for at, raw in enumerate(rows):
            try:
                row = self.read(raw)
            except KeyError as missing:
                raise ValueError(
                    f"row {at} of {self.path} has no column {missing}; it has {', '.join(map(str, raw))}"
                ) from None
            known = row.id or f"{name}-{split}-{at}"
            options, answer = row.options, row.answer
            if self.shuffled:
                right = options[0]
                order = list(options)
                random.Random(f"{seed}-{known}").shuffle(order)  # noqa: S311 (an order, not a secret)
                options, answer = tuple(order), _LETTERS[order.index(right)]
            form = "choice" if options else "boxed"
            found.append(Question(known, _asked(row.problem, options, request), answer, form, name, options))
        return found


def _asked(problem: str, options: Sequence[str], request: str | None) -> str:
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False))
    if request is None:
        request = CHOICE_REQUEST if options else BOXED_REQUEST
    return "\n\n".join(part for part in (problem.strip(), lines, request) if part)


def _gsm8k(row: Mapping[str, Any]) -> _Row:
    solution, mark, answer = str(row["answer"]).rpartition("####")
    if not mark:
        raise ValueError(f"a GSM8K answer ends with #### and the number, this one does not: {solution or answer!r}")
    return _Row(row["question"], answer.strip().replace(",", ""))


def _math(row: Mapping[str, Any]) -> _Row:
    return _Row(row["problem"], str(row["answer"]), id=row.get("unique_id"))


def _contest(row: Mapping[str, Any]) -> _Row:
    answer = row["answer"]  # a float such as 27.0 in one copy of AMC 23
    plain = str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)
    return _Row(row["question"] if "question" in row else row["problem"], plain)


def _olympiad(row: Mapping[str, Any]) -> _Row:
    answers = [re.sub(r"^\$|\$$", "", str(answer).strip()) for answer in row["final_answer"]]
    return _Row(row["question"], ", ".join(answers), id=str(row["id"]))


def _commonsense(row: Mapping[str, Any]) -> _Row:
    options = row["choices"]
    if not row["answerKey"]:
        raise ValueError("this split of CommonsenseQA is published without answers; take 'validation' or 'train'")
    if list(options["label"]) != list(_LETTERS[: len(options["label"])]):
        raise ValueError(f"options are labelled {options['label']}, not from A on")
    return _Row(row["question"], row["answerKey"], tuple(options["text"]), row["id"])


def _gpqa(row: Mapping[str, Any]) -> _Row:
    options = [row["Correct Answer"], *(row[f"Incorrect Answer {at}"] for at in (1, 2, 3))]
    return _Row(row["Question"], "A", tuple(str(option).strip() for option in options), row["Record ID"])


HUB: Final[dict[str, Hub]] = {
    "gsm8k": Hub("openai/gsm8k", "main", "test", _gsm8k),
    "math500": Hub("HuggingFaceH4/MATH-500", None, "test", _math),
    "aime24": Hub("HuggingFaceH4/aime_2024", None, "train", _contest),
    "aime25": Hub("math-ai/aime25", None, "test", _contest),
    "amc23": Hub("math-ai/amc23", None, "test", _contest),
    "olympiadbench": Hub("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", _olympiad),
    "commonsenseqa": Hub("tau/commonsense_qa", None, "validation", _commonsense),
    "gpqa": Hub("Idavidrein/gpqa", "gpqa_diamond", "train", _gpqa, shuffled=True),
}
"""Data sets by the name `load` knows them by. Their texts stay on the hub, under their own licences."""


def load(
    name_or_path: str, split: str | None = None, n: int | None = None, seed: int = 0, *, request: str | None = None
) -> list[Question]:
    """Questions of a data set, in its order.

    Args:
        name_or_path: "pocket", a key of `HUB`, or a file of JSON lines with "question" and "answer", and if they like
            "id", "form" and "options". "pocket" and files are asked as they are, without a request.
        split: of "pocket" (train, dev or test; test when None) or of a data set on the hub; a file has none.
        n: so many, drawn without replacement by the seed; all when None. "pocket" makes as many as it is asked for.
        seed: of the draw, of pocket's problems, and of the order of GPQA's options.
        request: asked after every question instead of the data set's own request; "" for none.

    Raises:
        ValueError: an unknown name, split or form, a line or row without question or answer, two questions with one
            id, or fewer questions than n.
        ImportError: a data set on the hub, and `datasets` is not installed.
    """
    if n is not None and n < 1:
        raise ValueError(f"at least 1 question is needed, got n={n}")
    if name_or_path == "pocket":
        return _pocket(split or "test", n, seed, request)
    if name_or_path in HUB:
        hub = HUB[name_or_path]
        split = split or hub.split
        found = hub.questions(name_or_path, _rows(hub, split), split, seed=seed, request=request)
    elif Path(name_or_path).is_file():
        if split is not None:
            raise ValueError(f"{name_or_path} is a file and has no splits, but split={split!r} is asked for")
        found = _lines(Path(name_or_path), request)
    else:
        known = ", ".join(["pocket", *HUB])
        raise ValueError(f"{name_or_path!r} is neither a data set ({known}) nor a file of JSON lines")
    for known, times in Counter(question.id for question in found).items():
        if times > 1:
            raise ValueError(f"{name_or_path} has {times} questions with the id {known!r}")
    if n is None or n == len(found):
        return found
    if n > len(found):
        raise ValueError(f"n={n} questions are asked for, but {name_or_path} has {len(found)}")
    draw = random.Random(f"{name_or_path}-{seed}")  # noqa: S311 (a sample, not a secret)
    return [found[at] for at in sorted(draw.sample(range(len(found)), n))]


def _pocket(split: str, n: int | None, seed: int, request: str | None) -> list[Question]:
    if n is None:
        raise ValueError("pocket makes as many questions as one asks for: say how many, as in n=200")
    if split not in ("train", "dev", "test"):
        raise ValueError(f"pocket has the splits train, dev and test, not {split!r}")
    return [
        Question(
            id=f"pocket-{split}-{seed}-{at}",
            question=_asked(problem.question, (), request or ""),
            answer=problem.answer,
            form="boxed",
            source="pocket",
        )
        for at, problem in enumerate(sample(split, n, seed))  # type: ignore[arg-type] # checked above
    ]


def _rows(hub: Hub, split: str) -> Iterable[Mapping[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as missing:
        raise ImportError(
            f"{hub.path} is read from the hub, which needs datasets: pip install 'langchain-earlyexit[lab]'"
        ) from missing
    rows: Iterable[Mapping[str, Any]] = load_dataset(hub.path, hub.config, split=split)
    return rows


def _lines(path: Path, request: str | None) -> list[Question]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is no JSON: {error}") from None
        if not isinstance(row, dict) or "question" not in row:
            raise ValueError(f'{where} must be an object with "question", and "answer" if it is known: {line[:80]}')
        options = tuple(str(option) for option in row.get("options", ()))
        form = row.get("form", "choice" if options else "boxed")
        if form not in ("boxed", "choice", "text"):
            raise ValueError(f'{where} has the form {form!r}; known are "boxed", "choice" and "text"')
        if len(options) > len(_LETTERS):
            raise ValueError(f"{where} has {len(options)} options, but letters only go up to {_LETTERS[-1]}")
        answer = None if row.get("answer") is None else str(row["answer"]).strip()
        if form == "choice" and answer in options:
            answer = _LETTERS[options.index(answer)]
        text = _asked(str(row["question"]), options, request or "")
        found.append(Question(str(row.get("id", f"{path.stem}-{number}")), text, answer, form, str(path), options))
    return found
