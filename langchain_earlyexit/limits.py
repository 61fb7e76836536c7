"""What the run of a ready graph may spend: the caller's budget and risk, or its part of those of a graph around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NotRequired

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable, RunnableConfig
from typing_extensions import TypedDict

from langchain_earlyexit.budgets import spread_risk
from langchain_earlyexit.ledger import Budget, Ledger, Risk, check_budget, check_risk
from langchain_earlyexit.node import ReasoningState, State, chat_of, turn_of
from langchain_earlyexit.parts import below, known_as, names_in, part_of, part_of_risk
from langchain_earlyexit.places import around_of


class Part(TypedDict):
    """What a graph's run shares out among its steps.

    Attributes:
        budget: its own, below the caller's or the graph's around it.
        risk: likewise.
        around: the steps of the graphs around it, from the outside in.
    """

    budget: NotRequired[Budget]
    risk: NotRequired[Risk]
    around: list[str]


class PartState(ReasoningState, total=False):
    """State within a ready graph. What the caller gave stays as it came, for the turns to come."""

    reasoning_part: Part


@dataclass(frozen=True)
class Limits:
    """What a ready graph's run may spend, where the caller does not say.

    Args:
        graph: its name.
        tokens: thinking tokens of one turn; None for no cap.
        weights: shares of any budget, by step; None: a step may take all that remains.
        epsilon: risk of one turn; None: the models' own policies decide.
        risk_weights: shares of any risk, by step.
    """

    graph: str
    tokens: int | None
    weights: Mapping[str, float] | None
    epsilon: float | None
    risk_weights: Mapping[str, float]

    def check(self, *models: Runnable[LanguageModelInput, AIMessage]) -> None:
        """Raise ValueError for numbers that cannot be, or for a risk that a model's calibration does not serve."""
        if self.tokens is not None:
            check_budget({"tokens": self.tokens})
        for risk in [] if self.epsilon is None else set(spread_risk(self.epsilon, self.risk_weights).values()) - {0.0}:
            for model in models:
                chat = chat_of(model)[0]
                if not chat.serves(1 - risk) and (held := chat.load_calibration()) is not None:
                    raise ValueError(
                        f"epsilon={self.epsilon:g} is {risk:.3g} for one of {len(self.risk_weights)} steps, but the "
                        f"strictest level of {chat.model}'s calibration is {held.levels[0].epsilon:g}, so none would "
                        "ever be cut: give a larger epsilon, or calibrate on more questions"
                    )

    def begin(self, state: State, config: RunnableConfig) -> dict[str, Any]:
        """With what a run begins: its `reasoning_part`, and no `step`.

        As a step of another graph (the state's `step`, or its node) it shares out what that step may spend. Otherwise
        the caller's budget and risk stand, and get only the weights or shares that they lack; without an id, they are
        the whole thread's. The graph's own are for one turn of the conversation.
        """
        around = around_of(config)
        if state.get("step"):
            around = [*around[:-1], state["step"]]
        part: Part = {"around": around}
        budget, risk = self._budget(state, around), self._risk(state, around)
        if budget is not None:
            part["budget"] = budget
        if risk is not None:
            part["risk"] = risk
        return {"reasoning_part": part, "step": ""}

    def _budget(self, state: State, around: list[str]) -> Budget | None:
        ledger: Ledger = state.get("ledger", {})
        given: Budget | None = state.get("budget")
        if given is None:
            budget: Budget | None = (
                None if self.tokens is None else {"tokens": self.tokens, "id": self._own(state, around)}
            )
        else:
            budget, below_it = check_budget(given), [turn_of(state)]
            if _is_step(around, budget, self.weights):
                step = known_as(around[-1], around, budget)
                budget = part_of(step, budget, ledger)
                below_it = [*around[around.index(step) + 1 :], *below_it]
            for name in filter(None, below_it):
                budget = below(budget, name.replace("|", "/"), ledger)
        if budget is not None and self.weights is not None and "weights" not in budget:
            budget = {**budget, "weights": dict(self.weights)}
        return budget

    def _risk(self, state: State, around: list[str]) -> Risk | None:
        given: Risk | None = state.get("risk")
        if given is None:
            risk: Risk | None = (
                None if self.epsilon is None else {"epsilon": self.epsilon, "id": self._own(state, around)}
            )
        else:
            risk = check_risk(given)
            if _is_step(around, risk, self.risk_weights):
                risk = part_of_risk(known_as(around[-1], around, risk), risk, state.get("ledger", {}))
            elif names_in(risk) is not None and not _is_own(risk, around):
                return risk  # its shares are for the steps of this graph
        return None if risk is None else {**risk, "shares": spread_risk(risk["epsilon"], self.risk_weights)}

    def _own(self, state: State, around: list[str]) -> str:
        """An id that no other graph's run has."""
        return "|".join([*around, self.graph, turn_of(state)])


def _is_step(around: list[str], limit: Budget | Risk, steps: Mapping[str, float] | None) -> bool:
    """Whether a budget or risk is that of the graph around, so that this one spends as a step of it.

    It may also have been made for this graph: for its own steps, or by `branches`.
    """
    if not around or _is_own(limit, around):
        return False
    names = names_in(limit)
    return names is None or not set(names) & set(steps or ()) or around[-1] in names


def _is_own(limit: Budget | Risk, around: list[str]) -> bool:
    """Whether it is already the part of the step that this graph is."""
    return bool(around) and limit.get("id", "").endswith(f"|{around[-1]}")
