"""Totals of exits over many calls."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.runnables import RunnableConfig

from langchain_earlyexit import ChatEarlyExit, ExitCallbackHandler, FunctionEngine, get_exit_callback
from langchain_earlyexit.engines.function import byte_tokenizer, scripted


@pytest.fixture
def llm():
    tokenizer = byte_tokenizer()
    return ChatEarlyExit(engine=FunctionEngine(scripted(tokenizer, "It is four.\n", "The answer is 4."), tokenizer))


def output(*messages):
    return sum(message.usage_metadata["output_tokens"] for message in messages)


def test_calls_inside_the_block_are_added_up_and_later_ones_are_not(llm):
    with get_exit_callback() as exits:
        messages = [llm.invoke("2 + 2?"), llm.invoke("2 + 2?", thinking_budget=3)]
    llm.invoke("2 + 2?")
    totals = exits.totals[llm.model]
    assert (totals.calls, totals.exited) == (2, 1)
    assert totals.reasons == {"natural": 1, "budget": 1}
    assert totals.output_tokens == output(*messages)


def test_streams_and_async_calls_count_too(llm):
    async def both():
        return [chunk async for chunk in llm.astream("2 + 2?")], await llm.ainvoke("2 + 2?")

    with get_exit_callback() as exits:
        list(llm.stream("2 + 2?"))
        asyncio.run(both())
    assert exits.totals[llm.model].calls == 3


def test_two_blocks_in_two_contexts_do_not_mix(llm):
    async def block(times):
        with get_exit_callback() as exits:
            for _ in range(times):
                await llm.ainvoke("2 + 2?")
            return exits.totals[llm.model].calls

    async def both():
        return await asyncio.gather(block(1), block(3))

    assert asyncio.run(both()) == [1, 3]


def test_one_handler_serves_many_threads(llm):
    handler = ExitCallbackHandler()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: llm.invoke("2 + 2?", config=RunnableConfig(callbacks=[handler])), range(12)))
    assert handler.totals[llm.model].calls == 12


def test_models_without_an_exit_record_are_passed_over():
    with get_exit_callback() as exits:
        FakeListChatModel(responses=["four"]).invoke("2 + 2?")
    assert exits.totals == {}
