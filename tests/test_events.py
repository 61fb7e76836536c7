"""Native content-block events: the same call as in `stream`, block by block, the thinking finished when it ended."""

import asyncio
import gc
import threading
import time

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessageChunk, HumanMessage
from langchain_tests.utils.stream_lifecycle import assert_valid_event_stream
from langgraph.graph import START, MessagesState, StateGraph

from langchain_earlyexit import DEER, ChatEarlyExit, FunctionEngine
from langchain_earlyexit.engines.function import byte_tokenizer, scripted
from langchain_earlyexit.engines.program import Closed
from langchain_earlyexit.events import Blocks

pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")

QUESTION = "2 + 2?"
WAYS_OUT = [
    {"exit_policy": "never"},
    {"exit_policy": DEER(threshold=0.9)},
    {"thinking_budget": 9},
    {"thinking_budget": 0},
    {"max_tokens": 60},
    {"stop": ["is"]},
]


def engine():
    tokenizer = byte_tokenizer()
    thinking = "It is 4.\n\nWait, is it? 2 + 2 is 4.\n\nHmm, let me see again: 4.\n"
    confident = scripted(tokenizer, thinking, lambda chain: ("The answer is 4.", 0.99 if "Wait" in chain else 0.5))
    return FunctionEngine(confident, tokenizer)


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def endless_engine():
    tokenizer = byte_tokenizer()
    return FunctionEngine(scripted(tokenizer, "still thinking. " * 500, "4"), tokenizer)


def settled(engine):
    """Wait until nothing runs."""
    for _ in range(200):
        if not engine.running:
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def llm():
    return ChatEarlyExit(engine=engine(), seed=3)


def summed(chunks):
    whole = None
    for chunk in chunks:
        whole = chunk if whole is None else whole + chunk
    return whole


def record(message):
    return message.response_metadata["early_exit"]


def facts(message):
    """What every way of making the same call must agree on."""
    metadata = {key: value for key, value in message.response_metadata.items() if key != "output_version"}
    calls = message.tool_calls, message.invalid_tool_calls
    return message.text, message.additional_kwargs, message.usage_metadata, metadata, calls


def finished(events, kind):
    """Finish events of blocks of this type, with their places in the stream."""
    return [
        (place, event["content"])
        for place, event in enumerate(events)
        if event["event"] == "content-block-finish" and event["content"]["type"] == kind
    ]


class TestTheSameCall:
    @pytest.mark.parametrize("settings", WAYS_OUT, ids=str)
    async def test_events_sync_and_async_hold_what_stream_and_invoke_hold(self, llm, settings):
        said = facts(summed(llm.stream(QUESTION, **settings)))
        assert facts(llm.invoke(QUESTION, **settings)) == said
        sync = llm.stream_events(QUESTION, version="v3", **settings)
        events = list(sync)
        assert facts(sync.output) == said
        assert_valid_event_stream(events)
        stream = await llm.astream_events(QUESTION, version="v3", **settings)
        assert [strip_id(event) async for event in stream] == [strip_id(event) for event in events]
        assert facts(await stream.output) == said

    def test_the_blocks_are_reasoning_and_text(self, llm):
        message = llm.stream_events(QUESTION, version="v3").output
        assert [block["type"] for block in message.content] == ["reasoning", "text"]
        assert message.content[0]["reasoning"] == message.additional_kwargs["reasoning_content"]
        assert message.content_blocks == message.content

    def test_without_thinking_there_is_no_reasoning_block(self, llm):
        message = llm.stream_events(QUESTION, version="v3", thinking_budget=0).output
        assert [block["type"] for block in message.content] == ["text"]

    async def test_v2_events_hold_it_too(self, llm):
        said = facts(llm.invoke(QUESTION))
        chunks, ends = [], []
        async for event in llm.astream_events(QUESTION, version="v2"):
            if event["event"] == "on_chat_model_stream":
                chunks.append(event["data"]["chunk"])
            if event["event"] == "on_chat_model_end":
                ends.append(event["data"]["output"])
        assert facts(summed(chunks)) == said
        assert [facts(end) for end in ends] == [said]

    @pytest.mark.parametrize("is_async", [False, True])
    async def test_a_node_of_a_graph_gets_the_same_message_however_the_graph_is_run(self, llm, is_async):
        def node(state: MessagesState):
            return {"messages": [llm.invoke(state["messages"])]}

        async def anode(state: MessagesState):
            return {"messages": [await llm.ainvoke(state["messages"])]}

        graph = (
            StateGraph(MessagesState).add_node("node", anode if is_async else node).add_edge(START, "node").compile()
        )
        ask = {"messages": [HumanMessage(QUESTION)]}
        said = facts(llm.invoke(QUESTION))
        states = [await graph.ainvoke(ask)]
        async for part in graph.astream(ask, stream_mode=["messages", "values"]):
            states += [part[1]] if part[0] == "values" else []
        async for event in graph.astream_events(ask, version="v2"):
            states += [event["data"]["output"]] if event["name"] == "LangGraph" and "output" in event["data"] else []
        states.append(await (await graph.astream_events(ask, version="v3")).output())
        if not is_async:
            states += [graph.invoke(ask), *graph.stream(ask, stream_mode="values")]
            states.append(graph.stream_events(ask, version="v3").output)
        found = [state["messages"][-1] for state in states if len(state["messages"]) > 1]
        assert len(found) == (4 if is_async else 7)
        assert [facts(message) for message in found] == [said] * len(found)

    def test_the_message_s_id_is_that_of_its_first_event_and_stops_its_thinking(self, llm):
        stream = llm.stream_events(QUESTION, version="v3")
        for event in stream:
            if event["event"] == "content-block-delta":
                llm.answer_now(stream.message_id)
                break
        assert record(stream.output)["reason"] == "answer_now"
        assert stream.output.id == stream.message_id


def strip_id(event):
    return {key: value for key, value in event.items() if key != "id"}


class TestTheMomentOfExit:
    @pytest.mark.parametrize("settings", WAYS_OUT[:3], ids=str)
    def test_the_reasoning_block_finishes_with_the_exit_and_agrees_with_the_record(self, llm, settings):
        stream = llm.stream_events(QUESTION, version="v3", **settings)
        ((_, block),) = finished(list(stream), "reasoning")
        told = block["extras"]["exit"]
        assert set(told) == {"exited", "reason", "score", "thinking_tokens"}
        assert told.items() <= record(stream.output).items()

    def test_it_finishes_before_the_answer_is_begun(self):
        """The model does not write a token of its answer until the reader has the finished block."""
        tokenizer = byte_tokenizer()
        quick = scripted(tokenizer, "It is 4.\n", "The answer is 4.")
        seen = threading.Event()

        def function(ids):
            if "</think>" in tokenizer.decode(list(ids)):
                assert seen.wait(timeout=20)
            return quick(ids)

        events = ChatEarlyExit(engine=FunctionEngine(function, tokenizer)).stream_events("2 + 2?", version="v3")
        for event in events:
            if event["event"] == "content-block-finish" and event["content"]["type"] == "reasoning":
                seen.set()
        assert events.output.text == "The answer is 4."

    def test_a_stream_that_nobody_reads_any_more_stops_the_model(self):
        endless = endless_engine()
        llm = ChatEarlyExit(engine=endless)
        stream = llm.stream_events(QUESTION, version="v3")
        next(iter(stream.reasoning))
        assert endless.running
        del stream
        gc.collect()  # core's stream holds itself in a cycle
        assert settled(endless)
        assert llm.answer_now() == 0

    async def test_a_cancelled_reader_stops_the_model(self):
        endless = endless_engine()

        async def read():
            async with await ChatEarlyExit(engine=endless).astream_events(QUESTION, version="v3") as stream:
                async for _ in stream:
                    pass

        reading = asyncio.create_task(read())
        while not endless.running:
            await asyncio.sleep(0.005)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await asyncio.to_thread(settled, endless)


class TestToolCalls:
    """Whatever chunks say of tool calls becomes blocks of their own."""

    def events(self, *chunks):
        class Running:
            id, model = "earlyexit-1", "pocket"

        blocks = Blocks(Running())
        events = [blocks.start(), *blocks.take(Closed(False, "natural", None, 3), None)]
        last = AIMessageChunk(content="", chunk_position="last", usage_metadata=None)
        for chunk in (*chunks, last):
            events += blocks.take(None, chunk)
        assert_valid_event_stream(events)
        return events

    @pytest.mark.parametrize("max_tokens", [None, 70])
    async def test_a_turn_that_calls_is_the_same_however_it_is_run(self, max_tokens):
        tokenizer = byte_tokenizer()
        call = """<tool_call>\n{"name": "add", "arguments": {"a": 37, "b": 48}}\n</tool_call>"""
        engine = FunctionEngine(scripted(tokenizer, "I add them.\n", f"I add.\n{call}"), tokenizer)
        llm = ChatEarlyExit(engine=engine, seed=1).bind_tools([add], tool_choice="any" if max_tokens else "auto")

        def told(message):
            calls = [*message.tool_calls, *message.invalid_tool_calls]
            assert len({call.pop("id") for call in calls}) == len(calls) == 1
            return facts(message)

        said = told(llm.invoke("37 + 48?", max_tokens=max_tokens))
        assert bool(said[-1][0]) == (max_tokens is None)
        assert told(summed(llm.stream("37 + 48?", max_tokens=max_tokens))) == said
        stream = llm.stream_events("37 + 48?", version="v3", max_tokens=max_tokens)
        assert_valid_event_stream(list(stream))
        assert told(stream.output) == said
        assert told(await llm.ainvoke("37 + 48?", max_tokens=max_tokens)) == said
        astream = await llm.astream_events("37 + 48?", version="v3", max_tokens=max_tokens)
        assert told(await astream.output) == said

    def piece(self, index, args, **named):
        named = {"id": None, "name": None, **named}
        return AIMessageChunk(content="", tool_call_chunks=[{"index": index, "args": args, **named}])

    def test_two_calls_after_text_are_three_blocks(self):
        events = self.events(
            AIMessageChunk(content="I look it up."),
            self.piece(0, "", id="call_a", name="add"),
            self.piece(0, '{"a": 1, '),
            self.piece(0, '"b": 2}'),
            self.piece(1, "", id="call_b", name="now"),
            self.piece(1, "{}"),
        )
        assert [block["text"] for _, block in finished(events, "text")] == ["I look it up."]
        assert [block for _, block in finished(events, "tool_call")] == [
            {"type": "tool_call", "id": "call_a", "name": "add", "args": {"a": 1, "b": 2}},
            {"type": "tool_call", "id": "call_b", "name": "now", "args": {}},
        ]
        starts = [event["content"] for event in events if event["event"] == "content-block-start"]
        assert [start.get("name") for start in starts] == [None, "add", "now"]

    @pytest.mark.parametrize("args", ['{"a": 1', "[1]", "nonsense"])
    def test_a_call_that_is_not_a_whole_object_is_invalid_and_keeps_its_text(self, args):
        ((_, block),) = finished(self.events(self.piece(0, args, id="c", name="add")), "invalid_tool_call")
        assert (block["id"], block["name"], block["args"]) == ("c", "add", args)


class Heard(BaseCallbackHandler):
    def __init__(self):
        self.names, self.tokens, self.ends = [], [], []

    def on_stream_event(self, event, **_):
        self.names.append(event["event"])

    def on_llm_new_token(self, token, *, chunk=None, **_):
        self.tokens.append(token)

    def on_custom_event(self, name, data, **_):
        self.names.append(name)

    def on_llm_end(self, response, **_):
        self.ends.append(response.generations[0][0].message)


class TestHandlers:
    def test_they_hear_events_tokens_checks_and_the_exit(self, llm):
        heard = Heard()
        stream = llm.stream_events(QUESTION, version="v3", exit_policy=DEER(), config={"callbacks": [heard]})
        message = stream.output
        assert heard.names[0] == "message-start"
        assert heard.names[-1] == "message-finish"
        assert heard.names.count("early_exit.check") == record(message)["checks"]
        assert heard.names.count("early_exit.exit") == 1
        assert "".join(heard.tokens) == message.text
        assert [facts(end) for end in heard.ends] == [facts(message)]
