"""Traces in a real Phoenix server, run by `make test-slow`, which installs it in `.venv-phoenix`: its own pins."""

import contextlib
import json
import os
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from agents_for_tests import PROBLEM, arithmetician, talker
from openinference.instrumentation.langchain import LangChainInstrumentor
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from processes_for_tests import served

from langchain_earlyexit.graph import create_plan_and_solve

PHOENIX = Path(os.environ.get("EARLYEXIT_PHOENIX", Path(__file__).parents[1] / ".venv-phoenix" / "bin" / "phoenix"))
PROJECT = "earlyexit"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not PHOENIX.exists(), reason=f"there is no {PHOENIX}; `make test-slow` installs it"),
]


def free_ports(count):
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a running server that keeps its spans in an SQLite file."""
    folder = tmp_path_factory.mktemp("phoenix")
    port, grpc = free_ports(2)
    told = {
        "PHOENIX_HOST": "127.0.0.1",
        "PHOENIX_PORT": str(port),
        "PHOENIX_GRPC_PORT": str(grpc),
        "PHOENIX_WORKING_DIR": str(folder),
        "PHOENIX_SQL_DATABASE_URL": f"sqlite:///{folder / 'phoenix.db'}",
        "PHOENIX_TELEMETRY_ENABLED": "false",
        "PHOENIX_ALLOW_EXTERNAL_RESOURCES": "false",
    }
    address = f"http://127.0.0.1:{port}"
    with served([PHOENIX, "serve"], folder, f"{address}/healthz", 600, **told):
        yield address
        assert (folder / "phoenix.db").stat().st_size > 0


@pytest.fixture
def traced(server):
    """Runs under OpenInference's instrumentation, whose spans go to the server; called, it sends what is left."""
    provider = TracerProvider(resource=Resource({"openinference.project.name": PROJECT}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{server}/v1/traces")))
    instrumentor = LangChainInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    yield provider.force_flush
    instrumentor.uninstrument()
    provider.shutdown()


def spans_of(server, count):
    """The model calls that the server knows, once there are so many."""
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(urllib.error.HTTPError):  # a project begins with its first span
            asked = f"{server}/v1/projects/{PROJECT}/spans?limit=1000"
            with urllib.request.urlopen(asked, timeout=20) as reply:  # noqa: S310 - it is ours
                found = [span for span in json.load(reply)["data"] if span["span_kind"] == "LLM"]
            if len(found) >= count:
                return found
        assert time.monotonic() < deadline, "the spans did not come"
        time.sleep(1)


def test_every_step_of_a_graph_shows_its_reasoning_tokens_and_its_exit(server, traced):
    with talker(arithmetician) as llm:
        graph = create_plan_and_solve(llm, budget=60)
        done = graph.invoke({"messages": [("user", PROBLEM)]})
    assert traced()
    ledger = done["ledger"]
    found = spans_of(server, len(ledger))
    assert len(found) == len(ledger) == 5
    messages = {message.id: message for message in (*done["work"], done["messages"][-1])}
    expected = [
        (spend["reasoning"], spend["exit"], messages[key.partition("/")[2]].usage_metadata["output_tokens"])
        for key, spend in ledger.items()
    ]
    told = []
    for span in found:
        attributes = span["attributes"]
        output = json.loads(attributes["output.value"])
        message = output["generations"][0][0]["message"]["kwargs"]
        told.append(
            (
                attributes["llm.token_count.completion_details.reasoning"],
                message["response_metadata"]["early_exit"],
                attributes["llm.token_count.completion"],
            )
        )
    assert sorted(told, key=repr) == sorted(expected, key=repr)
    assert {record["reason"] for _, record, _ in told} >= {"budget"}
