"""The grader: right answers in any notation are right, wrong ones are wrong, and nothing hangs it."""

import json
import logging
import re
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_earlyexit.answers import BOXED, CHOICE, TEXT
from langchain_earlyexit.lab import grade as grading
from langchain_earlyexit.lab.grade import grade, grade_all, main
from langchain_earlyexit.lab.notation import boxed, exact
from langchain_earlyexit.lab.rewrites import ALTERATIONS, REWRITES, changed, measure
from langchain_earlyexit.lab.symbolic import Algebraists

GOLDS_FILE = Path(__file__).parent / "data" / "math500_golds.jsonl"
GOLDS = [json.loads(line)["answer"] for line in GOLDS_FILE.read_text().splitlines()]


def no_algebra(monkeypatch):
    """Any need of another process is a failure."""

    def refuse(pairs):
        assert not pairs, f"computer algebra was asked about {pairs}"
        return []

    monkeypatch.setattr(grading._ALGEBRAISTS, "same_all", refuse)


SAME = [
    # numbers
    ("0.5", r"\frac{1}{2}"), ("1/2", r"\frac12"), (r"\frac{-35}{9}", r"-\frac{35}{9}"), ("9/5", r"1\frac{4}{5}"),
    ("1 4/5", r"1\frac{4}{5}"), (r"0.\overline{3}", r"\frac{1}{3}"), (r"6.72 \times 10^{-5}", ".0000672"),
    ("18.00", "18"), ("70,000", "70000"), ("58500", "58,500"), (r"10{,}080", r"10,\!080"),
    (r"2021\cdot 505", "1020605"),
    (r"\frac{4!}{2^3}", "3"), ("007", "7"), ("−3", "-3"),
    # units, currency, percent, bases
    ("90", r"90^\circ"), ("90°", r"90^{\circ}"), (r"90 \text{ degrees}", r"90^\circ"), ("5.4", r"5.4 \text{ cents}"),
    ("$18", "18"), (r"\$18.90", "18.9"), ("18 dollars", r"\$18"), ("864 square inches", r"864 \mbox{ inches}^2"),
    (r"15 \text{ cm}^2", r"15\mbox{ cm}^2"), ("8%", r"8 \%"), ("0.08", r"8\%"), ("8", r"8\%"), (r"62.5\%", "62.5"),
    ("52_{8}", "52_8"), ("52", "52_8"), ("42_{10}", "42"), ("18 eggs", "18"),
    # lists, sets, points, intervals
    ("-2, 1", "1,-2"), (r"\{1, -2\}", "1,-2"), (r"1 \text{ and } -2", "1,-2"), ("x=1 or x=-2", "1,-2"),
    (r"1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}"), (r"\{-2, 1-\sqrt5, 1+\sqrt5\}", r"\{1\pm\sqrt{5},-2\}"),
    (r"(3, \frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)"), (r"(3,4]", r"\left(3, 4\right]"),
    (r"(3,\infty)\cup(-\infty,2)", r"(-\infty, 2) \cup (3, \infty)"), ("x > 2", r"(2,\infty)"),
    (r"-2 \le x \le 7", r"x \in [-2,7]"), (r"[2,\infty)", r"k \geqslant 2"), ("7 >= x >= -2", "[-2,7]"),
    ("(8,18), (2,32)", "(2,32), (8,18)"), ("100, 200", "100,200"), ("3 : 2", "3:2"),
    # matrices
    (r"\begin{bmatrix}-0.5\\2/3\end{bmatrix}", r"\begin{pmatrix} -1/2 \\ 2/3 \end{pmatrix}"),
    ("(-2,-14,-7)", r"\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}"),
    # names
    ("5", "x=5"), ("x = 5", "5"), ("2x+3", "y = 2x + 3"), ("f(x)=2x", "f(n)=2n"), (r"x \in [-2,7]", "[-2,7]"),
    # words
    ("evelyn", r"\text{Evelyn}"), (r"\textbf{East}", r"\text{east}"), ("No.", r"\text{no}"), ("C", r"\text{(C)}"),
    (r"\mathrm{(C)}", "C"), (r"\text{(C)}", "(C)"),
    # wrapping
    (r"$\dfrac{14}{3}$.", r"\frac{14}{3}"), (r"\[ 3\sqrt{13} \]", r"3 \sqrt{13}"),
    (r"\boxed{\frac{14}{3}}", r"\frac{14}{3}"),
    (r"First \boxed{3}. No: \boxed{\text{(C)}}", "C"), (r"\boxed{\boxed{5}}", "5"), (r"8 \pi", r"8\pi"),
    ("6−5i", "6 - 5i"),
]  # fmt: skip

DIFFERENT = [
    ("0.333", r"\frac{1}{3}"), ("0.3333333333333333", "1/3"), (".0000673", ".0000672"), ("12", "2"), ("10", "10,080"),
    ("1.2", "12"), ("1000000", "10^{100}"), ("12 13", "1213"), ("3.5.2", "3.5"), ("-5", "5"),
    ("5 cm", r"5\text{ m}"), (r"5 \text{ cents}", r"\$5"), ("80%", r"8\%"), ("800", r"8\%"), ("52_9", "52_8"),
    ("42", "52_8"),
    ("(2,1)", "(1,2)"), (r"\{1,2\}", "(1,2)"), ("(1,2]", "[1,2]"), ("[1,2)", "(1,2]"), ("x > 2", r"[2,\infty)"),
    ("2,3", "2,3,4"), ("2,2", "2,3"), ("2,2,3", "2,3,3"), ("5 or 6", "5"), ("2:3", "3:2"), ("(1,2)", "(1,2,3)"),
    (r"\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix}", r"\begin{pmatrix}1 & 3\\2 & 4\end{pmatrix}"),
    (r"\begin{vmatrix}1 & 2\\3 & 4\end{vmatrix}", r"\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix}"),
    ("x=5", "y=5"), ("x", "X"), ("R", "r"), ("west", r"\text{east}"), ("seat", r"\text{east}"), ("A", r"\text{(C)}"),
    ("even", "7"), ("I don't know", "5"), ("", "5"), ("  ", "5"), (r"\boxed{}", "5"),
    (r"\boxed{4} then \boxed{3}", "4"),
    ("$", "5"), ("\\", "5"), ("{" * 300 + "5" + "}" * 300, "6"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "gold"), SAME)
def test_a_right_answer_in_other_notation_is_right_without_computer_algebra(answer, gold, monkeypatch):
    no_algebra(monkeypatch)
    assert grade(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_a_wrong_answer_is_wrong_without_computer_algebra(answer, gold, monkeypatch):
    no_algebra(monkeypatch)
    assert not grade(answer, gold)


SAME_BY_ALGEBRA = [
    (r"\sqrt{117}", r"3\sqrt{13}"), (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}"), ("-5i+6", "6-5i"),
    ("(x+1)^2", "x^2+2x+1"),
    ("n/2 + n^2/2", r"\frac{n(n+1)}{2}"), (r"2(3)\sqrt{2}", r"6\sqrt{2}"), ("0.5x", r"\frac{x}{2}"),
    ("(2+i)(2-i)", "5"),
    (r"\frac{\cos x}{\sin x}", r"\cot x"), (r"\frac{\sqrt{6}-\sqrt{2}}{4}", r"\sin 15^\circ"), ("cd+ab", "ba+dc"),
    ("10x - 14y + 22z + 8 = 0", "5x - 7y + 11z + 4 = 0"), ("2x - y + 3 = 0", "y = 2x + 3"),
    ("sqrt(2)/2", r"\frac{1}{\sqrt2}"),
    (r"(\sqrt{4}, \frac{2\pi}{4})", r"(2, \frac{\pi}{2})"), (r"\sqrt{12}, 1", r"1, 2\sqrt3"), (r"\log_2 8", "3"),
]  # fmt: skip
DIFFERENT_BY_ALGEBRA = [
    ("x^2", "y^2"), (r"5\sqrt3", r"2\sqrt3"), (r"(5, \frac{\pi}{2})", r"(3, \frac{2\pi}{4})"), ("2k+2", "2n+2"),
    ("3r^2", "3R^2"),
    ("1.41421356", r"\sqrt2"), (r"\sqrt2+10^{-20}", r"\sqrt2"), ("2x+4", "y=2x+3"),
    ("5x - 7y + 11z = 4", "5x - 7y + 11z + 4 = 0"),
    (r"\frac{", "5"), ("(" * 200, "5"), ("12 13", "25"), (r"\frac{1}{0}", "0"), (r"\boxed{5", "5"),
]  # fmt: skip


def test_expressions_are_compared_by_what_they_are_worth():
    pairs = SAME_BY_ALGEBRA + DIFFERENT_BY_ALGEBRA
    verdicts = grade_all(pairs)
    assert [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict] == SAME_BY_ALGEBRA


@given(st.integers(-999, 999), st.integers(1, 999), st.integers(2, 9), st.sampled_from([-1, 1]))
def test_a_fraction_is_itself_in_any_terms_and_is_not_its_neighbour(top, bottom, factor, step):
    gold = rf"\frac{{{top}}}{{{bottom}}}"
    assert grade(f"{top * factor}/{bottom * factor}", gold)
    assert not grade(f"{top * factor + step}/{bottom * factor}", gold)


@given(st.integers(-(10**9), 10**9), st.integers(1, 6), st.sampled_from([-1, 1]))
def test_a_decimal_is_compared_to_its_last_digit(digits, places, step):
    def said(number):
        text = str(abs(number)).rjust(places + 1, "0")
        return f"{'-' if number < 0 else ''}{text[:-places]}.{text[-places:]}"

    value = Fraction(digits, 10**places)
    assert grade(said(digits), f"{value.numerator}/{value.denominator}")
    assert not grade(said(digits + step), f"{value.numerator}/{value.denominator}")


ARITHMETIC = st.recursive(
    st.integers(0, 20).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: f"({''.join(parts)})"),
    max_leaves=6,
)


@given(ARITHMETIC)
def test_plain_arithmetic_is_worth_what_python_says(expression):
    try:
        worth = eval(re.sub(r"(\d+)", r"Fraction(\1)", expression), {"Fraction": Fraction})  # noqa: S307
    except ZeroDivisionError:
        worth = None
    assert exact(expression.replace("*", r"\cdot ")) == worth


PIECES = [
    *"0123456789xiab+-*/^_=<>(){}[],.;:|!&%$ \\°¤",
    "and",
    " cm",
    r"\frac",
    r"\sqrt",
    r"\text{",
    r"\{",
    r"\}",
    r"\pm",
]
PIECES += [r"\cup", r"\\", r"\boxed{", r"\begin{pmatrix}", r"\end{pmatrix}", r"\infty", r"\in", r"\leq", r"^\circ", "−"]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
def test_no_text_breaks_the_grader_and_what_is_spelled_alike_is_the_same(text):
    assert grading._by_spelling("5", text) in (True, False, None)
    assert grading._by_spelling(text, r"\{1\pm x, (2, 3]\}") in (True, False, None)
    assert grading._by_spelling(text, text) is True


class TestTheBugsOfPublishedGraders:
    """LYNX's reads a gold answer up to the first closing brace, and compares the last number of each side first."""

    @staticmethod
    def first_closing_brace(text):
        found = re.search(r"\\boxed\{([^}]*)\}", text)
        return found.group(1) if found else text

    @staticmethod
    def last_number(answer, gold):
        one, other = (re.findall(r"-?\d+(?:\.\d+)?", text) for text in (answer, gold))
        return one[-1] == other[-1] if one and other else answer == gold

    def test_every_gold_answer_comes_out_of_its_box_whole(self):
        solutions = [rf"So $x$ is $\boxed{{{gold}}}$, as \boxed{{ was asked." for gold in GOLDS]
        assert [boxed(text) for text in solutions] == GOLDS
        assert sum(self.first_closing_brace(text) != gold for text, gold in zip(solutions, GOLDS, strict=True)) > 80

    def test_an_answer_cut_at_its_first_closing_brace_is_wrong(self, monkeypatch):
        no_algebra(monkeypatch)
        assert grade(r"\frac{14}{3}", r"It is \boxed{\frac{14}{3}}")
        assert not grade("14", r"It is \boxed{\frac{14}{3}}")

    def test_answers_that_agree_in_their_last_number_alone_are_wrong(self):
        pairs = [
            (r"\frac{3}{4}", r"\frac{1}{4}"),
            (r"5\sqrt3", r"2\sqrt3"),
            ("x^2", "y^2"),
            (r"(5, \pi/2)", r"(3, \pi/2)"),
        ]
        assert all(self.last_number(*pair) for pair in pairs)
        assert not any(grade_all(pairs))

    def test_a_first_number_changed_makes_an_answer_of_several_wrong(self):
        golds = [gold for gold in GOLDS if len(re.findall(r"\d+", gold)) > 1 and "sqrt" not in gold and "x" not in gold]
        pairs = [(re.sub(r"\d+", lambda m: str(int(m.group()) + 1), gold, count=1), gold) for gold in golds]
        assert len(pairs) > 80
        assert sum(self.last_number(*pair) for pair in pairs) > 0.9 * len(pairs)
        assert not any(grade_all(pairs))


class TestFormsAndNoAnswer:
    def test_no_answer_is_wrong(self):
        assert not grade(None, "5")

    def test_a_gold_answer_normalised_by_its_form_is_still_right(self, monkeypatch):
        no_algebra(monkeypatch)
        assert all(grade_all([(BOXED.normalise(gold), gold) for gold in GOLDS]))

    @pytest.mark.parametrize(
        "answer", ["B", "b", "(B)", "B.", r"\boxed{B}", r"\text{B}", "The answer is (B).", "**B**"]
    )
    def test_a_choice_is_graded_by_its_letter(self, answer):
        assert grade(answer, "B", CHOICE)
        assert not grade(answer, "C", "choice")

    def test_a_choice_of_no_letter_is_wrong(self):
        assert not grade("both", "B", "choice")
        assert not grade(None, "B", "choice")

    def test_a_free_answer_is_graded_by_its_words_or_its_value(self):
        assert grade("paris.", "Paris", TEXT)
        assert grade("1,200", "1200", "text")
        assert not grade("London", "Paris", "text")

    def test_a_runaway_answer_is_none_but_its_box_counts(self):
        assert not grade("5 " * 2000, "5")
        assert grade("so " * 2000 + r"\boxed{5}", "5")

    @pytest.mark.parametrize(
        ("gold", "form", "message"),
        [
            ("5", "schema", "form 'schema' cannot be compared"),
            (" ", "boxed", "empty gold"),
            ("E5", "choice", "got 'E5'"),
        ],
    )
    def test_what_cannot_be_graded_is_an_error(self, gold, form, message):
        with pytest.raises(ValueError, match=message):
            grade("5", gold, form)

    def test_without_math_verify_plain_answers_are_graded_and_others_say_what_to_install(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert grade("0.5", r"\frac12")
        with pytest.raises(ImportError, match=r"pip install 'langchain-earlyexit\[lab\]'"):
            grade(r"\sqrt{8}", r"2\sqrt{2}")


@pytest.fixture(scope="module")
def one_worker():
    workers = Algebraists(workers=1, seconds=1)
    yield workers
    workers.close()


def worker_processes():
    return [child for child in psutil.Process().children() if "lab.symbolic" in " ".join(child.cmdline())]


class TestComputerAlgebraElsewhere:
    def test_a_pair_that_takes_for_ever_is_wrong_with_a_warning_and_the_next_is_graded(self, one_worker, caplog):
        with caplog.at_level(logging.WARNING):
            assert not one_worker.same("5", "9^{9^{9^{9}}}")
        assert "'9^{9^{9^{9}}}' and '5' (took over 1 s)" in caplog.text
        assert one_worker.same(r"2\sqrt{2}", r"\sqrt{8}")

    def test_a_process_that_was_killed_is_replaced(self, one_worker):
        assert one_worker.same(r"2\sqrt{2}", r"\sqrt{8}")
        before = worker_processes()
        for process in before:
            process.kill()
            process.wait()
        assert one_worker.same(r"2\sqrt{2}", r"\sqrt{8}")
        assert not {process.pid for process in before} & {process.pid for process in worker_processes()}

    def test_threads_share_a_bounded_number_of_processes(self, one_worker):
        verdicts = {}

        def ask(at):
            verdicts[at] = one_worker.same(rf"{at}\sqrt{{2}}", rf"\sqrt{{{2 * at * at + at % 2}}}")

        before = len(worker_processes())
        threads = [threading.Thread(target=ask, args=(at,)) for at in range(2, 8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert verdicts == {at: at % 2 == 0 for at in range(2, 8)}
        assert len(worker_processes()) <= max(before, 1)

    @pytest.mark.parametrize(("arguments", "message"), [({"workers": 0}, "got 0"), ({"seconds": 0}, "got 0")])
    def test_no_workers_or_no_time_is_an_error(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            Algebraists(**arguments)

    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform == "win32", reason="needs limits of POSIX")
    def test_a_process_ends_though_nobody_is_there_to_end_it(self):
        code = "from langchain_earlyexit.lab.symbolic import serve; serve()"
        with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            process.stdin.write(json.dumps(["5", "9^{9^{9^{9}}}", 1]) + "\n")
            process.stdin.close()
            process.wait(timeout=240)


class TestRates:
    def test_the_self_test_would_catch_a_lenient_grader(self):
        wrong = changed(GOLDS, ALTERATIONS)
        lenient = sum(TestTheBugsOfPublishedGraders.last_number(answer, gold) for _, answer, gold in wrong)
        assert lenient > 0.1 * len(wrong)

    def test_the_self_test_would_catch_one_that_compares_text(self):
        right = changed(GOLDS, REWRITES)
        assert sum(BOXED.normalise(answer) == BOXED.normalise(gold) for _, answer, gold in right) < 0.9 * len(right)

    def test_every_kind_of_rewrite_and_alteration_is_tried(self):
        assert {kind for kind, _, _ in changed(GOLDS, REWRITES)} == set(REWRITES)
        assert {kind for kind, _, _ in changed(GOLDS, ALTERATIONS)} == set(ALTERATIONS)

    def test_a_tenth_of_the_gold_answers_is_graded_within_the_bounds_by_the_command(self, tmp_path, capsys):
        some = tmp_path / "golds.jsonl"
        some.write_text("\n".join(json.dumps({"answer": gold}) for gold in GOLDS[::10]))
        assert main(["--self-test", str(some)]) == 0
        said = capsys.readouterr().out
        rejects, accepts = (float(share) for share in re.findall(r"([\d.]+)%", said))
        assert rejects <= 1.0
        assert accepts <= 2.0

    @pytest.mark.slow
    def test_at_most_one_percent_of_right_answers_are_rejected_and_two_of_wrong_ones_accepted(self):
        rates = measure(GOLDS)
        assert sum(rates.right.values()) > 5000
        assert sum(rates.wrong.values()) > 1000
        assert rates.false_rejects <= 0.01, rates.rejected
        assert rates.false_accepts <= 0.02, rates.accepted
