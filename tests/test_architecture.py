"""Imports only point down, and the torch-free half stays torch-free."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "langchain_earlyexit"

ROOMS = {
    "_version": 0, "trace": 0, "cues": 0, "answers": 0, "sampling": 0, "families": 0,
    "pocket": 0, "pocket.problems": 0, "toolcalls": 0, "jsonforms": 0,
    "fingerprint": 0, "policies": 1, "budgets": 1, "ledger": 1, "parts": 1, "claims": 1,
    "policy_json": 1, "guarantee": 1, "drift": 1,
    "codec": 2, "strain": 2, "engines": 2, "probe": 2, "sentry": 2, "vllm_plugin": 2, "vllm_sentries": 2,
    "guide": 3, "signals": 3, "request": 3, "trunk": 3, "answering": 3, "controller": 3, "lanes": 3,
    "messages": 4, "inert": 4, "prompts": 4,
    "record": 4, "settings": 4, "binding": 4, "replies": 4, "events": 4, "copies": 4,
    "schemas": 4, "promises": 4, "beside": 4, "loading": 4, "grammar": 4, "asks": 4, "toolturns": 4, "turnshapes": 4,
    "structured": 5, "tooled": 5, "configurable": 5, "fields": 5, "chat_models": 5, "init_model": 5, "callbacks": 5,
    "places": 6, "node": 6, "limits": 6, "routes": 6, "cascade": 6, "self_consistency": 6, "plan_and_solve": 6,
    "knobs": 6, "agent_steps": 6, "budgeted_agent": 6,
    "graph": 6, "middleware": 6, "lab": 6, "pocket.*": 6,
    "cli": 7,
    "__init__": 8,
}  # fmt: skip

TORCH_AT_RUN_TIME = {
    "engines.attention", "engines.identity", "engines.lean", "engines.local", "engines.matrices",
    "engines.memory", "engines.packed", "engines.separate", "engines.taps", "engines.threads", "lab.peers", "lab.train",
    "vllm_plugin", "vllm_sentries",
}  # fmt: skip


def room(name: str) -> int:
    parts = name.split(".")
    for key in (name, f"{parts[0]}.*" if len(parts) > 1 else "", parts[0]):
        if key in ROOMS:
            return ROOMS[key]
    raise AssertionError(f"{name} stands in no room; give it one")


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = path
    return found


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_only_from_its_own_room_or_below(name):
    known = modules()
    for full in imported(known[name]):
        target = full.removeprefix("langchain_earlyexit.")
        if full.startswith("langchain_earlyexit.") and target in known:
            assert room(target) <= room(name), f"{name} (room {room(name)}) imports {target} (room {room(target)})"


@pytest.mark.parametrize("name", sorted(modules()))
def test_torch_is_imported_only_where_tensors_are(name):
    uses_torch = any(full.split(".")[0] == "torch" for full in imported(modules()[name]))
    assert not uses_torch or name in TORCH_AT_RUN_TIME or name.startswith("pocket.")


@pytest.mark.parametrize(
    "statement",
    [
        "import langchain_earlyexit",
        "from langchain_earlyexit import Check, CoDEStop, DEER, FirstOf, Never, Trace, replay",
        "import langchain_earlyexit.controller",
        "from langchain_earlyexit.cli import _parser; _parser()",
        "from langchain_earlyexit import ChatEarlyExit; ChatEarlyExit()",
    ],
)
def test_torch_is_not_loaded_before_a_model_is(statement):
    code = f"{statement}\nimport sys\nassert 'torch' not in sys.modules, 'torch was loaded'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_loads_neither_transformers_nor_langchain():
    code = "import langchain_earlyexit, sys\nassert not {'torch', 'transformers', 'langchain_core'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_can_be_imported():
    import langchain_earlyexit

    for name in langchain_earlyexit.__all__:
        assert getattr(langchain_earlyexit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        langchain_earlyexit.nothing  # noqa: B018
