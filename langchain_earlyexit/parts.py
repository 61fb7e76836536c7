"""Parts of a run's budget and risk: for steps that run side by side, and for graphs that are steps of others.

A part has an id of its own below that of the whole, and what is spent of it is spent of both (`ledger.is_part`). No two
parts that are handed out together can spend the same token.

Knows nothing of models or graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_earlyexit.budgets import split
from langchain_earlyexit.ledger import (
    Budget,
    Ledger,
    Risk,
    allowance,
    counted,
    is_part,
    opened,
    remaining,
    risk_of,
    spent,
    weighed,
)


def branches(steps: Sequence[str], budget: Budget | None, risk: Risk | None, ledger: Ledger) -> list[dict[str, Any]]:
    """What to give steps that run side by side: for each a `step`, and a `budget` and `risk` that are its own.

    No two can spend the same token, as they would if all saw what remains. Merge each into what a `Send` carries; the
    entries that come back count against the run's budget and risk.

    Args:
        steps: their names, each once.
        budget: of the run; None for no cap.
        risk: of the run; None to leave exits to the model's own policy.
        ledger: of the run.
    """
    if len(set(steps)) < len(steps):
        raise ValueError(f"steps that run side by side need names of their own, got {list(steps)}")
    told: list[dict[str, Any]] = [{"step": step, "ledger": {}} for step in steps]
    if budget is not None:
        left, shares = remaining(budget, ledger), _side_by_side(steps, budget, ledger)
        for one, tokens in zip(told, shares, strict=True):
            one["budget"] = {
                "tokens": tokens, "id": part_id(budget, one["step"]), "spare": _spare(budget, left - tokens)
            }  # fmt: skip
    if risk is not None:
        handed, seen = [], dict(ledger)
        for step in steps:
            handed.append(risk_of(step, risk, seen))
            # The next one is given its risk as if this one had already run.
            seen[f"{step}/to come"] = opened(step, None, risk, epsilon=handed[-1][0])
        together = sum(epsilon for epsilon, _ in handed)
        for one, (epsilon, heuristic) in zip(told, handed, strict=True):
            part = _part_of_risk(one["step"], risk, epsilon, heuristic)
            part["spare"] = spare_risk(risk, ledger, epsilon, together)
            one["risk"] = {**part, "shares": {one["step"]: epsilon}}
    return told


def part_of(step: str, budget: Budget, ledger: Ledger) -> Budget:
    """What a graph may spend of a budget that is itself a step of the budget's graph.

    For steps that run one after the other. Whenever it is asked, all that the graph has spent is of its one share.

    Args:
        step: the graph, as the weights name it.
        budget: of the graph around it.
        ledger: of the run, with what the graph itself has spent.
    """
    id_ = part_id(budget, step)
    others = {key: entry for key, entry in ledger.items() if not is_part(entry["budget"], id_)}
    part: Budget = {"tokens": allowance(step, budget, others), "id": id_}
    part["spare"] = _spare(budget, remaining(budget, ledger) - remaining(part, ledger))
    return part


def part_of_risk(step: str, risk: Risk, ledger: Ledger) -> Risk:
    """What a graph may take of a risk that is itself a step of the risk's graph, for all its calls together.

    As with `part_of`: whenever it is asked, all that the graph has taken is of its one share.

    Args:
        step: the graph, as the risk's shares or weights name it.
        risk: of the graph around it.
        ledger: of the run, with what the graph itself has taken.
    """
    id_ = part_id(risk, step)
    others = {key: entry for key, entry in ledger.items() if not is_part(entry["risk"], id_)}
    part = _part_of_risk(step, risk, *risk_of(step, risk, others))
    mine = sum(entry["epsilon"] for entry in counted("risk", part, ledger))
    part["spare"] = spare_risk(risk, ledger, max(0.0, part["epsilon"] - mine))
    return part


def below(budget: Budget, name: str, ledger: Ledger) -> Budget:
    """All that is left of a budget, under an id of its own: what was spent of it before counts for no step any more.

    Args:
        budget: such as one that goes on from turn to turn.
        name: of the part, such as the id of a turn.
        ledger: of the run.
    """
    left = remaining(budget, ledger)
    part: Budget = {**budget, "tokens": left, "id": part_id(budget, name), "spare": _spare(budget, 0)}
    part["tokens"] += spent(part, ledger)
    return part


def known_as(step: str, around: Sequence[str], limit: Budget | Risk) -> str:
    """The name under which a budget or risk knows a step: its own, or else that of the nearest graph around it.

    Args:
        step: of a graph.
        around: the graphs it stands in, as nodes or steps of each other, from the outside in.
        limit: what may name them.
    """
    names = names_in(limit) or {}
    return next((name for name in (step, *reversed(around)) if name in names), step)


def names_in(limit: Budget | Risk) -> Mapping[str, float] | None:
    """Weights or shares by step, None for a budget or risk that names no steps."""
    named: Mapping[str, Any] = limit
    names: Mapping[str, float] | None = named.get("weights", named.get("shares"))
    return names


def part_id(whole: Budget | Risk, step: str) -> str:
    """Id of a step's part of a budget or risk.

    Raises:
        ValueError: a step whose name would be read as several.
    """
    if "|" in step:
        raise ValueError(f"step {step!r} cannot have a part of the budget: `|` stands between the names of steps")
    return f"{whole.get('id', '')}|{step}"


def spare_risk(risk: Risk, ledger: Ledger, own: float, handed: float | None = None) -> dict[str, float]:
    """By ids: risk that calls beside this one may take.

    Args:
        risk: of the run.
        ledger: of the run.
        own: what this call or step takes.
        handed: what all get among whom it is shared now; None: this one alone.
    """
    if "shares" in risk or "weights" in risk:
        return _spare(risk, risk["epsilon"] - sum(entry["epsilon"] for entry in counted("risk", risk, ledger)) - own)
    # What is left is for the calls to come, by number: two that run at once would take the same one's.
    return _spare(risk, (own if handed is None else handed) - own)


def _spare(whole: Budget | Risk, left: float) -> dict[str, float]:
    return {**whole.get("spare", {}), whole.get("id", ""): left}


def _part_of_risk(step: str, risk: Risk, epsilon: float, heuristic: bool) -> Risk:
    part: Risk = {"epsilon": epsilon, "id": part_id(risk, step)}
    if heuristic:
        part["heuristic"] = True
    return part


def _side_by_side(steps: Sequence[str], budget: Budget, ledger: Ledger) -> tuple[int, ...]:
    if not steps:
        return ()
    weights = weighed(steps, "budget", budget, ledger) if "weights" in budget else [1.0] * len(steps)
    return split(remaining(budget, ledger), weights)[: len(steps)]
