"""Questions: from files, from the bundled model's problems, and from rows shaped as the hub's data sets are."""

import json
import sys
from collections import Counter

import pytest

from langchain_earlyexit.answers import BOXED, CHOICE, detect_form
from langchain_earlyexit.lab.datasets import BOXED_REQUEST, HUB, Question, load
from langchain_earlyexit.lab.grade import grade


def lines(path, *rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(path)


# Rows as the data sets' cards show them; the texts are made up.
ROWS = {
    "gsm8k": {"question": "900 pens and 300 more?", "answer": "900+300=<<900+300=1200>>1200 pens.\n#### 1,200"},
    "math500": {
        "problem": "What is $1/2+1/4$?", "solution": "It is $\\boxed{\\frac{3}{4}}$.", "answer": "\\frac{3}{4}",
        "subject": "Algebra", "level": 1, "unique_id": "test/algebra/1.json",
    },
    "aime24": {"id": 60, "problem": "Find $n$.", "solution": "It is 33.", "answer": "033", "url": "", "year": "2024"},
    "aime25": {"problem": "Find the angle.", "answer": "336^\\circ", "id": "0"},
    "amc23": {"id": 0, "question": "Find $x$.", "answer": 27.0, "url": ""},
    "olympiadbench": {
        "id": 1606, "question": "Solve $x^2=4$.", "solution": ["..."], "final_answer": ["$2$", "$-2$"], "context": None,
        "is_multiple_answer": True, "unit": None, "answer_type": "Numerical", "error": None,
    },
    "commonsenseqa": {
        "id": "1afa02df", "question": "Where do fish live?", "question_concept": "fish",
        "choices": {"label": list("ABCDE"), "text": ["tree", "sea", "sky", "desk", "shoe"]}, "answerKey": "B",
    },
    "gpqa": {
        "Record ID": "rec06pnAkLOr2t2mp", "Question": "Which is a noble gas?", "Correct Answer": "neon\n",
        "Incorrect Answer 1": "iron", "Incorrect Answer 2": "gold", "Incorrect Answer 3": "salt",
    },
}  # fmt: skip
GOLDS = {
    "gsm8k": "1200", "math500": "\\frac{3}{4}", "aime24": "033", "aime25": "336^\\circ", "amc23": "27",
    "olympiadbench": "2, -2", "commonsenseqa": "B",
}  # fmt: skip


def only(name, **changes):
    hub = HUB[name]
    (question,) = hub.questions(name, [ROWS[name] | changes], hub.split)
    return question


@pytest.mark.parametrize("name", sorted(GOLDS))
def test_a_row_of_every_data_set_on_the_hub_becomes_a_question_with_its_gold_answer(name):
    question = only(name)
    assert question.answer == GOLDS[name]
    assert question.source == name
    assert question.question.startswith(ROWS[name].get("question") or ROWS[name]["problem"])


@pytest.mark.parametrize("name", sorted(ROWS))
def test_what_is_asked_leads_to_the_form_it_is_graded_in(name):
    question = only(name)
    assert detect_form(question.question, "text") is {"boxed": BOXED, "choice": CHOICE}[question.form]
    assert grade(question.answer, question.answer, question.form)


def test_a_problem_is_asked_with_the_papers_request_for_a_boxed_answer():
    assert only("math500").question == f"What is $1/2+1/4$?\n\n{BOXED_REQUEST}"


def test_options_stand_on_lines_of_their_own_from_a_on():
    assert "\n\nA. tree\nB. sea\nC. sky\nD. desk\nE. shoe\n\n" in only("commonsenseqa").question


def test_gpqas_right_option_stands_at_every_letter_about_equally_often():
    rows = [ROWS["gpqa"] | {"Record ID": f"rec{at}"} for at in range(400)]
    questions = HUB["gpqa"].questions("gpqa", rows, "train", seed=0)
    assert all(question.options["ABCD".index(question.answer)] == "neon" for question in questions)
    shares = Counter(question.answer for question in questions)
    assert all(60 <= shares[letter] <= 140 for letter in "ABCD")


def test_gpqas_order_hangs_on_the_seed_and_the_question_alone():
    rows = [ROWS["gpqa"] | {"Record ID": f"rec{at}"} for at in range(20)]
    once, again = (HUB["gpqa"].questions("gpqa", rows, "train", seed=1) for _ in range(2))
    fewer = HUB["gpqa"].questions("gpqa", rows[10:], "train", seed=1)
    other = HUB["gpqa"].questions("gpqa", rows, "train", seed=2)
    assert once == again
    assert fewer == once[10:]
    assert [question.answer for question in other] != [question.answer for question in once]


def test_a_row_without_a_column_is_an_error_that_names_both_sides():
    with pytest.raises(ValueError, match=r"row 0 of openai/gsm8k has no column 'answer'; it has question"):
        HUB["gsm8k"].questions("gsm8k", [{"question": "?"}], "test")


def test_a_split_without_answers_is_refused():
    with pytest.raises(ValueError, match="take 'validation'"):
        only("commonsenseqa", answerKey="")


def test_the_hub_without_the_datasets_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'langchain-earlyexit\[lab\]'"):
        load("gsm8k")


def test_a_data_set_on_the_hub_is_loaded_by_its_path_config_and_split(monkeypatch):
    asked = []

    class Datasets:
        @staticmethod
        def load_dataset(path, name, split):
            asked.append((path, name, split))
            return [ROWS["gsm8k"]] * 3

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    assert [question.id for question in load("gsm8k")] == ["gsm8k-test-0", "gsm8k-test-1", "gsm8k-test-2"]
    assert len(load("gsm8k", split="train", n=2)) == 2
    assert asked == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")]


def test_pocket_makes_as_many_questions_as_asked_for_the_same_for_the_same_seed():
    once = load("pocket", n=5, seed=3)
    assert once == load("pocket", n=5, seed=3)
    assert once != load("pocket", n=5, seed=4)
    assert len({question.id for question in once + load("pocket", "dev", n=5, seed=3)}) == 10
    assert all(BOXED_REQUEST not in question.question for question in once)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name_or_path": "pocket"}, "say how many"),
        ({"name_or_path": "pocket", "n": 3, "split": "validation"}, "train, dev and test, not 'validation'"),
        ({"name_or_path": "pocket", "n": 0}, "n=0"),
        ({"name_or_path": "gsm9k"}, r"'gsm9k' is neither a data set \(pocket, gsm8k, .*gpqa\) nor a file"),
    ],
)
def test_what_cannot_be_loaded_is_an_error_that_says_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**arguments)


def test_json_lines_are_asked_as_they_are(tmp_path):
    path = lines(
        tmp_path / "own.jsonl",
        {"id": "a", "question": "1+1?", "answer": 2},
        {"question": "Which?\u2028Say.", "answer": "sea", "options": ["tree", "sea"]},
        {"question": "Capital of France?", "answer": "Paris", "form": "text"},
    )
    assert load(path) == [
        Question("a", "1+1?", "2", "boxed", path),
        Question("own-2", "Which?\u2028Say.\n\nA. tree\nB. sea", "B", "choice", path, ("tree", "sea")),
        Question("own-3", "Capital of France?", "Paris", "text", path),
    ]
    assert load(path, request=BOXED_REQUEST)[0].question == f"1+1?\n\n{BOXED_REQUEST}"


def test_a_draw_keeps_the_order_and_hangs_on_the_seed(tmp_path):
    path = lines(tmp_path / "own.jsonl", *({"id": at, "question": f"{at}?", "answer": at} for at in range(100)))
    some = [int(question.id) for question in load(path, n=20, seed=0)]
    assert some == sorted(set(some))
    assert some == [int(question.id) for question in load(path, n=20, seed=0)]
    assert some != [int(question.id) for question in load(path, n=20, seed=1)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "2"}, r'own.jsonl:1 must be an object with "question", and "answer" if it is known'),
        ({"question": " "}, "has an empty question or an empty answer"),
        ({"question": "1+1?", "answer": " "}, "has an empty question or an empty answer"),
        ({"question": "Which?", "answer": "C", "options": ["x", "y"]}, "'C', which is none of its options A, B"),
        ({"question": "1+1?", "answer": "2", "form": "box"}, "has the form 'box'; known are"),
        ({"question": "Which?", "answer": "A", "options": ["x"] * 11}, "has 11 options, but letters only go up to J"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        load(lines(tmp_path / "own.jsonl", row))


def test_an_answer_that_nobody_knows_may_be_left_out(tmp_path):
    options = {"question": "Which?", "options": ["x", "y"]}
    path = lines(tmp_path / "own.jsonl", {"question": "1+1?"}, {"question": "2+2?", "answer": None}, options)
    assert [(one.form, one.answer) for one in load(path)] == [("boxed", None), ("boxed", None), ("choice", None)]


def test_two_questions_with_one_id_and_too_few_questions_are_refused(tmp_path):
    row = {"id": "a", "question": "1+1?", "answer": "2"}
    with pytest.raises(ValueError, match="has 2 questions with the id 'a'"):
        load(lines(tmp_path / "own.jsonl", row, row))
    with pytest.raises(ValueError, match=r"n=3 questions are asked for, but .* has 1"):
        load(lines(tmp_path / "own.jsonl", row), n=3)
    with pytest.raises(ValueError, match="has no splits, but split='test'"):
        load(lines(tmp_path / "own.jsonl", row), split="test")
