"""Totals of exits over many calls."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.language_models import FakeListChatModel
from langchain_core.runnables import RunnableConfig, RunnableLambda

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


def test_a_block_inside_another_is_gathered_by_both_once(llm):
    def inside(_):
        with get_exit_callback() as inner:
            llm.invoke("2 + 2?")
            with get_exit_callback() as innermost:
                llm.invoke("2 + 2?")
        return [block.totals[llm.model].calls for block in (inner, innermost)]

    with get_exit_callback() as outer:
        for _ in range(3):
            assert inside(None) == [2, 1]
        assert RunnableLambda(inside).invoke("a run that has the outer handler already") == [2, 1]
        llm.invoke("2 + 2?")
    assert outer.totals[llm.model].calls == 9


async def test_blocks_inside_each_other_keep_to_their_contexts(llm):
    async def block(times):
        with get_exit_callback() as exits:
            await asyncio.gather(*(llm.ainvoke("2 + 2?") for _ in range(times)))
            return exits.totals[llm.model].calls

    with get_exit_callback() as outer:
        assert await asyncio.gather(block(1), block(3)) == [1, 3]
    assert outer.totals[llm.model].calls == 4


def test_a_block_that_breaks_gathers_no_more(llm):
    with pytest.raises(RuntimeError, match="broken"), get_exit_callback() as outer, get_exit_callback() as inner:
        raise RuntimeError("broken")
    llm.invoke("2 + 2?")
    assert (outer.totals, inner.totals) == ({}, {})


def test_one_handler_serves_many_threads(llm):
    handler = ExitCallbackHandler()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: llm.invoke("2 + 2?", config=RunnableConfig(callbacks=[handler])), range(12)))
    assert handler.totals[llm.model].calls == 12


def test_totals_that_were_read_do_not_change_with_later_calls(llm):
    with get_exit_callback() as exits:
        llm.invoke("2 + 2?")
        before = exits.totals[llm.model]
        llm.invoke("2 + 2?")
        assert (before.calls, before.reasons["natural"]) == (1, 1)
        assert exits.totals[llm.model].calls == 2


def test_an_answer_from_a_cache_is_counted_as_such_and_costs_nothing(llm):
    llm.cache = InMemoryCache()
    with get_exit_callback() as exits:
        message = llm.invoke("2 + 2?")
        assert llm.invoke("2 + 2?").text == message.text
    totals = exits.totals[llm.model]
    assert (totals.calls, totals.cached, totals.output_tokens) == (1, 1, output(message))


def test_threads_that_read_meet_threads_that_add(llm):
    handler = ExitCallbackHandler()
    done = []

    def read():
        while not done:
            assert all(total.calls == sum(total.reasons.values()) for total in handler.totals.values())

    with ThreadPoolExecutor(5) as pool:
        reading = pool.submit(read)
        config = RunnableConfig(callbacks=[handler])
        asked = [pool.submit(llm.invoke, "2 + 2?", config=config) for _ in range(12)]
        total = sum(output(one.result()) for one in asked)
        done.append(True)
        reading.result()
    assert handler.totals[llm.model].output_tokens == total


def test_models_without_an_exit_record_are_passed_over():
    with get_exit_callback() as exits:
        FakeListChatModel(responses=["four"]).invoke("2 + 2?")
    assert exits.totals == {}


class _Breaks:
    def __init__(self, name, *, raise_error=False):
        self.name, self.raise_error = name, raise_error

    def on_custom_event(self, name, *_, **__):
        if name == self.name:
            raise RuntimeError(f"broken at {name}")


class Breaks(_Breaks, BaseCallbackHandler):
    pass


class AsyncBreaks(_Breaks, AsyncCallbackHandler):
    async def on_custom_event(self, *args, **kwargs):
        _Breaks.on_custom_event(self, *args, **kwargs)


NAMES = ["early_exit.check", "early_exit.exit"]


async def every_way(llm, handler):
    """The text of one call, however it is made; each of these gets a run manager from core."""
    config = RunnableConfig(callbacks=[handler])
    yield await asyncio.to_thread(lambda: llm.invoke("2 + 2?", config=config).text)
    yield (await llm.ainvoke("2 + 2?", config=config)).text
    yield await asyncio.to_thread(lambda: llm.stream_events("2 + 2?", version="v3", config=config).output.text)
    yield (await (await llm.astream_events("2 + 2?", version="v3", config=config)).output).text


@pytest.fixture
def looking():
    tokenizer = byte_tokenizer()
    model = scripted(tokenizer, "It is four.\n\nWait, is it? Yes.\n", "The answer is 4.")
    return ChatEarlyExit(engine=FunctionEngine(model, tokenizer), exit_policy="deer")


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
@pytest.mark.parametrize("kind", [Breaks, AsyncBreaks])
@pytest.mark.parametrize("name", NAMES)
async def test_a_handler_that_breaks_on_our_events_is_logged_and_breaks_no_call(looking, kind, name, caplog):
    with caplog.at_level(logging.WARNING):
        texts = [text async for text in every_way(looking, kind(name))]
    assert texts == ["The answer is 4."] * 4
    assert f"broken at {name}" in caplog.text


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
@pytest.mark.parametrize("name", NAMES)
async def test_a_handler_that_asks_to_raise_does_and_the_model_stops(looking, name):
    config = RunnableConfig(callbacks=[Breaks(name, raise_error=True)])
    with pytest.raises(RuntimeError, match=f"broken at {name}"):
        looking.invoke("2 + 2?", config=config)
    with pytest.raises(RuntimeError, match=f"broken at {name}"):
        await looking.ainvoke("2 + 2?", config=config)
    with pytest.raises(RuntimeError, match=f"broken at {name}"):
        _ = looking.stream_events("2 + 2?", version="v3", config=config).output
    for _ in range(200):
        if not looking.engine.running:
            break
        await asyncio.sleep(0.01)
    assert not looking.engine.running
    assert looking.answer_now() == 0
