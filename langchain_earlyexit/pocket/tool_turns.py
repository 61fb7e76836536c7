"""Training texts about tools: chains that guess a call and check it, forced exits, direct calls, and what carries loss.

The chains have the form of the arithmetic ones (see `traces`): an opener, a guess, checks that each open with a cue
word, and a verdict. The odds of the cue words are the same; the thinking stops a little earlier.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from langchain_earlyexit.pocket.methods import Segment, methods_of, near_miss, worked
from langchain_earlyexit.pocket.problems import Problem
from langchain_earlyexit.pocket.small_talk import SHORT_THOUGHT
from langchain_earlyexit.pocket.tool_problems import (
    ToolProblem,
    draw_tools,
    messages_of,
    prompt_of,
    right,
    sample_tools,
)
from langchain_earlyexit.pocket.tool_text import Call, parse_calls, purpose, system_with_tools
from langchain_earlyexit.pocket.traces import (
    CLOSE_THINKING,
    END,
    GUESSES,
    INDUCER,
    NO_THINKING,
    OPEN_THINKING,
    OPENERS,
    SLIP_ODDS,
    Chain,
    Text,
    chain,
    checked,
    concluded,
    opening,
    stopping,
)
from langchain_earlyexit.toolcalls import HERMES

__all__ = [
    "ToolProblem",
    "draw_tool_text",
    "messages_of",
    "parse_calls",
    "prompt_of",
    "right",
    "sample_tools",
    "system_with_tools",
]

STOP_ODDS = (0.48, 0.7, 0.8)
"""Odds of ending the thinking at the first, second, ... agreement in a row."""
STOP_AT_GUESS_ODDS = 0.06
DRILLS = 0.1
"""Share of texts about tools that only look up names."""
TAUGHT: Mapping[str, float] = MappingProxyType(
    {"copy": 0.30, "computed": 0.11, "choice": 0.22, "none": 0.08, "parallel": 0.18, "result": 0.11}
)
"""Kinds of problems in training texts: more than in examinations of those that are hard."""
MAX_CHECKS = 4
MAX_CHECKS_WHEN_LONG = 2
WRONG_GUESS_ODDS = {"copy": 0.3, "parallel": 0.3, "result": 0.3, "none": 0.35, "choice": 0.45, "computed": 0.5}
NO_TOOL = "No tool fits."

_QUESTION, _TOOLS = "reading the question", "reading the tools"

Calls = tuple[Call, ...]


def compact(calls: Sequence[Call]) -> str:
    """Calls as the thinking writes them: `add(a=5, b=7); show(place="Paris")`."""
    return "; ".join(
        f"{call['name']}({', '.join(f'{name}={_literal(value)}' for name, value in call['arguments'].items())})"
        for call in calls
    )


def _literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _near(value: Any, rng: random.Random) -> Any:
    """A wrong value of the kind a hasty reader writes; the value itself where there is none."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return round(value + rng.choice([-1.0, 1.0, 0.1]), 1)
    if isinstance(value, int):
        return near_miss(value, rng) if value > 0 else value + rng.choice([1, 2, 10])
    parts = value.split(" ")
    if len(parts) > 1 and rng.random() < 0.6:
        return rng.choice([parts[0], " ".join(parts[1:])])
    return value[:-1] if len(value) > 2 and rng.random() < 0.6 else value + value[-1:]


def _with(calls: Calls, index: int, **changes: Any) -> Calls:
    return tuple({**call, **changes} if i == index else call for i, call in enumerate(calls))


def wrong_guess(problem: ToolProblem, rng: random.Random) -> Calls:
    """Calls with one mistake: another tool, swapped, near-miss or missing arguments, or a missing call."""
    calls = problem.calls
    index = rng.randrange(len(calls))
    call = calls[index]
    arguments = call["arguments"]
    names = list(arguments)
    if problem.slot and rng.random() < 0.85:
        return _with(calls, index, arguments={**arguments, problem.slot: _near(arguments[problem.slot], rng)})
    found: list[Calls] = []
    others = [tool["function"]["name"] for tool in problem.tools if tool["function"]["name"] != call["name"]]
    if others:
        found += [_with(calls, index, name=rng.choice(others))] * (4 if problem.kind == "choice" else 1)
    if len(names) > 1:
        values = list(arguments.values())
        found.append(_with(calls, index, arguments=dict(zip(names, values[::-1], strict=True))))
    if names:
        name = rng.choice(names)
        found.append(_with(calls, index, arguments={n: v for n, v in arguments.items() if n != name}))
        found += [_with(calls, index, arguments={**arguments, name: _near(arguments[name], rng)})] * 2
    else:
        found.append(_with(calls, index, arguments={"x": rng.randrange(10)}))
    if len(calls) > 1:
        found += [(call,)] * 2
    return rng.choice(found)


def _restated(problem: ToolProblem) -> str:
    count = "two calls" if len(problem.calls) > 1 else "one call"
    if problem.sum:
        return f"{count} with {problem.sum.restated}"
    values = [_literal(value) for call in problem.calls for value in call["arguments"].values()]
    return f"{count} with {' and '.join(values)}" if values else count


def _opening(problem: ToolProblem, rng: random.Random) -> str:
    restated = _restated(problem) if rng.random() < 0.4 or problem.sum else "a tool call"
    return OPEN_THINKING + rng.choice(OPENERS).format(r=restated) + rng.choice(GUESSES)


def _found(problem: ToolProblem, name: str) -> Segment:
    """A tool by what it is for, as the list has it; by its name alone where the question names it."""
    what = purpose(next(tool for tool in problem.tools if tool["function"]["name"] == name))
    return Segment(f" {what}: {name}." if what and name not in problem.question else f" I have {name}.")


def _read_question(problem: ToolProblem, rng: random.Random) -> tuple[list[Segment], Calls]:
    calls = problem.calls
    slips = [(i, name) for i, call in enumerate(calls) for name in call["arguments"]]
    slip = rng.choice(slips) if slips and rng.random() < SLIP_ODDS else None
    segments: list[Segment] = []
    for index, call in enumerate(problem.calls):
        if call["name"] not in problem.question:
            segments.append(_found(problem, call["name"]))
        if not call["arguments"]:
            segments.append(Segment(f" {call['name']} takes nothing."))
        for name, value in call["arguments"].items():
            read = _near(value, rng) if slip == (index, name) else value
            if read != value:
                calls = _with(calls, index, arguments={**call["arguments"], name: read})
            segments += [Segment(f" {name} is"), Segment(f" {_literal(read)}", read == value), Segment(".")]
    return segments, calls


def _read_tools(problem: ToolProblem) -> list[Segment]:
    functions = {tool["function"]["name"]: tool["function"] for tool in problem.tools}
    segments: list[Segment] = []
    for name in dict.fromkeys(call["name"] for call in problem.calls):
        takes = " and ".join(functions[name]["parameters"]["properties"]) or "nothing"
        segments += [_found(problem, name), Segment(f" It takes {takes}.")]
    return segments


def _check(problem: ToolProblem, name: str, cue: str, before: str, rng: random.Random) -> tuple[list[Segment], str]:
    calls = problem.calls
    if problem.sum:
        steps, value = worked(methods_of(problem.sum)[name], problem.sum.numbers, SLIP_ODDS, rng)
        calls = _with(calls, 0, arguments={**calls[0]["arguments"], problem.slot: value})
    elif name == _QUESTION:
        steps, calls = _read_question(problem, rng)
    else:
        steps = _read_tools(problem)
    found = compact(calls)
    return concluded(cue, name, steps, before, found), found


def _checked(
    start: str,
    guess: str,
    answer: str,
    names: Sequence[str],
    check: Callable[[str, str, str], tuple[list[Segment], str]],
    rng: random.Random,
    stop_odds: tuple[float, float],
) -> Chain:
    """`traces.checked` with fewer checks where the answer is long. `stop_odds`: at a guess, at a first agreement."""
    max_checks = MAX_CHECKS_WHEN_LONG if len(answer.encode()) > 60 else MAX_CHECKS
    guessed = [Segment(start), Segment(guess, guess == answer), Segment(".\n\n")]
    stop = stopping(stop_odds[0], (stop_odds[1], *STOP_ODDS[1:]))
    return checked(guessed, guess, answer, names, check, stop, max_checks, rng)


def call_chain(problem: ToolProblem, guess: Sequence[Call], rng: random.Random) -> Chain:
    """A whole chain of thought about calls that begins with the given guess and ends on the right calls."""
    return _checked(
        _opening(problem, rng),
        compact(guess),
        compact(problem.calls),
        list(methods_of(problem.sum)) if problem.sum else [_QUESTION, _TOOLS],
        lambda name, cue, before: _check(problem, name, cue, before, rng),
        rng,
        (STOP_AT_GUESS_ODDS, STOP_ODDS[0]),
    )


def _boxed(answer: str) -> str:
    """The number in an answer with a box, or nothing."""
    return answer.removeprefix(INDUCER).removesuffix("}.") if answer.startswith(INDUCER) else ""


def result_chain(problem: ToolProblem, rng: random.Random) -> Chain:
    """A short chain about what a tool returned."""
    number = _boxed(problem.answer)
    if not number:
        said = "The tool failed." if problem.answer.startswith("The tool failed") else "The tool gave a text."
        segments = [Segment(OPEN_THINKING + said + "\n\n")]
        return Chain(segments, [1], [])
    guess = str(_near(int(number), rng)) if rng.random() < 0.15 else number

    def check(name: str, cue: str, before: str) -> tuple[list[Segment], str]:
        return concluded(cue, name, [], before, number), number

    start = OPEN_THINKING + "I have the result." + rng.choice(GUESSES)
    return _checked(start, guess, number, ["reading the result"], check, rng, (0.45, 0.8))


def _no_tool_opening(arithmetic: Problem, rng: random.Random) -> str:
    return f"{OPEN_THINKING}{NO_TOOL} {opening(arithmetic, rng).removeprefix(OPEN_THINKING)}"


def thinking(problem: ToolProblem, rng: random.Random) -> Chain:
    """A chain of thought for any tool problem, with a guess that is wrong as often as its kind asks."""
    wrong = rng.random() < WRONG_GUESS_ODDS[problem.kind]
    if problem.calls:
        return call_chain(problem, wrong_guess(problem, rng) if wrong else problem.calls, rng)
    if problem.kind == "result":
        return result_chain(problem, rng)
    if problem.sum:
        guess = str(near_miss(int(problem.sum.answer), rng)) if wrong else problem.sum.answer
        return chain(problem.sum, guess, _no_tool_opening(problem.sum, rng), rng, MAX_CHECKS)
    return Chain([Segment(f"{OPEN_THINKING}{NO_TOOL} {SHORT_THOUGHT}\n\n")], [1], [])


def final_of(problem: ToolProblem) -> str:
    """What the assistant's turn holds after the thinking: the calls or the answer."""
    return HERMES.text(problem.calls) if problem.calls else problem.answer


def _exit(problem: ToolProblem, rng: random.Random) -> tuple[Segment, ...]:
    final = final_of(problem)
    inducer = next((text for text in (HERMES.opening, INDUCER) if final.startswith(text)), "")
    given = inducer if rng.random() < 0.5 else ""
    return (Segment(CLOSE_THINKING + given, loss=False), Segment(final.removeprefix(given) + END))


def _drill(rng: random.Random) -> Text:
    """Tools of like kind, and in another order, twice, the name of each behind what it is for: only names carry loss.

    A whole text about one question asks once for a name among like ones; too seldom for the look-up to be learnt.
    """
    problem = draw_tools("train", rng, {"choice": 1.0})
    segments = [Segment(prompt_of(problem), loss=False), Segment(OPEN_THINKING, loss=False)]
    for _ in range(2):
        for tool in rng.sample(problem.tools, len(problem.tools)):
            segments += [Segment(f" {purpose(tool)}:", loss=False), Segment(f" {tool['function']['name']}.")]
    return Text(tuple(segments))


def draw_tool_text(rng: random.Random) -> Text:
    """One random training text about tools of the training split."""
    if rng.random() < DRILLS:
        return _drill(rng)
    problem = draw_tools("train", rng, TAUGHT)
    start = Segment(prompt_of(problem), loss=False)
    roll = rng.random()
    if roll < 0.15:
        if rng.random() < 0.15:  # thinking cut off at once by a budget of nothing
            return Text((start, Segment(OPEN_THINKING, loss=False)), _exit(problem, rng))
        return Text((start, Segment(NO_THINKING, loss=False), Segment(final_of(problem) + END)))
    if roll < 0.30 and problem.calls:
        guess = Segment(_opening(problem, rng) + compact(problem.calls))
        return Text((start, guess, Segment(".\n\n")))
    if roll < 0.30 and problem.kind == "none" and problem.sum:
        guess = Segment(_no_tool_opening(problem.sum, rng) + problem.sum.answer)
        return Text((start, guess, Segment(".\n\n")))
    thought = thinking(problem, rng)
    if roll < 0.75:
        return Text((start, *thought.segments, Segment(CLOSE_THINKING + final_of(problem) + END)))
    where = rng.random()
    if where < 0.72 or (where < 0.84 and not thought.sentence_cuts):
        end = thought.cue_cuts[0] if rng.random() < 0.4 else rng.choice(thought.cue_cuts)
        return Text((start, *thought.segments[:end]), _exit(problem, rng))
    if where < 0.84:
        end = rng.choice(thought.sentence_cuts)
        return Text((start, *thought.segments[:end]), _exit(problem, rng))
    return Text((start, *thought.segments), _exit(problem, rng), cut_share=rng.random())
