"""Measure the bundled model through the product itself, and write its card.

Every figure comes from `ChatEarlyExit` answering held-out questions, many at once: what is counted is what a user
would pay, trial, forced and thrown-away tokens included. Thresholds are chosen on the dev split by replay, and every
reported figure is of the test split, live.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import fmean
from typing import Any

from tqdm import tqdm

from langchain_earlyexit.answers import BOXED
from langchain_earlyexit.chat_models import ChatEarlyExit
from langchain_earlyexit.lab.statistics import auroc, paired_bootstrap
from langchain_earlyexit.pocket import weights_dir
from langchain_earlyexit.pocket.problems import Problem, Split, sample
from langchain_earlyexit.policies import DEER, CoDEStop, Never, replay
from langchain_earlyexit.record import KEY
from langchain_earlyexit.trace import Trace

AT_ONCE = 64
"""Questions in flight: they share forward passes, and their answers do not depend on it."""

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999)
TOLERANCE = 0.0025
"""Accuracy on the dev split that a threshold may cost."""

_SEEDS = {"dev": 1_000_000, "test": 2_000_000}


@dataclass(frozen=True)
class Outcome:
    """One question answered once."""

    problem: Problem
    answer: str | None
    output_tokens: int
    record: Mapping[str, Any]

    @property
    def right(self) -> bool:
        return BOXED.same(self.answer, self.problem.answer)

    @property
    def trace(self) -> Trace:
        return Trace.from_dict(self.record["trace"])


async def answer_all(
    llm: ChatEarlyExit, problems: Sequence[Problem], seed: int, title: str, **settings: Any
) -> list[Outcome]:
    """Answer all problems, `AT_ONCE` in flight; question i is sampled with seed + i, so that arms can be paired."""
    slots = asyncio.Semaphore(AT_ONCE)
    bar = tqdm(total=len(problems), desc=title, unit="q")

    async def one(i: int, problem: Problem) -> Outcome:
        async with slots:
            message = await llm.ainvoke(problem.question, seed=seed + i, include_checks=True, **settings)
        bar.update()
        usage = message.usage_metadata
        assert usage is not None  # noqa: S101 - ChatEarlyExit always reports it
        return Outcome(problem, BOXED.extract(message.text), usage["output_tokens"], message.response_metadata[KEY])

    outcomes = await asyncio.gather(*(one(i, problem) for i, problem in enumerate(problems)))
    bar.close()
    return list(outcomes)


def choose_threshold(full: Sequence[Outcome]) -> float:
    """The lowest of `THRESHOLDS` that keeps accuracy within `TOLERANCE`, replayed on shadowed runs of the dev split.

    A replayed exit answers with its trial answer. When none keeps it, the highest.
    """
    traces = [outcome.trace for outcome in full]
    goal = fmean(outcome.right for outcome in full) - TOLERANCE
    for threshold in THRESHOLDS:
        policy = DEER(threshold)
        right = 0
        for outcome, trace in zip(full, traces, strict=True):
            at = replay(policy, trace)
            answer = outcome.answer if at is None else trace.checks[at].answer
            right += BOXED.same(answer, outcome.problem.answer)
        if right / len(full) >= goal:
            return threshold
    return THRESHOLDS[-1]


@dataclass(frozen=True)
class _Arm:
    """One pass over the questions of a split, as a process of its own can run it."""

    title: str
    model: str
    split: Split
    questions: int
    settings: Mapping[str, Any]

    def run(self) -> list[Outcome]:
        seed = _SEEDS[self.split]
        with ChatEarlyExit(model=self.model) as llm:
            problems = sample(self.split, self.questions, seed)
            return asyncio.run(answer_all(llm, problems, seed, f"{self.split}, {self.title}", **self.settings))


def measure(questions: int = 2000, model: str = "pocket") -> dict[str, Any]:
    """All figures of the card, as JSON data. Two processes share the work.

    Args:
        questions: of each split.
        model: as for `ChatEarlyExit`.
    """
    start = time.monotonic()
    # A policy that looks everywhere and never leaves: shadowed, it leaves a trace of the whole chain.
    watching = {"exit_policy": DEER(threshold=1.0), "shadow": True, "look": "wait"}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:

        def submit(title: str, settings: Mapping[str, Any], split: Split = "test") -> Future[list[Outcome]]:
            return pool.submit(_Arm.run, _Arm(title, model, split, questions, settings))

        on_test = submit("full", watching)
        dev = submit("full", watching, "dev").result()
        threshold = choose_threshold(dev)
        deer = f"DEER({threshold})"
        rest = {
            "no thinking": submit("no thinking", {"thinking_budget": 0}),
            deer: submit(deer, {"exit_policy": DEER(threshold)}),
            f"trial reused, {deer}": submit(
                f"trial reused, {deer}", {"exit_policy": DEER(threshold), "reuse_trial_answer": True}
            ),
            "CoDE-Stop, paper's defaults": submit("CoDE-Stop", {"exit_policy": CoDEStop()}),
        }
        watched = on_test.result()
        arms = {"full thinking": [_without_trials(outcome) for outcome in watched]}
        arms |= {name: arm.result() for name, arm in rest.items()}
        # A fixed budget of the same mean cost as plain DEER: what a token cap alone would give for the same money.
        budget = _matching_budget(arms["full thinking"], fmean(outcome.output_tokens for outcome in arms[deer]))
        capped = submit(f"budget {budget}", {"exit_policy": Never(), "thinking_budget": budget})
        arms[f"budget of {budget}"] = capped.result()
    full = arms["full thinking"]
    return {
        "questions": {"dev": len(dev), "test": len(full)},
        "seeds": _SEEDS,
        "sampling": "temperature 0.6, top_p 0.95",
        "deer_threshold": threshold,
        "arms": {name: _arm(outcomes, full) for name, outcomes in arms.items()},
        "families": _families(full, arms["no thinking"], arms[deer]),
        "thinking_tokens": {
            "right": fmean(o.record["thinking_tokens"] for o in full if o.right),
            "wrong": fmean(o.record["thinking_tokens"] for o in full if not o.right),
        },
        "checks": fmean(len(o.trace.checks) for o in full),
        "auroc": _auroc(full),
        "minutes": round((time.monotonic() - start) / 60, 1),
    }


def _without_trials(outcome: Outcome) -> Outcome:
    """A shadowed run as it would have been without looking: looking leaves no mark but its own tokens."""
    return Outcome(
        outcome.problem, outcome.answer, outcome.output_tokens - outcome.record["trial_tokens"], outcome.record
    )


def _matching_budget(full: Sequence[Outcome], spent: float) -> int:
    """The budget whose mean cost comes nearest to `spent` from above."""
    thinking = [outcome.record["thinking_tokens"] for outcome in full]
    closing = 12  # forced and answer tokens, about
    for budget in range(1, 2000):
        if fmean(min(budget, length) for length in thinking) + closing >= spent:
            return budget
    return 2000


def _arm(outcomes: Sequence[Outcome], full: Sequence[Outcome]) -> dict[str, Any]:
    right = [float(outcome.right) for outcome in outcomes]
    gap, low, high = paired_bootstrap(right, [float(outcome.right) for outcome in full])
    tokens = fmean(outcome.output_tokens for outcome in outcomes)
    reasons: dict[str, int] = {}
    for outcome in outcomes:
        reasons[outcome.record["reason"]] = reasons.get(outcome.record["reason"], 0) + 1
    return {
        "accuracy": fmean(right),
        "accuracy_gap": {"mean": gap, "low": low, "high": high},
        "output_tokens": tokens,
        "saved": 1 - tokens / fmean(outcome.output_tokens for outcome in full),
        "thinking_tokens": fmean(outcome.record["thinking_tokens"] for outcome in outcomes),
        "reasons": dict(sorted(reasons.items())),
    }


def _families(
    full: Sequence[Outcome], none: Sequence[Outcome], early: Sequence[Outcome]
) -> dict[str, dict[str, float | str]]:
    found: dict[str, list[tuple[Outcome, Outcome, Outcome]]] = {}
    for row in zip(full, none, early, strict=True):
        found.setdefault(row[0].problem.family, []).append(row)
    return {
        family: {
            "level": rows[0][0].problem.level,
            "questions": len(rows),
            "full": fmean(row[0].right for row in rows),
            "none": fmean(row[1].right for row in rows),
            "early": fmean(row[2].right for row in rows),
            "thinking_tokens": fmean(row[0].record["thinking_tokens"] for row in rows),
        }
        for family, rows in sorted(found.items())
    }


def _auroc(full: Sequence[Outcome]) -> dict[str, float]:
    looks = [(check, outcome) for outcome in full for check in outcome.trace.checks]
    first = [(outcome.trace.checks[0], outcome) for outcome in full if outcome.trace.checks]
    found = {}
    for name, pairs in (("all_checks", looks), ("first_check", first)):
        confidence = [check.signals["trial_confidence"] for check, _ in pairs]
        found[f"{name}_same_as_full"] = auroc(confidence, [BOXED.same(c.answer, o.answer) for c, o in pairs])
        found[f"{name}_right"] = auroc(confidence, [BOXED.same(c.answer, o.problem.answer) for c, o in pairs])
    return found


def markdown(card: Mapping[str, Any]) -> str:
    """The measured part of the card, to be read by people."""
    lines = [
        f"{card['questions']['test']} held-out questions, {card['sampling']}; threshold chosen on "
        f"{card['questions']['dev']} dev questions; every trial, forced and thrown-away token counted.",
        "",
        "| | accuracy | against full thinking (95 % interval) | output tokens | saved | thinking tokens | exits |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, arm in card["arms"].items():
        gap = arm["accuracy_gap"]
        reasons = ", ".join(f"{reason} {count}" for reason, count in arm["reasons"].items())
        lines.append(
            f"| {name} | {arm['accuracy']:.3f} | {gap['mean']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f}) | "
            f"{arm['output_tokens']:.1f} | {100 * arm['saved']:.0f} % | {arm['thinking_tokens']:.1f} | {reasons} |"
        )
    lines += [
        "",
        "| family | level | questions | full | no thinking | DEER | thinking tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {family} | {row['level']} | {row['questions']} | {row['full']:.2f} | {row['none']:.2f} | "
        f"{row['early']:.2f} | {row['thinking_tokens']:.0f} |"
        for family, row in card["families"].items()
    ]
    tokens, areas = card["thinking_tokens"], card["auroc"]
    lines += [
        "",
        f"Thinking tokens of right chains {tokens['right']:.1f}, of wrong ones {tokens['wrong']:.1f}; "
        f"{card['checks']:.2f} checks a chain.",
        f"AUROC of trial confidence: {areas['all_checks_same_as_full']:.3f} for the answer of full thinking and "
        f"{areas['all_checks_right']:.3f} for the right answer, over all checks; at the first check "
        f"{areas['first_check_same_as_full']:.3f} and {areas['first_check_right']:.3f}.",
        "",
        f"Measured in {card['minutes']} minutes by `earlyexit pocket eval`.",
    ]
    return "\n".join(lines)


def write(card: Mapping[str, Any]) -> None:
    """Put the figures beside the weights: `card.json`, and between the marks of `README.md`."""
    folder = weights_dir()
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    readme = folder / "README.md"
    begin, end = "<!-- figures -->\n", "<!-- end of figures -->"
    text = readme.read_text()
    if begin not in text or end not in text:
        raise ValueError(f"{readme.name} has no {begin.strip()} and {end} marks to write between")
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    readme.write_text(head + begin + markdown(card) + "\n" + end + tail)
