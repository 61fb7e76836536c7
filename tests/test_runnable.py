"""What LangChain does with any chat model: configure, cache, limit, fall back, retry, count, copy, save."""

import copy
import json
import pickle

import numpy as np
import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.load import dumps, loads
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage, trim_messages
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.rate_limiters import BaseRateLimiter
from langchain_core.runnables import ConfigurableField
from langchain_core.tools import tool

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

    def test_a_bad_value_in_the_configuration_is_an_error_as_in_the_constructor(self):
        llm = chat().configurable_fields(thinking_budget=ConfigurableField(id="budget"))
        with pytest.raises(ValueError, match="thinking_budget must be -1"):
            llm.invoke(QUESTION, config={"configurable": {"budget": -7}})

    def test_models_can_be_alternatives_of_each_other(self):
        llm = chat().configurable_alternatives(
            ConfigurableField(id="llm"), default_key="four", five=chat(Steps("It is 5."))
        )
        chain = ChatPromptTemplate.from_messages([("human", "{question}")]) | llm
        assert chain.invoke({"question": QUESTION}).text == "The answer is 4."
        assert chain.invoke({"question": QUESTION}, config={"configurable": {"llm": "five"}}).text == "It is 5."


class TestInit:
    def test_a_name_with_our_provider_before_it_makes_our_model(self):
        llm = init_chat_model("earlyexit:pocket", thinking_budget=5)
        assert isinstance(llm, ChatEarlyExit)
        assert (llm.model, llm.thinking_budget) == ("pocket", 5)
        assert init_chat_model("org/model", model_provider="earlyexit").model == "org/model"

    def test_the_fields_that_are_opened_can_be_set_by_a_run_and_no_others(self):
        llm = init_chat_model("earlyexit:pocket", seed=1, configurable_fields="any", config_prefix="thinker")
        asked = {"configurable": {"thinker_thinking_budget": 3, "thinker_model": "elsewhere", "thinking_budget": 9}}
        assert record(llm.invoke(QUESTION, config=asked))["budget"] == 3
        opened = init_chat_model("earlyexit:pocket", configurable_fields=["model"])
        assert [field.id for field in opened.config_specs] == ["model"]

    def test_bad_fields_and_a_prefix_for_none_are_errors(self):
        with pytest.raises(ValueError, match=r"names \['budgets'\], which ChatEarlyExit has not"):
            init_chat_model("earlyexit:pocket", configurable_fields=["budgets"])
        with pytest.raises(ValueError, match="nothing would have the prefix"):
            init_chat_model("earlyexit:pocket", config_prefix="a")

    def test_other_names_are_langchains(self):
        with pytest.raises(ImportError, match="langchain-anthropic"):
            init_chat_model("anthropic:claude-sonnet-4-5")
        with pytest.raises(ValueError, match="Unable to infer model provider"):
            init_chat_model("of-nobody")


TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]


class TestCache:
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
