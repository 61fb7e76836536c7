"""What the calls of this process take of a run before its state shows it.

Calls of one superstep do not see each other's entries in the ledger, nor does a node that is tried again see those of
its earlier attempt. So each call is entered here before it begins: one that could, with those beside it, take more
than is left is refused, and what an attempt spent before it failed goes into the ledger of the next.

Knows nothing of models.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Literal

from langchain_earlyexit.ledger import Budget, Ledger, Risk, Spend, is_part, remaining
from langchain_earlyexit.parts import spare_risk

_SLACK: Final = 1e-9
_RUNS: Final = 1024
"""Supersteps whose calls are remembered; the oldest goes first."""

_WAYS_OUT: Final = {
    "tokens": "Give the budget weights that name them, or the nodes shares that fit together (share, most), or send "
    "each a budget of its own (`branches`)",
    "risk": "Give the risk shares that name them (`budgets.spread_risk`), or send each a risk of its own (`branches`)",
}


@dataclass(frozen=True)
class Place:
    """Where in a running graph a call is made.

    Attributes:
        levels: from the outermost graph in: the checkpoint at which its superstep began, and the task.
        began: time at which the innermost task's first attempt began.
        attempt: which one this is.
    """

    levels: tuple[tuple[str, str], ...]
    began: float | None
    attempt: int

    @property
    def run(self) -> str:
        """The checkpoint at which the outermost graph's superstep began."""
        return self.levels[0][0]

    def shares_its_step(self, other: Place) -> bool:
        """Whether neither of two calls can see the other's entry: two tasks of one superstep, or one task's two."""
        for mine, theirs in zip(self.levels, other.levels, strict=False):
            if mine != theirs:
                return mine[0] == theirs[0]
        return self == other


@dataclass(frozen=True)
class Hold:
    """What a call may take.

    Attributes:
        of: what it takes.
        path: id of the budget or risk from which it is taken.
        amount: at most.
        spare: by ids, its own and those of what it is part of: what is left of each for calls beside this one.
    """

    of: Literal["tokens", "risk"]
    path: str
    amount: float
    spare: Mapping[str, float]


def holds(
    step: str, budget: Budget | None, cap: int | None, risk: Risk | None, epsilon: float, ledger: Ledger
) -> list[Hold]:
    """What a call of `step` takes of a budget and a risk that allow it `cap` and `epsilon`."""
    taken = []
    if budget is not None and cap is not None:
        path = budget.get("id", "")
        taken.append(Hold("tokens", path, cap, {**budget.get("spare", {}), path: remaining(budget, ledger) - cap}))
    if risk is not None and epsilon > 0:
        path, spare = risk.get("id", ""), spare_risk(risk, ledger, epsilon)
        if "shares" in risk:  # a share is for one call
            path = f"{path}|{step}"
            spare[path] = 0.0
        taken.append(Hold("risk", path, epsilon, spare))
    return taken


@dataclass(eq=False)
class Claim:
    """A call that runs, or has run.

    Attributes:
        step: its step.
        place: where it is made, None outside of any graph.
        holds: what it may take.
        lost: what earlier attempts of its task have spent; belongs into the ledger beside its own entry.
    """

    step: str
    place: Place | None
    holds: Sequence[Hold]
    lost: Ledger
    _entries: Ledger = field(default_factory=dict)
    _failed: bool = False

    def spent(self, key: str, entry: Spend) -> None:
        """The call has ended so."""
        self._entries = {**self._entries, key: entry}  # others may be looking

    def _amount(self, of: str, scope: str, but: str | None) -> float:
        """What it takes of a scope, or has taken, but for one part of that."""
        held = [hold for hold in self.holds if hold.of == of and is_part(hold.path, scope)]
        held = [hold for hold in held if but is None or not is_part(hold.path, but)]
        if of == "tokens" and self._entries:
            return float(sum(entry["thinking"] for entry in self._entries.values())) if held else 0.0
        return sum(hold.amount for hold in held)


class Claims:
    """The calls of a process that runs graphs, by superstep of the outermost graph. Any thread may use it."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, list[Claim]] = OrderedDict()
        self._lock = threading.Lock()

    def lost(self, place: Place | None) -> Ledger:
        """Entries of earlier attempts of this task, which failed after they had spent."""
        with self._lock:
            return _entries_of(self._earlier(place))

    @contextmanager
    def claimed(self, step: str, place: Place | None, holds: Sequence[Hold], ledger: Ledger) -> Iterator[Claim]:
        """While a call runs. One that fails before it has `spent` takes nothing.

        Args:
            step: of the call.
            place: where it is made; None: no other can run beside it.
            holds: what it may take.
            ledger: what it sees, `lost` entries among it.

        Raises:
            ValueError: with the calls beside it, it could take more than is left.
        """
        if place is None:
            yield Claim(step, None, holds, {})
            return
        with self._lock:
            self._drop_rerun(place)
            earlier = self._earlier(place)
            mine = Claim(step, place, holds, _entries_of(earlier))
            _refuse(mine, [claim for claim in self._runs.get(place.run, ()) if _unseen(claim, mine, ledger)])
            self._runs.setdefault(place.run, []).append(mine)
            self._runs.move_to_end(place.run)
            while len(self._runs) > _RUNS:
                self._runs.popitem(last=False)
        try:
            yield mine
        except BaseException:
            with self._lock:
                mine._failed = True
                self._forget(mine)
            raise
        with self._lock:
            self._forget(mine)
            for claim in earlier:  # they are in the ledger now
                claim._failed = False

    def _drop_rerun(self, place: Place) -> None:
        """Forget what this task has done when it ran before: a graph that runs its step anew has discarded it."""
        began = place.began
        known = self._runs.get(place.run, [])
        known[:] = [
            claim for claim in known
            if not claim._entries or claim._failed or claim.place is None or claim.place.levels != place.levels
            or began is None or claim.place.began is None or claim.place.began >= began
        ]  # fmt: skip

    def _forget(self, claim: Claim) -> None:
        """What has spent nothing, since it failed or was answered without a model, is forgotten."""
        known = self._runs.get(claim.place.run, []) if claim.place and not claim._entries else []
        if claim in known:
            known.remove(claim)

    def _earlier(self, place: Place | None) -> list[Claim]:
        if place is None:
            return []
        return [
            claim for claim in self._runs.get(place.run, ())
            if claim._entries and claim.place is not None and claim.place.levels == place.levels
            and (claim._failed or (claim.place.began == place.began and claim.place.attempt < place.attempt))
        ]  # fmt: skip


def _entries_of(claims: Sequence[Claim]) -> Ledger:
    return {key: entry for claim in claims for key, entry in claim._entries.items()}


def _unseen(claim: Claim, mine: Claim, ledger: Ledger) -> bool:
    """Whether a call's entry cannot stand in the ledger that another sees, though it runs beside it."""
    if claim.place is None or mine.place is None or claim._entries.keys() & ledger.keys():
        return False
    return not claim._entries or mine.place.shares_its_step(claim.place)


def _refuse(mine: Claim, beside: Sequence[Claim]) -> None:
    for hold in mine.holds:
        for scope, spare in hold.spare.items():
            own = None if scope == hold.path else f"{scope}|{hold.path[len(scope) + 1 :].split('|', 1)[0]}"
            others = [(claim.step, claim._amount(hold.of, scope, own)) for claim in beside]
            taken = sum(amount for _, amount in others)
            if taken > max(spare, 0) + _SLACK:
                names = ", ".join(dict.fromkeys(repr(step) for step, amount in others if amount))
                what = "thinking tokens" if hold.of == "tokens" else "risk"
                raise ValueError(
                    f"step {mine.step!r} runs at once with {names}, and none sees what the others take. They may take "
                    f"{taken:g} {what}, but beside what {mine.step!r} is given there are {max(spare, 0):g} left. "
                    f"{_WAYS_OUT[hold.of]}"
                )
