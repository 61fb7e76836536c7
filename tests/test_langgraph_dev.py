"""`langgraph dev` serves the graphs, run by `make test-slow`: in an environment of its own, as its pins differ."""

import json
import shutil
import socket
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
from langgraph_sdk import get_client
from processes_for_tests import served

ROOT = Path(__file__).parents[1]
GRAPHS = json.loads((ROOT / "langgraph.json").read_text())["graphs"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a running server."""
    folder = tmp_path_factory.mktemp("langgraph-dev")
    # The server wants an older protobuf than is pinned here; all else is shared with this environment.
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("protobuf==")]
    (folder / "constraints.txt").write_text("\n".join(pins))
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", folder / "constraints.txt", "langgraph-cli[inmem]==0.4.40"],
        check=True,
        capture_output=True,
    )
    [packages] = (folder / "env" / "lib").glob("python*/site-packages")
    (packages / "shared.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
    project = folder / "served"  # the server keeps files of its own beside what it serves
    shutil.copytree(ROOT / "graphs", project / "graphs")
    for name in ("langgraph.json", "pyproject.toml"):
        shutil.copy(ROOT / name, project)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [python.parent / "langgraph", "dev", "--no-browser", "--no-reload", "--port", str(port)]
    with served(command, project, f"{address}/ok", 300, LANGSMITH_TRACING="false"):
        yield address


@pytest.mark.parametrize("graph", GRAPHS)
async def test_a_client_streams_a_graph_and_sees_the_exit_of_every_call(server, graph):
    """The server refuses what blocks its event loop, so that this passes says that nothing does."""
    pieces, last = 0, None
    asked = {"messages": [{"role": "user", "content": "What is 41 + 58?"}]}
    async for part in get_client(url=server).runs.stream(
        None, graph, input=asked, stream_mode=["values", "messages-tuple"]
    ):
        assert part.event != "error", part.data
        pieces += part.event == "messages"
        if part.event == "values":
            last = part.data
    assert pieces > 3
    record = last["messages"][-1]["response_metadata"]["early_exit"]
    exits = last["exits"] if "exits" in last else [spend["exit"] for spend in last["ledger"].values()]
    assert {key: value for key, value in record.items() if key != "trace"} in exits


async def test_a_thread_keeps_messages_and_spend_between_runs(server):
    client = get_client(url=server)
    thread = await client.threads.create()
    for turn in (1, 2):
        asked = {"messages": [{"role": "user", "content": f"What is 4{turn} + 58?"}]}
        done = await client.runs.wait(thread["thread_id"], "cascade", input=asked)
        assert len(done["messages"]) == 2 * turn
        assert len({spend["turn"] for spend in done["ledger"].values()}) == turn
