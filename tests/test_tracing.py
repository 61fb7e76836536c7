"""What Langfuse, OpenInference (Phoenix) and LangSmith make of our runs: their own code, without their servers."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from langchain_core.messages import HumanMessage
from langchain_core.tracers import LangChainTracer
from langfuse import Langfuse
from langfuse.langchain import CallbackHandler as LangfuseHandler
from langgraph.graph import END, START, MessagesState, StateGraph
from langsmith import Client
from openinference.instrumentation.langchain._tracer import OpenInferenceTracer
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from langchain_earlyexit import DEER, ChatEarlyExit, FunctionEngine
from langchain_earlyexit.engines.function import byte_tokenizer, scripted
from langchain_earlyexit.graph import ReasoningState, reasoning_node

pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")

QUESTION = "2 + 2?"


@pytest.fixture
def llm():
    """A model whose thinking is stopped early, with trials before: every count is above zero."""
    tokenizer = byte_tokenizer()
    thinking = "It is 4.\n\nWait, is it? 2 + 2 is 4.\n\nHmm, let me see again: 4.\n"
    model = scripted(tokenizer, thinking, lambda chain: ("The answer is 4.", 0.99 if "Wait" in chain else 0.5))
    return ChatEarlyExit(engine=FunctionEngine(model, tokenizer), exit_policy=DEER(0.9), thinking_budget=90, seed=3)


def summed(chunks):
    whole = None
    for chunk in chunks:
        whole = chunk if whole is None else whole + chunk
    return whole


async def _astream(llm, config):
    return summed([chunk async for chunk in llm.astream(QUESTION, config)])


async def _astream_events(llm, config):
    # Leaving the stream waits for the handlers, which core tells after the message is there.
    async with await llm.astream_events(QUESTION, config, version="v3") as stream:
        return await stream.output


WAYS = {
    "invoke": lambda llm, config: llm.invoke(QUESTION, config),
    "stream": lambda llm, config: summed(llm.stream(QUESTION, config)),
    "v3 events": lambda llm, config: llm.stream_events(QUESTION, config, version="v3").output,
    "ainvoke": lambda llm, config: asyncio.run(llm.ainvoke(QUESTION, config)),
    "astream": lambda llm, config: asyncio.run(_astream(llm, config)),
    "async v3 events": lambda llm, config: asyncio.run(_astream_events(llm, config)),
}
every_way = pytest.mark.parametrize("way", WAYS)


def graph(llm):
    def twice(state: MessagesState):
        return {"messages": [llm.invoke(state["messages"][:1]), llm.invoke(state["messages"][:1])]}

    return StateGraph(MessagesState).add_node(twice).add_edge(START, "twice").add_edge("twice", END).compile()


STEPS = {"plan": 30, "solve": 20}
"""Nodes and the caps of their calls."""


def steps_of(llm):
    """A graph of the package's own nodes, which all ask the same question."""
    builder = StateGraph(ReasoningState)
    for name, cap in STEPS.items():
        builder.add_node(name, reasoning_node(llm, name=name, most=cap, reads=lambda state: QUESTION))
    return builder.add_edge(START, "plan").add_edge("plan", "solve").compile()


def run_steps(llm, tracer):
    """Messages of the steps of one run, in their order."""
    return steps_of(llm).invoke({"messages": [HumanMessage(QUESTION)]}, {"callbacks": [tracer]})["messages"][1:]


def expected(message):
    """(prompt, output, reasoning) as the message tells them. None is zero, so none can be lost unseen."""
    usage = message.usage_metadata
    counts = usage["input_tokens"], usage["output_tokens"], usage["output_token_details"]["reasoning"]
    assert min(counts) > 0
    assert counts[2] < counts[1]
    return counts


def record(message):
    told = message.response_metadata["early_exit"]
    assert told["reason"] == "confident"
    return told


@pytest.fixture(scope="module")
def langfuse():
    exporter = InMemorySpanExporter()
    client = Langfuse(
        public_key="pk-test",
        secret_key="sk-test",  # noqa: S106
        base_url="http://127.0.0.1:9",
        span_exporter=exporter,
        tracer_provider=TracerProvider(),
    )
    yield client, exporter
    client.shutdown()


class TestLangfuse:
    @pytest.fixture
    def spans(self, langfuse):
        client, exporter = langfuse
        exporter.clear()

        def generations():
            client.flush()
            found = [dict(span.attributes) for span in exporter.get_finished_spans()]
            return [told for told in found if told["langfuse.observation.type"] == "generation"]

        return generations

    @every_way
    def test_one_generation_tells_reasoning_apart_and_shows_the_record(self, llm, spans, way):
        message = WAYS[way](llm, {"callbacks": [LangfuseHandler(public_key="pk-test")]})
        (told,) = spans()
        prompt, output, reasoning = expected(message)
        usage = json.loads(told["langfuse.observation.usage_details"])
        # Langfuse keeps disjoint parts: what is reasoning is taken out of the output.
        assert usage == {
            "input": prompt, "output": output - reasoning, "output_reasoning": reasoning, "total": prompt + output,
        }  # fmt: skip
        assert min(usage.values()) > 0
        shown = json.loads(told["langfuse.observation.output"])
        assert shown["additional_kwargs"]["early_exit"] == record(message)
        assert shown["additional_kwargs"]["reasoning_content"] == message.additional_kwargs["reasoning_content"]
        assert told["langfuse.observation.model.name"] == llm.model

    def test_a_graph_s_calls_are_told_once_each(self, llm, spans):
        config = {"callbacks": [LangfuseHandler(public_key="pk-test")]}
        *_, first, second = graph(llm).invoke({"messages": [HumanMessage(QUESTION)]}, config)["messages"]
        totals = [json.loads(told["langfuse.observation.usage_details"])["total"] for told in spans()]
        assert totals == [message.usage_metadata["total_tokens"] for message in (first, second)]


class TestOpenInference:
    @pytest.fixture
    def traced(self):
        exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))

        def spans():
            found = [dict(span.attributes) for span in exporter.get_finished_spans()]
            return [told for told in found if told["openinference.span.kind"] == "LLM"]

        return OpenInferenceTracer(provider.get_tracer("test"), separate_trace_from_runtime_context=True), spans

    @every_way
    def test_one_span_has_the_reasoning_tokens_and_the_record(self, llm, traced, way):
        tracer, spans = traced
        message = WAYS[way](llm, {"callbacks": [tracer]})
        (told,) = spans()
        prompt, output, reasoning = expected(message)
        assert {
            name.removeprefix("llm.token_count."): count
            for name, count in told.items()
            if name.startswith("llm.token_count.")
        } == {
            "prompt": prompt,
            "completion": output,
            "total": prompt + output,
            "completion_details.reasoning": reasoning,
        }
        assert told["llm.provider"] == "earlyexit"
        assert told["llm.model_name"] == llm.model
        assert json.loads(told["llm.invocation_parameters"])["thinking_budget"] == 90
        kept = told["output.value"]
        assert json.dumps(record(message)["reason"]) in kept
        assert '"early_exit"' in kept

    def test_a_graph_s_calls_are_told_once_each(self, llm, traced):
        tracer, spans = traced
        config = {"callbacks": [tracer]}
        *_, first, second = graph(llm).invoke({"messages": [HumanMessage(QUESTION)]}, config)["messages"]
        totals = [told["llm.token_count.total"] for told in spans()]
        assert totals == [message.usage_metadata["total_tokens"] for message in (first, second)]

    def test_a_step_s_call_says_which_step_it_is_and_what_it_might_think(self, llm, traced):
        tracer, spans = traced
        run_steps(llm, tracer)
        told = [json.loads(span["metadata"]) for span in spans()]
        assert [(one["early_exit_step"], one["early_exit_cap"]) for one in told] == list(STEPS.items())


class Recorder(ThreadingHTTPServer):
    """Stands where LangSmith's server would: keeps what was sent of every run."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Keep)
        self.runs = {}


class _Keep(BaseHTTPRequestHandler):
    def _keep(self):
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        run = self.server.runs.setdefault(sent.get("id") or self.path.rsplit("/", 1)[-1], {})
        run.update({name: value for name, value in sent.items() if value is not None})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_PATCH = _keep

    def log_message(self, *_):
        pass


class TestLangSmith:
    @pytest.fixture
    def server(self):
        server = Recorder()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
        server.server_close()

    @pytest.fixture
    def tracer(self, server):
        url = f"http://127.0.0.1:{server.server_port}"
        return LangChainTracer(client=Client(api_url=url, api_key="test", auto_batch_tracing=False, info={}))

    def runs(self, tracer, server):
        tracer.wait_for_futures()
        tracer.client.flush()
        return [run for run in server.runs.values() if run["run_type"] == "llm"]

    @every_way
    def test_a_run_is_sent_with_usage_parameters_and_record(self, llm, tracer, server, way):
        message = WAYS[way](llm, {"callbacks": [tracer]})
        (run,) = self.runs(tracer, server)
        metadata = run["extra"]["metadata"]
        prompt, output, reasoning = expected(message)
        usage = metadata["usage_metadata"]
        assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (
            prompt,
            output,
            prompt + output,
        )
        assert usage["output_token_details"] == {"reasoning": reasoning}
        assert (metadata["ls_provider"], metadata["ls_model_name"]) == ("earlyexit", llm.model)
        assert metadata["thinking_budget"] == 90
        ((generation,),) = run["outputs"]["generations"]
        kept = generation["message"]["kwargs"]
        assert kept["response_metadata"]["early_exit"] == record(message)
        assert kept["usage_metadata"]["output_token_details"]["reasoning"] == reasoning

    @pytest.mark.parametrize("way", ["stream", "v3 events", "astream", "async v3 events"])
    def test_the_first_token_is_timed(self, llm, tracer, server, way):
        WAYS[way](llm, {"callbacks": [tracer]})
        (run,) = self.runs(tracer, server)
        assert [event["name"] for event in run["events"]][:2] == ["start", "new_token"]

    def test_the_steps_of_a_graph_can_be_told_apart_under_its_run(self, llm, tracer, server):
        messages = run_steps(llm, tracer)
        runs = {run["extra"]["metadata"]["early_exit_step"]: run for run in self.runs(tracer, server)}
        assert runs.keys() == STEPS.keys()
        for (step, cap), message in zip(STEPS.items(), messages, strict=True):
            run = runs[step]
            metadata = run["extra"]["metadata"]
            assert metadata["early_exit_cap"] == metadata["thinking_budget"] == cap
            reasoning = message.usage_metadata["output_token_details"]["reasoning"]
            assert metadata["usage_metadata"]["output_token_details"] == {"reasoning": reasoning}
            assert server.runs[run["parent_run_id"]]["run_type"] == "chain"

    def test_as_opentelemetry_spans_a_graph_s_calls_have_genai_usage_and_their_reasoning(self, llm):
        exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        client = Client(
            api_url="http://127.0.0.1:9", api_key="test", info={}, tracing_mode="otel", otel_tracer_provider=provider
        )
        tracer = LangChainTracer(client=client)
        messages = run_steps(llm, tracer)
        tracer.wait_for_futures()
        client.flush()
        spans = [dict(span.attributes) for span in exporter.get_finished_spans()]
        calls = [told for told in spans if told["gen_ai.operation.name"] == "chat"]
        by_step = {told["langsmith.metadata.early_exit_step"]: told for told in calls}
        for step, message in zip(STEPS, messages, strict=True):
            told = by_step.pop(step)
            prompt, output, reasoning = expected(message)
            assert told["gen_ai.request.model"] == llm.model
            usage = told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]
            assert usage == (prompt, output)
            # The exporter writes no reasoning under `gen_ai.`: there is only what it makes of the run's metadata.
            details = json.loads(told["langsmith.metadata.usage_metadata"])["output_token_details"]
            assert details == {"reasoning": reasoning}
        assert not by_step
