import math
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from langchain_earlyexit.answers import BOXED, CHOICE, FORMS, TEXT, AnswerForm, detect_form

HALF = math.log(0.5)


def trial(form, pieces, logprobs=None, ended=False):
    return form.trial(pieces, logprobs or [HALF] * len(pieces), ended)


# the span


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("5}", "5"),
        (r"\frac{1}{2}} and so on}", r"\frac{1}{2}"),
        (r"\{1, 2\}} done", r"\{1, 2\}"),
        ("{5}}", "{5}"),
        (r"5\\} x", r"5\\"),
        ("}", ""),
    ],
)
def test_a_boxed_answer_ends_at_the_balanced_brace(text, answer):
    assert text[: BOXED.span_end(text)] == answer


@pytest.mark.parametrize("text", ["", "5", r"\frac{1}{2}", r"5\}", "{5}"])
def test_a_box_that_is_still_open_has_no_end(text):
    assert BOXED.span_end(text) is None


@given(st.text(alphabet="ab{}\\ ", max_size=12), st.text(alphabet="ab{}\\ ", max_size=12))
def test_what_follows_the_closing_brace_does_not_move_it(text, more):
    end = BOXED.span_end(text)
    if end is not None:
        assert BOXED.span_end(text + more) == end
        assert text[end] == "}"


@pytest.mark.parametrize(
    ("text", "end"),
    [("B)", 1), (" b).", 2), ("**C**", 3), ("(D)", 2), ("B", None), ("Both", None), ("I think", None), ("K)", None)],
)
def test_a_choice_ends_after_its_letter_once_it_is_no_words_first(text, end):
    assert CHOICE.span_end(text) == end


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\n\nParis. It is", "Paris."),
        ("\n\nParis\nIt", "Paris"),
        ('He said "no." Then', 'He said "no."'),
        ("It is 3.5 m", None),
        ("Paris.", None),
        ("\n\n", None),
    ],
)
def test_a_free_answer_ends_with_its_first_sentence_or_line(text, answer):
    end = TEXT.span_end(text)
    assert (text[:end].strip() if end is not None else None) == answer


# the score


def test_the_score_is_the_geometric_mean_probability():
    assert AnswerForm.score([math.log(0.9), math.log(0.4)]) == pytest.approx(0.6)


def test_one_or_two_tokens_are_scored_like_any_number():
    # the published codes drop the first and last token and divide by n - 2 or n - 1: by zero here, or 1.0
    assert BOXED.score([HALF]) == pytest.approx(0.5)
    assert BOXED.score([HALF, HALF]) == pytest.approx(0.5)


@pytest.mark.parametrize("logprobs", [[], [math.nan], [HALF, -math.inf], [math.inf, HALF], [math.nan, -math.inf]])
def test_no_tokens_or_a_broken_one_is_no_confidence(logprobs):
    assert BOXED.score(logprobs) == 0.0


@given(st.lists(st.floats()))
def test_the_score_is_a_probability(logprobs):
    assert 0.0 <= BOXED.score(logprobs) <= 1.0


# trials


def test_a_trial_goes_on_until_its_brace_closes():
    assert trial(BOXED, ["\\frac", "{1}", "{2"]) is None
    result = trial(BOXED, ["\\frac", "{1}", "{2", "}}"])
    assert result.complete
    assert (result.answer, result.text) == (r"\frac{1}{2}", r"\frac{1}{2}}")


def test_only_tokens_that_hold_the_answer_are_scored():
    # "12" at .5, then a brace the model is unsure of and more text: none of it says how sure it is of 12
    result = trial(BOXED, ["1", "2", "}", ".\n", "So"], [HALF, HALF, -9.0, -9.0, -9.0])
    assert (result.confidence, result.span_tokens, result.text) == (pytest.approx(0.5), 2, "12}")


def test_a_token_that_holds_the_last_digit_and_the_brace_counts():
    result = trial(BOXED, ["1", "2}."], [HALF, math.log(0.125)])
    assert (result.confidence, result.span_tokens, result.answer) == (pytest.approx(0.25), 2, "12")


def test_whitespace_before_the_answer_is_not_scored_but_inside_it_is():
    result = trial(TEXT, ["\n\n", "San", " ", "Jose", "\n"], [-9.0, HALF, HALF, HALF, -9.0])
    assert (result.confidence, result.span_tokens) == (pytest.approx(0.5), 3)


def test_tokens_of_one_letter_are_all_scored():
    result = trial(BOXED, [" ", "", "", "é", "}", ""], [-9.0, HALF, HALF, HALF, -9.0, -9.0])
    assert (result.answer, result.confidence, result.span_tokens) == ("é", pytest.approx(0.5), 3)


@pytest.mark.parametrize("ended", [True, False])
def test_a_box_that_never_closes_is_no_answer(ended):
    pieces = ["5"] * (2 if ended else BOXED.trial_cap)
    result = trial(BOXED, pieces, [0.0] * len(pieces), ended)
    assert (result.answer, result.confidence, result.complete) == (None, 0.0, False)
    assert result.text == "".join(pieces)


def test_an_empty_box_is_no_answer():
    result = trial(BOXED, ["}"], [0.0])
    assert (result.answer, result.confidence, result.complete, result.span_tokens) == (None, 0.0, False, 0)


def test_no_tokens_at_all_are_no_answer():
    for form in FORMS.values():
        result = form.trial([], [], True)
        assert (result.answer, result.text, result.confidence, result.complete) == (None, "", 0.0, False)
        assert form.trial([], [], False) is None


def test_a_choice_is_its_letter_with_the_bracket_kept_for_reuse():
    result = trial(CHOICE, ["B", ")", " because"], [HALF, -9.0, -9.0])
    assert (result.answer, result.text, result.confidence, result.complete) == ("B", "B)", pytest.approx(0.5), True)


def test_a_lone_letter_the_model_ends_on_is_a_choice_and_a_word_is_none():
    assert trial(CHOICE, ["B"]) is None
    assert trial(CHOICE, ["B"], ended=True).complete
    word = trial(CHOICE, ["Both"], ended=True)
    assert (word.answer, word.confidence, word.complete) == (None, 0.0, False)


def test_a_free_trial_is_scored_over_what_there_is():
    assert trial(TEXT, ["Paris"]) is None
    ended = trial(TEXT, ["Par", "is"], ended=True)
    assert (ended.answer, ended.confidence, ended.complete) == ("paris", pytest.approx(0.5), True)
    capped = trial(TEXT, [" a"] * TEXT.trial_cap)
    assert (capped.confidence, capped.complete, capped.span_tokens) == (pytest.approx(0.5), False, TEXT.trial_cap)


def test_every_token_needs_its_logprob():
    with pytest.raises(ValueError, match="2 pieces, but 1 logprobs"):
        BOXED.trial(["1", "2"], [HALF], False)


@given(st.text(alphabet="1\\{} é", max_size=12), st.data())
def test_how_a_trial_is_split_into_tokens_changes_neither_answer_nor_text(text, data):
    edges = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *edges], [*edges, len(text)], strict=True)]
    whole, split = trial(BOXED, [text], ended=True), trial(BOXED, pieces, ended=True)
    assert (whole.answer, whole.text, whole.complete) == (split.answer, split.text, split.complete)
    assert split.confidence == pytest.approx(whole.confidence)


# normalised answers


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        (" 42 ", "42"),
        ("42.", "42"),
        ("+42", "42"),
        ("007", "7"),
        ("3.0", "3"),
        ("3.50", "3.5"),
        (".5", "0.5"),
        ("-0", "0"),
        ("−5", "-5"),
        ("- 5", "-5"),
        ("1,234,567", "1234567"),
        ("1{,}234", "1234"),
        (r"1\,234", "1234"),
        ("$42$", "42"),
        (r"\(42\)", "42"),
        (r"\text{ 42 }", "42"),
        (r"\mathrm{\text{Monday}}", "Monday"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\tfrac12", r"\frac12"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \frac{\pi}{2})"),
        ("(3,4)", "(3, 4)"),
        ("p - q", "p-q"),
        (r"2 \pi r", r"2\pi r"),
        ("9" * 40 + ".0", "9" * 40),
        ("", ""),
    ],
)
def test_a_boxed_answer_is_normalised(raw, normal):
    assert BOXED.normalise(raw) == normal


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (r"\frac34", r"\frac14"),
        (r"5\sqrt3", r"2\sqrt3"),
        ("x^2", "y^2"),
        (r"(5, \frac{\pi}{2})", r"(3, \frac{\pi}{2})"),
        ("50%", "50"),
        (r"336^\circ", "336"),
        ("1, 234", "1234"),
        ("1,23", "123"),
        ("x", "X"),
        ("10", "1"),
        ("2 3/4", "23/4"),
        (r"\text{a} + \text{b}", "a + b"),
        (r"\leftarrow", "arrow"),
        ("5", "-5"),
    ],
)
def test_different_boxed_answers_stay_different(a, b):
    # the first four are pairs that a published grader takes for equal
    assert not BOXED.same(a, b)


@given(st.text(alphabet="0123456789,.+-$(){}\\ abtextlfrgdqu~!=[]", max_size=24))
@example("1, 234")
@example(r"\text{\text{1,234.}}")
@example("$$$")
@example(r"\boxed{\left. 5\ \right.}")
def test_normalising_twice_is_normalising_once(text):
    for form in FORMS.values():
        once = form.normalise(text)
        assert form.normalise(once) == once
        assert form.same(text, once)


@given(st.integers(-(10**12), 10**12))
def test_one_whole_number_written_in_many_ways_is_one_answer(n):
    for raw in (f"{n}", f"{n:,}", f"{n}.0", f" {n}. ", f"${n}$", f"\\text{{{n}}}"):
        assert BOXED.same(raw, str(n))


def test_no_answer_is_the_same_as_none():
    assert not BOXED.same(None, None)
    assert not BOXED.same("5", None)


# answers in full texts


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (r"The answer is \boxed{5}.", "5"),
        (r"\boxed{4}, no: \boxed{5}", "5"),
        (r"\boxed{\frac{14}{3}}", r"\frac{14}{3}"),
        (r"\boxed {5}", "5"),
        (r"\boxed{5} and a cut \boxed{6", "5"),
        (r"{a \boxed{5}", "5"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{}", None),
        ("The answer is 5.", None),
        ("", None),
    ],
)
def test_the_last_balanced_box_is_the_answer(content, answer):
    assert BOXED.extract(content) == answer


@given(st.text(alphabet="ab1{}\\ ", max_size=12))
def test_a_complete_trial_reads_the_same_in_the_full_text(text):
    result = trial(BOXED, [text], ended=True)
    if result.complete and "box" not in text:
        assert BOXED.extract(BOXED.inducer + result.text) == result.answer


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("The answer is (B)", "B"),
        ("The answer is B.", "B"),
        ("Answer: **C**", "C"),
        ("(A) is too small, so the answer is (B). (C) is too big.", "B"),
        ("So it must be (D).", "D"),
        (r"\boxed{B}", "B"),
        (r"\boxed{\text{(c)}}", "C"),
        ("b)", "B"),
        ("A", "A"),
        (r"\boxed{a + b}", None),
        ("The answer is a matter of taste.", None),
        ("The answer is I'd say unclear.", None),
        ("P(A) is one half.", None),
        ("", None),
    ],
)
def test_the_letter_called_the_answer_is_the_choice(content, answer):
    assert CHOICE.extract(content) == answer


def test_a_free_answer_is_the_whole_text_case_and_spaces_aside():
    assert TEXT.extract(" The  capital\nis Paris. ") == "the capital is paris"
    assert TEXT.extract(" 1,000.0 ") == "1000"
    assert TEXT.extract(" \n") is None


# forms


def test_a_form_is_plain_data_whose_inducer_a_family_may_replace():
    other = replace(BOXED, inducer="\n\n**Final Answer**\n\nThe final answer is \\boxed{")
    assert other != BOXED
    assert other == replace(BOXED, inducer=other.inducer)
    assert hash(other) is not None
    assert list(FORMS) == ["boxed", "choice", "text"]
    assert [form.name for form in FORMS.values()] == list(FORMS)


def test_a_boxed_inducer_must_leave_its_box_open_and_a_cap_must_allow_a_token():
    with pytest.raises(ValueError, match="end with its open brace"):
        replace(BOXED, inducer="The answer is \\boxed")
    with pytest.raises(ValueError, match="at least 1 token"):
        replace(TEXT, trial_cap=0)


@pytest.mark.parametrize(
    ("conversation", "form"),
    [
        ("What is 2 + 2?", "text"),
        (r"What is 2 + 2? Put your final answer within \boxed{}.", "boxed"),
        ("Which is prime?\nA) 4\nB) 5\nC) 6", "choice"),
        ("Which is prime?\n(A) 4\n(B) 5", "choice"),
        ("Which is prime?\n\nA. 4\nB. 5\nC. 9\nD. 6", "choice"),
        ("Which is prime? 4 is A, 5 is B. Answer with the letter only.", "choice"),
        ("Give the letter of the correct option.", "choice"),
        ("Which is prime?\nA) 4\nB) 5\nPut the letter in \\boxed{}.", "boxed"),
        ("Outline this:\nA. Introduction\nB. Methods", "text"),
        ("Please reply with a letter to the landlord.", "text"),
        ("What does the letter say? A lot.", "text"),
    ],
)
def test_the_form_is_what_the_conversation_asks_for(conversation, form):
    assert detect_form(conversation, "text").name == form
    assert detect_form(conversation, "boxed").name == ("boxed" if form == "text" else form)


def test_an_unknown_habit_is_a_clear_error():
    with pytest.raises(ValueError, match="unknown answer habit 'tables'"):
        detect_form("Hello", "tables")
