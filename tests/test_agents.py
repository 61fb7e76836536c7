"""LangChain's `create_agent` on this model: sync, async, in every stream mode, with memory, off the event loop."""

import asyncio
import operator
import threading
import time

import pytest
from blockbuster import blockbuster_ctx
from langchain.agents import create_agent
from langchain.agents.middleware import ModelCallLimitMiddleware
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import BaseModel

from langchain_earlyexit import ChatEarlyExit, FunctionEngine, get_exit_callback
from langchain_earlyexit.engines.function import byte_tokenizer, scripted

pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")


@tool
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


@tool
def double(n: int) -> str:
    """Doubles a number."""
    return f"{n} twice is {2 * n}"


class Sum(BaseModel):
    """The result."""

    value: int


def call(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def workman(**answers):
    """A model whose next turn depends on what has been said: the last of `answers` that is there decides."""
    tokenizer = byte_tokenizer()
    turns = {
        "": call("add", '{"a": 37, "b": 48}'),
        "85": call("double", '{"n": 85}'),
        "85 twice is 170": "It is 170.",
        **answers,
    }
    models = {
        heard: scripted(tokenizer, f"Now {number}.\n", said) for number, (heard, said) in enumerate(turns.items())
    }

    def function(ids):
        text = tokenizer.decode(list(ids))
        prompt = text[: text.rfind("<|im_start|>assistant\n")]
        return models[[heard for heard in models if heard in prompt][-1]](ids)

    return FunctionEngine(function, tokenizer)


def chat(**settings):
    return ChatEarlyExit(engine=workman(), seed=1, **settings)


@pytest.fixture
def agent():
    return create_agent(chat(), [add, double])


ASK = {"messages": [HumanMessage("Twice 37 + 48?")]}
STEPS = [HumanMessage, AIMessage, ToolMessage, AIMessage, ToolMessage, AIMessage]


def check(state):
    """The whole run: two tools were called, with their results, and the thinking of every step is kept apart."""
    messages = state["messages"]
    assert [type(message) for message in messages] == STEPS
    assert [message.text for message in messages if message.type == "tool"] == ["85", "85 twice is 170"]
    assert messages[-1].text == "It is 170."
    turns = [message for message in messages if message.type == "ai"]
    assert [turn.response_metadata["finish_reason"] for turn in turns] == ["tool_calls", "tool_calls", "stop"]
    for number, turn in enumerate(turns):
        assert turn.additional_kwargs["reasoning_content"] == f"Now {number}."
        assert turn.response_metadata["early_exit"]["reason"] == "natural"
        assert turn.usage_metadata["output_token_details"]["reasoning"] > 0
    return messages


class TestTheLoop:
    def test_two_tools_are_called_and_their_results_are_used(self, agent):
        with get_exit_callback() as exits:
            check(agent.invoke(ASK))
        assert exits.totals["pocket"].calls == 3

    async def test_async_runs_are_the_same(self, agent):
        check(await agent.ainvoke(ASK))

    @pytest.mark.parametrize("mode", ["values", "updates", "custom", "debug", "tasks", "checkpoints"])
    async def test_state_is_streamed_in_every_mode(self, mode):
        agent = create_agent(chat(), [add, double], checkpointer=InMemorySaver())

        def config(thread):
            return {"configurable": {"thread_id": thread}}

        sync = list(agent.stream(ASK, config("a"), stream_mode=mode))
        parts = [part async for part in agent.astream(ASK, config("b"), stream_mode=mode)]
        assert len(sync) == len(parts)
        assert bool(sync) == (mode != "custom")
        for thread in "ab":
            check(agent.get_state(config(thread)).values)

    async def test_messages_are_streamed_token_by_token_and_once(self, agent):
        for parts in (
            list(agent.stream(ASK, stream_mode="messages")),
            [part async for part in agent.astream(ASK, stream_mode="messages")],
        ):
            by_step = {}
            for message, told in parts:
                by_step.setdefault(told["langgraph_step"], []).append(message)
            turns = [summed(step) for step in by_step.values() if step[0].type == "AIMessageChunk"]
            assert [turn.text for turn in turns] == ["", "", "It is 170."]
            assert [turn.additional_kwargs["reasoning_content"] for turn in turns] == ["Now 0.", "Now 1.", "Now 2."]
            assert [call["args"] for turn in turns for call in turn.tool_calls] == [{"a": 37, "b": 48}, {"n": 85}]
            assert len(by_step[1]) > 10

    async def test_v2_events_stream_and_end_with_the_same_state(self, agent):
        streamed, end = "", None
        async for event in agent.astream_events(ASK, version="v2"):
            if event["event"] == "on_chat_model_stream":
                streamed += event["data"]["chunk"].text
            if event["event"] == "on_chain_end" and not event["parent_ids"]:
                end = event["data"]["output"]
        assert streamed == "It is 170."
        check(end)

    async def test_v3_events_show_the_reasoning_of_every_step_finished_with_its_exit(self, agent):
        run = agent.stream_events(ASK, version="v3")
        seen = [(str(message.reasoning), str(message.text), message.output) for message in run.messages]
        self.check_v3(seen, run.output)
        arun = await agent.astream_events(ASK, version="v3")
        seen = [(await message.reasoning, await message.text, await message.output) async for message in arun.messages]
        self.check_v3(seen, await arun.output())

    def check_v3(self, seen, state):
        assert [(reasoning, text) for reasoning, text, _ in seen] == [
            ("Now 0.", ""), ("Now 1.", ""), ("Now 2.", "It is 170."),
        ]  # fmt: skip
        for _, _, message in seen:
            assert message.content[0]["extras"]["exit"]["reason"] == "natural"
        messages = check(state)
        assert [message.id for message in messages if message.type == "ai"] == [each.id for *_, each in seen]


def summed(chunks):
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = operator.add(whole, chunk)
    return whole


class TestMemory:
    @pytest.mark.parametrize("version", ["v0", "v1"])
    async def test_a_thread_goes_on_where_it_was(self, version):
        agent = create_agent(chat(output_version=version), [add, double], checkpointer=InMemorySaver())
        config = {"configurable": {"thread_id": "1"}}
        agent.invoke(ASK, config)
        again = await agent.ainvoke({"messages": [HumanMessage("Sure?")]}, config)
        assert [message.text for message in again["messages"][-2:]] == ["Sure?", "It is 170."]
        assert len(again["messages"]) == len(STEPS) + 2

    async def test_a_run_that_was_streamed_as_v3_goes_on_as_another(self):
        agent = create_agent(chat(), [add, double], checkpointer=InMemorySaver())
        config = {"configurable": {"thread_id": "1"}}
        check(agent.stream_events(ASK, config, version="v3").output)
        again = agent.invoke({"messages": [HumanMessage("Sure?")]}, config)
        assert again["messages"][-1].text == "It is 170."

    def test_a_limit_of_calls_ends_a_run(self):
        agent = create_agent(chat(), [add, double], middleware=[ModelCallLimitMiddleware(run_limit=1)])
        assert sum(message.type == "ai" for message in agent.invoke(ASK)["messages"]) == 2  # one, and the notice


class TestStructuredAnswers:
    def test_a_tool_strategy_gives_the_value(self):
        llm = ChatEarlyExit(engine=workman(**{"85 twice is 170": call("Sum", '{"value": 170}')}))
        state = create_agent(llm, [add, double], response_format=ToolStrategy(Sum)).invoke(ASK)
        assert state["structured_response"] == Sum(value=170)

    async def test_so_does_a_provider_strategy(self):
        llm = ChatEarlyExit(engine=workman(**{"85 twice is 170": '{"value": 170}'}))
        state = await create_agent(llm, [], response_format=ProviderStrategy(Sum)).ainvoke(
            {"messages": [HumanMessage("85 twice is 170, you said?")]}
        )
        assert state["structured_response"] == Sum(value=170)

    def test_a_bare_schema_takes_the_provider_s_way_for_the_profile_says_it_can(self):
        llm = ChatEarlyExit(engine=workman(**{"85 twice is 170": '{"value": 170}'}))
        assert llm.profile["structured_output"]
        state = create_agent(llm, [add, double], response_format=Sum).invoke(ASK)
        assert state["structured_response"] == Sum(value=170)
        assert [message.type for message in state["messages"]][-1] == "ai"


class TestTheEventLoop:
    """Nothing may wait on the loop: `langgraph dev` ends a run that does."""

    @pytest.fixture(autouse=True)
    def _watched(self):
        with blockbuster_ctx():
            yield

    async def test_the_watch_works(self):
        with pytest.raises(Exception, match="Blocking call"):
            time.sleep(0.001)

    async def test_an_agent_never_blocks_it(self, agent):
        check(await agent.ainvoke(ASK))
        await asyncio.gather(*(agent.ainvoke(ASK) for _ in range(4)))
        _ = [part async for part in agent.astream(ASK, stream_mode=["messages", "updates", "values"])]
        run = await agent.astream_events(ASK, version="v3")
        check(await run.output())

    async def test_the_loop_goes_on_while_the_model_computes(self):
        engine = workman()
        forward = engine._model.forward

        def slow(rows):
            threading.Event().wait(0.06)
            return forward(rows)

        engine._model.forward = slow
        beats, asked = 0, asyncio.create_task(ChatEarlyExit(engine=engine, max_tokens=30).ainvoke(ASK["messages"]))
        while not asked.done():
            await asyncio.sleep(0.005)
            beats += 1
        steps = (await asked).usage_metadata["output_tokens"]
        assert beats > 3 * steps

    async def test_building_and_calling_a_model_inside_a_node_never_blocks_it(self):
        llm = chat()
        await asyncio.gather(*(llm.ainvoke("2 + 2?") for _ in range(8)))
        assert ChatEarlyExit().profile["max_input_tokens"] > 0
        llm.answer_now()
        llm.close()

    async def test_loading_weights_in_a_call_never_blocks_it(self, pocket):
        llm = ChatEarlyExit(model=pocket, seed=1)
        message = await llm.ainvoke("What is 2 + 2?", max_tokens=40)
        assert message.content
        await asyncio.to_thread(llm.close)
