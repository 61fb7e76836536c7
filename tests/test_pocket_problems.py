import re
import subprocess
import sys

import pytest

from langchain_earlyexit.pocket.problems import DOUBT_SHARES, LEVELS, MIX, SMALL_SHARES, Problem, sample, split_of


def test_sampling_is_deterministic_and_distinct() -> None:
    first, again, other = sample("test", 300, 1), sample("test", 300, 1), sample("test", 300, 2)
    assert first == again
    assert first != other
    assert len({problem.question for problem in first}) == 300


def test_every_family_and_level_occurs() -> None:
    problems = sample("dev", 600, 0)
    assert {problem.family for problem in problems} == set(MIX.shares)
    assert {problem.level for problem in problems} == {"easy", "medium", "hard"}
    assert all(LEVELS[problem.family] == problem.level for problem in problems)
    assert abs(sum(MIX.shares.values()) - 1) < 1e-9


def test_answers_are_right() -> None:
    others = [problem for shares in (SMALL_SHARES, DOUBT_SHARES) for problem in sample("train", 300, 3, shares)]
    for problem in sample("train", 2000, 3) + others:
        restated = problem.restated
        if problem.family == "rem":
            a, b = problem.numbers
            expected = a % b
        elif problem.family == "cmp":
            sides = [eval(side) for side in restated.split(" of ")[1].split(" and ")]  # noqa: S307
            expected = max(sides) if problem.form == "larger" else min(sides)
        elif problem.family == "seq":
            start, step, term = problem.numbers
            expected = [start + step * index for index in range(term)][-1]
        else:
            expected = eval(restated)  # noqa: S307
        assert problem.answer == str(expected)
        assert int(problem.answer) >= 0


def test_problems_beyond_it_are_of_their_own_level_and_never_in_the_card_s_mix() -> None:
    assert {problem.level for problem in sample("test", 100, 0, DOUBT_SHARES)} == {"beyond"}
    assert not set(DOUBT_SHARES) & set(MIX.shares)


def _numbers(problem: Problem) -> tuple[str, tuple[int, ...]]:
    return problem.family, tuple(sorted(problem.numbers))


def test_splits_share_no_numbers_in_commutative_families() -> None:
    commutative = {"add2", "add3", "mul21", "mul31", "mul22"}
    train = {_numbers(problem) for problem in sample("train", 4000, 0) if problem.family in commutative}
    held_out = {
        _numbers(problem)
        for split in ("dev", "test")
        for problem in sample(split, 1500, 0)  # type: ignore[arg-type]
        if problem.family in commutative
    }
    assert not train & held_out


def test_split_is_by_key() -> None:
    shares = [split_of(f"add:{a},{b}") for a in range(11, 60) for b in range(a, 99)]
    for split in ("dev", "test"):
        assert shares.count(split) / len(shares) == pytest.approx(1 / 16, abs=0.02)  # type: ignore[arg-type]


def test_questions_name_their_numbers() -> None:
    for problem in sample("test", 500, 5):
        written = {int(number) for number in re.findall(r"\d+", problem.question)}
        assert problem.family == "seq" or set(problem.numbers) <= written


def test_importing_problems_loads_no_torch() -> None:
    code = (
        "import sys; import langchain_earlyexit.pocket.problems, langchain_earlyexit.pocket; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
