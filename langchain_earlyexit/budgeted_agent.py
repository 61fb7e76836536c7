"""An agent with tools whose steps think within a budget: langchain's `create_agent` with the middleware in place."""

from __future__ import annotations

import types
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.language_models import BaseChatModel
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Checkpointer

from langchain_earlyexit.init_model import init_chat_model

if TYPE_CHECKING:
    from langchain.agents.middleware.types import AgentMiddleware

    from langchain_earlyexit.middleware import ExitBehavior, Unsupported


def create_budgeted_agent(
    model: str | BaseChatModel,
    tools: Sequence[Any] = (),
    *,
    budget: int | None = None,
    thread_budget: int | None = None,
    weights: Mapping[str, float] | None = None,
    most: int | Mapping[str, int] | None = None,
    confidence: float | Mapping[str, float] | None = None,
    epsilon: float | None = None,
    irreversible: Collection[str] = (),
    exit_behavior: ExitBehavior = "answer",
    unsupported_model_behavior: Unsupported = "warn",
    middleware: Sequence[AgentMiddleware[Any, Any, Any]] = (),
    checkpointer: Checkpointer = None,
    name: str = "budgeted_agent",
    **rest: Any,
) -> CompiledStateGraph[Any, Any, Any, Any]:
    """`create_agent` with a `ReasoningBudgetMiddleware`, whose arguments it takes.

    Unlike the bare middleware's, its `ledger` is part of input and output, and its state may bring a `budget` and a
    `risk`, which stand over the arguments: as a node of a graph over `ReasoningState` the agent spends the graph's
    own budget, or, where that has weights, its node's share.

    Args:
        model: a chat model, or a name as `init_chat_model` takes it.
        tools: as `create_agent` takes them.
        budget: thinking tokens of one run.
        thread_budget: of all the runs of a thread.
        weights: shares of the budget by kind of step.
        most: cap of any one step, or by kind.
        confidence: 1 - epsilon of any one step, or by kind.
        epsilon: risk of one run.
        irreversible: tools whose calls cannot be undone.
        exit_behavior: "answer", "end" or "error", when a budget is spent.
        unsupported_model_behavior: "ignore", "warn" or "raise".
        middleware: of your own; the budget's comes after it.
        checkpointer: as for `create_agent`.
        name: of the graph.
        **rest: other arguments of `create_agent`, such as `system_prompt` or `response_format`.

    Raises:
        ImportError: langchain is not installed.
        ValueError: as `ReasoningBudgetMiddleware`; a confidence and a model that has no calibration for it; an
            irreversible tool that is not among the agent's.
    """
    # Graphs of nodes do without langchain: it is an extra, and the first of these says so where it is missing.
    from langchain_earlyexit.middleware import BudgetedAgentState, ReasoningBudgetMiddleware

    # isort: split
    from langchain.agents import create_agent

    budgeting = ReasoningBudgetMiddleware(
        budget=budget,
        thread_budget=thread_budget,
        weights=weights,
        most=most,
        confidence=confidence,
        epsilon=epsilon,
        irreversible=irreversible,
        exit_behavior=exit_behavior,
        unsupported_model_behavior=unsupported_model_behavior,
    )
    tools = list(tools)  # which may come but once
    chat: Any = init_chat_model(model) if isinstance(model, str) else model
    budgeting.check(chat)
    budgeting.check_tools([*tools, *(tool for one in middleware for tool in getattr(one, "tools", ()))])
    return create_agent(
        chat,
        tools,
        middleware=[*middleware, budgeting],
        state_schema=_joined(BudgetedAgentState, rest.pop("state_schema", None)),
        checkpointer=checkpointer,
        name=name,
        **rest,
    )


def _joined(ours: Any, theirs: Any) -> Any:
    """A state with the keys of both."""
    return ours if theirs is None else types.new_class("BudgetedAgentState", (theirs, ours))
