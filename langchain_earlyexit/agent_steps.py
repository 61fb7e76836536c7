"""The steps of an agent, by kind, and what the agent's state and context hold about their reasoning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, NotRequired, cast, get_args

from langchain_core.messages import AnyMessage, ToolMessage
from langchain_core.runnables import RunnableConfig
from typing_extensions import TypedDict

from langchain_earlyexit.ledger import Budget, Ledger, Risk, allowance, merge_ledgers, remaining
from langchain_earlyexit.limits import Part
from langchain_earlyexit.node import limits_of

try:
    from langchain.agents.middleware.types import AgentState, ModelRequest, OmitFromOutput, PrivateStateAttr
except ImportError as error:  # langchain is an extra: graphs of nodes do without it
    raise ImportError(
        "agents need the langchain package beside langchain-core: pip install 'langchain-earlyexit[agents]'"
    ) from error

Kind = Literal["planning", "routine", "recovery", "final"]
"""Of a step: the first of a run; one after tool results; one after a tool's error; one that can call no tool."""

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)


class ReasoningBudgetState(AgentState[Any]):
    """What the middleware keeps in the agent's state, hidden from its input and output.

    Attributes:
        ledger: one entry for each model call, its exit record among it; a union, so no branch's entry is lost.
        reasoning_run: id of the run; one that was interrupted goes on under the same.
        reasoning_part: what the run may spend of the state's budget and risk.
    """

    ledger: NotRequired[Annotated[Ledger, PrivateStateAttr, merge_ledgers]]
    reasoning_run: NotRequired[Annotated[str, PrivateStateAttr]]
    reasoning_part: NotRequired[Annotated[Part, PrivateStateAttr]]


class BudgetedAgentState(AgentState[Any]):
    """State of `create_budgeted_agent`: the same ledger in sight, and what the caller or a graph around it may bring.

    Attributes:
        budget: as in `ReasoningState`; it stands over the middleware's own.
        risk: likewise.
        ledger: one entry for each model call.
    """

    # Not handed back: of agents side by side in one graph, each would write the graph's own.
    budget: NotRequired[Annotated[Budget, OmitFromOutput]]
    risk: NotRequired[Annotated[Risk, OmitFromOutput]]
    ledger: NotRequired[Annotated[Ledger, merge_ledgers]]


class ReasoningContext(TypedDict, total=False):
    """Keys (or attributes) of the runtime context that stand over the middleware's own numbers, in one run.

    Attributes:
        reasoning_budget: thinking tokens of the run, or a whole `Budget`.
        reasoning_risk: a `Risk`: the levels of confidence are then what it allows each call.
    """

    reasoning_budget: int | Budget
    reasoning_risk: Risk


def part_of_run(state: Mapping[str, Any], config: RunnableConfig) -> Part:
    """What a run of an agent may spend: as a node of a graph whose budget or risk names that node, the node's share."""
    before = {**state, "reasoning_part": None}
    around, budget, risk = limits_of("", before, config, state.get("ledger", {}))
    part: Part = {"around": around}
    if budget is not None:
        part["budget"] = budget
    if risk is not None and risk is not state.get("risk"):
        # The share is for all calls of the run, however many: it falls from each to the next.
        risk = cast("Risk", {key: value for key, value in risk.items() if key != "shares"})
    if risk is not None:
        part["risk"] = risk
    return part


def share_of(kind: Kind, budget: Budget, ledger: Ledger) -> int:
    """Thinking tokens that a step may take now: kinds, unlike the steps of a plan, may come again and again, or never.

    So a step that can call no tool, after which nothing comes, takes all; and no remainder is too small to be spent.
    Only a kind of weight 0 gets nothing while others may come.

    Args:
        kind: of the step.
        budget: with a weight for every kind.
        ledger: of the run.
    """
    left = remaining(budget, ledger)
    if not budget["weights"][kind]:
        return allowance(kind, budget, ledger)
    return left if kind == "final" else min(left, max(1, allowance(kind, budget, ledger)))


def step_kind(request: ModelRequest[Any]) -> Kind:
    """What kind of step a model call is, by what can come of it and what it follows."""
    if not request.tools or request.tool_choice == "none":
        return "final"
    results = _last_results(request.messages)
    if any(result.status == "error" for result in results):
        return "recovery"
    return "routine" if results or (request.messages and request.messages[-1].type == "ai") else "planning"


def _last_results(messages: Sequence[AnyMessage]) -> list[ToolMessage]:
    results = []
    for message in reversed(messages):
        if not isinstance(message, ToolMessage):
            break
        results.append(message)
    return results


def tool_name(tool: Any) -> str | None:
    """Name of a tool of any kind that an agent may hold."""
    if isinstance(tool, dict):
        named = tool.get("function", tool).get("name")
    else:
        named = getattr(tool, "name", None) or getattr(tool, "__name__", None)
    return named if isinstance(named, str) else None


def names_of(tools: Iterable[Any]) -> set[str]:
    """Names of the tools that have one: some that a provider runs itself have none."""
    return {name for tool in tools if (name := tool_name(tool)) is not None}
