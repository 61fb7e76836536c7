"""A small model answers first; a larger one only where the small one was unsure or ran out of budget."""

from __future__ import annotations

from typing import Annotated, Any

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, AnyMessage
from langchain_core.runnables import Runnable
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Checkpointer
from typing_extensions import TypedDict

from langchain_earlyexit.budgets import RISK_WEIGHTS
from langchain_earlyexit.ledger import Ledger, merge_ledgers
from langchain_earlyexit.limits import Limits, PartState
from langchain_earlyexit.node import ReasoningState, ask_human, reasoning_node
from langchain_earlyexit.routes import route_by_confidence


class Answered(TypedDict):
    """What a ready graph hands back: the conversation with its answer, and what that cost."""

    messages: Annotated[list[AnyMessage], add_messages]
    ledger: Annotated[Ledger, merge_ledgers]


def create_cascade(
    small: Runnable[LanguageModelInput, AIMessage],
    large: Runnable[LanguageModelInput, AIMessage],
    *,
    threshold: float = 0.9,
    small_share: float = 0.25,
    budget: int | None = None,
    epsilon: float | None = None,
    ask: bool = False,
    checkpointer: Checkpointer = None,
    name: str = "cascade",
) -> CompiledStateGraph[Any, Any, Any, Any]:
    """A graph over `ReasoningState` that answers the conversation: `small` first, then `large` if need be.

    `small` should have a policy that tells when it is unsure, such as `FirstOf(DEER(), GiveUp())`. Its answer goes to
    `large` when it is unpromising, degenerate, cut by a cap, or measured below `threshold`; it is not shown to `large`,
    whose answer takes its place, and is never cut where the run has a risk: that was spent on the first try. `large`
    may be the same model with more to spend.

    Args:
        small: the model that answers first.
        large: the model that answers what is left.
        threshold: probability below which an answer of `small` is unsure.
        small_share: part of the budget that `small` may take, in (0, 1].
        budget: thinking tokens of one turn, where the state brings no `budget`; None for no cap.
        epsilon: risk of one turn, where the state brings no `risk`; needs a model with a calibration.
        ask: show a person what `large` is unsure of, too (by `interrupt`; needs a checkpointer).
        checkpointer: as for `StateGraph.compile`.
        name: of the graph.

    Raises:
        TypeError: a model that is no `ChatEarlyExit`.
        ValueError: a number that cannot be, or an epsilon and no calibration.
    """
    limits = Limits(name, budget, None, epsilon, {"small": RISK_WEIGHTS["routine"]})
    limits.check(small)
    builder = StateGraph(PartState, input_schema=ReasoningState, output_schema=Answered)
    builder.add_node("begin", limits.begin)
    builder.add_node("small", reasoning_node(small, name="small", share=small_share))
    builder.add_node("large", reasoning_node(large, name="large", replaces=("small",)))
    builder.add_edge(START, "begin")
    builder.add_edge("begin", "small")
    builder.add_conditional_edges(
        "small", route_by_confidence(END, escalate="large", threshold=threshold, step="small"), [END, "large"]
    )
    if ask:
        builder.add_node("human", ask_human())
        builder.add_conditional_edges(
            "large", route_by_confidence(END, ask="human", threshold=threshold, step="large"), [END, "human"]
        )
    return builder.compile(checkpointer=checkpointer, name=name)
