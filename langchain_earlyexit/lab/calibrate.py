"""From traces of full thinking to a promise: which setting of a policy changes at most a share epsilon of answers.

Each question counts once: the policy's first exit is replayed on its trace of full thinking, and what the serving
path would have answered there is held against the answer of full thinking. So no gold answers are needed, and many
correlated checks in one chain are still one loss. Which settings keep the risk is found by Learn-then-Test.

The promise is about new questions of the same kind, asked the same way. It is not about the early exits alone (see
`Level.bound_when_left`), and not about questions of another kind: that is what audits are for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from langchain_earlyexit.guarantee import LOSSES, Calibration, Level, Setting, with_policy
from langchain_earlyexit.lab.learn_then_test import certified_together, questions_needed, strictest, upper_bound
from langchain_earlyexit.policies import FirstOf, Policy
from langchain_earlyexit.trace import Trace

Same = Callable[[str, str], bool]
"""Whether two answers are one: an `AnswerForm`'s `same`, or a grader."""

LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Levels that a calibration serves when it is not told which, as far as its questions go."""


def first_exits(path: Sequence[Policy], trace: Trace) -> list[int | None]:
    """`replay(policy, trace)` for every policy of `path`, with the beginnings of the trace made once."""
    prefixes = [Trace(trace.checks[: i + 1]) for i in range(len(trace.checks))]
    return [
        next(
            (
                i
                for i, check in enumerate(trace.checks)
                if check.kind in policy.looks and policy.decide(prefixes[i]).exit
            ),
            None,
        )
        for policy in path
    ]


def replay_losses(
    traces: Sequence[Trace],
    path: Sequence[Policy],
    loss: str = "answer_changed",
    same: Same = str.__eq__,
    *,
    progress: bool = False,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where each setting leaves each question early, and where that is a loss.

    Args:
        traces: of full thinking, collected with `exit_answer`, one per question.
        path: settings.
        loss: "answer_changed": the early answer is not that of full thinking. "lost_correct": full thinking was right
            (against `gold`) and the early answer is not. No answer is never the same as another, nor right.
        same: compares two answers.
        progress: show a progress bar.

    Returns:
        (exits, losses), both of shape (traces, settings).

    Raises:
        ValueError: a question that occurs twice; a trace without exit answers, without a signal that the path reads,
            or without gold where it is needed.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {loss!r}")
    _one_each(traces)
    _refuse_unmeasured(traces, path)
    exits = np.zeros((len(traces), len(path)), dtype=bool)
    losses = np.zeros_like(exits)
    for row, trace in enumerate(tqdm(traces, desc="replay", unit="q", disable=not progress)):
        lost: dict[int, bool] = {}
        for column, at in enumerate(first_exits(path, trace)):
            if at is not None:
                if at not in lost:
                    lost[at] = _lost(trace, at, loss, same)
                exits[row, column], losses[row, column] = True, lost[at]
    return exits, losses


def calibrate(
    traces: Sequence[Trace],
    path: Sequence[Policy],
    epsilon: float | Sequence[float],
    delta: float,
    binds: Mapping[str, str],
    *,
    loss: str = "answer_changed",
    same: Same = str.__eq__,
    again: Sequence[Trace] = (),
    progress: bool = False,
) -> Calibration:
    """The boldest setting of `path` that is certified for each level.

    Levels share `delta` evenly, so that all of them hold together with probability at least 1 - delta over the draw
    of the questions, and whichever is picked at run time holds.

    Args:
        traces: of full thinking, one per question, drawn like the questions to come. None of them may have been used
            to choose the path, to train a probe, or to tune anything else that the policy is made of.
        path: settings in the order in which they are tested, fixed before the traces were seen: see `path_of`.
        epsilon: the level or levels to serve, each in (0, 1).
        delta: in (0, 1).
        binds: the fingerprint of how the questions were asked: the model's and the call's, see `guarantee.BOUND`. The
            policy's kind is added from the path.
        loss: see `replay_losses`.
        same: see `replay_losses`.
        again: the same questions, or some of them, answered by full thinking with another seed: how often that alone
            changes the answer is reported beside the levels.
        progress: show a progress bar.

    Raises:
        ValueError: too few questions for a level, naming how many it takes; a path that does not begin with a setting
            that never leaves; traces that cannot be judged.
    """
    levels = sorted({epsilon} if isinstance(epsilon, float | int) else set(epsilon))
    if not levels or not all(0 < level < 1 for level in levels):
        raise ValueError(f"every epsilon must lie in (0, 1), and there must be one; got {epsilon!r}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1), got {delta}")
    _refuse_too_few(len(traces), levels, delta)
    exits, losses = replay_losses(traces, path, loss, same, progress=progress)
    left, lost = exits.sum(axis=0).tolist(), losses.sum(axis=0).tolist()
    if not path or left[0]:
        raise ValueError("a path begins with a setting that never leaves: put Never() first")
    settings = tuple(Setting(policy, left[i], lost[i]) for i, policy in enumerate(path))
    binds = with_policy(binds, path[-1])
    if "p_safe" in path[-1].needs and binds.get("probe") == "none":
        raise ValueError(f"{path[-1]!r} reads a probe, but the questions were asked without one")
    found = []
    for level, index in zip(levels, certified_together(lost, len(traces), levels, delta), strict=True):
        chosen = settings[index]
        found.append(Level(level, chosen, upper_bound(chosen.losses, chosen.exits, delta / len(path))))
    return Calibration(
        loss=loss,
        delta=delta,
        questions=len(traces),
        path=settings,
        levels=tuple(found),
        binds=binds,
        full_again=disagreement(traces, again, same) if again else None,
    )


def servable(questions: int, delta: float, levels: Iterable[float] = LEVELS) -> tuple[float, ...]:
    """Those of `levels` that so many questions can certify together, when none of them is at a loss.

    The choice depends on their number alone, so it may be made for a calibration without spoiling it.
    """
    served = sorted(levels)
    while served and questions < questions_needed(served[0], delta / len(served)):
        served.pop(0)
    return tuple(served)


def disagreement(traces: Sequence[Trace], again: Sequence[Trace], same: Same = str.__eq__) -> tuple[int, int]:
    """Questions answered in both, and how many of them got another answer, or none, the second time.

    Args:
        traces: of full thinking.
        again: of full thinking with other seeds, paired with `traces` by `question_id`.
        same: compares two answers.

    Raises:
        ValueError: no question in common, a question twice, or a pair with one seed.
    """
    _one_each(traces)
    _one_each(again)
    first = {trace.question_id: trace for trace in traces if trace.question_id is not None}
    pairs = [(first[trace.question_id], trace) for trace in again if trace.question_id in first]
    if not pairs:
        raise ValueError("the two sets of traces have no question_id in common")
    for one, other in pairs:
        if one.seed is not None and one.seed == other.seed:
            raise ValueError(f"question {one.question_id} was answered twice with the same seed, {one.seed}")
    return len(pairs), sum(not _equal(one.answer, other.answer, same) for one, other in pairs)


def _lost(trace: Trace, at: int, loss: str, same: Same) -> bool:
    early = trace.checks[at].exit_answer
    if early is None and not trace.exit_tokens and all(check.exit_answer is None for check in trace.checks):
        raise ValueError(
            f"the trace of question {trace.question_id} holds no exit_answer: it does not tell what leaving early "
            "would have answered. Collect traces with `earlyexit collect`"
        )
    if loss == "answer_changed":
        return not _equal(early, trace.answer, same)
    if trace.gold is None:
        raise ValueError(f"loss='lost_correct' needs gold answers, and question {trace.question_id} has none")
    return _equal(trace.answer, trace.gold, same) and not _equal(early, trace.gold, same)


def _equal(one: str | None, other: str | None, same: Same) -> bool:
    return one is not None and other is not None and same(one, other)


def _refuse_unmeasured(traces: Sequence[Trace], path: Sequence[Policy]) -> None:
    """A signal that was not measured makes no exits, hence no losses, and would let the boldest setting pass."""
    for member in {(type(m), m.looks, m.needs): m for policy in path for m in _members(policy) if m.looks}.values():
        seen = False
        for trace in traces:
            checks = [check for check in trace.checks if check.kind in member.looks]
            missing = sorted(name for name in member.needs if not any(name in check.signals for check in checks))
            if checks and missing:
                raise ValueError(
                    f"{type(member).__name__} reads {', '.join(missing)}, but no check of question {trace.question_id} "
                    "has it; collect the traces with every signal that the path reads"
                )
            seen = seen or bool(checks)
        if not seen:
            raise ValueError(
                f"{type(member).__name__} looks at checks of kind {', '.join(sorted(member.looks))}, but none of the "
                f"{len(traces)} traces has any; collect them with a policy that looks there too"
            )


def _members(policy: Policy) -> Iterator[Policy]:
    if isinstance(policy, FirstOf):
        for member in policy.policies:
            yield from _members(member)
    else:
        yield policy


def _one_each(traces: Sequence[Trace]) -> None:
    counts = Counter(trace.question_id for trace in traces if trace.question_id is not None)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(
            f"{len(twice)} question(s) have more than one trace, {twice[0]} among them. A calibration counts each "
            "question once; give the runs with other seeds as `again`"
        )


def _refuse_too_few(questions: int, levels: Sequence[float], delta: float) -> None:
    share = delta / len(levels)
    needed = questions_needed(levels[0], share)
    if questions >= needed:
        return
    way_out = f", or ask for no epsilon below {strictest(questions, share):.3f}" if questions else ""
    of_several = f" (its share of delta={delta:g} over {len(levels)} levels)" if len(levels) > 1 else ""
    raise ValueError(
        f"{questions} questions cannot certify epsilon={levels[0]:g} at delta={share:g}{of_several}: it takes at "
        f"least {needed}, and more if some answers change. Collect more questions{way_out}"
    )
