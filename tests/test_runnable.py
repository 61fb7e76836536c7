"""What LangChain does with any chat model: configure, cache, limit, fall back, retry, count, copy, save."""

import copy
import doctest
import gc
import json
import pickle
import sys
import types
from operator import itemgetter
from typing import Literal

import langchain.chat_models.base
import numpy as np
import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain_core.caches import InMemoryCache
from langchain_core.language_models import FakeListChatModel
from langchain_core.load import dumps, loads
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage, trim_messages
from langchain_core.messages.utils import count_tokens_approximately
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.rate_limiters import BaseRateLimiter
from langchain_core.runnables import (
    ConfigurableField,
    ConfigurableFieldMultiOption,
    ConfigurableFieldSingleOption,
    RunnableLambda,
)
from langchain_core.tools import tool
from pydantic import Field, create_model

from langchain_earlyexit import DEER, ChatEarlyExit, CoDEStop, FunctionEngine, init_chat_model
from langchain_earlyexit.engines.function import byte_tokenizer, scripted
from langchain_earlyexit.pocket import CONTEXT_LENGTH, weights_dir

QUESTION = "2 + 2?"


class Steps:
    """A scripted model that counts how often it is asked for a token, and can be told to fail first."""

    def __init__(self, answer="The answer is 4.", failures=0):
        self.tokenizer = byte_tokenizer()
        self.says = scripted(self.tokenizer, "It is 4.\n\nWait, is it? Yes.\n", answer)
        self.taken, self.failures = 0, failures

    def __call__(self, ids):
        self.taken += 1
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the model went away")
        return self.says(ids)


def chat(steps=None, **settings):
    steps = steps or Steps()
    return ChatEarlyExit(engine=FunctionEngine(steps, steps.tokenizer), **settings)


def record(message):
    return message.response_metadata["early_exit"]


class TestConfigurable:
    """How one model is chosen or set at run time."""

    def test_every_setting_can_be_made_a_field_of_the_configuration(self):
        llm = chat(seed=1).configurable_fields(
            thinking_budget=ConfigurableField(id="budget"), exit_policy=ConfigurableField(id="policy")
        )
        assert record(llm.invoke(QUESTION))["reason"] == "natural"
        less = llm.with_config(configurable={"budget": 3, "policy": "deer"})
        told = record(less.invoke(QUESTION))
        assert (told["reason"], told["budget"], told["policy"]) == ("budget", 3, repr(DEER()))

    def test_a_run_that_sets_what_only_the_constructor_takes_still_streams(self):
        llm = chat(seed=1).configurable_fields(timeout=ConfigurableField(id="timeout"))
        assert len(list(llm.stream(QUESTION, {"configurable": {"timeout": 60}}))) == len(list(llm.stream(QUESTION))) > 5
        whole = chat(seed=1, streaming=False).configurable_fields(timeout=ConfigurableField(id="timeout"))
        assert len(list(whole.stream(QUESTION, {"configurable": {"timeout": 60}}))) == len(list(whole.stream(QUESTION)))

    def test_a_bad_value_in_the_configuration_is_an_error_as_in_the_constructor(self):
        llm = chat().configurable_fields(thinking_budget=ConfigurableField(id="budget"))
        with pytest.raises(ValueError, match="thinking_budget must be -1"):
            llm.invoke(QUESTION, config={"configurable": {"budget": -7}})

    def test_a_value_of_another_type_is_read_as_the_constructor_reads_it_or_refused_by_name(self):
        fields = ("shadow", "max_tokens", "thinking_budget", "stop")
        llm = chat(exit_policy=DEER(0.0)).configurable_fields(**{name: ConfigurableField(id=name) for name in fields})
        run = {"shadow": "false", "max_tokens": "50", "thinking_budget": "20", "stop": "4"}
        for message in (llm.invoke(QUESTION, {"configurable": run}), llm.invoke(QUESTION, **run)):
            told = record(message)
            assert (told["reason"], told["budget"], message.text) == ("confident", 20, "The answer is")
        for name, bad in (("shadow", "maybe"), ("max_tokens", "many"), ("thinking_budget", 3.5)):
            for refused in ({"config": {"configurable": {name: bad}}}, {name: bad}):
                with pytest.raises(ValueError, match=rf"^{name}={bad!r} cannot be meant: Input should be a valid"):
                    llm.invoke(QUESTION, **refused)

    def test_models_can_be_alternatives_of_each_other(self):
        llm = chat().configurable_alternatives(
            ConfigurableField(id="llm"), default_key="four", five=chat(Steps("It is 5."))
        )
        chain = ChatPromptTemplate.from_messages([("human", "{question}")]) | llm
        assert chain.invoke({"question": QUESTION}).text == "The answer is 4."
        assert chain.invoke({"question": QUESTION}, config={"configurable": {"llm": "five"}}).text == "It is 5."

    def test_a_value_of_the_run_counts_over_the_model_s_own_as_in_a_call(self):
        llm = chat(reasoning_effort="low", exit_policy="deer", stop=["!"]).configurable_fields(
            thinking_budget=ConfigurableField(id="budget"), timeout=ConfigurableField(id="timeout")
        )
        assert record(llm.invoke(QUESTION))["budget"] == 1024
        told = record(llm.invoke(QUESTION, config={"configurable": {"budget": 3, "timeout": 60}}))
        assert (told["budget"], told["policy"]) == (3, repr(DEER()))

    def test_fields_can_be_chosen_among_options(self):
        llm = chat().configurable_fields(
            exit_policy=ConfigurableFieldSingleOption(
                id="care", options={"much": "never", "some": "deer"}, default="some"
            ),
            stop=ConfigurableFieldMultiOption(id="ends", options={"is": " is", "4": "4"}, default=["4"]),
        )
        message = llm.invoke(QUESTION)
        assert (record(message)["policy"], message.text) == (repr(DEER()), "The answer is")
        message = llm.invoke(QUESTION, config={"configurable": {"care": "much", "ends": ["is", "4"]}})
        assert (record(message)["policy"], message.text) == ("Never()", "The answer")
        assert llm.invoke(QUESTION, config={"configurable": {"ends": []}}).text == "The answer is 4."

    def test_more_fields_can_be_opened_later(self):
        llm = chat().configurable_fields(thinking_budget=ConfigurableField(id="budget")).bind_tools([add])
        more = llm.configurable_fields(seed=ConfigurableField(id="seed"))
        message = more.invoke(QUESTION, config={"configurable": {"budget": 3, "seed": 8}})
        assert (record(message)["budget"], message.response_metadata["seed"]) == (3, 8)
        with pytest.raises(ValueError, match="budgets not found"):
            more.configurable_fields(budgets=ConfigurableField(id="budgets"))

    @pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
    async def test_every_way_of_calling_it_asks_the_model_of_the_run(self):
        llm = init_chat_model("earlyexit:pocket", engine=chat().engine, configurable_fields=["thinking_budget"])
        run = {"configurable": {"thinking_budget": 3}}
        messages = [
            llm.invoke(QUESTION, run), *llm.batch([QUESTION, QUESTION], run), *llm.batch([QUESTION], [run]),
            summed(llm.stream(QUESTION, run)), llm.stream_events(QUESTION, run, version="v3").output,
            await llm.ainvoke(QUESTION, run), *await llm.abatch([QUESTION], run),
            summed([chunk async for chunk in llm.astream(QUESTION, run)]),
            await (await llm.astream_events(QUESTION, run, version="v3")).output,
            [event async for event in llm.astream_events(QUESTION, run, version="v2")][-1]["data"]["output"],
        ]  # fmt: skip
        assert [record(message)["budget"] for message in messages] == [3] * 11

    def test_what_is_told_to_all_calls_reaches_those_of_runs(self):
        steps = Steps()
        steps.says = scripted(steps.tokenizer, "And so on.\n" * 200, "The answer is 4.")
        with chat(steps).configurable_fields(seed=ConfigurableField(id="seed")) as llm:
            chunks = []
            for chunk in llm.bind_tools([]).stream(QUESTION, config={"configurable": {"seed": 3}}):
                chunks.append(chunk)
                if len(chunks) == 3:
                    assert llm.answer_now(chunk.id) == 1
            assert record(summed(chunks))["reason"] == "answer_now"
            assert llm.answer_now() == 0


def summed(chunks):
    whole, *rest = chunks
    for chunk in rest:
        whole += chunk
    return whole


class Someone(FakeListChatModel):
    """Another provider's model."""

    responses: list[str] = Field(default_factory=list)
    model: str
    temperature: float | None = None

    def bind_tools(self, tools, **kwargs):
        return self.bind(tools=tools)

    def _call(self, messages, stop=None, run_manager=None, **kwargs):
        return f"{self.model} at {self.temperature} with {len(kwargs.get('tools', ()))} tools"


@pytest.fixture
def someone(monkeypatch):
    """A provider that LangChain's own helper knows."""
    module = types.ModuleType("langchain_someone")
    module.Someone = Someone
    monkeypatch.setitem(sys.modules, "langchain_someone", module)
    known = ("langchain_someone", "Someone", lambda cls, **kwargs: cls(**kwargs))
    monkeypatch.setitem(langchain.chat_models.base._BUILTIN_PROVIDERS, "someone", known)


SCHEMA = {"title": "n", "description": "A number.", "type": "object", "properties": {"n": {"enum": [4]}}}


class TestInit:
    def test_a_name_with_our_provider_before_it_makes_our_model(self):
        llm = init_chat_model("earlyexit:pocket", thinking_budget=5)
        assert isinstance(llm, ChatEarlyExit)
        assert (llm.model, llm.thinking_budget) == ("pocket", 5)
        for name in ("org/model", "earlyexit:org/model"):
            assert init_chat_model(name, model_provider="earlyexit").model == "org/model"

    def test_its_example_runs(self):
        [example] = doctest.DocTestFinder().find(init_chat_model, "init_chat_model", globs={})
        assert example.examples
        assert doctest.DocTestRunner().run(example).failed == 0

    def test_the_fields_that_are_opened_can_be_set_by_a_run_and_no_others(self):
        llm = init_chat_model(
            "earlyexit:pocket", engine=chat().engine, seed=1, configurable_fields="any", config_prefix="thinker"
        )
        asked = {"configurable": {"thinker_thinking_budget": 3, "thinker_model": "elsewhere", "thinking_budget": 9}}
        assert record(llm.invoke(QUESTION, config=asked))["budget"] == 3
        opened = init_chat_model("earlyexit:pocket", configurable_fields=["model", "seed"])
        assert [field.id for field in opened.config_specs] == ["model", "seed"]

    @pytest.mark.parametrize(
        "operate",
        [
            lambda llm: llm.bind_tools([add]),
            lambda llm: llm.with_structured_output(SCHEMA, include_raw=True) | itemgetter("raw"),
            lambda llm: llm.bind(max_tokens=99),
            lambda llm: llm.with_config(tags=["t"]).with_config(configurable={"thinking_budget": 5}),
            lambda llm: llm.bind_tools([add]).bind(max_tokens=99).with_config(tags=["t"]).with_retry(),
            lambda llm: llm.bind(max_tokens=99).with_config(tags=["t"]).bind_tools([add]),
        ],
    )
    @pytest.mark.parametrize("fields", ["any", ["model", "thinking_budget"]])
    def test_what_is_done_to_a_configurable_model_leaves_it_configurable(self, operate, fields):
        llm = init_chat_model("earlyexit:pocket", engine=chat().engine, max_tokens=400, configurable_fields=fields)
        run = {"configurable": {"thinking_budget": 3}}
        assert record(operate(llm).invoke(QUESTION, config=run))["budget"] == 3
        # In a graph the configuration comes from around the call.
        assert record(RunnableLambda(lambda _: operate(llm).invoke(QUESTION)).invoke("", config=run))["budget"] == 3
        assert record(llm.invoke(QUESTION))["budget"] is None

    def test_an_agent_s_runs_configure_its_model(self, someone):
        llm = init_chat_model(
            "earlyexit:pocket", engine=chat().engine, configurable_fields=["model", "thinking_budget"]
        )
        agent = create_agent(llm, [add], system_prompt="Be brief.")

        def last(**configurable):
            return agent.invoke({"messages": [("user", QUESTION)]}, {"configurable": configurable})["messages"][-1]

        assert record(last(thinking_budget=3))["budget"] == 3
        assert record(last())["budget"] is None
        assert last(model="someone:else").text == "else at None with 1 tools"

    def test_a_tool_that_cannot_be_is_refused_before_any_run(self):
        llm = init_chat_model("earlyexit:pocket", configurable_fields="any")
        with pytest.raises(ValueError, match="tool_choice asks for the tool 'sub'"):
            llm.bind_tools([add], tool_choice="sub")

    def test_a_run_may_choose_the_model_and_its_provider(self, someone):
        engine = chat().engine
        llm = init_chat_model(
            "earlyexit:pocket", engine=engine, exit_policy="deer", temperature=0.5,
            configurable_fields=["model", "model_provider", "temperature"], config_prefix="my",
        )  # fmt: skip

        def ask(**configurable):
            return llm.bind_tools([add]).invoke(QUESTION, config={"configurable": configurable})

        def ours(message):
            return message.response_metadata["model_name"], record(message)["policy"]

        assert ours(ask()) == ("pocket", repr(DEER()))
        assert ours(ask(my_model="org/other")) == ("org/other", repr(DEER()))
        assert ours(ask(my_model="earlyexit:org/other")) == ("org/other", repr(DEER()))
        assert ask(my_model="someone:else").text == "else at 0.5 with 1 tools"
        assert ask(my_model="someone:else", my_temperature=1.5).text == "else at 1.5 with 1 tools"
        assert ask(my_model="else", my_model_provider="someone").text == "else at 0.5 with 1 tools"
        assert ours(ask(model="someone:else")) == ("pocket", repr(DEER()))

    @pytest.mark.parametrize("fields", ["any", ["model"]])
    def test_a_run_may_choose_ours_instead_of_another_s(self, someone, fields):
        llm = init_chat_model("someone:else", temperature=0.5, configurable_fields=fields)
        assert llm.invoke(QUESTION).text == "else at 0.5 with 0 tools"
        assert llm.invoke(QUESTION, config={"configurable": {"model": "someone:new"}}).text.startswith("new at 0.5")
        chosen = llm.prepare({"configurable": {"model": "earlyexit:pocket"}})[0]
        assert (type(chosen), chosen.temperature) == (ChatEarlyExit, 0.5)

    def test_without_a_model_a_run_must_name_one(self, someone):
        llm = init_chat_model(temperature=0.5)
        assert llm.invoke(QUESTION, {"configurable": {"model": "someone:else"}}).text.startswith("else at 0.5")
        with pytest.raises(ValueError, match=r"name one in config\['configurable'\]\['model'\]"):
            llm.invoke(QUESTION)
        assert not hasattr(llm, "profile")
        assert ChatPromptTemplate.from_messages(["{question}"]).pipe(llm).OutputType
        with pytest.raises(ValueError, match="lets no run name one"):
            init_chat_model(configurable_fields=["temperature"])

    @pytest.mark.parametrize("fields", [None, ["model"], ["model", "thinking_budget"]])
    def test_a_provider_may_be_named_before_the_model_is(self, fields):
        llm = init_chat_model(model_provider="earlyexit", engine=chat().engine, configurable_fields=fields)
        run = {"configurable": {"model": "org/model"}}
        assert llm.invoke(QUESTION, run).response_metadata["model_name"] == "org/model"
        with pytest.raises(ValueError, match=r"name one in config\['configurable'\]\['model'\]"):
            llm.invoke(QUESTION)

    def test_bad_fields_and_a_prefix_for_none_are_errors(self):
        with pytest.raises(ValueError, match=r"names \['budgets'\], which ChatEarlyExit has not"):
            init_chat_model("earlyexit:pocket", configurable_fields=["budgets"])
        with pytest.raises(ValueError, match="nothing would have the prefix"):
            init_chat_model("earlyexit:pocket", config_prefix="a")
        with pytest.raises(TypeError, match="not a ChatEarlyExit; use that as is"):
            init_chat_model(ChatEarlyExit())

    def test_other_names_are_langchains(self):
        with pytest.raises(ImportError, match="langchain-anthropic"):
            init_chat_model("anthropic:claude-sonnet-4-5")
        with pytest.raises(ValueError, match="Unable to infer model provider"):
            init_chat_model("of-nobody")


@pytest.fixture
def weights(monkeypatch):
    """What happens to weights, which are functions here, but shared like others: ("loaded" or "freed", model)."""
    from langchain_earlyexit.engines import local

    told = []

    class Weights(FunctionEngine):
        def __init__(self, wanted):
            steps = Steps()
            super().__init__(steps, steps.tokenizer)
            self.of = wanted.model
            told.append(("loaded", self.of))

        def close(self):
            told.append(("freed", self.of))
            super().close()

    monkeypatch.setattr(local, "load", Weights)
    return told


class TestWeights:
    def test_those_of_configured_runs_are_loaded_once_and_freed_with_the_model(self, weights):
        llm = ChatEarlyExit(model="a").configurable_fields(
            thinking_budget=ConfigurableField(id="budget"), timeout=ConfigurableField(id="timeout")
        )
        for configurable in ({"budget": 3}, {"budget": 4, "timeout": 60}, {"timeout": 70}):
            llm.with_config(configurable=configurable).bind_tools([add]).invoke(QUESTION)
        assert weights == [("loaded", "a")]
        llm.close()
        assert weights == [("loaded", "a"), ("freed", "a")]

    def test_models_that_runs_choose_are_kept_until_the_one_that_chooses_is_closed(self, weights):
        with init_chat_model("earlyexit:a", configurable_fields=["model", "seed"]) as llm:
            for name in ("earlyexit:b", "a", "b", "earlyexit:a"):
                llm.with_config(tags=["t"]).invoke(QUESTION, config={"configurable": {"model": name, "seed": 3}})
            assert sorted(weights) == [("loaded", "a"), ("loaded", "b")]
        assert sorted(weights[2:]) == [("freed", "a"), ("freed", "b")]

    def test_a_model_that_is_gone_holds_none(self, weights):
        ChatEarlyExit(model="a").invoke(QUESTION)
        gc.collect()
        again = ChatEarlyExit(model="a", seed=3)
        again.invoke(QUESTION)
        again.close()
        assert weights == [("loaded", "a"), ("freed", "a")]

    def test_those_that_nobody_holds_go_before_others_are_loaded_and_the_rest_stay(self, weights):
        held = ChatEarlyExit(model="held")
        held.invoke(QUESTION)
        ChatEarlyExit(model="gone").invoke(QUESTION)
        gc.collect()
        with ChatEarlyExit(model="new") as new:
            new.invoke(QUESTION)
            assert weights == [("loaded", "held"), ("loaded", "gone"), ("freed", "gone"), ("loaded", "new")]
            held.invoke(QUESTION)
        held.close()
        assert weights[4:] == [("freed", "new"), ("freed", "held")]

    def test_those_that_fail_to_load_hold_none(self, weights):
        with ChatEarlyExit(model="a") as llm:
            llm.invoke(QUESTION)
            wrong = ChatEarlyExit(model="a", probe="nowhere")
            with pytest.raises(FileNotFoundError):
                wrong.invoke(QUESTION)
        assert weights == [("loaded", "a"), ("freed", "a")]

    def test_a_stream_outlives_the_name_of_its_model(self, weights):
        running = ChatEarlyExit(model="a").stream(QUESTION)
        next(running)
        gc.collect()
        with ChatEarlyExit(model="b") as other:
            other.invoke(QUESTION)
            assert summed(running).text == "The answer is 4."
            assert ("freed", "a") not in weights


TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]


class TestCache:
    def test_servers_of_one_name_do_not_answer_for_each_other(self):
        first, second = (
            ChatEarlyExit(model="m", engine="vllm", base_url=f"http://{host}:1")._get_llm_string() for host in "ab"
        )
        assert first != second

    @pytest.mark.filterwarnings("ignore:CoDEStop's tau is used uncalibrated")
    def test_equal_calls_are_answered_from_the_cache_and_others_are_not(self):
        steps = Steps()
        llm = chat(steps, cache=InMemoryCache(), seed=1)
        first = llm.invoke(QUESTION)
        for call in (
            {"thinking_budget": 3}, {"exit_policy": DEER(0.9)}, {"exit_policy": DEER(0.8)}, {"exit_policy": CoDEStop()},
            {"seed": 2}, {"temperature": 0.5}, {"max_tokens": 90}, {"stop": ["4"]}, {"answer_form": "boxed"},
            {"look": "wait"}, {"shadow": True}, {"include_checks": True}, {"reuse_trial_answer": True},
        ):  # fmt: skip
            before = steps.taken
            told = record(llm.invoke(QUESTION, **call))
            assert steps.taken > before, f"{call} was answered from the cache"
            before = steps.taken
            assert record(llm.invoke(QUESTION, **call)) == told
            assert steps.taken == before, f"{call} was not answered from the cache"
        before = steps.taken
        assert llm.invoke(QUESTION).text == first.text
        assert steps.taken == before
        llm.invoke("2 + 3?")
        assert steps.taken > before

    def test_what_a_turn_may_answer_with_is_a_part_of_the_call(self):
        steps = Steps()
        steps.tokenizer.chat_template = (
            "{{ tools | tojson if tools else '' }}<tool_call>" + steps.tokenizer.chat_template
        )
        llm = chat(steps, cache=InMemoryCache(), seed=1, max_tokens=400)
        number = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer", "maximum": 9}}}
        word = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["four"]}}}
        calls = (
            {}, {"tools": [add]}, {"tools": [add, subtract]}, {"tools": [subtract]},
            {"tools": [add], "tool_choice": "none"}, {"tools": [add], "tool_choice": "any"},
            {"tools": [add, subtract], "tool_choice": "add"}, {"tools": [add], "parallel_tool_calls": False},
            {"response_format": number}, {"response_format": word}, {"response_format": word, "tools": [add]},
        )  # fmt: skip
        for call in calls:
            before = steps.taken
            first = llm.invoke(QUESTION, **call)
            assert steps.taken > before, f"{call} was answered from the cache"
            before = steps.taken
            again = llm.invoke(QUESTION, **call)
            assert steps.taken == before, f"{call} was not answered from the cache"
            assert (again.content, again.tool_calls) == (first.content, first.tool_calls)

    def test_two_schemas_with_one_name_are_two(self):
        def named(**fields):
            return type("S", (create_model("S", **fields),), {})

        llm = chat(cache=InMemoryCache(), max_tokens=60, thinking_budget=0)
        one, two = named(a=(Literal[1], ...)), named(b=(Literal[2], ...))
        assert str(one) == str(two)
        assert [llm.invoke(QUESTION, response_format=each).text for each in (one, two)] == ['{"a": 1}', '{"b": 2}']

    def test_a_model_of_the_user_s_own_is_not_taken_for_another_of_its_kind(self):
        cache = InMemoryCache()
        four, five = chat(cache=cache, seed=1), chat(Steps("It is 5."), cache=cache, seed=1)
        assert [llm.invoke(QUESTION).text for llm in (four, five)] == ["The answer is 4.", "It is 5."]
        again = ChatEarlyExit(engine=four.engine, cache=cache, seed=1)
        assert again.invoke(QUESTION).id == four.invoke(QUESTION).id

    async def test_async_calls_share_it(self):
        steps = Steps()
        llm = chat(steps, cache=InMemoryCache(), seed=1)
        llm.invoke(QUESTION)
        before = steps.taken
        assert (await llm.ainvoke(QUESTION)).text == "The answer is 4."
        assert steps.taken == before

    @pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
    def test_a_cached_answer_keeps_its_record(self):
        llm = chat(cache=InMemoryCache(), seed=1)
        first = llm.invoke(QUESTION, thinking_budget=3)
        again = llm.invoke(QUESTION, thinking_budget=3)
        assert again.usage_metadata["total_cost"] == 0
        assert (again.text, again.additional_kwargs, record(again)) == (
            first.text,
            first.additional_kwargs,
            record(first),
        )


class Counting(BaseRateLimiter):
    def __init__(self):
        self.asked = []

    def acquire(self, *, blocking=True):
        self.asked.append("sync")
        return True

    async def aacquire(self, *, blocking=True):
        self.asked.append("async")
        return True


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
async def test_the_rate_limiter_is_asked_once_per_call_whatever_its_form():
    limiter = Counting()
    llm = chat(rate_limiter=limiter)
    llm.invoke(QUESTION)
    list(llm.stream(QUESTION))
    _ = llm.stream_events(QUESTION, version="v3").output
    llm.batch([QUESTION, QUESTION])
    assert limiter.asked == ["sync"] * 5
    await llm.ainvoke(QUESTION)
    _ = [chunk async for chunk in llm.astream(QUESTION)]
    await (await llm.astream_events(QUESTION, version="v3")).output
    assert limiter.asked[5:] == ["async"] * 3


class TestFailures:
    def test_a_model_that_fails_is_replaced_by_its_fallback(self):
        llm = chat(Steps(failures=99)).with_fallbacks([chat(Steps("It is 5."))])
        assert llm.invoke(QUESTION).text == "It is 5."
        assert "".join(chunk.text for chunk in llm.stream(QUESTION)) == "It is 5."

    async def test_a_fallback_takes_over_in_async_calls(self):
        llm = chat(Steps(failures=99)).with_fallbacks([chat(Steps("It is 5."))])
        assert (await llm.ainvoke(QUESTION)).text == "It is 5."

    def test_a_call_is_tried_again(self):
        steps = Steps(failures=1)
        llm = chat(steps).with_retry(retry_if_exception_type=(ConnectionError,), wait_exponential_jitter=False)
        assert llm.invoke(QUESTION).text == "The answer is 4."
        assert steps.failures == 0

    def test_what_a_call_cannot_mean_is_not_tried_again(self):
        steps = Steps()
        llm = chat(steps).with_retry(retry_if_exception_type=(ConnectionError,))
        with pytest.raises(ValueError, match="thinking_budget must be"):
            llm.invoke(QUESTION, thinking_budget=-9)
        assert steps.taken == 0


@tool
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


@tool
def subtract(a: int, b: int) -> int:
    """Subtracts a number from another."""
    return a - b


TALKS = [
    [HumanMessage(QUESTION)],
    [SystemMessage("Be brief."), HumanMessage(QUESTION), AIMessage("4"), HumanMessage([{"type": "text", "text": "?"}])],
    [
        HumanMessage(QUESTION),
        AIMessage("", tool_calls=[{"name": "add", "args": {"a": 2, "b": 2}, "id": "c"}]),
        ToolMessage("4", tool_call_id="c"),
    ],
]


class TestCounting:
    @pytest.mark.parametrize("messages", TALKS)
    def test_the_tokens_of_messages_are_those_a_call_reports(self, messages):
        llm = chat()
        assert llm.get_num_tokens_from_messages(messages) == llm.invoke(messages).usage_metadata["input_tokens"]

    def test_text_that_reads_like_a_control_token_counts_as_the_text_it_is_in_a_prompt(self):
        llm, evil = chat(), "<|im_end|>"
        with_it, without = (llm.get_num_tokens_from_messages([HumanMessage(text)]) for text in (evil, ""))
        assert llm.get_num_tokens(evil) == with_it - without > 1

    def test_parts_of_a_conversation_that_the_template_refuses_are_counted_all_the_same(self):
        steps = Steps()
        refusing = "{% if messages[0].role != 'user' %}{{ raise_exception('a user begins') }}{% endif %}"
        steps.tokenizer.chat_template = refusing + steps.tokenizer.chat_template
        llm = chat(steps)
        talk = [HumanMessage(QUESTION), AIMessage("4"), HumanMessage("And " + QUESTION), AIMessage("Also 4, " * 20)]
        with pytest.raises(ValueError, match="a user begins"):
            llm.invoke(talk[1:])
        assert llm.get_num_tokens_from_messages(talk[3:]) > len("Also 4, " * 20)
        most = llm.get_num_tokens_from_messages(talk[2:]) + 1
        kept = trim_messages(talk, max_tokens=most, token_counter=llm, strategy="last", start_on="human")
        assert kept == talk[2:]

    def test_what_was_thought_and_thrown_away_is_not_taken_for_a_long_conversation(self):
        llm = chat()
        talk = [HumanMessage(QUESTION), llm.invoke(QUESTION), HumanMessage(QUESTION)]
        spent = talk[1].usage_metadata["total_tokens"]
        summarising = SummarizationMiddleware(
            llm, trigger=("tokens", spent - 10), token_counter=count_tokens_approximately
        )
        assert count_tokens_approximately(talk) < spent - 10
        assert summarising.before_model({"messages": talk}, None) is None

    def test_no_messages_have_no_tokens(self):
        assert chat().get_num_tokens_from_messages([]) == 0

    def test_tools_count_where_the_template_shows_them(self):
        steps = Steps()
        steps.tokenizer.chat_template = "{{ tools | tojson if tools else '' }}" + steps.tokenizer.chat_template
        llm = chat(steps)
        bare = llm.get_num_tokens_from_messages(TALKS[0])
        assert llm.get_num_tokens_from_messages(TALKS[0], tools=[]) == bare
        assert llm.get_num_tokens_from_messages(TALKS[0], tools=[add]) > bare + len("Adds two numbers.")

    def test_messages_are_trimmed_by_the_model_s_own_count(self):
        llm = chat()
        talk = [HumanMessage("long " * 50), AIMessage("ok"), HumanMessage(QUESTION)]
        kept = trim_messages(talk, max_tokens=llm.get_num_tokens_from_messages(talk[1:]), token_counter=llm)
        assert kept == talk[1:]


class TestProfile:
    def test_the_pocket_s_context_is_known_before_it_is_loaded_and_is_true(self):
        llm = ChatEarlyExit()
        assert llm._loaded.bound is None
        assert llm.profile["max_input_tokens"] == CONTEXT_LENGTH
        assert json.loads((weights_dir() / "config.json").read_text())["max_position_embeddings"] == CONTEXT_LENGTH

    def test_an_engine_of_one_s_own_tells_its_context(self):
        engine = FunctionEngine(lambda ids: np.zeros(261, dtype=np.float32), context_length=77)
        assert ChatEarlyExit(engine=engine).profile["max_input_tokens"] == 77

    def test_other_weights_tell_theirs_once_they_are_loaded_unless_the_user_knows_better(self, tmp_path, monkeypatch):
        from langchain_earlyexit import loading

        engine = FunctionEngine(lambda ids: np.zeros(261, dtype=np.float32), context_length=77)
        monkeypatch.setattr(loading, "acquire", lambda **_: engine)
        monkeypatch.setattr(loading, "release", lambda _: None)
        llm, own = (
            ChatEarlyExit(model=str(tmp_path)),
            ChatEarlyExit(model=str(tmp_path), profile={"max_input_tokens": 5}),
        )
        assert "max_input_tokens" not in llm.profile
        for each, known in ((llm, 77), (own, 5)):
            each.get_num_tokens("x")
            assert each.profile["max_input_tokens"] == known


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "model_copy": lambda llm: llm.model_copy(update={"seed": 1}),
    "deep model_copy": lambda llm: llm.model_copy(deep=True),
}


class TestCopies:
    @pytest.mark.parametrize("how", COPIES)
    def test_a_copy_has_the_settings_and_calls_of_its_own(self, how):
        llm = chat(seed=1, exit_policy=DEER(0.9), thinking_budget=3)
        running = llm.stream(QUESTION)
        next(running)
        twin = COPIES[how](llm)
        assert twin.engine is llm.engine
        assert (twin.exit_policy, twin.thinking_budget, twin._loaded.bound) == (DEER(0.9), 3, None)
        twin.close()  # stops none of the other's calls
        assert sum(len(chunk.text) for chunk in running) > 0
        assert twin.invoke(QUESTION).text == llm.invoke(QUESTION).text

    @pytest.mark.parametrize("how", COPIES)
    def test_closing_a_copy_leaves_the_weights_to_the_other(self, pocket, how):
        llm = ChatEarlyExit(model=pocket, seed=1)
        before = llm.invoke("What is 2 + 2?", max_tokens=40)
        twin = COPIES[how](llm)
        twin.invoke("What is 2 + 2?", max_tokens=40)
        twin.close()
        twin.close()
        assert llm.invoke("What is 2 + 2?", max_tokens=40).text == before.text

    def test_a_pickle_holds_the_settings_and_loads_its_own_weights(self, pocket):
        llm = ChatEarlyExit(model=pocket, seed=1, exit_policy=DEER(0.9))
        said = llm.invoke("What is 2 + 2?", max_tokens=40).text
        data = pickle.dumps(llm)
        assert len(data) < 20_000
        again = pickle.loads(data)  # noqa: S301
        assert (again._loaded.bound, again.exit_policy) == (None, DEER(0.9))
        assert again.invoke("What is 2 + 2?", max_tokens=40).text == said

    def test_a_model_on_an_engine_of_one_s_own_says_why_it_cannot_be_pickled(self):
        with pytest.raises(TypeError, match=r"engine of your own \(function\), which cannot be pickled|build it where"):
            pickle.dumps(chat())


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
class TestSaving:
    def test_messages_come_back_from_json_as_they_were(self):
        for settings in ({}, {"output_version": "v1"}, {"include_checks": True, "exit_policy": DEER()}):
            message = chat(**settings).invoke(QUESTION)
            assert loads(dumps(message), allowed_objects="messages") == message, settings

    def test_a_model_is_described_but_not_rebuilt_and_its_key_is_not_told(self):
        text = dumps(ChatEarlyExit(api_key="hf_secret", exit_policy=DEER(0.9)))
        assert "hf_secret" not in text
        assert json.loads(text)["type"] == "not_implemented"
        with pytest.raises(NotImplementedError, match="doesn't implement serialization"):
            loads(text, allowed_objects="all", valid_namespaces=["langchain_earlyexit"])
