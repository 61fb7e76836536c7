"""LangGraph nodes, edges and ready graphs that budget reasoning step by step.

State keys (`ReasoningState`): `budget`, thinking tokens of the run; `risk`, the chance of a change its early exits may
take; `ledger`, what each call was given and took. All are plain dicts. `budgets` has the arithmetic.

A graph that is a node of another spends as that node's step, and shares that step's part out under names of its own.
Nodes that run at once need to be told apart: by weights (or a risk's shares) that name them, by a `share` or `most` of
the nodes that fit together, or by `branches`. Where they could take more than is left, they are refused.
Retry policies belong on the nodes that call models: one on a node that is a graph begins the graph anew, and what its
calls had spent before it failed is lost to the ledger.

Example:
    >>> from langgraph.graph import START, StateGraph
    >>> from langchain_earlyexit import DEER, ChatEarlyExit
    >>> from langchain_earlyexit.graph import ReasoningState, reasoning_node, route_by_confidence
    >>> llm = ChatEarlyExit(model="pocket", exit_policy=DEER(threshold=0.95))
    >>> builder = StateGraph(ReasoningState)
    >>> node = builder.add_node("think", reasoning_node(llm, share=0.5))
    >>> edges = builder.add_edge(START, "think").add_conditional_edges("think", route_by_confidence(think_more="think"))
    >>> graph = builder.compile()
    >>> graph.invoke({"messages": [("user", "What is 86 * 7?")], "budget": {"tokens": 200}})  # doctest: +SKIP
"""

from langchain_earlyexit.budgeted_agent import create_budgeted_agent
from langchain_earlyexit.cascade import Answered, create_cascade
from langchain_earlyexit.ledger import (
    Budget,
    Ledger,
    Risk,
    Spend,
    merge_ledgers,
    remaining,
    run_guarantee,
)
from langchain_earlyexit.node import ReasoningState, ask_human, reasoning_node
from langchain_earlyexit.parts import branches
from langchain_earlyexit.plan_and_solve import create_plan_and_solve, parse_numbered_plan
from langchain_earlyexit.routes import route_by_confidence, verdict
from langchain_earlyexit.self_consistency import create_self_consistency

__all__ = [
    "Answered",
    "Budget",
    "Ledger",
    "ReasoningState",
    "Risk",
    "Spend",
    "ask_human",
    "branches",
    "create_budgeted_agent",
    "create_cascade",
    "create_plan_and_solve",
    "create_self_consistency",
    "merge_ledgers",
    "parse_numbered_plan",
    "reasoning_node",
    "remaining",
    "route_by_confidence",
    "run_guarantee",
    "verdict",
]
