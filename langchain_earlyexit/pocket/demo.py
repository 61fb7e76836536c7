"""The demonstration: the bundled model answers with full thinking, DEER and CoDE-Stop side by side."""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

from langchain_earlyexit.answers import BOXED
from langchain_earlyexit.chat_models import ChatEarlyExit
from langchain_earlyexit.pocket.problems import Problem, sample
from langchain_earlyexit.policies import DEER, CoDEStop, Never, Policy
from langchain_earlyexit.record import KEY

_FIRST = "What is 37 + 48 * 2 - 15?"
_QUESTIONS = 10
_SEED = 20


@dataclass(frozen=True)
class Run:
    """One question under one policy."""

    answer: str
    right: bool
    seconds: float
    output_tokens: int
    record: dict[str, Any]


def questions(count: int = _QUESTIONS) -> list[Problem]:
    """Held-out problems, one family after the other, so that easy and hard ones are there."""
    by_family: dict[str, list[Problem]] = {}
    for problem in sample("test", 60 + 10 * count, _SEED):
        by_family.setdefault(problem.family, []).append(problem)
    turns = [problem for row in zip(*by_family.values(), strict=False) for problem in row]
    return turns[:count]


def ask(llm: ChatEarlyExit, problem: Problem, policy: Policy, seed: int) -> Run:
    """Answer one problem; the clock runs over the whole call."""
    start = time.perf_counter()
    message = llm.invoke(problem.question, exit_policy=policy, seed=seed)
    seconds = time.perf_counter() - start
    answer = BOXED.extract(message.text) or message.text
    usage = message.usage_metadata
    assert usage is not None  # noqa: S101 - ChatEarlyExit always reports it
    return Run(
        answer, BOXED.same(answer, problem.answer), seconds, usage["output_tokens"], message.response_metadata[KEY]
    )


def main(count: int = _QUESTIONS) -> None:
    """Print the demonstration."""
    warnings.filterwarnings("ignore", message="CoDEStop's tau")  # said in words below
    policies: dict[str, Policy] = {"full": Never(), "DEER": DEER(threshold=0.95), "CoDE-Stop": CoDEStop()}
    with ChatEarlyExit(model="pocket") as llm:
        print("The bundled pocket reasoner (a tiny model trained from scratch; it does small arithmetic only).\n")
        print(f"One question, streamed, {policies['DEER']!r}:\n\n  {_FIRST}\n")
        _stream(llm, policies["DEER"])
        print("\nHeld-out questions, each under three policies (same seed, so the same thoughts):\n")
        runs: dict[str, list[Run]] = {name: [] for name in policies}
        head = f"{'':9} {'answer':>9}  {'':5} {'thinking':>8} {'trial':>6} {'all':>5} {'seconds':>8}  exit"
        for i, problem in enumerate(questions(count)):
            print(f"{i + 1:2}. {problem.question}   [{problem.level}; {problem.answer}]\n{head}")
            for name, policy in policies.items():
                run = ask(llm, problem, policy, seed=i)
                runs[name].append(run)
                record = run.record
                print(
                    f"{name:>9} {run.answer:>9}  {'right' if run.right else 'WRONG':5} {record['thinking_tokens']:8} "
                    f"{record['trial_tokens']:6} {run.output_tokens:5} {run.seconds:8.2f}  {record['reason']}"
                )
            print()
    _total(runs)


def _stream(llm: ChatEarlyExit, policy: Policy) -> None:
    dim, plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
    answering = False
    record: dict[str, Any] = {}
    print(f"  {dim}", end="")
    for chunk in llm.stream(_FIRST, exit_policy=policy, seed=3):
        thought = chunk.additional_kwargs.get("reasoning_content", "")
        if chunk.text and not answering:
            answering = True
            print(f"{plain}\n\n  ", end="")
        print((thought or chunk.text).replace("\n", "\n  "), end="", flush=True)
        record = chunk.response_metadata.get(KEY, record)
    print(f"{plain}\n\n  exit record: {record}")


def _total(runs: dict[str, list[Run]]) -> None:
    full = runs["full"]
    all_tokens = sum(run.output_tokens for run in full)
    all_seconds = sum(run.seconds for run in full)
    print("Total, every trial, forced and thrown-away token counted:")
    for name, row in runs.items():
        tokens, seconds = sum(run.output_tokens for run in row), sum(run.seconds for run in row)
        print(
            f"{name:>9}: {sum(run.right for run in row)}/{len(row)} right, {tokens} tokens "
            f"({100 * (1 - tokens / all_tokens):+.0f} % saved), {seconds:.2f} s "
            f"({100 * (1 - seconds / all_seconds):+.0f} % saved)"
        )
    print("CoDE-Stop's tau is the paper's for another model, uncalibrated here; neither policy promises anything.")
