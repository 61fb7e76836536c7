"""The ready graphs: plan and solve, cascade, self-consistency."""

import asyncio
import itertools
import re

import pytest
from agents_for_tests import PLAN, PROBLEM, arithmetician, chatterer, promising, talker
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command

from langchain_earlyexit import ChatEarlyExit
from langchain_earlyexit.graph import (
    ReasoningState,
    create_budgeted_agent,
    create_cascade,
    create_plan_and_solve,
    create_self_consistency,
    reasoning_node,
)
from langchain_earlyexit.plan_and_solve import STEP_REQUEST, compose_results, parse_numbered_plan
from langchain_earlyexit.pocket.plans import PLANNER_PROMPT, compose_request, plan_text, sample_plans, step_questions
from langchain_earlyexit.self_consistency import answer_in, still_needed

THREAD = {"configurable": {"thread_id": "1"}}


def entries(state):
    return list(state["ledger"].values())


@pytest.fixture(params=["sync", "async"])
def run(request):
    """Run a graph to its end, both ways."""
    if request.param == "sync":
        return lambda graph, given, *rest: graph.invoke(given, *rest)
    return lambda graph, given, *rest: asyncio.run(graph.ainvoke(given, *rest))


class TestReadingAPlan:
    def test_takes_numbered_lines_and_what_stands_before_them(self):
        assert parse_numbered_plan("1. Add 2 and 3\n2) Double #1.\n") == ["Add 2 and 3", "Double #1."]
        assert parse_numbered_plan("Here is a plan:\n\n 1. Add\n\n 2. Double #1\n") == ["Add", "Double #1"]

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "The answer is 5.",
            "1. Add\n3. Double",
            "2. Add",
            "1. Double #1",
            "1. Add #2\n2. Go",
            "1. Add #0",
            "1. A\nB",
        ],
    )
    def test_knows_what_is_none(self, text):
        assert parse_numbered_plan(text) is None

    def test_reads_and_prompts_as_the_pocket_model_has_learnt_to_plan(self):
        from langchain_earlyexit.plan_and_solve import PLANNER_PROMPT as OURS

        assert OURS == PLANNER_PROMPT
        for problem in sample_plans("dev", 20, seed=1):
            assert parse_numbered_plan(plan_text(problem.steps)) == [f"What is {step}?" for step in problem.steps]
            asked = step_questions(problem)
            solved = [question.removeprefix("What is ").removesuffix("?") for question in asked]
            assert compose_results(problem.story, asked, [str(r) for r in problem.results]) == compose_request(
                problem.story, solved, problem.results
            )


class TestPlanAndSolve:
    def test_plans_solves_step_by_step_and_answers(self, run):
        done = run(create_plan_and_solve(talker(arithmetician)), {"messages": [("user", PROBLEM)]})
        assert [message.text for message in done["messages"]] == [PROBLEM, r"The final answer is \boxed{16}."]
        assert done["plan"] == PLAN
        assert done["results"] == {"1": "12", "2": "4", "3": "16"}
        assert [spend["step"] for spend in entries(done)] == ["plan", "step 1", "step 2", "step 3", "answer"]
        assert {spend["cap"] for spend in entries(done)} == {None}

    def test_steps_that_wait_for_nothing_run_side_by_side_the_others_in_turn(self):
        graph = create_plan_and_solve(talker(arithmetician))
        waves = [
            sorted(part["step"]["results"])
            for part in graph.stream({"messages": [("user", PROBLEM)]})
            if "step" in part
        ]
        order = [next(iter(part)) for part in graph.stream({"messages": [("user", PROBLEM)]}) if "begin" not in part]
        assert sorted(itertools.chain(*waves)) == ["1", "2", "3"]
        assert order == ["plan", "step", "step", "gather", "step", "gather", "answer"]

    @pytest.mark.parametrize("schedule", ["even", "linear", "cosine"])
    def test_keeps_to_its_budget_and_lets_the_steps_have_what_others_left(self, run, schedule):
        graph = create_plan_and_solve(talker(arithmetician), budget=60, schedule=schedule)
        done = run(graph, {"messages": [("user", PROBLEM)]})
        spent = [spend["thinking"] for spend in entries(done)]
        assert sum(spent) <= 60
        assert all(spend["thinking"] <= spend["cap"] for spend in entries(done))
        assert spent[1] > 6, "a plan of three steps leaves them what eight would have needed"

    def test_a_budget_of_the_caller_s_goes_before_its_own(self, run):
        graph = create_plan_and_solve(talker(arithmetician), budget=9)
        assert sum(s["thinking"] for s in entries(run(graph, {"messages": [("user", PROBLEM)]}))) <= 9
        done = run(graph, {"messages": [("user", PROBLEM)], "budget": {"tokens": 1000}})
        assert sum(s["thinking"] for s in entries(done)) > 9
        weights = {"plan": 0, "step 1": 1, "step 2": 1, "step 3": 1, "answer": 0}
        done = run(graph, {"messages": [("user", PROBLEM)], "budget": {"tokens": 30, "weights": weights}})
        assert [spend["cap"] for spend in entries(done)] == [0, 10, 10, 10, 0]

    def test_its_own_budget_is_for_one_turn_of_the_conversation(self, run):
        graph = create_plan_and_solve(talker(arithmetician), budget=60, checkpointer=InMemorySaver())
        first = run(graph, {"messages": [("user", PROBLEM)]}, THREAD)
        second = run(graph, {"messages": [("user", PROBLEM)]}, THREAD)
        assert len(second["ledger"]) == 2 * len(first["ledger"])
        caps = [spend["cap"] for spend in entries(second)]
        assert caps[:5] == caps[5:]
        assert len(second["work"]) == 4, "the work of the turn before is gone"
        assert [type(m) for m in second["messages"]] == [HumanMessage, AIMessage] * 2

    def test_a_caller_s_budget_goes_on_for_the_whole_thread_whatever_is_planned(self, run):
        def says(turns):
            if turns[0][0] == "system":
                return "A plan.\n", "\n".join(
                    f"{i}. What is {i} + 1?" for i in range(1, 5 if "long" in turns[-1][1] else 3)
                )
            return arithmetician(turns)

        graph = create_plan_and_solve(talker(says), checkpointer=InMemorySaver())
        first = run(graph, {"messages": [("user", "short")], "budget": {"tokens": 400}}, THREAD)
        second = run(graph, {"messages": [("user", "long")]}, THREAD)
        assert len(second["plan"]) == 4
        left = 400 - sum(spend["thinking"] for spend in entries(first))
        plan = entries(second)[len(entries(first))]
        assert (plan["step"], plan["cap"]) == ("plan", left * 2 // 11), "the steps of this turn have not come yet"
        assert sum(spend["thinking"] for spend in entries(second)) <= 400
        assert graph.get_state(THREAD).values["budget"] == {"tokens": 400}

    def test_what_cannot_be_planned_is_answered_without_steps(self, run):
        def says(turns):
            return ("Hm.\n", "I cannot plan.") if turns[0][0] == "system" else ("Well.\n", turns[-1][1].upper())

        done = run(create_plan_and_solve(talker(says)), {"messages": [("user", "why?")]})
        assert (done["plan"], done["messages"][-1].text) == ([], "WHY?")
        assert [spend["step"] for spend in entries(done)] == ["plan", "answer"]

    def test_a_plan_that_is_too_long_counts_as_none(self, run):
        done = run(create_plan_and_solve(talker(arithmetician), max_steps=2), {"messages": [("user", PROBLEM)]})
        assert done["plan"] == []

    def test_a_plan_of_a_parser_of_one_s_own_may_not_refer_to_what_is_not_there(self, run):
        graph = create_plan_and_solve(talker(arithmetician), parse=lambda text: ["What is #2 + 1?", "What is 1 + 1?"])
        assert run(graph, {"messages": [("user", PROBLEM)]})["plan"] == []

    def test_the_plan_is_not_asked_for_in_a_box(self, run):
        done = run(create_plan_and_solve(talker(arithmetician, thinking_budget=3)), {"messages": [("user", PROBLEM)]})
        assert done["plan"] == PLAN
        assert "boxed" not in done["work"][0].text

    def test_a_step_may_be_solved_by_a_graph(self, run):
        def careless(turns):
            return ("Hm.\n" * 20, r"The final answer is \boxed{0}.")

        cascade = create_cascade(talker(careless), talker(arithmetician), small_share=0.2)
        graph = create_plan_and_solve(talker(arithmetician), solver=cascade, budget=200)
        done = run(graph, {"messages": [("user", PROBLEM)]})
        assert done["messages"][-1].text == r"The final answer is \boxed{16}."
        made = [(spend["within"], spend["step"]) for spend in entries(done)]
        assert made == [
            ("", "plan"),
            *itertools.product(["step 1"], ["small", "large"]),
            *itertools.product(["step 2"], ["small", "large"]),
            *itertools.product(["step 3"], ["small", "large"]),
            ("", "answer"),
        ]
        assert sum(spend["thinking"] for spend in entries(done)) <= 200

    def test_a_conversation_without_a_question_is_an_error(self, run):
        with pytest.raises(ValueError, match="have none"):
            run(create_plan_and_solve(talker(arithmetician)), {"messages": [AIMessage("hello")]})


class TestCascade:
    def graph(self, **settings):
        return create_cascade(talker(chatterer(40)), talker(lambda turns: ("Hm.\n", "No.")), **settings)

    def test_a_sure_answer_of_the_small_model_stands(self, run):
        done = run(self.graph(), {"messages": [("user", "why?")]})
        assert (done["messages"][-1].text, [s["node"] for s in entries(done)]) == ("WHY?", ["small"])

    def test_a_cut_one_goes_to_the_large_model_which_does_not_see_it(self, run):
        asked = []

        def says(turns):
            asked.append(turns)
            return "Hm.\n", "No."

        graph = create_cascade(talker(chatterer(40)), talker(says), budget=40)
        done = run(graph, {"messages": [("user", "why?")]})
        assert [message.text for message in done["messages"]] == ["why?", "No."]
        assert asked == [[("user", "why?")]]
        assert [(s["node"], s["cap"]) for s in entries(done)] == [("small", 10), ("large", 30)]

    def test_earlier_turns_and_the_system_prompt_are_shown_to_both(self, run):
        asked = []

        def says(turns):
            asked.append([role for role, _ in turns])
            return "Hm.\n" * 9, "No."

        graph = create_cascade(talker(says), talker(says), budget=30)
        history = [SystemMessage("Be brief."), HumanMessage("why?"), AIMessage("Because."), HumanMessage("how?")]
        done = run(graph, {"messages": history})
        assert asked == [["system", "user", "assistant", "user"]] * 2
        assert len(done["messages"]) == 5

    def test_what_both_are_unsure_of_a_person_decides(self, run):
        graph = create_cascade(
            talker(chatterer(40)), talker(chatterer(60)), budget=40, ask=True, checkpointer=InMemorySaver()
        )
        paused = run(graph, {"messages": [("user", "why?")]}, THREAD)
        assert paused["__interrupt__"][0].value["answer"] == "WHY?"
        done = run(graph, Command(resume="because"), THREAD)
        assert [message.text for message in done["messages"]] == ["why?", "because"]
        assert [s["node"] for s in entries(done)] == ["small", "large"]


def cascade(model, **settings):
    return create_cascade(model, model, **settings)


class TestWithinOtherGraphs:
    """A ready graph is a step of the graph it stands in: it shares out that step's part, under names of its own."""

    def around(self, inner):
        builder = StateGraph(ReasoningState)
        builder.add_node("inner", inner)
        builder.add_node("tell", reasoning_node(talker(chatterer(500)), name="tell"))
        builder.add_edge(START, "inner").add_edge("inner", "tell")
        return builder.compile()

    @pytest.mark.parametrize("create", [cascade, create_plan_and_solve, create_self_consistency, create_budgeted_agent])
    def test_spends_its_step_s_share_and_leaves_the_others_theirs(self, run, create):
        budget = {"tokens": 100, "weights": {"inner": 3, "tell": 1}}
        done = run(self.around(create(talker(chatterer(500)))), {"messages": [("user", "why?")], "budget": budget})
        *inside, last = entries(done)
        assert {spend["within"] for spend in inside} == {"inner"}
        assert 0 < sum(spend["thinking"] for spend in inside) <= 75
        assert (last["step"], last["cap"]) == ("tell", 100 - sum(spend["thinking"] for spend in inside))
        assert last["cap"] >= 25

    @pytest.mark.parametrize("create", [cascade, create_plan_and_solve, create_self_consistency, create_budgeted_agent])
    def test_side_by_side_they_are_refused_where_they_could_spend_the_same_and_else_keep_apart(self, run, create):
        builder = StateGraph(ReasoningState)
        for name in "ab":
            builder.add_node(name, create(talker(chatterer(500))))
            builder.add_edge(START, name)
        graph, asked = builder.compile(), {"messages": [("user", "why?")]}
        with pytest.raises(ValueError, match=r"'[ab]\|.*' runs at once with '[ab]\|.*weights"):
            run(graph, {**asked, "budget": {"tokens": 60}})
        done = run(graph, {**asked, "budget": {"tokens": 60, "weights": {"a": 1, "b": 1}}})
        for name in "ab":
            assert 0 < sum(s["thinking"] for s in entries(done) if s["within"] == name) <= 30

    def test_of_the_same_name_each_keeps_to_its_own_budget_and_the_outer_s(self, run):
        inner = create_plan_and_solve(talker(arithmetician), budget=500)
        done = run(
            create_plan_and_solve(talker(arithmetician), solver=inner, budget=60), {"messages": [("user", PROBLEM)]}
        )
        assert sum(spend["thinking"] for spend in entries(done)) <= 60
        builder = StateGraph(ReasoningState)
        for name in "ab":
            builder.add_node(name, cascade(talker(chatterer(30)), budget=40, small_share=0.1))
        builder.add_edge(START, "a").add_edge("a", "b")
        told = [(s["within"], s["cap"]) for s in entries(run(builder.compile(), {"messages": [("user", "why?")]}))]
        assert told == [("a", 4), ("a", 36), ("b", 4), ("b", 36)]

    def test_takes_a_budget_made_for_its_own_steps_as_it_is(self, run):
        inner = create_self_consistency(talker(chatterer(50)), 2, seed=1)
        graph = StateGraph(ReasoningState).add_node("inner", inner).add_edge(START, "inner").compile()
        budget = {"tokens": 30, "weights": {"chain 1": 2, "chain 2": 1}}
        done = run(graph, {"messages": [("user", "why?")], "budget": budget})
        assert [spend["cap"] for spend in entries(done)] == [20, 10]

    @pytest.mark.parametrize("create", [create_self_consistency, create_budgeted_agent])
    def test_that_solves_a_plan_s_steps_leaves_the_answer_all_that_is_left(self, run, create):
        graph = create_plan_and_solve(talker(arithmetician), solver=create(talker(arithmetician)), budget=100)
        *solved, answer = entries(run(graph, {"messages": [("user", PROBLEM)]}))
        assert [*dict.fromkeys(spend["within"] for spend in solved)] == ["", "step 1", "step 2", "step 3"]
        assert answer["cap"] == 100 - sum(spend["thinking"] for spend in solved)

    def test_that_solves_a_plan_s_steps_shares_out_their_risk(self, run):
        model = promising(arithmetician)
        graph = create_plan_and_solve(model, solver=create_self_consistency(model, 3, seed=1), epsilon=0.1)
        taken = [spend["epsilon"] for spend in entries(run(graph, {"messages": [("user", PROBLEM)]}))]
        assert all(epsilon > 0 for epsilon in taken)
        assert sum(taken) <= 0.1

    def test_with_less_risk_for_a_step_than_anything_is_certified_for_is_refused_when_built(self):
        model = promising(arithmetician, strictest=0.01)
        with pytest.raises(
            ValueError, match=r"epsilon=0\.05 is 0\.005 for one of 10 steps, but the strictest .* is 0\.01"
        ):
            create_plan_and_solve(model, epsilon=0.05)


class TestWithAModelOfAnotherFamily:
    def test_the_planner_is_told_all_it_must_know_and_a_step_to_give_its_result_alone(self, run):
        seen = []

        def says(turns):
            seen.append(turns)
            if turns[0][0] == "system":
                return "A plan.\n", "1. What is 3 * 4?\n2. What is #01 + 4?"
            return "So.\n", r"The final answer is \boxed{12}."

        model = ChatEarlyExit(model="Qwen/Qwen3-4B", engine=talker(says).engine, seed=1)
        done = run(create_plan_and_solve(model, max_steps=5), {"messages": [("user", PROBLEM)]})
        assert done["plan"] == ["What is 3 * 4?", "What is #01 + 4?"]
        assert "at most 5 numbered steps" in seen[0][0][1]
        assert "Write #k for the result" in seen[0][0][1]
        assert [turns[-1][1] for turns in seen[1:3]] == [
            f"What is {step}?{STEP_REQUEST}" for step in ("3 * 4", "12 + 4")
        ]

    def test_a_prompt_of_one_s_own_stands(self, run):
        seen = []

        def says(turns):
            seen.append(turns[0])
            return "So.\n", "1. Go on"

        model = ChatEarlyExit(model="Qwen/Qwen3-4B", engine=talker(says).engine, seed=1)
        run(create_plan_and_solve(model, planner_prompt="Plan it."), {"messages": [("user", PROBLEM)]})
        assert seen[0] == ("system", "Plan it.")


class TestStillNeeded:
    @given(st.lists(st.integers(0, 9), max_size=5), st.integers(0, 20))
    def test_that_many_votes_for_the_leader_settle_it_and_one_fewer_does_not(self, votes, left):
        needed = still_needed(votes, left)
        first, second, *_ = [*sorted(votes, reverse=True), 0, 0]

        def settled(more):
            return first + more - second > left - more

        assert 0 <= needed <= left
        assert needed == left or settled(needed)
        assert needed == 0 or not settled(needed - 1)


def voter(answers, **settings):
    """Answers by seed: the n-th chain says the n-th answer."""
    model = talker(lambda turns: ("Hm.\n", "?"), **settings)
    by_seed = dict(enumerate(answers))

    class Voter(type(model)):
        def _start(self, messages, stop, kwargs):
            said = by_seed[kwargs["seed"] - 100]
            engine = talker(lambda turns: ("Hm. " * 9 + "\n", rf"The final answer is \boxed{{{said}}}.")).engine
            return type(model)(engine=engine)._start(messages, stop, kwargs)

    return Voter(engine=model.engine, **settings)


class TestSelfConsistency:
    @pytest.mark.parametrize(
        ("answers", "ran", "winner"),
        [
            ([4, 4, 4, 5, 5], 3, "4"),
            ([4, 5, 4, 4, 5], 4, "4"),
            ([5, 4, 5, 4, 4], 5, "4"),
            ([1, 2, 3, 4, 5], 5, "1"),
            ([7], 1, "7"),
        ],
    )
    def test_runs_no_more_chains_than_settle_the_vote(self, run, answers, ran, winner):
        graph = create_self_consistency(voter(answers), len(answers), seed=100)
        done = run(graph, {"messages": [("user", "why?")]})
        assert sum(done["votes"].values()) == ran == len(done["ledger"])
        assert [answer_in(message) for message in done["messages"][1:]] == [winner]
        seeds = sorted(spend["step"] for spend in entries(done))
        assert seeds == [f"chain {i + 1}" for i in range(ran)]

    def test_chains_have_seeds_of_their_own_and_a_share_of_the_budget(self, run):
        graph = create_self_consistency(voter([1, 2, 3, 4]), 4, seed=100, budget=42)
        done = run(graph, {"messages": [("user", "why?")]})
        caps = [spend["cap"] for spend in entries(done)]
        assert sum(spend["thinking"] for spend in entries(done)) <= 42
        assert sorted(caps[:3]) == [10, 11, 11]

    def test_without_a_seed_every_turn_draws_other_chains(self, run):
        graph = create_self_consistency(talker(chatterer(5)), 1, checkpointer=InMemorySaver())
        seeds = set()
        for _ in range(2):
            done = run(graph, {"messages": [("user", "why?")]}, THREAD)
            seeds.add(done["messages"][-1].response_metadata["seed"])
        assert len(seeds) == 2
        assert sum(done["votes"].values()) == 1

    def test_a_vote_of_no_chains_is_an_error(self):
        with pytest.raises(ValueError, match="at least one chain"):
            create_self_consistency(talker(chatterer(5)), 0)


@pytest.mark.parametrize(
    "create",
    [
        create_plan_and_solve,
        create_self_consistency,
        lambda model, **more: create_cascade(model, model, **more),
    ],
)
class TestAllOfThem:
    def test_refuse_a_risk_without_a_calibration_when_they_are_built(self, create):
        with pytest.raises(ValueError, match="calibration"):
            create(talker(chatterer(5)), epsilon=0.1)

    def test_refuse_a_budget_below_zero_when_they_are_built(self, create):
        with pytest.raises(ValueError, match="at least 0, got -5"):
            create(talker(chatterer(5)), budget=-5)

    def test_name_what_they_take_and_give_back(self, create):
        graph = create(talker(chatterer(5)))
        assert {"messages", "budget", "risk", "ledger"} <= graph.get_input_jsonschema()["properties"].keys()
        assert {"messages", "ledger"} <= graph.get_output_jsonschema()["properties"].keys()
        assert re.search("begin", graph.get_graph().draw_mermaid())
