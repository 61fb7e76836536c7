"""The benchmark of the graphs: paired, net, and fair to the flat budget."""

import re

import pytest
from agents_for_tests import talker
from hypothesis import given
from hypothesis import strategies as st

from langchain_earlyexit import DEER, ChatEarlyExit
from langchain_earlyexit.lab.agents_bench import (
    CONFIDENT,
    FLAT,
    NO_CONTROL,
    PER_STEP,
    WITH_CALIBRATIONS,
    Calibrated,
    Solved,
    equal_cap,
    markdown,
    measure,
)
from langchain_earlyexit.pocket.plans import plan_text, sample_plans

QUESTIONS = 2


def solver(turns):
    """Plans the problems right, does the sums right, and thinks long about each."""
    plans = {problem.story: problem for problem in sample_plans("test", QUESTIONS, 0)}
    [*_, (_, asked)] = turns
    if asked in plans:
        return f"First this.\n\n{'Then that. ' * 30}\n", (lambda chain: (plan_text(plans[asked].steps), 0.99))
    if found := re.fullmatch(r"What is (\d+) ([-+*]) (\d+)\?", asked):
        left, right = int(found[1]), int(found[3])
        result = {"+": left + right, "-": left - right, "*": left * right}[found[2]]
    else:
        result = re.findall(r"= (-?\d+)", asked)[-1]
    said = rf"The final answer is \boxed{{{result}}}."
    return f"It is so.\n\n{'And so it is. ' * 20}\n", (lambda chain: (said, 0.99))


class Promising(ChatEarlyExit):
    """Takes `confidence` as a calibrated model would: for 0.9875 and less it leaves early."""

    def call_settings(self, **kwargs):
        return super().call_settings(**{**kwargs, "confidence": None})

    def _start(self, messages, stop, kwargs):
        asked = kwargs.get("confidence")
        policy = DEER(0.95) if asked is not None and asked <= 0.9876 else kwargs.get("exit_policy")
        return super()._start(messages, stop, {**kwargs, "confidence": None, "exit_policy": policy})


@pytest.fixture(scope="module")
def bench():
    with talker(solver) as llm:
        promising = Promising(engine=llm.engine, seed=1)
        calibrated = Calibrated(promising, promising, epsilon=0.1)
        return measure(llm, QUESTIONS, calibrated=calibrated, width=2, progress=False)


def test_every_regime_solves_the_same_problems(bench):
    assert list(bench.solved) == list(WITH_CALIBRATIONS)
    for regime in set(WITH_CALIBRATIONS) - {FLAT}:
        assert [one.right and one.right_plan for one in bench.solved[regime]] == [True] * QUESTIONS
        assert bench.seconds[regime] > 0
    for one, problem in zip(bench.solved[NO_CONTROL], bench.problems, strict=True):
        assert len(one.calls) == len(problem.steps) + 2


def test_the_per_step_policies_save_and_the_flat_budget_costs_no_more_than_they_do(bench):
    cost = {regime: sum(one.reasoning for one in bench.solved[regime]) for regime in WITH_CALIBRATIONS}
    assert cost[CONFIDENT] < cost[NO_CONTROL], "0.1 over plan, six steps and answer is 0.0125 each"
    assert cost[PER_STEP] < cost[NO_CONTROL]
    assert cost[FLAT] <= cost[PER_STEP]


def test_the_table_has_a_row_for_each_regime(bench):
    table = markdown(bench)
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert rows[2:] == list(WITH_CALIBRATIONS)
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1


def test_a_run_that_comes_to_an_error_counts_as_wrong_and_is_told():
    def mute(turns):
        if turns[0][0] == "system":
            raise ValueError("the prompt has 2119 tokens")
        return "Hm.\n", "602"

    with talker(mute) as llm:
        told = measure(llm, 1, width=1, progress=False)
    assert not any(one.right for rows in told.solved.values() for one in rows)
    assert "1 runs came to an error and count as not solved, such as: the prompt has 2119 tokens" in markdown(told)


@given(
    st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=5), min_size=1, max_size=5),
    st.integers(0, 400),
    st.integers(0, 9),
)
def test_the_flat_cap_is_the_highest_that_costs_no_more(lengths, tokens, closing):
    runs = [Solved("1", True, True, tuple((length, length) for length in one)) for one in lengths]

    def cost(cap):
        return sum(length if length <= cap else cap + closing for one in lengths for length in one)

    cap = equal_cap(runs, tokens, closing)
    longest = max(max(one) for one in lengths)
    assert cap == 1 or cost(cap) <= tokens
    assert all(cost(higher) > tokens for higher in range(cap + 1, longest + 1))
