"""What a run may spend and what its calls have spent, as plain dicts that fit in graph state, checkpoints and JSON.

A *budget* and a *risk* say what a run may spend; the *ledger* holds one entry for each finished call. It only ever
grows: merging is a union by call, so branches that run side by side lose no entry, and a subgraph that hands back
what it was given, or a step that is merged twice, counts nothing twice.

Knows nothing of models or graphs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NotRequired

from typing_extensions import TypedDict

from langchain_earlyexit.budgets import adaptive_risk, endless_risk, next_share, pace


class Budget(TypedDict):
    """Thinking tokens of a run. The kept thinking of its calls, which is capped exactly, counts against it.

    Attributes:
        tokens: at least 0.
        weights: by step, or node of a graph within; a step takes its share of what remains, against the steps that
            are not done. Without them, a step may take all that remains, and none may run beside it.
        id: tells this budget from those of other runs in the same thread. A new budget with a new id starts from
            nothing spent; one without an id counts every call that had none. `a|b` is step b's part of budget `a`, and
            what is spent of it is spent of both.
        spare: of a part: by the ids of what it is part of, tokens that were left for calls beside it.
    """

    tokens: int
    weights: NotRequired[dict[str, float]]
    id: NotRequired[str]
    spare: NotRequired[dict[str, float]]


class Risk(TypedDict):
    """Tolerated chance that early exits change a run. A step that gets 0 of it is never cut.

    Attributes:
        epsilon: of the whole run, in [0, 1).
        shares: by step, fixed before the run (`budgets.spread_risk`); a step that is not there gets 0, and so does the
            second call of a step: its share is spent.
        weights: by step, instead of shares: each takes its part of what is left. Heuristic.
        id: as a budget's.
        spare: as a budget's.
        heuristic: this risk was itself handed out by a rule that looks at the run.

    With neither shares nor weights the n-th call of the run gets `budgets.endless_risk(epsilon, n)`.
    """

    epsilon: float
    shares: NotRequired[dict[str, float]]
    weights: NotRequired[dict[str, float]]
    id: NotRequired[str]
    spare: NotRequired[dict[str, float]]
    heuristic: NotRequired[bool]


class Spend(TypedDict):
    """One call: what it was given and what it took.

    Attributes:
        step: which step of its graph; what weights and shares name.
        within: the steps or nodes of the graphs around that, from the outside in, as in `step 2|plan`; "" for none.
        node: the node that made the call.
        turn: id of the conversation's last human message then, "" where there was none.
        model: its name.
        cap: thinking tokens it might take, or None.
        thinking: thinking tokens kept; they count against the budget.
        reasoning: all that was computed beyond prompt and answer (trials, forced and dropped tokens too): the net cost.
        epsilon: risk it was given.
        heuristic: a rule that looks at the run chose epsilon.
        confidence: the last probability that was measured for its answer, or None.
        budget: id of the budget it counts against, "" for one without.
        risk: id of the risk, likewise.
        exit: its exit record, without the trace.
        retry_of: key of the entry whose call this one repeats: the same node, given the same prompt.
        calibration: digest of the artifact that the exit record's guarantee is of, where there is one.
    """

    step: str
    within: str
    node: str
    turn: str
    model: str
    cap: int | None
    thinking: int
    reasoning: int
    epsilon: float
    heuristic: bool
    confidence: float | None
    budget: str
    risk: str
    exit: dict[str, Any]
    retry_of: NotRequired[str]
    calibration: NotRequired[str]


Ledger = dict[str, Spend]
"""Entries by call, in the order in which they came."""

_BUDGET_KEYS: Final = frozenset(Budget.__annotations__)
_RISK_KEYS: Final = frozenset(Risk.__annotations__)
_SLACK: Final = 1e-12
"""Of sums of risk, which are rounded."""


def opened(
    step: str,
    budget: Budget | None,
    risk: Risk | None,
    *,
    within: str = "",
    node: str = "",
    turn: str = "",
    model: str = "",
    cap: int | None = None,
    epsilon: float = 0.0,
    heuristic: bool = False,
) -> Spend:
    """The entry of a call that has taken nothing yet."""
    return {
        "step": step, "within": within, "node": node, "turn": turn, "model": model, "cap": cap, "thinking": 0,
        "reasoning": 0, "epsilon": epsilon, "heuristic": heuristic, "confidence": None,
        "budget": "" if budget is None else budget.get("id", ""),
        "risk": "" if risk is None else risk.get("id", ""),
        "exit": {},
    }  # fmt: skip


def merge_ledgers(mine: Ledger, other: Ledger) -> Ledger:
    """The union: the reducer of the state key `ledger`. In any order, and any number of times, it gives the same.

    An answer out of a LangChain cache has the key of the call that computed it, and cost nothing: where two entries
    have one key, the dearer stays.
    """
    merged = dict(mine)
    for key, entry in other.items():
        merged[key] = max(merged[key], entry, key=_dearer) if key in merged else entry
    return merged


def _dearer(entry: Spend) -> tuple[int, str]:
    return entry["reasoning"], json.dumps(entry, sort_keys=True)


def check_budget(budget: Budget) -> Budget:
    """`budget` itself.

    Raises:
        ValueError: not a budget, a key that no budget has, or a weight that cannot be.
    """
    _only("budget", budget, _BUDGET_KEYS, {"tokens": 200})
    tokens = budget["tokens"]
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
        raise ValueError(f"a budget's tokens are a whole number of at least 0, got {tokens!r}; leave it out for no cap")
    _check_weights("budget", budget)
    return budget


def check_risk(risk: Risk) -> Risk:
    """`risk` itself.

    Raises:
        ValueError: not a risk, a key that no risk has, a weight or share that cannot be, or shares that add up to more
            than epsilon.
    """
    _only("risk", risk, _RISK_KEYS, {"epsilon": 0.05})
    if not _is_number(risk["epsilon"]) or not 0 <= risk["epsilon"] < 1:
        raise ValueError(f"a risk's epsilon lies in [0, 1), got {risk['epsilon']!r}")
    shares = risk.get("shares")
    if shares is not None and "weights" in risk:
        raise ValueError("a risk has shares, fixed beforehand, or weights, which are heuristic; not both")
    _check_weights("risk", risk)
    fits = shares is None or (isinstance(shares, Mapping) and all(_at_least_zero(share) for share in shares.values()))
    if not fits or (shares is not None and sum(shares.values()) > risk["epsilon"] + _SLACK):
        raise ValueError(
            f"the steps' shares {shares} must be at least 0 and add up to at most epsilon={risk['epsilon']}; "
            "budgets.spread_risk gives such shares"
        )
    return risk


def remaining(budget: Budget, ledger: Ledger) -> int:
    """Thinking tokens that are left, at least 0."""
    return max(0, budget["tokens"] - spent(budget, ledger))


def spent(budget: Budget, ledger: Ledger) -> int:
    """Thinking tokens that count against a budget so far."""
    return sum(entry["thinking"] for entry in counted("budget", budget, ledger))


def allowance(step: str, budget: Budget, ledger: Ledger) -> int:
    """Thinking tokens that `step` may take now.

    Raises:
        ValueError: the budget has weights, and none for `step`.
    """
    left = remaining(budget, ledger)
    if "weights" not in budget:
        return left
    weight, *later = weighed([step], "budget", budget, ledger)
    return next_share(left, weight, later)


def pace_of(step: str, budget: Budget, ledger: Ledger) -> float | None:
    """How the run's spending keeps up with its weights before `step` (`budgets.pace`); None without weights.

    Raises:
        ValueError: the budget has weights, and none for `step`.
    """
    if "weights" not in budget:
        return None
    to_come = weighed([step], "budget", budget, ledger)
    return pace(budget["tokens"], remaining(budget, ledger), list(budget["weights"].values()), to_come)


def risk_of(step: str, risk: Risk, ledger: Ledger) -> tuple[float, bool]:
    """Risk that `step` may take now, and whether that is heuristic.

    Raises:
        ValueError: the risk has weights, and none for `step`.
    """
    taken = counted("risk", risk, ledger)
    gone = sum(entry["epsilon"] for entry in taken)
    if "weights" in risk:
        weight, *later = weighed([step], "risk", risk, ledger)
        return adaptive_risk(risk["epsilon"], gone, weight, later), True
    if "shares" in risk:
        # A share is for one call: the answer of another would be one more that an exit may have changed.
        tried = any(_step_of(entry, "risk", risk) == step and entry["epsilon"] > 0 for entry in taken)
        share = 0.0 if tried else risk["shares"].get(step, 0.0)
    else:
        share = endless_risk(risk["epsilon"], len(taken))
    # What was fixed beforehand fits; but a part that weights handed out may have become smaller since it was begun.
    left = risk["epsilon"] - gone
    return share if share <= left + _SLACK else max(0.0, left), risk.get("heuristic", False)


def is_part(id_: str, whole: str) -> bool:
    """Whether what is taken under an id counts against that of the whole: the same, or a part of it."""
    return id_ == whole or id_.startswith(f"{whole}|")


def run_guarantee(risk: Risk, ledger: Ledger) -> dict[str, Any] | None:
    """What the calibrations of a run's calls promise together, in the keys of an exit record's guarantee.

    The epsilons of the calls add up, and the deltas of the calibrations. `kind` is "heuristic" where any risk was
    chosen by what the run did; `n` is that of the smallest calibration, 0 where no call was cut. Thinking that ended by
    itself changed nothing; nor did a try that was cut, once the same model was asked the same again (`retry_of`) and
    thought that to its end. Another call of the same step makes nothing good: it may have been asked something else.

    Returns:
        None where a call was cut, by a cap or a policy, that no calibration covers; or where they promise different
        things.
    """
    taken = counted("risk", risk, ledger)
    cut = [entry for entry in taken if not _made_good(entry, ledger)]
    promises = [entry["exit"]["guarantee"] for entry in cut]
    if any(promise is None for promise in promises) or len({promise["kind"] for promise in promises}) > 1:
        return None
    kind = promises[0]["kind"] if promises else "answer_changed"
    deltas = {
        (entry["model"], entry.get("calibration"), promise["n"], promise["delta"]): promise["delta"]
        for entry, promise in zip(cut, promises, strict=True)
    }
    return {
        "kind": "heuristic" if any(entry["heuristic"] for entry in taken) else kind,
        "epsilon": sum(entry["epsilon"] for entry in taken),
        "delta": sum(deltas.values()),
        "n": min((promise["n"] for promise in promises), default=0),
    }


def _made_good(entry: Spend, ledger: Ledger) -> bool:
    """Whether the call's thinking ended by itself, or that of a later try of the same."""
    if entry["exit"]["reason"] == "natural":
        return True
    again = [one for one in ledger.values() if ledger.get(one.get("retry_of", "")) is entry]
    return any(one["model"] == entry["model"] and _made_good(one, ledger) for one in again)


def counted(key: Literal["budget", "risk"], whole: Budget | Risk, ledger: Ledger) -> list[Spend]:
    """The calls that count against a budget or a risk."""
    return [entry for entry in ledger.values() if is_part(entry[key], whole.get("id", ""))]


def _step_of(entry: Spend, key: Literal["budget", "risk"], whole: Budget | Risk) -> str:
    """The step of `whole`'s own graph that a call belongs to: its own, or that whose part it spent."""
    id_, mine = entry[key], whole.get("id", "")
    return entry["step"] if id_ == mine else id_[len(mine) + 1 :].split("|", 1)[0]


def weighed(steps: Sequence[str], key: Literal["budget", "risk"], whole: Budget | Risk, ledger: Ledger) -> list[float]:
    """Weights of `steps`, and then those of the steps still to come after them.

    Raises:
        ValueError: one of `steps` has no weight.
    """
    weights = whole["weights"]
    for step in steps:
        if step not in weights:
            raise ValueError(
                f"the {key} has weights for {', '.join(weights)}, and none for step {step!r}; give it one, or one to "
                "the node of the graph that it stands in"
            )
    done = {*steps, *(_step_of(entry, key, whole) for entry in counted(key, whole, ledger))}
    return [*(weights[step] for step in steps), *(weight for name, weight in weights.items() if name not in done)]


def _only(what: str, given: Any, known: frozenset[str], example: dict[str, Any]) -> None:
    [needed] = example
    if not isinstance(given, Mapping) or needed not in given or set(given) - known:
        raise ValueError(
            f"a {what} is a dict with {needed!r}, such as {example}, and, if you like, "
            f"{', '.join(sorted(known - {needed, 'spare'}))}; got {given!r}"
        )
    if not isinstance(given.get("id", ""), str):
        raise ValueError(f"a {what}'s id is a str, got {given['id']!r}")


def _check_weights(what: str, given: Mapping[str, Any]) -> None:
    weights = given.get("weights")
    if weights is None and "weights" not in given:
        return
    if not isinstance(weights, Mapping) or not weights or not all(_at_least_zero(one) for one in weights.values()):
        raise ValueError(
            f"a {what}'s weights are finite numbers of at least 0 by step, such as {{'think': 2, 'tell': 1}}; "
            f"got {weights!r}; leave them out if a step may take all that is left"
        )


def _at_least_zero(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
