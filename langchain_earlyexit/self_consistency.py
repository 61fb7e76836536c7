"""The same question thought through several times, and a vote: no more chains are run than the vote needs.

Self-consistency: arXiv 2203.11171. Here chains run in waves, each as large as could settle the vote if all its chains
agreed with the leader; so no chain is run that a vote taken one by one would not have run, and the outcome is that of
all chains.
"""

from __future__ import annotations

import operator
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Checkpointer, Overwrite, Send

from langchain_earlyexit.answers import BOXED, TEXT
from langchain_earlyexit.budgets import RISK_WEIGHTS
from langchain_earlyexit.cascade import Answered
from langchain_earlyexit.limits import Limits, PartState
from langchain_earlyexit.node import ReasoningState, State, reasoning_node
from langchain_earlyexit.parts import branches


class _Votes(PartState, total=False):
    seed: int
    chains: Annotated[dict[str, AIMessage], operator.or_]
    """Answers by chain, "chain 1" the first."""
    votes: dict[str, int]


class _Elected(Answered):
    votes: dict[str, int]


def answer_in(message: AIMessage) -> str:
    """What a message answers, as answers are compared: what is boxed in it, or its text."""
    return BOXED.extract(message.text) or TEXT.normalise(message.text)


def still_needed(votes: Collection[int], left: int) -> int:
    """How many more votes could settle an election at the least: 0 when nobody can catch up with the leader.

    Args:
        votes: for each candidate so far.
        left: votes still to come at most.
    """
    first, second, *_ = [*sorted(votes, reverse=True), 0, 0]
    lead = first - second
    return 0 if lead > left else min(left, (left - lead) // 2 + 1)


def create_self_consistency(
    model: Runnable[LanguageModelInput, AIMessage],
    chains: int = 5,
    *,
    seed: int | None = None,
    answer_of: Callable[[AIMessage], str] = answer_in,
    budget: int | None = None,
    epsilon: float | None = None,
    checkpointer: Checkpointer = None,
    name: str = "self_consistency",
) -> CompiledStateGraph[Any, Any, Any, Any]:
    """A graph over `ReasoningState` that answers the conversation by the vote of up to `chains` chains of thought.

    Chains of one wave run side by side, each with a seed and a share of the budget and the risk of its own. The
    answer is the earliest chain's of those that won; `votes` in the output tells how many said what. Of equal votes
    the earlier chain's answer wins. The model must sample: at temperature 0 all chains are one.

    Args:
        model: a `ChatEarlyExit`, or one with keywords bound.
        chains: how many at most, at least 1.
        seed: of chain 1; the others count up from it. None draws one for each turn.
        answer_of: what of a message is compared.
        budget: thinking tokens of one turn over all chains, where the state brings no `budget`.
        epsilon: risk of one turn over all chains, where the state brings no `risk`; needs a calibration.
        checkpointer: as for `StateGraph.compile`.
        name: of the graph.

    Raises:
        TypeError: a model that is no `ChatEarlyExit`.
        ValueError: a number that cannot be, or an epsilon and no calibration.
    """
    if chains < 1:
        raise ValueError(f"a vote needs at least one chain, got {chains}")
    names = [f"chain {i + 1}" for i in range(chains)]
    limits = Limits(name, budget, dict.fromkeys(names, 1.0), epsilon, dict.fromkeys(names, RISK_WEIGHTS["routine"]))
    limits.check(model)

    def begin(state: State, config: RunnableConfig) -> dict[str, Any]:
        # Kept in state: a run that is resumed must go on with the seeds it began with.
        drawn = random.randrange(2**31) if seed is None else seed  # noqa: S311 - not a secret
        return {**limits.begin(state, config), "seed": drawn, "chains": Overwrite({}), "votes": {}}

    def count(state: State) -> dict[str, Any]:
        return {"votes": dict(Counter(answer_of(state["chains"][name]) for name in names if name in state["chains"]))}

    def fan_out(state: State) -> list[Send] | str:
        begun = len(state["chains"])
        wave = still_needed(state["votes"].values(), chains - begun)
        if not wave:
            return "elect"
        part = state["reasoning_part"]
        told = branches(names[begun : begun + wave], part.get("budget"), part.get("risk"), state["ledger"])
        shown = {"messages": state["messages"], "reasoning_part": {"around": part["around"]}}
        return [Send("chain", {**one, **shown, "seed": state["seed"] + begun + i}) for i, one in enumerate(told)]

    def elect(state: State) -> dict[str, Any]:
        votes: Mapping[str, int] = state["votes"]
        most = max(votes.values())
        ordered = [state["chains"][name] for name in names if name in state["chains"]]
        return {"messages": [next(message for message in ordered if votes[answer_of(message)] == most)]}

    builder = StateGraph(_Votes, input_schema=ReasoningState, output_schema=_Elected)
    builder.add_node("begin", begin)
    builder.add_node(
        "chain",
        reasoning_node(
            model,
            name="chain",
            writes=lambda message, state: {"chains": {state["step"]: message}},
            keywords=lambda state: {"seed": state["seed"]},
        ),
    )
    builder.add_node("count", count)
    builder.add_node("elect", elect)
    builder.add_edge(START, "begin")
    builder.add_conditional_edges("begin", fan_out, ["chain", "elect"])
    builder.add_edge("chain", "count")
    builder.add_conditional_edges("count", fan_out, ["chain", "elect"])
    builder.add_edge("elect", END)
    return builder.compile(checkpointer=checkpointer, name=name)
