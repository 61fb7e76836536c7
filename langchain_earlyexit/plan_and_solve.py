"""A plan of numbered steps, each step solved with a budget of its own, and an answer made of the results.

Plan-and-solve: arXiv 2305.04091; budgets that fall over the steps of a plan: arXiv 2505.16122.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, SystemMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Checkpointer, Overwrite, Send

from langchain_earlyexit.answers import BOXED
from langchain_earlyexit.budgets import RISK_WEIGHTS, TOKEN_WEIGHTS, decay
from langchain_earlyexit.cascade import Answered
from langchain_earlyexit.families import find_family
from langchain_earlyexit.limits import Limits, PartState
from langchain_earlyexit.node import ReasoningState, State, chat_of, question_of, reasoning_node, settings_of
from langchain_earlyexit.parts import branches
from langchain_earlyexit.places import standing_in

Model = Runnable[LanguageModelInput, AIMessage]

PLANNER_PROMPT: Final = "Split the problem into numbered steps."
"""What the bundled model has learned to plan by."""

FULL_PLANNER_PROMPT: Final = (
    "Split the problem into at most {max_steps} numbered steps, one a line, as in `1. ...`, and write nothing else. "
    "Each step is solved by somebody who sees that line alone: put all its numbers and facts into it. Write #k for the "
    "result of step k."
)

STEP_REQUEST: Final = "\n\nGive the result alone, in as few words as it takes, within \\boxed{}."
"""What stands below each step, for models that have not learned to answer so."""

_LINE: Final = re.compile(r"\s*([0-9]{1,3})[.)]\s+(\S.*?)\s*")
_REFERENCE: Final = re.compile(r"#([0-9]{1,3})(?![0-9])")
_ASKING: Final = re.compile(r"^(?:what is|calculate|compute)\s+(.*?)\s*[?.]?$", re.IGNORECASE | re.DOTALL)


def parse_numbered_plan(text: str) -> list[str] | None:
    """The steps of `1. ...`, `2. ...`, one a line, in which `#k` stands for the result of an earlier step k.

    Lines before the first step and empty lines are passed over. None for a text that is no such plan: no step, a wrong
    number, text after a step that is not the next one, or a reference to no earlier step.
    """
    steps: list[str] = []
    for line in text.splitlines():
        found = _LINE.fullmatch(line)
        if not found:
            if line.strip() and steps:
                return None
            continue
        if int(found[1]) != len(steps) + 1:
            return None
        steps.append(found[2])
    return steps if steps and _grounded(steps) else None


def compose_results(question: str, steps: Sequence[str], results: Sequence[str]) -> str:
    """The last prompt: the question, and what each step, its references filled in, came to."""
    said = [_ASKING.sub(r"\1", step) for step in steps]
    pairs = zip(said, results, strict=True)
    solved = "\n".join(f"Step {i}: {step} = {result}" for i, (step, result) in enumerate(pairs, 1))
    return f"{question}\n\n{solved}\n\nWhat is the answer?"


def result_in(message: AIMessage) -> str:
    """The result that a step's answer gives to later steps: what is boxed in it, or its text."""
    return BOXED.extract(message.text) or message.text.strip()


class _Plan(PartState, total=False):
    plan: list[str]
    results: Annotated[dict[str, str], operator.or_]
    work: Annotated[list[AnyMessage], add_messages]
    question: str


class _Solved(Answered):
    plan: list[str]
    results: Annotated[dict[str, str], operator.or_]
    work: Annotated[list[AnyMessage], add_messages]


def create_plan_and_solve(
    model: Model,
    *,
    planner: Model | None = None,
    solver: Model | CompiledStateGraph[Any, Any, Any, Any] | None = None,
    composer: Model | None = None,
    max_steps: int = 8,
    schedule: str = "even",
    planner_prompt: str | None = None,
    parse: Callable[[str], list[str] | None] = parse_numbered_plan,
    compose: Callable[[str, Sequence[str], Sequence[str]], str] = compose_results,
    result_of: Callable[[AIMessage], str] = result_in,
    budget: int | None = None,
    epsilon: float | None = None,
    checkpointer: Checkpointer = None,
    name: str = "plan_and_solve",
) -> CompiledStateGraph[Any, Any, Any, Any]:
    """A graph over `ReasoningState` that plans, solves the steps, and answers the last human message.

    Steps whose references are solved run side by side, with shares of their own. Steps of the run are "plan",
    "step 1", "step 2", ... and "answer"; budgets and risks name them so. What is not planned (`parse` says None, or
    there are more than `max_steps`) is answered without steps; `plan` in the output is then empty. Only the answer
    joins `messages`; the plan and the steps' answers are in `work`, the results in `results`. A step is solved by a
    call that sees its own line, with the results it refers to, and nothing else.

    Args:
        model: plans, solves and composes, where no other is given for that.
        planner: writes the plan.
        solver: solves one step: a model, or a graph over `ReasoningState`, such as a cascade.
        composer: makes the answer of the results.
        max_steps: of a plan, at least 1. Risk is shared among so many steps beforehand, come they or not: shares that
            wait for the plan would depend on it.
        schedule: how the budgets of the steps fall: see `budgets.decay`.
        planner_prompt: system turn of the planner; when None `PLANNER_PROMPT` for the bundled model, which has learned
            it, and `FULL_PLANNER_PROMPT` for others, told `max_steps`.
        parse: the steps of a written plan, or None.
        compose: prompt of the composer, from question, steps (references filled in) and results.
        result_of: what a step's answer gives to later steps.
        budget: thinking tokens of one turn, where the state brings no `budget`.
        epsilon: risk of one turn, where the state brings no `risk`; needs models with calibrations.
        checkpointer: as for `StateGraph.compile`.
        name: of the graph.

    Raises:
        TypeError: a model that is no `ChatEarlyExit`.
        ValueError: a number that cannot be, or an epsilon and no calibration.
    """
    if max_steps < 1:
        raise ValueError(f"a plan has at least one step, got max_steps={max_steps}")
    planner, solver, composer = planner or model, solver or model, composer or model
    learned = find_family(chat_of(planner)[0].model).name == "pocket"
    request = "" if learned else STEP_REQUEST
    if planner_prompt is None:
        planner_prompt = PLANNER_PROMPT if learned else FULL_PLANNER_PROMPT.format(max_steps=max_steps)
    longest = _weights(max_steps, schedule)
    risky = {step: RISK_WEIGHTS[_kind(step)] for step in longest}
    limits = Limits(name, budget, longest, epsilon, risky)
    limits.check(planner, composer, *([] if isinstance(solver, CompiledStateGraph) else [solver]))

    def begin(state: State, config: RunnableConfig) -> dict[str, Any]:
        return {
            **limits.begin(state, config), "question": question_of(state), "plan": [],
            "results": Overwrite({}), "work": Overwrite([]),
        }  # fmt: skip

    def planned(message: AIMessage, state: State) -> dict[str, Any]:
        steps = parse(message.text) or []
        if len(steps) > max_steps or not _grounded(steps):
            steps = []
        told: dict[str, Any] = {"plan": steps, "work": [message]}
        part = state["reasoning_part"]
        if part.get("budget", {}).get("weights") == longest:
            # Steps that do not come leave their tokens to those that do.
            budget = {**part["budget"], "weights": _weights(len(steps), schedule)}
            told["reasoning_part"] = {**part, "budget": budget}
        return told

    def fan_out(state: State) -> list[Send] | str:
        ready = [
            i for i, step in enumerate(state["plan"], 1)
            if str(i) not in state["results"] and all(str(k) in state["results"] for k in _needs(step))
        ]  # fmt: skip
        if not ready:
            return "answer"
        part = state["reasoning_part"]
        told = branches([f"step {i}" for i in ready], part.get("budget"), part.get("risk"), state["ledger"])
        around = {"reasoning_part": {"around": part["around"]}}
        return [
            Send("step", {**one, **around, "question": _filled(state["plan"][i - 1], state["results"]) + request})
            for i, one in zip(ready, told, strict=True)
        ]

    def solved(message: AIMessage, state: State) -> dict[str, Any]:
        return {"results": {state["step"].removeprefix("step "): result_of(message)}, "work": [message]}

    def last_prompt(state: State) -> LanguageModelInput:
        if not state["plan"]:
            return [HumanMessage(state["question"])]
        steps = [_filled(step, state["results"]) for step in state["plan"]]
        results = [state["results"][str(i)] for i in range(1, len(steps) + 1)]
        return [HumanMessage(compose(state["question"], steps, results))]

    # A plan is no answer to be boxed, whatever the model's habit.
    form = {"answer_form": "text"} if settings_of(planner).answer_form == "auto" else {}
    builder = StateGraph(_Plan, input_schema=ReasoningState, output_schema=_Solved)
    builder.add_node("begin", begin)
    builder.add_node(
        "plan",
        reasoning_node(
            planner,
            name="plan",
            reads=lambda state: [SystemMessage(planner_prompt), HumanMessage(state["question"])],
            writes=planned,
            keywords=lambda state: form,
        ),
    )
    builder.add_node("step", _step(solver, solved))
    builder.add_node("gather", lambda state: {"plan": state["plan"]})
    builder.add_node("answer", reasoning_node(composer, name="answer", reads=last_prompt, writes=_answer))
    builder.add_edge(START, "begin")
    builder.add_edge("begin", "plan")
    builder.add_conditional_edges("plan", fan_out, ["step", "answer"])
    builder.add_edge("step", "gather")
    builder.add_conditional_edges("gather", fan_out, ["step", "answer"])
    builder.add_edge("answer", END)
    return builder.compile(checkpointer=checkpointer, name=name)


def _step(
    solver: Model | CompiledStateGraph[Any, Any, Any, Any],
    solved: Callable[[AIMessage, State], Mapping[str, Any]],
) -> Runnable[State, dict[str, Any]]:
    """The node that solves one step."""
    if not isinstance(solver, CompiledStateGraph):
        return reasoning_node(solver, name="step", reads=lambda state: [HumanMessage(state["question"])], writes=solved)
    graph = solver

    def given(state: State) -> dict[str, Any]:
        return {
            **{key: state[key] for key in state if key not in {"question", "reasoning_part"}},
            "messages": [HumanMessage(state["question"])],
        }

    def taken(state: State, done: Mapping[str, Any]) -> dict[str, Any]:
        return {**solved(done["messages"][-1], state), "ledger": done["ledger"]}

    def within(state: State, config: RunnableConfig) -> RunnableConfig:
        return standing_in([*state["reasoning_part"]["around"], state["step"]], config)

    def solve(state: State, config: RunnableConfig) -> dict[str, Any]:
        return taken(state, graph.invoke(given(state), within(state, config)))

    async def asolve(state: State, config: RunnableConfig) -> dict[str, Any]:
        return taken(state, await graph.ainvoke(given(state), within(state, config)))

    return RunnableLambda(solve, asolve, name="step")


def _answer(message: AIMessage, state: State) -> dict[str, Any]:
    return {"messages": [message]}


def _weights(steps: int, schedule: str) -> dict[str, float]:
    middle = decay(steps, schedule) if steps else ()
    fallen = {f"step {i}": weight / middle[0] for i, weight in enumerate(middle, 1)}
    shares = {"plan": 1.0, **fallen, "answer": 1.0}
    return {step: weight * TOKEN_WEIGHTS[_kind(step)] for step, weight in shares.items()}


def _kind(step: str) -> str:
    return {"plan": "planning", "answer": "final"}.get(step, "routine")


def _needs(step: str) -> list[int]:
    return [int(number) for number in _REFERENCE.findall(step)]


def _grounded(steps: Sequence[str]) -> bool:
    """Whether every reference is to an earlier step."""
    return all(0 < number <= done for done, step in enumerate(steps) for number in _needs(step))


def _filled(step: str, results: Mapping[str, str]) -> str:
    return _REFERENCE.sub(lambda found: results[str(int(found[1]))], step)
