"""One call of a reasoning model as a graph node: what it may spend is read from state, what it spent is written back.

Nothing here sums or splits: that is `ledger`, `parts` and `budgets`. A node keeps nothing between calls, so one model
may serve any number of graphs at once; that calls which run at once do not take the same tokens is seen to in `claims`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, Final

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, AnyMessage, BaseMessage, HumanMessage, RemoveMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.config import merge_configs
from langchain_core.runnables.configurable import DynamicRunnable
from langgraph.config import get_stream_writer
from langgraph.graph.message import add_messages
from langgraph.types import interrupt
from typing_extensions import TypedDict

from langchain_earlyexit.chat_models import ChatEarlyExit
from langchain_earlyexit.claims import Claim, Claims, holds
from langchain_earlyexit.ledger import (
    Budget,
    Ledger,
    Risk,
    Spend,
    allowance,
    check_budget,
    check_risk,
    merge_ledgers,
    opened,
    pace_of,
    remaining,
    risk_of,
)
from langchain_earlyexit.parts import known_as, part_of, part_of_risk
from langchain_earlyexit.places import around_of, place_of
from langchain_earlyexit.policies import Never
from langchain_earlyexit.promises import CALIBRATION_KEY
from langchain_earlyexit.record import KEY, from_cache
from langchain_earlyexit.settings import BUDGET_NAMES, Settings, as_policy

_CLAIMS: Final = Claims()

State = Any
"""A graph's state, a mapping. LangGraph's types let no node be written for any mapping whatever."""


class ReasoningState(TypedDict, total=False):
    """A conversation, what its thinking may cost, and what it has cost.

    Attributes:
        messages: the conversation.
        budget: thinking tokens of the run; none: the model's own cap, if it has one.
        risk: chance of a change that the run's early exits may take; none: the model's own policy decides.
        ledger: one entry for each call; no branch's is lost, and none counts twice.
        step: whose turn it is, where one node serves many steps.
    """

    messages: Annotated[list[AnyMessage], add_messages]
    budget: Budget
    risk: Risk
    ledger: Annotated[Ledger, merge_ledgers]
    step: str


@dataclass(frozen=True)
class _Asked:
    """A call before it is made: its prompt and keywords, its entry as far as it is known, and what it may take."""

    prompt: LanguageModelInput
    keywords: dict[str, Any]
    spend: Spend
    replaced: list[BaseMessage]
    ledger: Ledger
    claim: AbstractContextManager[Claim]


def reasoning_node(
    model: Runnable[LanguageModelInput, AIMessage],
    *,
    name: str = "think",
    share: float = 1.0,
    most: int | None = None,
    may_cut: bool = True,
    reads: Callable[[State], LanguageModelInput] | None = None,
    writes: Callable[[AIMessage, State], Mapping[str, Any]] | None = None,
    keywords: Callable[[State], Mapping[str, Any]] | None = None,
    replaces: Collection[str] = (),
) -> Runnable[State, dict[str, Any]]:
    """A node, for sync and async graphs alike, that asks `model` once.

    The cap on its thinking is what `state["budget"]` allows its step (times `share`, and at most `most` and the
    model's own), and its `confidence` is 1 - the risk that `state["risk"]` allows; a step without any is never cut, nor
    is one that has less than the calibration certifies. The call's entry goes to `state["ledger"]`. A call that fails
    writes nothing, so a retried step counts once; what was spent before `writes` failed is written by the next attempt
    in the same process. That is so for the retries of this node: a retry of a graph that it stands in begins that graph
    anew, and loses what it had spent. So a retry policy belongs on this node, not on a node that is a graph. Nodes of
    one superstep do not see each other's spend: those that could together take more than is left are refused, unless
    weights, shares or `branches` tell them apart. In a graph that is a node of another, a step that the budget or the
    risk does not name counts as a part of that node's step. Custom stream events `early_exit.step` (what it may spend)
    and `early_exit.spent` (its entry) go out.

    Args:
        model: a `ChatEarlyExit`, or one with keywords, tools, a configuration or retries bound to it.
        name: of the node; also its step's, where the state has no `step`.
        share: part of the step's allowance that this call may take, in (0, 1]; less leaves some for a second try.
        most: cap on the call's thinking tokens, whatever the budget.
        may_cut: False for a step that no policy may end, such as one before a tool call that cannot be undone. Caps
            hold all the same: where they must not either, keep the budget out of the state that the node gets.
        reads: the prompt; when None `state["messages"]`, but for an earlier try of this step at their end.
        writes: what an answer, and the state it was asked in, add to the state; when None the answer goes to
            `messages`, where it takes the place of an earlier try of this step at their end.
        keywords: further keywords of the call, such as a `seed`; what the budget and the risk say comes before theirs.
        replaces: nodes whose last answer counts as an earlier try.

    Raises:
        TypeError: no such model.
        ValueError: a share or cap that cannot be. When it runs: a risk, and a model without a calibration; a budget
            or risk without a ledger, or without a weight for this step; steps that run at once and could take more
            than is left.
    """
    chat, bound = chat_of(model)
    if not 0 < share <= 1:
        raise ValueError(f"share is the part of the allowance that a call may take, in (0, 1], not {share}")
    if most is not None and most < 0:
        raise ValueError(f"most is a cap of at least 0 thinking tokens, or None, not {most}")
    # What cannot be meant would only be refused at the first call.
    chat.call_settings(**{**bound, "thinking_budget": 0, "reasoning_effort": None})
    tries = {name, *replaces}

    def given(state: State, config: RunnableConfig) -> _Asked:
        chat, bound = chat_of(model, config)
        step = state.get("step") or name
        ledger = with_lost(_ledger(state), config)
        around, budget, risk = limits_of(step, state, config, ledger)
        asked: dict[str, Any] = {}
        more = dict(keywords(state)) if keywords else {}
        caps = [] if most is None else [most]
        if budget is not None:
            caps.append(int(allowance(step, budget, ledger) * share))
        said = {**bound, **more}
        own = chat.call_settings(**said).budget
        if own is not None:
            caps.append(own)
        if caps:
            asked |= chat.capped(min(caps), **said)
        earlier = None if writes else _earlier_try(state, step, tries)
        again = earlier is not None and ledger[earlier[0]]["node"] == name
        # What a policy once gave up on, it would give up on again; and one that is told never to leave keeps to that.
        free = may_cut and not again and as_policy(said.get("exit_policy")) != Never()
        epsilon, heuristic = 0.0, False
        if risk is not None and free:
            epsilon, heuristic = risk_of(step, risk, ledger)
        if epsilon > 0 and not chat.serves(1 - epsilon):
            epsilon = 0.0  # so strict that nothing is certified for it: full thinking keeps to it too
        if epsilon > 0:
            asked |= {"confidence": 1 - epsilon, "exit_policy": None}  # a bound one would be a second word for it
        elif risk is not None or not free:
            asked |= {"confidence": None, "exit_policy": "never"}
        replaced = [] if earlier is None else [earlier[1]]
        prompt = reads(state) if reads else state["messages"][: len(state["messages"]) - len(replaced)]
        spend = opened(
            step, budget, risk, within="|".join(around), node=name, turn=turn_of(state), model=chat.model,
            cap=min(caps) if caps else None, epsilon=epsilon, heuristic=heuristic,
        )  # fmt: skip
        if earlier is not None and again and not reads and not keywords:
            spend["retry_of"] = earlier[0]
        tell_step(spend, budget, ledger, None if budget is None else remaining(budget, ledger))
        capped = {*BUDGET_NAMES, "reasoning_effort"} if "thinking_budget" in asked else set()
        asked = {**{name: value for name, value in more.items() if name not in capped}, **asked}
        return _Asked(prompt, asked, spend, replaced, ledger, claimed(spend, budget, risk, ledger, config))

    def taken(state: State, message: AIMessage, asked: _Asked, claim: Claim) -> dict[str, Any]:
        if f"{asked.spend['step']}/{message.id}" in asked.ledger:
            # A cache told this step's own earlier answer again, id and all: it is another try all the same.
            message = message.model_copy(update={"id": str(uuid.uuid4())})
        spend, key = closed(asked.spend, message), f"{asked.spend['step']}/{message.id}"
        claim.spent(key, spend)
        tell({"event": "early_exit.spent", **spend})
        removed = [RemoveMessage(id=str(old.id)) for old in asked.replaced]
        added = dict(writes(message, state)) if writes else {"messages": [*removed, message]}
        return {**added, "ledger": {**claim.lost, key: spend}}

    def think(state: State, config: RunnableConfig) -> dict[str, Any]:
        asked = given(state, config)
        with asked.claim as claim:
            message = model.invoke(asked.prompt, told_of(asked.spend, config), **asked.keywords)
            return taken(state, message, asked, claim)

    async def athink(state: State, config: RunnableConfig) -> dict[str, Any]:
        chat = chat_of(model, config)[0]
        if chat.calibration is not None or "risk" in state or "risk" in state.get("reasoning_part", ()):
            await asyncio.to_thread(chat.load_calibration)  # a file: not to be read in the loop
        asked = given(state, config)
        with asked.claim as claim:
            message = await model.ainvoke(asked.prompt, told_of(asked.spend, config), **asked.keywords)
            return taken(state, message, asked, claim)

    return RunnableLambda(think, athink, name=name)


def ask_human(name: str = "human") -> Runnable[State, dict[str, Any]]:
    """A node that shows the last answer to a person, by `interrupt`, and goes on with their word.

    The interrupt's value has `question`, `answer` and `exit` (the record; None where another package's model
    answered). Resume with True to keep the answer, or with the text of another; its message then says
    `corrected_by: human` in its response metadata. The graph needs a checkpointer.

    Raises:
        TypeError: resumed with something else.
        ValueError: the last message is no answer.
    """

    def ask(state: State) -> dict[str, Any]:
        doubted = next(reversed(state["messages"]), None)
        if not isinstance(doubted, AIMessage):
            found = "there is no message" if doubted is None else f"the last message is of type {doubted.type!r}"
            raise ValueError(f"ask_human shows a model's answer to a person, but {found}: put it after a model's node")
        record = doubted.response_metadata.get(KEY)
        exit_ = None if record is None else _without_trace(record)
        said = interrupt({"question": question_of(state), "answer": doubted.text, "exit": exit_})
        if said is True:
            return {"messages": []}
        if not isinstance(said, str) or not said:
            raise TypeError(f"resume with True to keep the answer, or with the text of another; got {said!r}")
        metadata = {**doubted.response_metadata, "corrected_by": "human"}
        corrected = doubted.model_copy(update={"content": said, "response_metadata": metadata})
        return {"messages": [corrected]}

    return RunnableLambda(ask, name=name)


def settings_of(model: Runnable[LanguageModelInput, AIMessage]) -> Settings:
    """The settings of a call to `model`, with what is bound to it."""
    chat, bound = chat_of(model)
    return chat.call_settings(**bound)


def turn_of(state: State) -> str:
    """Id of the conversation's last human message, "" where there is none."""
    asked = [message.id for message in state.get("messages", ()) if isinstance(message, HumanMessage)]
    return str(asked[-1]) if asked else ""


def question_of(state: State) -> str:
    """Text of the conversation's last human message.

    Raises:
        ValueError: there is none.
    """
    for message in reversed(state.get("messages", ())):
        if isinstance(message, HumanMessage):
            return message.text
    raise ValueError("the graph answers the last human message, and the state's messages have none")


def chat_of(model: Any, config: RunnableConfig | None = None) -> tuple[ChatEarlyExit, dict[str, Any]]:
    """The chat model that a call with this configuration comes to, and the keywords bound to it."""
    under, bound, _ = unwrapped(model, config)
    if not isinstance(under, ChatEarlyExit):
        raise TypeError(
            f"a reasoning node sets thinking_budget and confidence, which only ChatEarlyExit (or one with keywords "
            f"or tools bound to it) has; got {type(under).__name__}"
        )
    return under, bound


def unwrapped(model: Any, config: RunnableConfig | None = None) -> tuple[Any, dict[str, Any], RunnableConfig]:
    """What a call of `model` with this configuration comes to in the end; the keywords and configuration it gets."""
    bound: dict[str, Any] = {}
    while not isinstance(model, ChatEarlyExit):
        if isinstance(model, RunnableBindingBase):
            bound = {**model.kwargs, **bound}
            config = merge_configs(model.config, config)
            model = model.bound
        elif isinstance(model, DynamicRunnable):
            model, config = model.prepare(config)
        else:
            break
    return model, bound, config or {}


def _ledger(state: State) -> Ledger:
    if "ledger" in state:
        found: Ledger = state["ledger"]
        return found
    if "budget" in state or "risk" in state:
        raise ValueError(
            "the state has a budget or a risk, but no ledger, so what is spent would be lost: give the graph's state "
            "`ledger: Annotated[Ledger, merge_ledgers]` (ReasoningState has it), and a Send what `branches` makes"
        )
    return {}


def limits_of(
    step: str, state: State, config: RunnableConfig, ledger: Ledger
) -> tuple[list[str], Budget | None, Risk | None]:
    """The steps around a step, and what budget and risk it shares with others."""
    part = state.get("reasoning_part")
    if part is not None:  # in a ready graph
        return part["around"], part.get("budget", state.get("budget")), part.get("risk", state.get("risk"))
    around = around_of(config)
    budget: Budget | None = state.get("budget")
    risk: Risk | None = state.get("risk")
    if budget is not None and (known := known_as(step, around, check_budget(budget))) != step:
        budget = part_of(known, budget, ledger)
    if risk is not None and (known := known_as(step, around, check_risk(risk))) != step:
        risk = part_of_risk(known, risk, ledger)
    return around, budget, risk


def with_lost(ledger: Ledger, config: RunnableConfig) -> Ledger:
    """A ledger as a node sees it, and what earlier attempts of this node spent before they failed."""
    return merge_ledgers(ledger, _CLAIMS.lost(place_of(config)))


def claimed(
    spend: Spend, budget: Budget | None, risk: Risk | None, ledger: Ledger, config: RunnableConfig
) -> AbstractContextManager[Claim]:
    """To be held while a call runs, so that no other that runs beside it takes the same (see `claims`)."""
    held = holds(spend["step"], budget, spend["cap"], risk, spend["epsilon"], ledger)
    return _CLAIMS.claimed("|".join(filter(None, (spend["within"], spend["step"]))), place_of(config), held, ledger)


def _earlier_try(state: State, step: str, nodes: Collection[str]) -> tuple[str, BaseMessage] | None:
    """The last message and the key of its entry, where one of `nodes` wrote it for this step."""
    last = state.get("messages", [])[-1:]
    if not last or not isinstance(last[0], AIMessage):
        return None
    for key, entry in state.get("ledger", {}).items():
        # A node that was given no step is a step of its own name.
        if key.endswith(f"/{last[0].id}") and entry["node"] in nodes and entry["step"] in (step, entry["node"]):
            return key, last[0]
    return None


def closed(spend: Spend, message: AIMessage) -> Spend:
    """The entry of a finished call."""
    record = message.response_metadata[KEY]
    usage = message.usage_metadata
    closed: Spend = {**spend, "confidence": _confidence(record), "exit": _without_trace(record)}
    if CALIBRATION_KEY in message.response_metadata:
        closed["calibration"] = message.response_metadata[CALIBRATION_KEY]
    if usage is None or from_cache(message):
        return closed
    reasoning = usage.get("output_token_details", {}).get("reasoning", 0)
    return {**closed, "thinking": record["thinking_tokens"], "reasoning": reasoning}


def _confidence(record: Mapping[str, Any]) -> float | None:
    """The last probability that was measured for the answer: at the exit, or at the last look of a recorded trace."""
    if record["reason"] in {"confident", "sufficient"}:
        return None if record["score"] is None else float(record["score"])
    for check in reversed(record.get("trace", {}).get("checks", ())):
        for signal in ("trial_confidence", "p_safe"):
            found = check["signals"].get(signal)
            if isinstance(found, float):
                return found
    return None


def _without_trace(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "trace"}


def told_of(spend: Spend, config: RunnableConfig) -> RunnableConfig:
    """`config` for the model's run, whose metadata then says which step it is and what it may think at most."""
    told = {"early_exit_step": spend["step"]} | ({} if spend["cap"] is None else {"early_exit_cap": spend["cap"]})
    return {**config, "metadata": {**(config.get("metadata") or {}), **told}}


def tell_step(spend: Spend, budget: Budget | None, ledger: Ledger, left: int | None) -> None:
    """Tell what a call may spend before it begins, what is left of its budget, and whether the run keeps to its pace.

    Args:
        spend: its entry so far.
        budget: of the run, None without.
        ledger: of the run.
        left: tokens that are left, None without any cap.
    """
    told: dict[str, Any] = {key: spend[key] for key in ("step", "node", "cap", "epsilon")}
    if left is not None:
        told["remaining"] = left
    if budget is not None and (rate := pace_of(spend["step"], budget, ledger)) is not None:
        told["pace"] = rate
    tell({"event": "early_exit.step", **told})


def tell(event: dict[str, Any]) -> None:
    """Write to the graph's custom stream, where there is one."""
    try:
        write = get_stream_writer()
    except (RuntimeError, KeyError):
        return  # called outside a graph, where there is no stream to write to
    write(event)
