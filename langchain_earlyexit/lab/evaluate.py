"""An evaluation from a collection and live runs: one table, its curves, and how far the signals are right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final

from langchain_earlyexit.lab.collect import refuse_learned
from langchain_earlyexit.lab.live import FULL, Live, arm_of
from langchain_earlyexit.lab.paths import path_of
from langchain_earlyexit.lab.replays import Collection, agreement, choose, curve, oracle, oracle_curve, reliability
from langchain_earlyexit.lab.table import Aside, Curve, Evaluation, Point, Reliability, Row, Table
from langchain_earlyexit.policies import CoDEStop, Policy
from langchain_earlyexit.policy_json import kind_of

TOLERANCE: Final = 0.005
"""Accuracy on the dev split that a setting may cost, as a share."""

_CLAIMS: Final = tuple(
    (signal, claim) for signal in ("trial_confidence", "p_safe") for claim in ("right", "same as full")
)
"""What a probability of a signal is held against."""

_TAUS: Final = (0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 12.0, 20.0, 50.0, 1000.0)


def evaluate(
    test: Collection,
    replayed: Mapping[str, Policy],
    live: Sequence[Live] = (),
    curves: Sequence[Curve] = (),
    *,
    about: Mapping[str, str] | None = None,
    remarks: Sequence[str] = (),
    asides: Sequence[Aside] = (),
) -> Evaluation:
    """One table of everything, on the questions of `test`.

    Args:
        test: full thinking on questions that nothing was chosen on.
        replayed: policies to replay, by name.
        live: runs of the same questions with the same seeds; those with a budget make the budget curve. One of full
            thinking stands for the collection's own.
        curves: drawn beside the budget and oracle curves.
        about: told in the head, after what the collection tells.
        remarks: told below the tables.
        asides: tables below those.

    Raises:
        ValueError: a policy that the collection does not replay, or that reads a probe which has learned from it; a
            run of other questions.
    """
    for policy in replayed.values():
        refuse_learned(policy, test.meta, test.about)
    full = next((run for run in live if run.arm == FULL.name), None)
    # Those that are cut at a fixed number of tokens and do nothing else.
    capped = [run for run in live if run.budget is not None and run.budget >= 0]
    budgets = [run for run in capped if run.arm == arm_of(budget=run.budget).name]
    table = Table(test.full() if full is None else full.outcomes, test.judge, [run.outcomes for run in budgets])
    first = _live(table, full) if full else table.row(FULL.name, test.full(), policy="Never()", how="replayed")
    rows = [first, *(_live(table, run) for run in live if run is not full)]
    rows += [
        table.row(name, test.run(policy), policy=repr(policy), how="replayed") for name, policy in replayed.items()
    ]
    for wanted in ("right", "same") if table.gold else ("same",):
        name = "oracle" if wanted == "right" else "oracle, same as full"
        rows.append(table.row(name, oracle(test, wanted), policy="knows the answer", how="oracle"))
    fixed = {run.arm for run in budgets}
    return Evaluation(
        about={**_about(test, table), **(about or {})},
        rows=tuple(rows),
        curves=(*_budget_curve(first, [row for row in rows if row.name in fixed]), oracle_curve(test), *curves),
        reliability=tuple(_reliability(test)),
        remarks=(*remarks, *_unknown(test)),
        asides=tuple(asides),
    )


def codestop_curves(test: Collection, title: str = "") -> list[Curve]:
    """CoDE-Stop as tau alone turns, from the paper's other defaults, and as its confidence and tau turn together."""
    own = CoDEStop()
    turns = [CoDEStop(tau=tau) for tau in _TAUS]
    return [
        curve(test, "CoDE-Stop, τ alone", turns, title and f"{title}, tau"),
        curve(test, "CoDE-Stop, r and τ", path_of(own), title and f"{title}, r and tau"),
    ]


def chosen_on(dev: Collection, policies: Sequence[Policy], tolerance: float = TOLERANCE) -> dict[str, Policy]:
    """For each policy, under its name, the setting of its path that `dev` favours."""
    found = {}
    for policy in policies:
        name = kind_of(policy)
        found[f"{name}, chosen on dev"] = choose(dev, path_of(policy), tolerance, f"choosing {name}")
    return found


def told_agreement(test: Collection, live: Sequence[tuple[Live, Policy]]) -> list[str]:
    """A remark for each live run: on how many questions its replay is the same in answer, reason and every count."""
    told = []
    for run, policy in live:
        both, equal = agreement(run.outcomes, test.run(policy))
        told.append(f"{run.arm}: live run and replay are equal in {equal} of {both} questions.")
    return told


def _live(table: Table, run: Live) -> Row:
    return table.row(run.arm, run.outcomes, policy=run.policy, seconds=run.seconds, cpu_seconds=run.cpu_seconds)


def _budget_curve(full: Row, capped: Sequence[Row]) -> list[Curve]:
    if not capped:
        return []
    points = sorted(Point(row.output_tokens, row.accuracy, row.name) for row in (*capped, full))
    return [Curve("fixed budgets", "budget", tuple(points))]


def _unknown(test: Collection) -> list[str]:
    if test.meta["binds"]["engine"].startswith(("transformers", "function")):
        return []
    return [
        "Replays cannot know which tokens a server draws and nobody reads, so on servers live runs take a little more."
    ]


def _about(test: Collection, table: Table) -> dict[str, str]:
    sampling = json.loads(test.meta["binds"]["sampling"])
    told = {
        "model": str(test.meta["model"]),
        "questions": f"{len(table.full)}, held out from every choice",
        "sampling": ", ".join(f"{name} {value}" for name, value in sampling.items() if value is not None),
    }
    return told if table.gold else {**told, "accuracy is": "share of answers that are those of full thinking"}


def _reliability(test: Collection) -> list[Reliability]:
    gold = all(trace.gold is not None for trace in test.traces)
    has = set(test.meta["signals"]) if any(trace.checks for trace in test.traces) else set()
    return [
        reliability(test, signal, claim) for signal, claim in _CLAIMS if signal in has and (gold or claim != "right")
    ]
