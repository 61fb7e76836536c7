"""From the files of a collection to the artifact of a calibration, and what it says in words."""

from __future__ import annotations

import os
from collections.abc import Sequence

from langchain_earlyexit.fingerprint import refuse_mismatch
from langchain_earlyexit.guarantee import Calibration
from langchain_earlyexit.lab.calibrate import LEVELS, calibrate, servable
from langchain_earlyexit.lab.collect import read_finished, read_traces, refuse_learned, refuse_other_kinds, subjects
from langchain_earlyexit.lab.judge import Judge
from langchain_earlyexit.lab.learn_then_test import questions_needed
from langchain_earlyexit.lab.paths import path_of
from langchain_earlyexit.policies import Policy
from langchain_earlyexit.trace import Trace


def certify(
    out: str | os.PathLike[str],
    policy: Policy,
    epsilon: float | Sequence[float] | None = None,
    delta: float = 0.1,
    *,
    loss: str = "answer_changed",
    again: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Calibration:
    """Calibrate `policy` on a collection.

    The questions must be like those to come, and must not be those that a setting was tuned on: on them any policy
    looks better than it is. (Those that a probe was trained on are refused.)

    Args:
        out: the file of traces, see `collect`.
        policy: any setting of the path to try, see `path_of`.
        epsilon: level or levels to serve; those of `LEVELS` that so many questions can certify, when None.
        delta: chance that some level does not hold, all of them together.
        loss: one of `guarantee.LOSSES`. "lost_correct" is judged by `lab.grade`.
        again: another collection of the same questions, made in the same way with another seed: it tells how often
            full thinking changes its own answer.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: no such collection.
        ValueError: too few questions, an unfinished collection, several calls of one run, a collection made for
            checks of other kinds than the policy looks at live, or questions that the probe has learned from.
    """
    meta, traces = read_finished(out), read_traces(out)
    runs = {str(trace.question_id).rpartition("/")[0] for trace in traces}
    if meta.get("of_runs") and len(runs) < len(traces):
        raise ValueError(
            f"{os.fspath(out)!r} holds {len(traces)} calls of {len(runs)} runs of a graph, and calls of one run are "
            "not drawn independently; certify a rule on whole runs (`lab.node_rules`), or collect questions"
        )
    refuse_other_kinds(policy, meta, repr(os.fspath(out)))
    refuse_learned(policy, meta, subjects(out, traces).values())
    second: list[Trace] = []
    if again is not None:
        try:
            refuse_mismatch(f"the collection {os.fspath(again)}", read_finished(again)["binds"], meta["binds"])
        except ValueError as error:
            raise ValueError(f"{error}. Collect the second time with the same settings, the seed aside") from None
        second = read_traces(again)
    if epsilon is None:
        epsilon = servable(len(traces), delta)
        if not epsilon:
            raise ValueError(
                f"{len(traces)} questions are too few to certify any of {', '.join(map(str, LEVELS))}: it takes at "
                f"least {questions_needed(max(LEVELS), delta)}"
            )
    judge = Judge(meta["form"])
    if loss == "lost_correct":
        judge.learn_traces(traces)
    return calibrate(
        traces,
        path_of(policy),
        epsilon,
        delta,
        meta["binds"],
        loss=loss,
        same=judge.same if loss == "answer_changed" else judge.right,
        again=second,
        progress=progress,
    )


def summary(found: Calibration) -> str:
    """A calibration in words and a table."""
    n = found.questions
    what = "changed" if found.loss == "answer_changed" else "lost a right answer"
    lines = [
        f"{n} questions, {len(found.path)} settings. With probability {1 - found.delta:g} the levels hold together, "
        "and with the same probability, by itself, the last column does:",
        "",
        f"| confidence | {what}, at most | policy | left early | {what} | of those left early, at most |",
        "|---|---|---|---|---|---|",
    ]
    for level in found.levels:
        setting = level.setting
        lines.append(
            f"| {1 - level.epsilon:g} | {level.epsilon:.1%} | {level.policy!r} | {setting.exits / n:.1%} | "
            f"{setting.losses / n:.1%} | {level.bound_when_left:.1%} |"
        )
    if found.full_again is not None:
        asked, other = found.full_again
        share = f"{other} of {asked} ({other / asked:.1%})"
        lines += ["", f"Full thinking with another seed gave another answer to {share}."]
    return "\n".join(lines)
