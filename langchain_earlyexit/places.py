"""Where in a running graph a call is made: in which graphs, and in which superstep of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from langchain_core.runnables import RunnableConfig
from langgraph.runtime import get_runtime

from langchain_earlyexit.claims import Place

_AROUND: Final = "__earlyexit_around"


def around_of(config: RunnableConfig | None) -> list[str]:
    """Names of the nodes or steps in which the graph that runs with this configuration stands, from the outside in."""
    told = (config or {}).get("configurable") or {}
    known: list[str] = told.get(_AROUND, [])
    return [*known, *_nodes(told.get("checkpoint_ns", ""))[len(known) : -1]]


def standing_in(around: Sequence[str], config: RunnableConfig) -> RunnableConfig:
    """The configuration for a graph that a node runs, which then stands in these steps rather than in nodes."""
    return {**config, "configurable": {**(config.get("configurable") or {}), _AROUND: list(around)}}


def place_of(config: RunnableConfig) -> Place | None:
    """Where in a running graph this is, None outside of any."""
    told = config.get("configurable") or {}
    checkpoints, tasks = told.get("checkpoint_map"), told.get("checkpoint_ns", "").split("|")
    if not checkpoints or not tasks[0]:
        return None
    levels = tuple((str(checkpoints.get("|".join(tasks[:i]))), task) for i, task in enumerate(tasks))
    info = get_runtime().execution_info
    return Place(levels, info.node_first_attempt_time if info else None, info.node_attempt if info else 1)


def _nodes(namespace: str) -> list[str]:
    # A number stands for the second, third, ... graph that one node runs.
    return [name.split(":", 1)[0] for name in namespace.split("|") if not name.isdigit()]
