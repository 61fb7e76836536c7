"""The ready graphs on the bundled model. EARLYEXIT_TEST_MODEL names other weights of its kind."""

import asyncio

import pytest

from langchain_earlyexit import DEER, ChatEarlyExit
from langchain_earlyexit.graph import create_cascade, create_plan_and_solve, create_self_consistency
from langchain_earlyexit.pocket import weights_dir
from langchain_earlyexit.pocket.plans import right_plan, sample_plans


@pytest.fixture(scope="module")
def llm(pocket):
    with ChatEarlyExit(model=pocket, exit_policy=DEER(threshold=0.95), seed=1) as model:
        yield model


# The weights that were taught plans came with the template that shows tools.
PLANS = "<tool_call>" in (weights_dir() / "chat_template.jinja").read_text()


@pytest.mark.skipif(not PLANS, reason="the bundled weights were not taught plans")
def test_most_problems_are_planned_and_no_run_overspends(llm):
    graph = create_plan_and_solve(llm, budget=900, max_steps=6)
    problems = sample_plans("test", 8, seed=0)

    async def solve():
        return await asyncio.gather(*(graph.ainvoke({"messages": [("user", one.story)]}) for one in problems))

    done = asyncio.run(solve())
    assert sum(right_plan(one, end["work"][0].text) for one, end in zip(problems, done, strict=True)) >= 4
    for end in done:
        spends = list(end["ledger"].values())
        assert sum(spend["thinking"] for spend in spends) <= 900
        assert len(end["results"]) == len(end["plan"])
        assert end["messages"][-1].text


def test_a_cascade_and_a_vote_answer_a_sum(llm):
    asked = {"messages": [("user", "What is 41 + 58?")]}
    cascade = create_cascade(llm, llm.bind(exit_policy="never"), budget=600)
    assert "99" in cascade.invoke(asked)["messages"][-1].text
    voted = create_self_consistency(llm, 3, seed=5).invoke(asked)
    assert max(voted["votes"], key=voted["votes"].get) == "99"
