"""An agent's steps think within their budgets, whatever kind of agent, model or run it is."""

import asyncio
import subprocess
import sys
import textwrap
import warnings
from dataclasses import dataclass

import pytest
from agents_for_tests import chatterer, promising, talker
from blockbuster import blockbuster_ctx
from fleet_for_tests import AnthropicLike, Noting, OpenAILike, usage
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, AgentState, ModelCallLimitMiddleware, ModelRetryMiddleware
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage
from langchain_core.runnables import ConfigurableField
from langchain_core.tools import ToolException, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, StateGraph
from langgraph.types import Send
from pydantic import BaseModel, field_validator

from langchain_earlyexit import init_chat_model
from langchain_earlyexit.graph import ReasoningState, branches, create_budgeted_agent, reasoning_node, run_guarantee
from langchain_earlyexit.middleware import (
    ReasoningBudgetExceededError,
    ReasoningBudgetMiddleware,
    ReasoningContext,
)

ASK = {"messages": [("user", "Twice 37 + 48?")]}
RESULTS = {"": ("add", '{"a": 37, "b": 48}'), "85": ("double", '{"n": 85}')}
LEVELS = {"reasoning_output": True, "reasoning_effort_levels": ["none", "low", "medium", "high"]}


@tool
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


@tool
def double(n: int) -> str:
    """Doubles a number."""
    return f"{n} twice is {2 * n}"


@tool
def send(text: str) -> str:
    """Sends a letter."""
    return "sent"


def workman(turns):
    """Adds, doubles the sum, and tells it; thinks eight tokens a line, three lines a step."""
    last = turns[-1][1]
    thinking = "thinking\n" * 3
    if "twice is" in last:
        return thinking, "It is 170."
    name, arguments = RESULTS["85" if "85" in last else ""]
    return thinking, f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


THOUGHT = 28
"""Tokens of one step's thinking, its end tag included, where nothing cuts it."""


def chat(says=workman, **settings):
    return talker(says, **settings)


def entries(state):
    return list(state["ledger"].values())


def of_steps(state, *keys):
    return [tuple(entry[key] for key in keys) if len(keys) > 1 else entry[keys[0]] for entry in entries(state)]


def on_thread(name="1"):
    return {"configurable": {"thread_id": name}}


def call(name, **args):
    return AIMessage("", tool_calls=[{"name": name, "args": args, "id": "1"}], usage_metadata=usage(9, 6))


@pytest.fixture(params=["sync", "async"])
def run(request):
    """Run a graph to its end, both ways."""
    if request.param == "sync":
        return lambda graph, given, *rest, **more: graph.invoke(given, *rest, **more)
    return lambda graph, given, *rest, **more: asyncio.run(graph.ainvoke(given, *rest, **more))


class TestAStep:
    def test_gets_its_share_of_what_is_left_by_its_kind(self, run):
        done = run(create_budgeted_agent(chat(), [add, double], budget=300), ASK)
        assert done["messages"][-1].text == "It is 170."
        # Weights 2, 1, 2, 1: planning gets 2 of 6, then a routine step 1 of 4 of what is left.
        assert of_steps(done, "step", "cap", "thinking") == [
            ("planning", 100, THOUGHT),
            ("routine", (300 - THOUGHT) // 4, THOUGHT),
            ("routine", (300 - 2 * THOUGHT) // 4, THOUGHT),
        ]

    def test_takes_no_more_than_its_kind_s_most_and_the_model_s_own_cap(self, run):
        agent = create_budgeted_agent(chat(thinking_budget=20), [add, double], budget=300, most={"routine": 10})
        assert of_steps(run(agent, ASK), "cap", "thinking") == [(20, 20), (10, 10), (10, 10)]
        assert of_steps(run(create_budgeted_agent(chat(), [add, double], most=7), ASK), "thinking") == [7, 7, 7]

    def test_after_a_tool_s_error_is_a_recovery(self, run):
        @tool
        def add(a: int, b: int) -> int:
            """Adds."""
            raise ToolException("it is broken")

        add.handle_tool_error = True

        def gives_up(turns):
            return ("Oh.\n", "I cannot.") if "broken" in turns[-1][1] else workman(turns)

        done = run(create_budgeted_agent(chat(gives_up), [add], weights={"recovery": 9}, budget=100), ASK)
        assert of_steps(done, "step") == ["planning", "recovery"]
        assert entries(done)[1]["cap"] > 4 * entries(done)[0]["cap"]

    def test_that_can_call_no_tool_is_the_last(self, run):
        done = run(create_budgeted_agent(chat(chatterer(20)), budget=300), ASK)
        assert of_steps(done, "step", "cap") == [("final", 300)], "nothing comes after it that could want any"

    def test_keeps_its_exit_record_in_its_message_and_in_the_ledger(self, run):
        done = run(create_budgeted_agent(chat(), [add, double], budget=60), ASK)
        records = [m.response_metadata["early_exit"] for m in done["messages"] if m.type == "ai"]
        assert of_steps(done, "exit") == records
        assert {record["reason"] for record in records} == {"budget"}
        assert [record["thinking_tokens"] for record in records] == of_steps(done, "cap")


class TestARun:
    @settings(max_examples=8, deadline=None)
    @given(
        budget=st.integers(0, 90), weights=st.dictionaries(st.sampled_from(["planning", "routine"]), st.integers(0, 5))
    )
    def test_never_thinks_more_than_its_budget_and_always_answers(self, budget, weights):
        done = create_budgeted_agent(chat(), [add, double], budget=budget, weights=weights).invoke(ASK)
        assert sum(of_steps(done, "thinking")) <= budget
        assert done["messages"][-1].text == "It is 170."

    def test_begins_anew_in_the_same_thread_and_the_thread_s_total_goes_on(self, run):
        agent = create_budgeted_agent(
            chat(), [add, double], budget=1000, thread_budget=100, checkpointer=InMemorySaver()
        )
        assert sum(of_steps(run(agent, ASK, on_thread()), "thinking")) == 3 * THOUGHT
        again = run(agent, ASK, on_thread())
        spent = of_steps(again, "thinking")
        assert spent[3:] == [100 - 3 * THOUGHT, 0, 0]
        assert len(set(of_steps(again, "budget"))) == 2
        assert of_steps(run(agent, ASK, on_thread("2")), "thinking") == [THOUGHT] * 3

    def test_that_has_spent_its_budget_goes_on_without_thinking(self, run):
        all_at_once = {"routine": 0, "recovery": 0, "final": 0}
        done = run(create_budgeted_agent(chat(), [add, double], budget=10, weights=all_at_once), ASK)
        assert of_steps(done, "thinking") == [10, 0, 0]
        assert [entry["exit"]["reason"] for entry in entries(done)] == ["budget", "no_thinking", "no_thinking"]
        assert done["messages"][-1].text == "It is 170."

    def test_that_has_spent_its_budget_ends_with_a_notice_where_it_should(self, run):
        all_at_once = {"routine": 0, "recovery": 0, "final": 0}
        agent = create_budgeted_agent(chat(), [add, double], budget=10, weights=all_at_once, exit_behavior="end")
        done = run(agent, ASK)
        assert [m.type for m in done["messages"]] == ["human", "ai", "tool", "ai"]
        assert done["messages"][-1].text == "The reasoning budget is spent: run 10 of 10 thinking tokens."
        assert len(entries(done)) == 1

    def test_that_has_spent_its_budget_is_an_error_where_it_should(self, run):
        agent = create_budgeted_agent(chat(), [add], thread_budget=0, exit_behavior="error")
        with pytest.raises(ReasoningBudgetExceededError, match="thread 0 of 0"):
            run(agent, ASK)

    @pytest.mark.parametrize("exit_behavior", ["answer", "end", "error"])
    def test_of_many_steps_can_spend_its_budget_to_the_last_token_and_is_then_told_so(self, run, exit_behavior):
        def endless(turns):
            return "thinking\n" * 5, workman([("user", "")])[1]

        agent = create_budgeted_agent(chat(endless), [add, double], budget=60, exit_behavior=exit_behavior,
                                      middleware=[ModelCallLimitMiddleware(run_limit=21)])  # fmt: skip
        if exit_behavior == "error":
            with pytest.raises(ReasoningBudgetExceededError, match="run 60 of 60"):
                run(agent, ASK, {"recursion_limit": 100})
            return
        done = run(agent, ASK, {"recursion_limit": 100})
        assert sum(of_steps(done, "thinking")) == 60
        assert len(entries(done)) == (21 if exit_behavior == "answer" else 15)

    def test_s_context_may_weigh_only_some_kinds(self, run):
        @tool
        def add(a: int, b: int) -> int:
            """Adds."""
            raise ToolException("it is broken")

        add.handle_tool_error = True
        agent = create_budgeted_agent(
            chat(lambda turns: ("Oh.\n", "No.") if "broken" in turns[-1][1] else workman(turns)),
            [add], weights={"recovery": 3}, context_schema=ReasoningContext,
        )  # fmt: skip
        told = {"reasoning_budget": {"tokens": 100, "weights": {"planning": 5}}}
        assert of_steps(run(agent, ASK, context=told), "step", "cap") == [("planning", 50), ("recovery", 43)]

    @pytest.mark.parametrize("as_object", [False, True])
    def test_s_context_stands_over_the_middleware_s_numbers(self, run, as_object):
        @dataclass
        class Context:
            reasoning_budget: int

        schema = Context if as_object else ReasoningContext
        agent = create_budgeted_agent(chat(), [add, double], budget=900, context_schema=schema)
        told = Context(30) if as_object else {"reasoning_budget": {"tokens": 30}}
        assert of_steps(run(agent, ASK, context=told), "cap")[0] == 10
        assert of_steps(run(agent, ASK), "cap")[0] == 300

    def test_gives_a_structured_answer_within_its_budget(self, run):
        class Sum(BaseModel):
            """The result."""

            value: int

        def says(turns):
            _, answer = workman(turns)
            call = '<tool_call>\n{"name": "Sum", "arguments": {"value": 170}}\n</tool_call>'
            return "thinking\n" * 3, call if answer == "It is 170." else answer

        agent = create_budgeted_agent(chat(says), [add, double], budget=50, response_format=ToolStrategy(Sum))
        done = run(agent, ASK)
        assert done["structured_response"] == Sum(value=170)
        assert sum(of_steps(done, "thinking")) <= 50

    async def test_keeps_its_own_numbers_among_fifty_others_on_one_agent(self):
        agent = create_budgeted_agent(chat(), [add, double])
        runs = [{**ASK, "budget": {"tokens": tokens}} for tokens in range(3, 53)]
        for asked, done in zip(runs, await asyncio.gather(*map(agent.ainvoke, runs)), strict=True):
            alone = asked["budget"]["tokens"]
            assert entries(done)[0]["cap"] == alone // 3
            assert len(entries(done)) == 3
            assert sum(of_steps(done, "thinking")) <= alone


class TestSpendIsNeitherLostNorCountedTwice:
    def test_a_model_call_that_failed_and_was_tried_again_counts_once(self, run):
        tries = []

        def says(turns):
            tries.append(turns)
            if len(tries) == 2:
                raise OSError("the model stumbled")
            return workman(turns)

        retry = ModelRetryMiddleware(max_retries=2, initial_delay=0, jitter=False)
        agent = create_budgeted_agent(chat(says), [add, double], budget=300, middleware=[retry])
        assert of_steps(run(agent, ASK), "thinking") == [THOUGHT] * 3
        assert len(tries) == 4

    def test_an_answer_that_is_refused_as_structured_output_counts_as_well(self, run):
        class Total(BaseModel):
            total: int

            @field_validator("total")
            @classmethod
            def large(cls, total):
                raise ValueError(f"{total} is too small")

        caps = []

        class Caps(BaseCallbackHandler):
            def on_chat_model_start(self, serialized, messages, *, metadata=None, **kwargs):
                caps.append(metadata["early_exit_cap"])

        model = chat(lambda turns: ("thinking\n" * 3, '{"total": 5}'))
        retry = ModelRetryMiddleware(max_retries=1, initial_delay=0, jitter=False)
        agent = create_budgeted_agent(model, [], budget=90, middleware=[retry], response_format=ProviderStrategy(Total))
        run(agent, ASK, {"callbacks": [Caps()]})
        assert len(caps) == 2
        assert caps[1] < caps[0], "the second try knew what the first had spent"

    @pytest.mark.parametrize("foreign", [False, True])
    def test_what_is_bound_to_the_model_as_configuration_reaches_its_runs_once(self, run, foreign):
        seen = []

        class Seen(BaseCallbackHandler):
            def on_chat_model_start(self, serialized, messages, *, tags=None, metadata=None, **kwargs):
                seen.append((tags, metadata["early_exit_step"]))

        bare = Noting() if foreign else chat()
        model = bare.with_config(callbacks=[Seen()], tags=["quiet"])
        limits = ReasoningBudgetMiddleware(budget=300, unsupported_model_behavior="ignore")
        run(create_agent(model, [] if foreign else [add, double], middleware=[limits]), ASK)
        assert [step for _, step in seen] == (["final"] if foreign else ["planning", "routine", "routine"])
        assert all("quiet" in tags for tags, _ in seen)

    def test_an_answer_that_an_outer_middleware_throws_away_counts_as_well(self, run):
        class Twice(AgentMiddleware):
            def wrap_model_call(self, request, handler):
                handler(request)
                return handler(request)

            async def awrap_model_call(self, request, handler):
                await handler(request)
                return await handler(request)

        done = run(create_budgeted_agent(chat(), [add, double], budget=300, middleware=[Twice()]), ASK)
        assert of_steps(done, "step") == ["planning"] * 2 + ["routine"] * 4
        assert sum(message.type == "ai" for message in done["messages"]) == 3
        caps = of_steps(done, "cap")
        assert caps[1] < caps[0], "the second try knew what the first had spent"

    def test_an_outer_middleware_s_copies_of_the_state_hide_no_call(self, run):
        def copied(request):
            return request.override(state=dict(request.state))

        class Twice(AgentMiddleware):
            def wrap_model_call(self, request, handler):
                handler(copied(request))
                return handler(copied(request))

            async def awrap_model_call(self, request, handler):
                return (await asyncio.gather(handler(copied(request)), handler(copied(request))))[0]

        done = run(create_budgeted_agent(chat(), [add, double], budget=300, middleware=[Twice()]), ASK)
        assert of_steps(done, "step") == ["planning"] * 2 + ["routine"] * 4

    def test_a_run_that_died_goes_on_from_its_checkpoint_with_what_it_had_spent(self, tmp_path):
        def agent(saver, *, dies):
            @tool
            def add(a: int, b: int) -> int:
                """Adds."""
                if dies:
                    raise KeyboardInterrupt
                return a + b

            return create_budgeted_agent(chat(), [add, double], budget=300, checkpointer=saver)

        with SqliteSaver.from_conn_string(str(tmp_path / "runs.sqlite")) as saver:
            with pytest.raises(KeyboardInterrupt):
                agent(saver, dies=True).invoke(ASK, on_thread(), durability="sync")
            [before] = agent(saver, dies=False).get_state(on_thread()).values["ledger"].items()
        with SqliteSaver.from_conn_string(str(tmp_path / "runs.sqlite")) as saver:
            done = agent(saver, dies=False).invoke(None, on_thread())
        assert before in done["ledger"].items()
        assert of_steps(done, "step", "cap")[1:] == [("routine", 68), ("routine", 61)]
        assert len(set(of_steps(done, "budget"))) == 1, "it is still the same run"
        assert len(done["messages"]) == 6

    def test_agents_side_by_side_spend_their_graph_s_budget_and_lose_no_entry(self, run):
        def fan(state):
            shares = branches(["a", "b", "c"], state["budget"], None, state["ledger"])
            return [Send("agent", {**ASK, **{k: v for k, v in one.items() if k != "step"}}) for one in shares]

        builder = StateGraph(ReasoningState)
        builder.add_node("agent", create_budgeted_agent(chat(), [add, double]))
        builder.add_conditional_edges(START, fan, ["agent"])
        done = run(builder.compile(), {"messages": [], "budget": {"tokens": 120, "id": "whole"}})
        assert len(entries(done)) == 9
        assert set(of_steps(done, "budget")) == {"whole|a", "whole|b", "whole|c"}
        assert 60 < sum(of_steps(done, "thinking")) <= 120
        assert done["budget"] == {"tokens": 120, "id": "whole"}

    def test_an_agent_that_is_a_node_spends_its_node_s_share_of_the_graph_s_budget(self, run):
        builder = StateGraph(ReasoningState)
        builder.add_node("work", create_budgeted_agent(chat(), [add, double]))
        builder.add_node("tell", reasoning_node(chat(chatterer(90)), name="tell", reads=lambda state: "So?"))
        builder.add_edge(START, "work")
        builder.add_edge("work", "tell")
        done = run(builder.compile(), {**ASK, "budget": {"tokens": 80, "weights": {"work": 3, "tell": 1}}})
        assert of_steps(done, "step", "within", "cap") == [
            ("planning", "work", 20), ("routine", "work", 10), ("routine", "work", 7), ("tell", "", 43),
        ]  # fmt: skip

    def test_a_weight_of_no_kind_and_no_node_is_an_error_that_names_it(self, run):
        given = {**ASK, "budget": {"tokens": 80, "weights": {"planing": 3}}}
        with pytest.raises(ValueError, match="a budget names planing, but the kinds of an agent's steps are planning"):
            run(create_budgeted_agent(chat(), [add]), given)

    def test_the_bare_middleware_keeps_its_state_to_itself(self, run):
        agent = create_agent(
            chat(), [add, double], middleware=[ReasoningBudgetMiddleware(budget=300)], checkpointer=InMemorySaver()
        )
        done = run(agent, {**ASK, "ledger": {"mine": {}}}, on_thread())
        assert set(done) == {"messages"}
        assert of_steps(agent.get_state(on_thread()).values, "thinking") == [THOUGHT] * 3


class TestConfidence:
    def asked(self, run, given=ASK, tools=(add, double), context=None, **limits):
        model = promising(workman)
        done = run(create_budgeted_agent(model, tools, **limits), given, context=context)
        levels = [one["confidence"] for one in model.metadata["asked"]]
        return [one if one is None else round(one, 9) for one in levels], of_steps(done, "epsilon")

    def test_takes_the_place_of_a_bound_policy_and_never_of_one_that_never_leaves(self, run):
        model = promising(workman)
        for bound, told in (("deer", 0.9), ("never", None)):
            run(create_budgeted_agent(model.bind(exit_policy=bound), [add, double], confidence=0.9), ASK)
            assert {one["confidence"] for one in model.metadata["asked"][-3:]} == {told}

    def test_is_asked_for_by_kind_and_a_kind_without_is_never_cut(self, run):
        levels, risks = self.asked(run, confidence={"routine": 0.96}, budget=300)
        assert levels == [None, 0.96, 0.96]
        assert risks == pytest.approx([0, 0.04, 0.04])
        assert self.asked(run, confidence=0.9)[0] == [0.9, 0.9, 0.9]

    def test_adds_up_to_no_more_than_the_run_s_risk(self, run):
        levels, risks = self.asked(run, confidence=0.96, epsilon=0.1)
        assert levels == [0.96, 0.96, None]
        assert sum(risks) <= 0.1

    def test_is_not_asked_for_while_something_irreversible_may_be_called(self, run):
        levels, risks = self.asked(run, tools=[add, double, send], confidence=0.9, irreversible=["send"])
        assert (levels, risks) == ([None] * 3, [0, 0, 0])

    def test_is_refused_for_something_irreversible_that_the_agent_does_not_have(self):
        with pytest.raises(ValueError, match=r"irreversible names sned, but its tools are add, send;"):
            create_budgeted_agent(chat(), [add, send], irreversible=["sned"])

    def test_of_something_irreversible_that_is_not_offered_is_warned_of_once(self, run):
        agent = create_agent(chat(), [add, double], middleware=[ReasoningBudgetMiddleware(irreversible=["dobule"])])
        with pytest.warns(UserWarning, match="names dobule, and a step is offered add, double only") as told:
            run(agent, ASK)
        assert len(told) == 1

    def test_that_a_risk_asks_of_another_package_s_model_is_warned_of(self, run):
        agent = create_budgeted_agent(OpenAILike(profile=LEVELS), context_schema=ReasoningContext)
        with pytest.warns(UserWarning, match="foreign-1 never exits early"):
            done = run(agent, ASK, context={"reasoning_risk": {"epsilon": 0.1}})
        assert of_steps(done, "epsilon") == [0]

    def test_is_what_the_state_s_or_the_context_s_risk_allows(self, run):
        risk = {"epsilon": 0.1, "shares": {"planning": 0.05, "routine": 0.05}}
        assert self.asked(run, {**ASK, "risk": risk})[0] == [0.95, 0.95, None]
        assert self.asked(run, context={"reasoning_risk": risk}, context_schema=ReasoningContext)[0][0] == 0.95

    def test_never_cut_means_that_the_model_s_own_policy_is_off(self, run):
        agent = create_budgeted_agent(chat(exit_policy="deer"), [add, double, send], budget=300, irreversible=["send"])
        assert {entry["exit"]["policy"] for entry in entries(run(agent, ASK))} == {"Never()"}

    @pytest.mark.parametrize("around", ["configured", "bound"])
    def test_never_cut_holds_for_a_model_that_something_stands_around_too(self, run, around):
        inner = chat(exit_policy="deer", thinking_budget=25)
        fields = {"temperature": ConfigurableField(id="temperature")}
        model = inner.configurable_fields(**fields) if around == "configured" else inner.with_config(tags=["x"])
        agent = create_agent(
            model, [add, double, send], middleware=[ReasoningBudgetMiddleware(budget=600, irreversible=["send"])],
            checkpointer=InMemorySaver(),
        )  # fmt: skip
        run(agent, ASK, on_thread())
        state = agent.get_state(on_thread()).values
        assert {entry["exit"]["policy"] for entry in entries(state)} == {"Never()"}
        assert set(of_steps(state, "cap")) == {25}, "its own cap is the tighter one"

    def test_of_a_node_s_share_is_for_all_calls_of_its_agent_together(self, run):
        model = promising(workman)
        builder = StateGraph(ReasoningState)
        builder.add_node("work", create_budgeted_agent(model, [add, double]))
        builder.add_edge(START, "work")
        done = run(builder.compile(), {**ASK, "risk": {"epsilon": 0.1, "shares": {"work": 0.06, "tell": 0.04}}})
        assert of_steps(done, "epsilon") == pytest.approx([0.03, 0.01, 0.005])

    def test_that_nothing_is_certified_for_is_an_error_when_built_and_when_it_runs_no_cut(self, run):
        model = promising(workman, strictest=0.02)
        with pytest.raises(ValueError, match=r"confidence=0\.99 is stricter than all that"):
            create_budgeted_agent(model, [add], confidence={"routine": 0.99})
        done = run(create_budgeted_agent(model, [add, double]), {**ASK, "risk": {"epsilon": 0.06}})
        assert of_steps(done, "epsilon") == pytest.approx([0.03, 0, 0]), "of .03, .01, .005"
        assert [one["exit_policy"] for one in model.metadata["asked"]] == [None, "never", "never"]

    def test_an_effort_s_confidence_outlives_a_cap_that_is_tighter(self, run):
        model = promising(workman, reasoning_effort="medium")
        run(create_budgeted_agent(model, [add, double], budget=300), ASK)
        assert {one["confidence"] for one in model.metadata["asked"]} == {0.95}

    def test_without_any_the_model_s_own_policy_decides(self, run):
        agent = create_budgeted_agent(chat(exit_policy="deer"), [add, double], budget=300)
        assert {entry["exit"]["policy"] for entry in entries(run(agent, ASK))} == {"DEER(threshold=0.95)"}

    @pytest.mark.parametrize("model", [talker(chatterer(9)), Noting()])
    def test_without_a_calibration_is_an_error_when_the_agent_is_built(self, model):
        with pytest.raises(ValueError, match="calibration"):
            create_budgeted_agent(model, [add], confidence=0.9)


class TestCreateBudgetedAgent:
    def test_takes_a_name_of_this_package_too(self):
        with pytest.raises(ValueError, match="calibration"):
            create_budgeted_agent("earlyexit:no-such-model", [add], confidence=0.9)
        assert create_budgeted_agent("earlyexit:pocket", [add], budget=100).name == "budgeted_agent"

    def test_takes_a_model_that_the_runs_choose(self, run):
        agent = create_budgeted_agent(init_chat_model(), [add, double], budget=300)
        assert agent.name == "budgeted_agent"

    def test_takes_a_state_of_one_s_own(self, run):
        class Mine(AgentState):
            customer: str

        agent = create_budgeted_agent(chat(), [add, double], budget=300, state_schema=Mine)
        done = run(agent, {**ASK, "customer": "Ada"})
        assert done["customer"] == "Ada"
        assert of_steps(done, "thinking") == [THOUGHT] * 3


class TestAMixedFleet:
    def test_is_told_in_each_model_s_own_words_and_its_reasoning_counts(self, run):
        model = OpenAILike(profile=LEVELS, replies=[call("add", a=1, b=2), AIMessage("3", usage_metadata=usage(9, 6))])
        done = run(create_budgeted_agent(model, [add], budget=6000), ASK)
        assert [one["reasoning_effort"] for one in model.calls] == ["low", "low"]
        assert of_steps(done, "model", "thinking", "cap") == [("foreign-1", 6, 2000), ("foreign-1", 6, 1498)]
        assert {entry["exit"]["reason"] for entry in entries(done)} == {"unreported"}
        [run_id] = set(of_steps(done, "risk"))
        assert run_guarantee({"epsilon": 0.1, "id": run_id}, done["ledger"]) is None

    def test_models_may_change_from_step_to_step(self, run):
        other = AnthropicLike(thinking={"type": "enabled", "budget_tokens": 9000}, replies=[call("double", n=85)])
        ours = chat()

        class Switch(AgentMiddleware):
            def wrap_model_call(self, request, handler):
                return handler(request.override(model=other) if request.messages[-1].text == "85" else request)

            async def awrap_model_call(self, request, handler):
                chosen = request.override(model=other) if request.messages[-1].text == "85" else request
                return await handler(chosen)

        done = run(create_budgeted_agent(ours, [add, double], budget=9000, middleware=[Switch()]), ASK)
        assert of_steps(done, "model", "thinking") == [("pocket", THOUGHT), ("foreign-1", 6), ("pocket", THOUGHT)]
        assert other.calls == [{"own thinking": {"type": "enabled", "budget_tokens": (9000 - THOUGHT) // 4}}]
        assert done["messages"][-1].text == "It is 170."

    def test_one_that_cannot_be_told_is_warned_of_once(self, run):
        agent = create_budgeted_agent(Noting(), [], most=100)
        with pytest.warns(UserWarning, match="foreign-1 cannot be told to think less than 100 tokens") as told:
            run(agent, ASK)
            run(agent, ASK)
        assert len(told) == 1

    def test_one_whose_least_is_not_nothing_is_warned_of_when_nothing_is_left(self, run):
        model = OpenAILike(profile={"reasoning_effort_levels": ["low", "high"]})
        with pytest.warns(UserWarning, match="foreign-1 may think on with nothing left: its least effort is low"):
            run(create_budgeted_agent(model, most=0), ASK)

    def test_one_that_cannot_be_told_is_an_error_or_nothing_by_choice(self, run):
        with pytest.raises(ValueError, match=r"cannot be told.*unsupported_model_behavior"):
            run(create_budgeted_agent(Noting(), [], budget=100, unsupported_model_behavior="raise"), ASK)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            done = run(create_budgeted_agent(Noting(), [], budget=100, unsupported_model_behavior="ignore"), ASK)
        assert of_steps(done, "thinking") == [3], "what it reports counts all the same"

    def test_one_that_reports_no_usage_is_warned_of(self, run):
        model = OpenAILike(profile=LEVELS, replies=[AIMessage("Done.")])
        with pytest.warns(UserWarning, match="reports no usage"):
            assert of_steps(run(create_budgeted_agent(model, [], budget=100), ASK), "thinking") == [0]


class TestTracing:
    class Watch(BaseCallbackHandler):
        def __init__(self):
            self.seen = []

        def on_chat_model_start(self, serialized, messages, *, metadata=None, **kwargs):
            self.seen.append((metadata.get("early_exit_step"), metadata.get("early_exit_cap")))

    def test_the_run_of_every_model_call_says_which_step_it_was_and_what_it_might_take(self, run):
        watch = self.Watch()
        done = run(create_budgeted_agent(chat(), [add, double], budget=300), ASK, {"callbacks": [watch]})
        assert watch.seen == of_steps(done, "step", "cap")

    async def test_streamed_tokens_say_it_too(self):
        agent = create_budgeted_agent(chat(), [add, double], budget=300)
        steps = [told.get("early_exit_step") for message, told in agent.stream(ASK, stream_mode="messages")
                 if message.type == "AIMessageChunk"]  # fmt: skip
        assert list(dict.fromkeys(steps)) == ["planning", "routine"]
        parts = [part async for part in agent.astream(ASK, stream_mode="messages")]
        assert {told["early_exit_step"] for message, told in parts if message.type == "AIMessageChunk"} == set(steps)

    def test_what_another_middleware_asks_after_it_does_not_inherit_its_step(self, run):
        class Judge(AgentMiddleware):
            def wrap_model_call(self, request, handler):
                response = handler(request)
                Noting().invoke("Was that good?")
                return response

            async def awrap_model_call(self, request, handler):
                response = await handler(request)
                await Noting().ainvoke("Was that good?")
                return response

        watch = self.Watch()
        agent = create_budgeted_agent(chat(), [add, double], budget=300, middleware=[Judge()])
        run(agent, ASK, {"callbacks": [watch]})
        assert [step for step, _ in watch.seen] == ["planning", None, "routine", None, "routine", None]

    @pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
    async def test_v3_events_end_every_step_s_reasoning_with_its_exit(self):
        agent = create_budgeted_agent(chat(), [add, double], budget=60)
        streamed = agent.stream_events(ASK, version="v3")
        seen = [message.output for message in streamed.messages]
        assert [message.content[0]["extras"]["exit"]["reason"] for message in seen] == ["budget"] * 3
        assert of_steps(streamed.output, "exit") == [message.response_metadata["early_exit"] for message in seen]
        assert len(entries(await (await agent.astream_events(ASK, version="v3")).output())) == 3

    async def test_the_event_loop_is_never_blocked(self):
        agent = create_budgeted_agent(chat(), [add, double], budget=300)
        with blockbuster_ctx():
            assert len(entries(await agent.ainvoke(ASK))) == 3

    def test_custom_events_tell_what_a_step_may_spend_and_what_it_spent(self):
        agent = create_budgeted_agent(chat(), [add, double], budget=300)
        told = list(agent.stream(ASK, stream_mode="custom"))
        assert [event["event"] for event in told] == ["early_exit.step", "early_exit.spent"] * 3
        assert [event["remaining"] for event in told[::2]] == [300, 300 - THOUGHT, 300 - 2 * THOUGHT]
        # After planning, 4 of the weights' 6 are to come.
        paces = [1, (300 - THOUGHT) / 300 * 6 / 4, (300 - 2 * THOUGHT) / 300 * 6 / 4]
        assert [event["pace"] for event in told[::2]] == pytest.approx(paces)
        assert {event["exit"]["reason"] for event in told[1::2]} == {"natural"}


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"budget": -1}, "at least 0, got -1"),
        ({"thread_budget": -1}, "at least 0, got -1"),
        ({"most": {"routine": -5}}, "at least 0, got -5"),
        ({"most": {"planing": 5}}, "planing, but the kinds of an agent's steps are planning"),
        ({"weights": {"last": 5}}, "names last"),
        ({"weights": {"final": -1}}, "at least 0, got -1"),
        ({"confidence": 1.0}, "in \\(0, 1\\), not 1.0"),
        ({"confidence": {"rest": 0.9}}, "names rest"),
        ({"epsilon": 0.1}, "give confidence"),
        ({"epsilon": 1.5, "confidence": 0.9}, "got 1.5"),
        ({"exit_behavior": "stop"}, "answer, end, error; got 'stop'"),
        ({"unsupported_model_behavior": "error"}, "ignore, warn, raise; got 'error'"),
    ],
)
def test_what_cannot_be_meant_is_refused_when_it_is_built(limits, says):
    with pytest.raises(ValueError, match=says):
        ReasoningBudgetMiddleware(**limits)


def test_a_context_s_budget_that_is_none_is_refused(run):
    agent = create_budgeted_agent(chat(), [add, double], context_schema=ReasoningContext)
    with pytest.raises(ValueError, match="at least 0, got 'much'"):
        run(agent, ASK, context={"reasoning_budget": "much"})


def test_without_langchain_the_other_graphs_work_and_an_agent_says_what_to_install():
    code = """
    import sys
    sys.modules["langchain"] = sys.modules["langchain.agents"] = None
    from langchain_earlyexit.graph import create_budgeted_agent, reasoning_node
    try:
        create_budgeted_agent("any", [])
    except ImportError as error:
        assert "langchain-earlyexit[agents]" in str(error), error
    else:
        raise AssertionError
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_an_agent_that_was_told_nothing_is_an_agent(run):
    done = run(create_agent(chat(), [add, double], middleware=[ReasoningBudgetMiddleware()]), ASK)
    assert done["messages"][-1].text == "It is 170."
