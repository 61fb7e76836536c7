"""The steps of an agent, by kind, and what the agent's state and context hold about their reasoning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, NotRequired, get_args

from langchain_core.messages import AnyMessage, ToolMessage
from typing_extensions import TypedDict

from langchain_earlyexit.ledger import Budget, Ledger, Risk, merge_ledgers

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
    """

    ledger: NotRequired[Annotated[Ledger, PrivateStateAttr, merge_ledgers]]
    reasoning_run: NotRequired[Annotated[str, PrivateStateAttr]]


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
    name: str | None = tool.get("function", tool).get("name") if isinstance(tool, dict) else tool.name
    return name
