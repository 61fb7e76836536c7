"""Where a graph goes after an answer, by how its thinking ended and how sure it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

from langchain_core.runnables import RunnableConfig
from langgraph.config import get_config
from langgraph.graph import END

from langchain_earlyexit.ledger import Ledger, Spend, allowance, remaining
from langchain_earlyexit.node import State, limits_of

Verdict = Literal["sure", "unsure", "cut"]

_CUT: Final = frozenset({"budget", "length", "no_thinking"})
_HOPELESS: Final = frozenset({"unpromising", "degenerate"})


def verdict(spend: Spend, threshold: float = 0.9) -> Verdict:
    """What an entry of the ledger says of its answer.

    `cut`: a cap ended the thinking (or there was none). `unsure`: the policy gave up on it, or the last probability
    measured for it is below `threshold`; for thinking that ended by itself there is one only where the model records
    its checks (`include_checks=True`). `sure`: anything else.
    """
    reason = spend["exit"]["reason"]
    if reason in _CUT:
        return "cut"
    confidence = spend["confidence"]
    return "unsure" if reason in _HOPELESS or (confidence is not None and confidence < threshold) else "sure"


def route_by_confidence(
    accept: str = END,
    *,
    think_more: str | None = None,
    escalate: str | None = None,
    ask: str | None = None,
    threshold: float = 0.9,
    tries: int = 2,
    step: str | None = None,
) -> Callable[[State], str]:
    """A function for `add_conditional_edges`, after a `reasoning_node`.

    A sure answer goes to `accept`. A cut one goes to `think_more`, an unsure one to `escalate`; where that is not
    given or cannot help, to the other, then to `ask`, and at last to `accept`: the ledger tells how it ended.

    Args:
        accept: where sure answers go.
        think_more: the node that tries again; often the same node, whose second call takes its share of what is left
            and is not cut by a policy (where the node has no `writes` of its own, so that its answer takes the first
            one's place). Not chosen once the step had `tries` calls in this turn, or may take nothing of what is left.
        escalate: the node of a larger model or budget.
        ask: a node of `ask_human`.
        threshold: probability below which an answer is unsure, in [0, 1].
        tries: calls of one step after which more thinking is not tried, at least 1.
        step: whose last answer is judged; None: the state's `step`, or the last call of all.

    Raises:
        ValueError: a threshold or number of tries that cannot be. When it runs: no call to judge, or a node that was
            reached by a `Send`.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is a probability, not {threshold}")
    if tries < 1:
        raise ValueError(f"tries counts the first call too: at least 1, not {tries}")

    def route(state: State) -> str:
        config = _config_not_sent()
        ledger: Ledger = state.get("ledger", {})
        named = step or state.get("step")
        calls = [entry for entry in ledger.values() if named is None or entry["step"] == named]
        if not calls:
            raise ValueError(
                f"there is no call of {'any step' if named is None else f'step {named!r}'} to judge: "
                "route_by_confidence goes after a reasoning_node, and the state must keep its ledger"
            )
        judged = verdict(calls[-1], threshold)
        if judged == "sure":
            return accept
        made = sum((entry["step"], entry["turn"]) == (calls[-1]["step"], calls[-1]["turn"]) for entry in calls)
        may_think = made < tries and _has_some(calls[-1]["step"], state, config, ledger)
        more = think_more if may_think else None
        ways = (more, escalate) if judged == "cut" else (escalate, more)
        return next((way for way in (*ways, ask) if way is not None), accept)

    return route


def _has_some(step: str, state: State, config: RunnableConfig, ledger: Ledger) -> bool:
    """Whether a step may take any tokens now."""
    _, budget, _ = limits_of(step, state, config, ledger)
    if budget is None:
        return True
    if step not in budget.get("weights", {step: 1.0}):  # it was the step of a graph within, under a name of its own
        return remaining(budget, ledger) > 0
    return allowance(step, budget, ledger) > 0


def _config_not_sent() -> RunnableConfig:
    """The configuration of the node that was left; none where a route is called by hand, outside a graph.

    After a `Send` a route is shown the graph's state, not the branch's: a second try would lose step and budget.
    """
    try:
        config = get_config()
    except RuntimeError:
        return {}
    told = config.get("metadata", {})
    if "__pregel_push" in told.get("langgraph_triggers", ()):
        raise ValueError(
            f"route_by_confidence goes on in the graph's own state, but {told['langgraph_node']!r} was reached by a "
            "Send, whose step and budget only it can see: compile the node and its routes as a graph of their own, "
            "which hands back `messages` or results and `ledger`, and Send to that"
        )
    return config
