"""A reasoning node spends what its state allows and writes down what it spent, whatever graph it stands in."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import pytest
from agents_for_tests import chatterer, promising, talker
from langchain_core.caches import InMemoryCache
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import ConfigurableField
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, RetryPolicy, Send, interrupt
from typing_extensions import TypedDict

from langchain_earlyexit import DEER
from langchain_earlyexit.graph import (
    Ledger,
    ReasoningState,
    ask_human,
    branches,
    merge_ledgers,
    reasoning_node,
    route_by_confidence,
    run_guarantee,
    verdict,
)
from langchain_earlyexit.policies import GiveUp

ASKED = {"messages": [("user", "why?")]}


def one_node(model, schema=ReasoningState, **settings):
    builder = StateGraph(schema)
    builder.add_node("think", reasoning_node(model, **settings))
    builder.add_edge(START, "think")
    return builder.compile()


def entries(state):
    return list(state["ledger"].values())


@pytest.fixture(params=["sync", "async"])
def run(request):
    """Run a graph to its end, both ways."""
    if request.param == "sync":
        return lambda graph, given, *rest: graph.invoke(given, *rest)
    return lambda graph, given, *rest: asyncio.run(graph.ainvoke(given, *rest))


class TestTheNode:
    def test_writes_the_answer_its_record_and_what_it_spent(self, run):
        done = run(one_node(talker(chatterer(40))), {**ASKED, "budget": {"tokens": 30}})
        [asked, answer] = done["messages"]
        assert (asked.text, answer.text) == ("why?", "WHY?")
        [spend] = entries(done)
        record = answer.response_metadata["early_exit"]
        assert spend["exit"] == record
        assert (spend["step"], spend["node"], spend["cap"], record["budget"]) == ("think", "think", 30, 30)
        assert (spend["thinking"], record["reason"]) == (30, "budget")
        assert spend["reasoning"] == answer.usage_metadata["output_token_details"]["reasoning"]

    def test_takes_no_more_than_its_share_its_most_and_the_model_s_own_cap(self, run):
        def cap(budget, model=None, **settings):
            given = {**ASKED, "budget": {"tokens": budget}} if budget is not None else ASKED
            [spend] = entries(run(one_node(model or talker(chatterer(9)), **settings), given))
            return spend["cap"]

        assert cap(40, share=0.25) == 10
        assert cap(40, most=7) == 7
        assert cap(40, talker(chatterer(9), thinking_budget=5)) == 5
        assert cap(40, talker(chatterer(9)).bind(thinking_budget=6)) == 6
        assert cap(40, talker(chatterer(9)).bind(reasoning_effort="high")) == 40
        assert cap(0) == 0
        assert cap(None) is None

    def test_a_model_s_configuration_counts_as_its_own(self, run):
        def told(model, given, **configurable):
            [spend] = entries(run(one_node(model), {**ASKED, **given}, {"configurable": configurable}))
            return spend["model"], spend["cap"], spend["thinking"]

        capped = talker(chatterer(9)).configurable_fields(thinking_budget=ConfigurableField(id="cap"))
        assert told(capped, {"budget": {"tokens": 8}}, cap=5) == ("pocket", 5, 5)
        assert told(capped.with_config(configurable={"cap": 4}), {}) == ("pocket", 4, 4)
        either = talker(chatterer(9)).configurable_alternatives(
            ConfigurableField(id="mode"), default_key="one", other=talker(chatterer(9), model="other")
        )
        assert told(either, {}, mode="other") == ("other", None, 9)

    def test_without_a_budget_in_the_state_it_spends_as_the_model_does_and_still_writes_it_down(self, run):
        [spend] = entries(run(one_node(talker(chatterer(20), thinking_budget=8)), ASKED))
        assert (spend["cap"], spend["thinking"]) == (8, 8)

    def test_a_graph_of_steps_never_spends_more_than_its_budget(self, run):
        builder = StateGraph(ReasoningState)
        names = ["read", "think", "check", "tell"]
        for name in names:
            node = reasoning_node(talker(chatterer(50)), name=name, reads=lambda state: state["messages"][0].text)
            builder.add_node(name, node)
        for a, b in zip([START, *names], names, strict=False):
            builder.add_edge(a, b)
        budget = {"tokens": 70, "weights": {"read": 1, "think": 3, "check": 2, "tell": 1}}
        done = run(builder.compile(), {**ASKED, "budget": budget})
        assert [spend["thinking"] for spend in entries(done)] == [10, 30, 20, 10]

    def test_goes_into_a_state_of_one_s_own(self, run):
        class Own(TypedDict):
            topic: str
            essay: str
            ledger: Annotated[Ledger, merge_ledgers]

        graph = one_node(
            talker(chatterer(9)),
            Own,
            reads=lambda state: f"about {state['topic']}",
            writes=lambda message, state: {"essay": f"{state['topic']}: {message.text}"},
            keywords=lambda state: {"seed": 77},
        )
        done = run(graph, {"topic": "rain"})
        assert done["essay"] == "rain: ABOUT RAIN"
        assert [spend["turn"] for spend in entries(done)] == [""]

    def test_a_budget_whose_spends_would_be_lost_is_an_error(self, run):
        class Forgetful(TypedDict):
            messages: list
            budget: dict

        with pytest.raises(ValueError, match="no ledger, so what is spent would be lost"):
            run(one_node(talker(chatterer(9)), Forgetful), {"messages": ["why?"], "budget": {"tokens": 9}})

    def test_an_answer_out_of_a_cache_costs_nothing(self, run):
        from langchain_core.caches import InMemoryCache

        model = talker(chatterer(20), cache=InMemoryCache())
        for spent in (20, 0):
            [spend] = entries(run(one_node(model), ASKED))
            assert (spend["thinking"], spend["exit"]["thinking_tokens"]) == (spent, 20)

    def test_can_be_asked_outside_a_graph(self):
        done = reasoning_node(talker(chatterer(9))).invoke({"messages": [HumanMessage("why?")]})
        assert done["messages"][0].text == "WHY?"

    @pytest.mark.parametrize("said", [{"thinking_budget": 512}, {"reasoning_effort": "high"}, {"reasoning_budget": 3}])
    def test_keywords_of_a_node_make_no_budget_larger(self, run, said):
        node = one_node(talker(chatterer(30)), keywords=lambda state: said)
        [spend] = entries(run(node, {**ASKED, "budget": {"tokens": 8}}))
        assert spend["thinking"] == spend["cap"] == (3 if "reasoning_budget" in said else 8)

    def test_a_budget_that_is_no_dict_is_an_error_that_shows_one(self, run):
        with pytest.raises(ValueError, match=r"such as \{'tokens': 200\}.*got 200"):
            run(one_node(talker(chatterer(9))), {**ASKED, "budget": 200})

    @pytest.mark.parametrize(
        ("build", "error", "says"),
        [
            (lambda m: reasoning_node(m | (lambda x: x)), TypeError, "only ChatEarlyExit"),
            (lambda m: reasoning_node(m, share=0), ValueError, r"in \(0, 1\], not 0"),
            (lambda m: reasoning_node(m, most=-1), ValueError, "at least 0 thinking tokens"),
            (lambda m: reasoning_node(m.bind(reasoning_budget=5)), ValueError, "names for the same setting"),
            (lambda m: reasoning_node(m.bind(colour="red")), TypeError, "unknown keyword"),
        ],
    )
    def test_what_cannot_run_is_refused_when_it_is_built(self, build, error, says):
        with pytest.raises(error, match=says):
            build(talker(chatterer(9)))


class TestRisk:
    def test_is_passed_on_as_confidence_and_a_step_without_any_is_never_cut(self, run):
        model = promising(chatterer(9))
        builder = StateGraph(ReasoningState)
        names = ("think", "think again", "send", "unplanned")
        for name in names:
            node = reasoning_node(
                model, name=name, may_cut=name != "send", reads=lambda state: state["messages"][0].text
            )
            builder.add_node(name, node)
        for a, b in zip((START, *names), names, strict=False):
            builder.add_edge(a, b)
        shares = {"think": 0.04, "think again": 0.04, "send": 0.02}
        done = run(builder.compile(), {**ASKED, "risk": {"epsilon": 0.1, "shares": shares}})
        assert model.metadata["asked"] == [
            {"confidence": 0.96, "exit_policy": None},
            {"confidence": 0.96, "exit_policy": None},
            {"confidence": None, "exit_policy": "never"},
            {"confidence": None, "exit_policy": "never"},
        ]
        assert [spend["epsilon"] for spend in entries(done)] == [0.04, 0.04, 0, 0]

    def test_a_second_try_is_not_cut_its_step_s_risk_is_spent(self, run):
        model = promising(chatterer(9))
        builder = StateGraph(ReasoningState)
        builder.add_node("think", reasoning_node(model, most=3))
        builder.add_edge(START, "think")
        builder.add_conditional_edges("think", route_by_confidence(think_more="think"), ["think", END])
        done = run(builder.compile(), {**ASKED, "risk": {"epsilon": 0.1, "shares": {"think": 0.1}}})
        assert [spend["epsilon"] for spend in entries(done)] == [0.1, 0]
        assert [asked["exit_policy"] for asked in model.metadata["asked"]] == [None, "never"]

    def test_is_not_taken_twice_by_nodes_that_run_at_once(self, run):
        builder = StateGraph(ReasoningState)
        for name in "abc":
            builder.add_node(name, reasoning_node(promising(chatterer(9)), name=name))
            builder.add_edge(START, name)
        graph = builder.compile()
        with pytest.raises(ValueError, match=r"runs at once with .*spread_risk"):
            run(graph, {**ASKED, "risk": {"epsilon": 0.1}})
        shares = {"a": 0.03, "b": 0.03, "c": 0.04}
        done = run(graph, {**ASKED, "risk": {"epsilon": 0.1, "shares": shares}})
        assert {spend["step"]: spend["epsilon"] for spend in entries(done)} == shares

    def test_an_effort_s_confidence_outlives_a_cap_that_is_tighter_and_the_effort_one_that_is_looser(self, run):
        model = promising(chatterer(9), reasoning_effort="low")
        for most, told in ((4000, None), (5, 0.9)):
            run(one_node(model, most=most), ASKED)
            assert model.metadata["asked"][-1] == {"confidence": told, "exit_policy": None}
        assert model.call_settings(**model.capped(4000)).reasoning_effort == "low"
        assert model.call_settings(**model.capped(5)).budget == 5

    def test_takes_the_place_of_a_bound_policy_and_never_of_one_that_never_leaves(self, run):
        model = promising(chatterer(9))
        given = {**ASKED, "risk": {"epsilon": 0.1, "shares": {"think": 0.1}}}
        for bound, told, epsilon in (("deer", 0.9, 0.1), ("never", None, 0)):
            done = run(one_node(model.bind(exit_policy=bound)), given)
            assert model.metadata["asked"][-1]["confidence"] == told
            assert entries(done)[0]["epsilon"] == epsilon
        run(one_node(model, keywords=lambda state: {"exit_policy": "deer"}), given)
        assert model.metadata["asked"][-1] == {"confidence": 0.9, "exit_policy": None}

    def test_that_nothing_is_certified_for_is_no_cut(self, run):
        model = promising(chatterer(9), strictest=0.02)
        for epsilon, told in ((0.02, None), (0.01, "never"), (1e-18, "never")):
            done = run(one_node(model), {**ASKED, "risk": {"epsilon": epsilon, "shares": {"think": epsilon}}})
            assert model.metadata["asked"][-1]["exit_policy"] == told
            assert entries(done)[0]["epsilon"] == (epsilon if told is None else 0)

    def test_with_a_model_that_has_no_calibration_is_an_error_that_says_so(self, run):
        given = {**ASKED, "risk": {"epsilon": 0.1, "shares": {"think": 0.1}}}
        with pytest.raises(ValueError, match="calibration"):
            run(one_node(talker(chatterer(9))), given)


class TestSideBySide:
    def fan(self, model, width):
        def fan_out(state):
            steps = [f"part {i}" for i in range(width)]
            told = branches(steps, state.get("budget"), state.get("risk"), state["ledger"])
            return [Send("part", {**one, "messages": [HumanMessage(one["step"])]}) for one in told]

        builder = StateGraph(ReasoningState)
        builder.add_node("part", reasoning_node(model))
        builder.add_conditional_edges(START, fan_out, ["part"])
        return builder.compile()

    def test_no_branch_s_spend_is_lost_and_together_they_keep_to_the_budget(self, run):
        done = run(self.fan(talker(chatterer(50)), 7), {**ASKED, "budget": {"tokens": 100}})
        told = {spend["step"]: spend["thinking"] for spend in entries(done)}
        assert told == {f"part {i}": 15 if i < 2 else 14 for i in range(7)}
        assert len(done["messages"]) == 8

    def beside(self, **settings):
        """Nodes a, b and c that run at once."""
        builder = StateGraph(ReasoningState)
        for name in "abc":
            builder.add_node(name, reasoning_node(talker(chatterer(50)), name=name, **settings))
            builder.add_edge(START, name)
        return builder

    def test_nodes_that_run_at_once_and_could_spend_more_than_is_left_are_refused(self, run):
        with pytest.raises(ValueError, match=r"runs at once with .*weights that name them.*share, most.*`branches`"):
            run(self.beside().compile(), {**ASKED, "budget": {"tokens": 30}})

    @pytest.mark.parametrize(
        ("settings", "budget", "spent"),
        [
            ({}, {"tokens": 30, "weights": {"a": 1, "b": 1, "c": 1}}, [10, 10, 10]),
            ({}, {"tokens": 30, "weights": {"a": 1, "b": 1, "c": 0, "later": 1}}, [10, 10, 0]),
            ({"share": 0.3}, {"tokens": 30}, [9, 9, 9]),
            ({"most": 7}, {"tokens": 30}, [7, 7, 7]),
            ({}, {"tokens": 0}, [0, 0, 0]),
        ],
    )
    def test_weights_shares_and_caps_that_fit_together_let_them_run_at_once(self, run, settings, budget, spent):
        done = run(self.beside(**settings).compile(), {**ASKED, "budget": budget})
        assert sorted((s["thinking"] for s in entries(done)), reverse=True) == spent

    def test_a_step_that_comes_again_beside_another_cannot_take_that_one_s_share(self, run):
        builder = StateGraph(ReasoningState)
        for name in ("first", "a", "b"):
            step = reasoning_node(talker(chatterer(50)), name="a" if name == "first" else name, reads=lambda _: "why?")
            builder.add_node(name, step)
        builder.add_edge(START, "first").add_edge("first", "a").add_edge("first", "b")
        with pytest.raises(ValueError, match="runs at once with"):
            run(builder.compile(), {**ASKED, "budget": {"tokens": 60, "weights": {"a": 1, "b": 1}}})

    def test_the_state_sent_to_many_is_refused_where_each_would_spend_it_all(self, run):
        builder = StateGraph(ReasoningState)
        builder.add_node("part", reasoning_node(talker(chatterer(50))))
        builder.add_conditional_edges(
            START, lambda state: [Send("part", {**state, "step": f"part {i}"}) for i in range(3)], ["part"]
        )
        with pytest.raises(ValueError, match=r"'part \d' runs at once with 'part \d'"):
            run(builder.compile(), {**ASKED, "budget": {"tokens": 30}})

    def test_a_function_that_asks_a_node_more_than_once_cannot_spend_the_same_twice(self):
        node = reasoning_node(talker(chatterer(20)))

        def thrice(state):
            told = [node.invoke(state)["ledger"] for _ in range(3)]
            return {"ledger": {key: entry for one in told for key, entry in one.items()}}

        graph = StateGraph(ReasoningState).add_node("f", thrice).add_edge(START, "f").compile()
        with pytest.raises(ValueError, match="'think' runs at once with 'think'"):
            graph.invoke({**ASKED, "budget": {"tokens": 30}})

    def test_an_old_checkpoint_that_is_run_again_has_the_budget_it_had(self, run):
        graph, thread = self.beside().compile(checkpointer=InMemorySaver()), {"configurable": {"thread_id": "1"}}
        budget = {"tokens": 30, "weights": {"a": 1, "b": 1, "c": 1}}
        first = run(graph, {**ASKED, "budget": budget}, thread)
        [old] = [one for one in graph.get_state_history(thread) if "a" in one.next]
        again = run(graph, None, old.config)
        assert [s["cap"] for s in entries(again)] == [s["cap"] for s in entries(first)] == [10, 10, 10]

    def test_a_graph_of_one_s_own_that_is_a_step_keeps_to_that_step_s_share(self, run):
        inner, builder = StateGraph(ReasoningState), StateGraph(ReasoningState)
        for name in ("x", "y", "tell"):
            graph = builder if name == "tell" else inner
            graph.add_node(name, reasoning_node(talker(chatterer(50)), name=name, reads=lambda _: "why?"))
        inner.add_edge(START, "x").add_edge("x", "y")
        builder.add_node("inner", inner.compile()).add_edge(START, "inner").add_edge("inner", "tell")
        done = run(builder.compile(), {**ASKED, "budget": {"tokens": 100, "weights": {"inner": 3, "tell": 1}}})
        told = [(spend["within"], spend["step"], spend["thinking"]) for spend in entries(done)]
        assert told == [("inner", "x", 50), ("inner", "y", 25), ("", "tell", 25)]

    def test_a_subgraph_that_hands_its_ledger_back_counts_nothing_twice(self, run):
        builder = StateGraph(ReasoningState)
        builder.add_node("first", reasoning_node(talker(chatterer(10)), name="first"))
        builder.add_node("inner", one_node(talker(chatterer(20))))
        builder.add_edge(START, "first")
        builder.add_edge("first", "inner")
        done = run(builder.compile(), {**ASKED, "budget": {"tokens": 25}})
        assert [spend["thinking"] for spend in entries(done)] == [10, 15]

    async def test_a_hundred_runs_at_once_on_one_model_keep_their_budgets_and_records_apart(self):
        graph = one_node(talker(chatterer(60)))
        given = [{"messages": [("user", f"run {i}")], "budget": {"tokens": 3 + i % 25}} for i in range(100)]
        done = await asyncio.gather(*(graph.ainvoke(one) for one in given))
        for one, end in zip(given, done, strict=True):
            [spend] = entries(end)
            assert end["messages"][-1].text == one["messages"][0][1].upper()
            assert spend["thinking"] == spend["cap"] == spend["exit"]["budget"] == one["budget"]["tokens"]
            assert spend["exit"] == end["messages"][-1].response_metadata["early_exit"]


class TestWhenThingsGoWrong:
    def test_a_step_that_is_tried_again_counts_once(self, run):
        failures = [2]

        def says(turns):
            if failures[0]:
                failures[0] -= 1
                raise ConnectionError("the model went away")
            return chatterer(12)(turns)

        builder = StateGraph(ReasoningState)
        again = RetryPolicy(initial_interval=0.001, max_attempts=3, retry_on=ConnectionError)
        builder.add_node("think", reasoning_node(talker(says)), retry_policy=again)
        builder.add_edge(START, "think")
        done = run(builder.compile(), {**ASKED, "budget": {"tokens": 30}})
        assert not failures[0]
        assert [spend["thinking"] for spend in entries(done)] == [12]

    def test_what_a_step_spent_before_its_writes_failed_is_spent(self, run):
        spent = []

        def writes(message, state):
            spent.append(message.response_metadata["early_exit"]["thinking_tokens"])
            if len(spent) < 3:
                raise ConnectionError("the store is away")
            return {"messages": [message]}

        builder = StateGraph(ReasoningState)
        again = RetryPolicy(initial_interval=0.001, max_attempts=3, retry_on=ConnectionError)
        builder.add_node("think", reasoning_node(talker(chatterer(20)), writes=writes), retry_policy=again)
        builder.add_edge(START, "think")
        done = run(builder.compile(), {**ASKED, "budget": {"tokens": 30}})
        assert spent == [20, 10, 0]
        assert [spend["thinking"] for spend in entries(done)] == spent

    def test_a_step_that_waits_for_a_person_in_its_writes_counts_both_calls(self, run):
        def writes(message, state):
            interrupt("may it stand?")
            return {"messages": [message]}

        builder = StateGraph(ReasoningState)
        builder.add_node("think", reasoning_node(talker(chatterer(20)), writes=writes))
        builder.add_edge(START, "think")
        graph, thread = builder.compile(checkpointer=InMemorySaver()), {"configurable": {"thread_id": "1"}}
        run(graph, {**ASKED, "budget": {"tokens": 30}}, thread)
        assert [spend["thinking"] for spend in entries(run(graph, Command(resume=True), thread))] == [20, 10]

    def test_a_run_that_was_killed_goes_on_where_it_was_and_loses_neither_messages_nor_spend(self, tmp_path):
        """The first process dies by SIGKILL in the second step, while a third is running beside it."""
        script = textwrap.dedent(
            """
            import os, signal, sqlite3, sys, json
            from agents_for_tests import PROBLEM, arithmetician, talker
            from langgraph.checkpoint.sqlite import SqliteSaver
            from langchain_earlyexit.graph import create_plan_and_solve

            def says(turns):
                if sys.argv[2] == "die" and turns[-1][1] == "What is 12 + 4?":
                    os.kill(os.getpid(), signal.SIGKILL)
                return arithmetician(turns)

            with SqliteSaver.from_conn_string(sys.argv[1]) as saver:
                graph = create_plan_and_solve(talker(says), budget=300, checkpointer=saver)
                config = {"configurable": {"thread_id": "1"}}
                given = {"messages": [("user", PROBLEM)]} if sys.argv[2] == "die" else None
                before = graph.get_state(config).values
                done = graph.invoke(given, config, durability="sync")
                spent = {e["step"]: e["thinking"] for e in done["ledger"].values()}
                kept = all(done["ledger"][key] == entry for key, entry in before["ledger"].items())
                work = [message.id for message in done["work"]]
                print(json.dumps({
                    "before": [e["step"] for e in before["ledger"].values()], "kept": kept, "spent": spent,
                    "calls": len(done["ledger"]), "work": len(work),
                    "ledger": sorted(key.split("/")[1] for key in done["ledger"]) ==
                              sorted([*work, done["messages"][-1].id]),
                    "said": [message.text for message in done["messages"]],
                }))
            """
        )
        here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "LANGGRAPH_STRICT_MSGPACK": "true"}

        def process(how):
            told = [sys.executable, "-c", script, str(tmp_path / "runs.sqlite"), how]
            return subprocess.run(told, env=here, capture_output=True, text=True, check=False)

        assert process("die").returncode == -signal.SIGKILL
        again = process("resume")
        assert again.returncode == 0, again.stderr
        import json

        told = json.loads(again.stdout)
        assert told["before"] == ["plan", "step 1", "step 2"]
        assert told["kept"]
        assert told["ledger"]
        assert (told["calls"], told["work"]) == (5, 4)
        assert list(told["spent"]) == ["plan", "step 1", "step 2", "step 3", "answer"]
        assert told["said"][-1] == r"The final answer is \boxed{16}."


class TestStreaming:
    def test_custom_events_tell_what_a_step_may_spend_and_what_it_spent(self):
        graph = one_node(talker(chatterer(20)))
        told = list(graph.stream({**ASKED, "budget": {"tokens": 9}}, stream_mode="custom"))
        assert told[0] == {
            "event": "early_exit.step", "step": "think", "node": "think", "cap": 9, "epsilon": 0.0, "remaining": 9,
        }  # fmt: skip
        assert (told[1]["event"], told[1]["thinking"], told[1]["exit"]["reason"]) == ("early_exit.spent", 9, "budget")
        assert len(told) == 2

    async def test_tokens_come_as_messages_and_the_sum_is_what_the_state_holds(self):
        graph = one_node(talker(chatterer(20)))
        chunks, last = [], None
        told = []
        async for mode, part in graph.astream(ASKED, stream_mode=["messages", "values", "custom"]):
            if mode == "messages":
                chunks.append(part[0])
            elif mode == "custom":
                told.append(part["event"])
            else:
                last = part
        assert told == ["early_exit.step", "early_exit.spent"]
        assert sum(bool(chunk.additional_kwargs.get("reasoning_content")) for chunk in chunks) > 3
        assert "".join(chunk.text for chunk in chunks) == last["messages"][-1].text
        [spend] = entries(last)
        assert spend["thinking"] == 20

    @pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
    def test_v3_events_leave_the_same_ledger(self):
        stream = one_node(talker(chatterer(20))).stream_events(ASKED, version="v3")
        [spend] = entries(stream.output)
        assert (spend["thinking"], spend["exit"]["reason"]) == (20, "natural")

    def test_the_node_takes_a_timeout_as_async_nodes_do(self):
        builder = StateGraph(ReasoningState)
        builder.add_node("think", reasoning_node(talker(chatterer(5))), timeout=60)
        builder.add_edge(START, "think")
        assert asyncio.run(builder.compile().ainvoke(ASKED))["messages"][-1].text == "WHY?"


def ended(reason, confidence=None):
    return {"exit": {"reason": reason}, "confidence": confidence}


class TestVerdicts:
    @pytest.mark.parametrize(
        ("spend", "judged"),
        [
            (ended("natural"), "sure"),
            (ended("natural", 0.95), "sure"),
            (ended("natural", 0.5), "unsure"),
            (ended("confident", 0.91), "sure"),
            (ended("confident", 0.89), "unsure"),
            (ended("sufficient", 0.2), "unsure"),
            (ended("converged"), "sure"),
            (ended("margin"), "sure"),
            (ended("answer_now"), "sure"),
            (ended("unpromising"), "unsure"),
            (ended("degenerate"), "unsure"),
            (ended("budget"), "cut"),
            (ended("length"), "cut"),
            (ended("no_thinking"), "cut"),
        ],
    )
    def test_say_what_the_end_of_the_thinking_means(self, spend, judged):
        assert verdict(spend, threshold=0.9) == judged

    def test_judge_thinking_that_ended_by_itself_by_its_last_look_where_checks_are_recorded(self, run):
        def says(turns):
            return "It is four.\n\nWait, is it?\n\nIt is.\n", (lambda chain: (r"The final answer is \boxed{4}.", 0.6))

        model = talker(says, exit_policy=DEER(0.95), include_checks=True, answer_form="boxed")
        [spend] = entries(run(one_node(model), ASKED))
        assert spend["exit"]["reason"] == "natural"
        assert spend["confidence"] == pytest.approx(0.6, abs=0.3)
        assert verdict(spend) == "unsure"
        assert "trace" not in spend["exit"]


class TestRoutes:
    def state(self, *spends, **more):
        base = {"step": "think", "turn": "t", "thinking": 10, "budget": ""}
        return {"ledger": {f"think/{i}": {**base, **spend} for i, spend in enumerate(spends)}, **more}

    @pytest.mark.parametrize(
        ("reason", "ways", "goes"),
        [
            ("natural", {"think_more": "more", "escalate": "large", "ask": "human"}, END),
            ("budget", {"think_more": "more", "escalate": "large", "ask": "human"}, "more"),
            ("budget", {"escalate": "large", "ask": "human"}, "large"),
            ("budget", {"ask": "human"}, "human"),
            ("unpromising", {"think_more": "more", "escalate": "large", "ask": "human"}, "large"),
            ("unpromising", {"think_more": "more", "ask": "human"}, "more"),
            ("unpromising", {}, END),
        ],
    )
    def test_go_where_it_helps_and_else_to_the_next_best(self, reason, ways, goes):
        assert route_by_confidence(**ways)(self.state(ended(reason))) == goes

    def test_do_not_think_more_without_end(self):
        route = route_by_confidence("done", think_more="more", tries=2)
        assert route(self.state(ended("budget"))) == "more"
        assert route(self.state(ended("budget"), ended("budget"))) == "done"
        assert route(self.state({**ended("budget"), "turn": "before"}, ended("budget"))) == "more"

    def test_do_not_think_more_when_nothing_is_left_to_think_with(self):
        route = route_by_confidence("done", think_more="more")
        assert route(self.state(ended("budget"), budget={"tokens": 10})) == "done"
        assert route(self.state(ended("budget"), budget={"tokens": 11})) == "more"

    def test_an_answer_that_was_thought_over_takes_the_place_of_the_first(self, run):
        builder = StateGraph(ReasoningState)
        builder.add_node("think", reasoning_node(talker(chatterer(20)), share=0.5))
        builder.add_edge(START, "think")
        builder.add_conditional_edges("think", route_by_confidence(think_more="think", tries=3), ["think", END])
        done = run(builder.compile(), {**ASKED, "budget": {"tokens": 30}})
        assert [(spend["thinking"], spend["exit"]["reason"]) for spend in entries(done)] == [
            (15, "budget"),
            (7, "budget"),
            (4, "budget"),
        ]
        assert [message.text for message in done["messages"]] == ["why?", "WHY?"]

    def again(self, tells=ReasoningState, tries=2, **asked):
        builder = StateGraph(ReasoningState, output_schema=tells)
        builder.add_node("think", reasoning_node(**asked))
        builder.add_edge(START, "think")
        builder.add_conditional_edges("think", route_by_confidence(think_more="think", tries=tries), ["think", END])
        return builder.compile()

    def test_what_is_thought_over_is_not_cut_by_the_policy_that_gave_it_up(self, run):
        def doubting(turns):
            return "It is four.\n\nWait, is it?\n\nIt is.\n\nWait.\n", lambda chain: (r"It is \boxed{4}.", 0.3)

        gives_up = GiveUp(threshold=0.9, patience=1, min_checks=1)
        done = run(self.again(model=talker(doubting, exit_policy=gives_up, answer_form="boxed")), ASKED)
        assert [spend["exit"]["reason"] for spend in entries(done)] == ["unpromising", "natural"]
        assert run_guarantee({"epsilon": 0.1}, done["ledger"]) is not None, "the second call made the first one good"

    def test_what_was_asked_otherwise_makes_no_cut_good(self, run):
        def asked_longer(state):
            return {"thinking_budget": 90 if state["ledger"] else 3}

        done = run(self.again(model=talker(chatterer(20)), keywords=asked_longer), ASKED)
        assert [spend["exit"]["reason"] for spend in entries(done)] == ["budget", "natural"]
        assert run_guarantee({"epsilon": 0.1}, done["ledger"]) is None

    def test_an_answer_out_of_a_cache_is_a_try_too(self, run):
        cached = talker(chatterer(20), cache=InMemoryCache())
        done = run(self.again(model=cached, most=3, tries=4), ASKED)
        assert [spend["thinking"] for spend in entries(done)] == [3, 3, 0, 0]
        assert [message.text for message in done["messages"]] == ["why?", "WHY?"]

    def parts(self, part):
        def fan(state):
            told = branches(["p 0", "p 1"], state["budget"], None, state["ledger"])
            return [Send("part", {**one, "messages": [HumanMessage(one["step"])]}) for one in told]

        builder = StateGraph(ReasoningState)
        builder.add_node("part", part)
        builder.add_conditional_edges(START, fan, ["part"])
        return builder

    def test_after_a_send_are_refused_for_they_cannot_see_the_branch(self, run):
        builder = self.parts(reasoning_node(talker(chatterer(50)), name="part", share=0.2))
        builder.add_conditional_edges("part", route_by_confidence(think_more="part"), ["part", END])
        with pytest.raises(ValueError, match=r"'part' was reached by a Send.*graph of their own"):
            run(builder.compile(), {**ASKED, "budget": {"tokens": 300}})

    @pytest.mark.parametrize("weights", [{}, {"weights": {"p 0": 1, "p 1": 1}}], ids=str)
    def test_of_a_graph_that_is_sent_to_stay_in_their_branch(self, run, weights):
        class Told(TypedDict):
            ledger: Annotated[Ledger, merge_ledgers]

        part = self.again(Told, model=talker(chatterer(50)), share=0.2)
        done = run(self.parts(part).compile(), {**ASKED, "budget": {"tokens": 200, **weights}})
        told = sorted((spend["step"], spend["thinking"]) for spend in entries(done))
        assert told == [("p 0", 16), ("p 0", 20), ("p 1", 16), ("p 1", 20)]

    def test_a_conversation_s_later_turns_keep_earlier_answers(self, run):
        graph, state = one_node(talker(chatterer(9))), ASKED
        for question in ("how?", "when?"):
            state = run(graph, state)
            state = {**state, "messages": [*state["messages"], HumanMessage(question)]}
        done = run(graph, state)
        assert [m.text for m in done["messages"]] == ["why?", "WHY?", "how?", "HOW?", "when?", "WHEN?"]
        assert len({spend["turn"] for spend in entries(done)}) == 3

    @pytest.mark.parametrize(
        ("call", "says"),
        [
            (lambda: route_by_confidence(threshold=1.2), "not 1.2"),
            (lambda: route_by_confidence(tries=0), "at least 1, not 0"),
            (lambda: route_by_confidence()({"ledger": {}}), "no call of any step to judge"),
            (lambda: route_by_confidence(step="x")({"ledger": {}}), "no call of step 'x'"),
        ],
    )
    def test_what_cannot_be_judged_is_an_error(self, call, says):
        with pytest.raises(ValueError, match=says):
            call()


class TestAPerson:
    def graph(self):
        builder = StateGraph(ReasoningState)
        builder.add_node("think", reasoning_node(talker(chatterer(20)), most=4))
        builder.add_node("human", ask_human())
        builder.add_edge(START, "think")
        builder.add_conditional_edges("think", route_by_confidence(ask="human"), ["human", END])
        return builder.compile(checkpointer=InMemorySaver())

    def test_sees_the_doubtful_answer_and_corrects_it_without_a_second_call(self, run):
        graph, thread = self.graph(), {"configurable": {"thread_id": "1"}}
        paused = run(graph, ASKED, thread)
        [asked] = paused["__interrupt__"]
        assert (asked.value["question"], asked.value["answer"]) == ("why?", "WHY?")
        assert asked.value["exit"]["reason"] == "budget"
        done = run(graph, Command(resume="because"), thread)
        assert [message.text for message in done["messages"]] == ["why?", "because"]
        assert done["messages"][-1].response_metadata["corrected_by"] == "human"
        assert len(entries(done)) == 1

    def test_may_keep_the_answer(self, run):
        graph, thread = self.graph(), {"configurable": {"thread_id": "1"}}
        run(graph, ASKED, thread)
        done = run(graph, Command(resume=True), thread)
        assert done["messages"][-1].text == "WHY?"
        assert "corrected_by" not in done["messages"][-1].response_metadata

    def asked_after(self, *messages):
        builder = StateGraph(ReasoningState)
        builder.add_node("human", ask_human())
        builder.add_edge(START, "human")
        return builder.compile(checkpointer=InMemorySaver()), {"messages": list(messages)}

    def test_sees_another_model_s_answer_too_without_a_record(self, run):
        graph, given = self.asked_after(HumanMessage("why?"), AIMessage("so"))
        [asked] = run(graph, given, {"configurable": {"thread_id": "1"}})["__interrupt__"]
        assert asked.value == {"question": "why?", "answer": "so", "exit": None}

    def test_is_asked_about_an_answer_only(self, run):
        graph, given = self.asked_after(HumanMessage("why?"))
        with pytest.raises(ValueError, match="the last message is of type 'human'"):
            run(graph, given, {"configurable": {"thread_id": "1"}})

    def test_who_says_something_else_is_told_what_can_be_said(self, run):
        graph, thread = self.graph(), {"configurable": {"thread_id": "1"}}
        run(graph, ASKED, thread)
        with pytest.raises(TypeError, match="resume with True"):
            run(graph, Command(resume={"ok": 1}), thread)
